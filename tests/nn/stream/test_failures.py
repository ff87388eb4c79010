"""Exceptions anywhere in a pass leave no trace; engines leave no thread and no file behind."""

from __future__ import annotations

import threading

import pytest
import torch

from lib.core.errors import EnvError, UserError
from lib.core.run_settings import Runtime
from lib.nn.stream import memory
from lib.nn.stream.execute import InOrder, Lanes
from tests.nn.stream.models import gradients, ids, losses_of, make

CPU = torch.device("cpu")


class Boom(InOrder):
    """Raises in front of operation number `at`, once."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error, self.seen = at, error, 0

    def start(self, ops, act):
        def watched(op):
            self.seen += 1
            if self.seen == self.at + 1:
                raise self.error
            act(op)

        super().start(ops, watched)


class BoomLanes(Lanes):
    """The same on threads: the error may come up on any of them."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__(CPU)
        self.at, self.error, self.seen, self.lock = at, error, 0, threading.Lock()

    def start(self, ops, act):
        def watched(op):
            with self.lock:
                self.seen += 1
                due = self.seen == self.at + 1
            if due:
                raise self.error
            act(op)

        super().start(ops, watched)


def undisturbed():
    model = make(config={"dropout": 0.1})
    losses = losses_of(model, ids(4), 4)
    return losses, gradients(model)


@pytest.mark.parametrize("executor", [Boom, BoomLanes])
def test_an_exception_at_any_operation_leaves_no_trace(executor):
    """The step after it equals the step of a run in which it never happened (9.4)."""
    before = set(threading.enumerate())  # another test's may end at any time, or not yet
    losses, wanted = undisturbed()
    count = len(make().engine._plan("pass", 2).ops)
    for at in range(count):
        boom = executor(at, torch.OutOfMemoryError("CUDA out of memory, in a test"))
        model = make(executor=boom, config={"dropout": 0.1})
        with pytest.raises(torch.OutOfMemoryError, match="in a test"):
            losses_of(model, ids(4, seed=9), 4)
        assert not gradients(model), f"gradients of half a pass stay, operation {at}"
        again = losses_of(model, ids(4), 4)
        found = gradients(model)
        assert torch.equal(again[0], losses[0])
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), f"operation {at}"
        model.close()
    assert set(threading.enumerate()) <= before


def test_ctrl_c_is_an_exception_like_any_other():
    losses, wanted = undisturbed()
    model = make(executor=Boom(9, KeyboardInterrupt()), config={"dropout": 0.1})
    with pytest.raises(KeyboardInterrupt):
        losses_of(model, ids(4), 4)
    assert torch.equal(losses_of(model, ids(4), 4)[0], losses[0])
    assert all(torch.equal(gradients(model)[n], wanted[n]) for n in wanted)


def test_an_error_in_the_users_block_comes_out_as_it_is():
    """Resident and streamed raise the same; parameters are back in their modules."""
    model = make()
    block = model.blocks[1]
    block.forward = lambda *_: (_ for _ in ()).throw(ZeroDivisionError("in the block"))
    with pytest.raises(ZeroDivisionError, match="in the block"):
        losses_of(model, ids(2), 2)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(ids(2)[:, :-1])
    assert all(isinstance(p, torch.nn.Parameter) for m in model.modules() for p in
               m._parameters.values() if p is not None)  # fmt: skip
    del block.forward
    a, b = losses_of(model, ids(2), 2), losses_of(make(), ids(2), 2)
    assert torch.equal(a[0], b[0])


def test_a_pass_that_another_replaced_has_no_backward():
    from lib.train.job import Batch

    model, tokens = make(), ids(2)
    batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], step=0)
    first, second = (next(iter(model.losses(batch))) for _ in range(2))
    with pytest.raises(RuntimeError, match="replaced"):
        first.backward()
    second.backward()
    with pytest.raises(RuntimeError):
        second.backward()


def test_twenty_engines_leave_no_thread():
    before = set(threading.enumerate())
    for _ in range(20):
        model = make(executor=Lanes(CPU))
        losses_of(model, ids(2), 2)
        model.close()
    assert set(threading.enumerate()) <= before


def test_an_update_that_fails_is_told_at_the_next_use():
    model = make()

    def bad():
        raise ValueError("in the optimizer")

    model.run_updates([(list(dict(model.named_parameters())), bad)])
    with pytest.raises(ValueError, match="in the optimizer"):
        model.state_dict()
    model.close()


# ---------------------------------------------------------------- asked for and not to be had


def test_too_little_memory_is_an_error_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_ram", lambda: 1000)
    monkeypatch.setattr("lib.nn.stream.decide.available_ram", lambda: 1000)
    with pytest.raises(EnvError, match=r"needs .* GB more.*free"):
        make()


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ({"shard": "fsdp"}, "runtime.shard is fsdp"),
        ({"compile": True}, "runtime.compile is true"),
    ],
)
def test_what_streaming_excludes_is_refused(runtime, said):
    with pytest.raises(UserError, match=said):
        make(**runtime)


def test_blocks_with_more_than_one_input_are_refused_by_name():
    with pytest.raises(UserError, match="resid_mix"):
        make("gpt", config={"variant": "modern", "heads": 2})


def test_a_family_that_does_not_stream_says_so():
    from lib.nn.stream import Streaming, open_stream
    from tests.train.tiny import make_model

    asked = Streaming(runtime=Runtime(stream="on"), context=6)
    with pytest.raises(UserError, match="does not stream"):
        open_stream(make_model(), CPU, torch.float32, asked)
    off = Streaming(runtime=Runtime(), context=6)
    assert open_stream(make_model(), CPU, torch.float32, off) is None


def test_auto_never_refuses_what_it_was_not_asked_for(monkeypatch):
    """A run that cannot stream and did not ask to is resident, on whatever device it is."""
    from lib.nn.stream import Streaming, open_stream

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1e6, 1e6))
    resident = make("gpt", stream=False, config={"variant": "modern", "heads": 2})
    fits = make(stream=False)
    for device in ("cuda", "mps", "cpu"):
        for model, options in (
            (resident, {}),
            (fits, {"compile": True}),
            (fits, {"shard": "fsdp"}),
        ):
            asked = Streaming(runtime=Runtime(**options), context=12)
            assert open_stream(model, torch.device(device), torch.float32, asked) is None
    with pytest.raises(
        EnvError, match="does not fit the device"
    ):  # it would stream, were it larger
        asked = Streaming(runtime=Runtime(), context=12)
        open_stream(fits, torch.device("cuda"), torch.float32, asked)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8e9, 8e9))
    assert open_stream(fits, torch.device("cuda"), torch.float32, asked) is None
    assert "stream: off | resident needs" in fits.engine_notes()[0]


def test_a_model_that_reads_streams_only_where_its_weights_do_not_fit(monkeypatch):
    """16 B a parameter are for training; here weights, cache and one block's work count."""
    from lib import nn

    model = make(stream=False, config={"depth": 48, "width": 64})
    parameters = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(nn.stream, "Engine", lambda *_: "engine")
    for bytes_each, wanted in ((5.0, None), (3.5, "engine")):
        free = (0.5e9 + bytes_each * parameters) / 0.9  # a tenth of the device stays free
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        found = nn.stream.for_reading("auto")(model, torch.device("cuda"), torch.float32)
        assert found == wanted, model.stream_reason
    assert not any(p.requires_grad for p in model.parameters())


def test_a_group_that_does_not_divide_names_the_nearest():
    model = make(stream_group=5)
    with pytest.raises(UserError, match=r"5, 8 micro-batches; nearest: 4"):
        model.group_rows(2, 16)
    assert make(stream_group=4).group_rows(2, 16) == 8
    assert make(stream_group="auto").group_rows(2, 16) == 16


def test_a_pinning_that_is_refused_names_bytes_and_limit(monkeypatch):
    class Refuses:
        def cudaHostRegister(self, *_):
            return 2

    monkeypatch.setattr(memory, "_driver", Refuses)
    with pytest.raises(EnvError, match=r"4,096 bytes asked, limit .*ulimit"):
        memory.Slab(4096, pinned=True)
