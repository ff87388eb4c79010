"""The loop: resumed runs equal undisturbed ones, bad numbers stop it, knobs do what they say."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.core.errors import EnvError, InputError, Interrupted, UserError
from lib.core.run_settings import Hub
from lib.models.base import STEP, Optim
from lib.train import precision, trainer
from lib.train.checkpoint import read_tensors
from lib.train.job import Batch
from lib.train.optim import build_optimizer
from lib.train.precision import LossScaler, compute_dtype
from lib.train.schedule import make_schedule
from tests.faults.crash import in_child, tree
from tests.train.tiny import BASE, RUNTIME, Bigram, Rows, Stop, make_job, make_model, train

CLOCKED = (
    "time", "tokens_per_s", "chunk_tokens_per_s", "read_bytes_per_s", "written_bytes_per_s",
    "chunk_s", "sweep_s", "left_s",
)  # fmt: skip


def log_of(work: Path) -> list[dict]:
    """The log but for what follows the clock."""
    lines = (work / "training_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in CLOCKED} for r in records]


def snapshot(work: Path) -> tuple[dict, list]:
    return tree(work, lambda name: name.endswith("training_log.jsonl")), log_of(work)


def run(work: Path, **changes):
    outcome = train(make_job(work, **changes))
    outcome.observer.write_curves(work / "curves")
    return outcome


class Killing(Rows):
    """Kills the process when the rows of step `at` are asked for."""

    def __init__(self, at: int, **options) -> None:
        super().__init__(**options)
        self.at = at

    def prefetch(self, start, stop, rank=0, world=1):
        for step, rows in enumerate(super().prefetch(start, stop, rank, world), start=start):
            if step == self.at and stop > start + 1:  # not in the dry step
                os.kill(os.getpid(), signal.SIGKILL)
            yield rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    work = tmp_path_factory.mktemp("undisturbed")
    run(work)
    return snapshot(work)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("kills", [[1], [4], [8], [2, 5, 7]], ids=str)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, undisturbed, kills):
    """Weights, optimizer, average, random states, curves, log; epochs of 2.5 steps end inside."""
    for at in kills:
        status = in_child(lambda at=at: run(tmp_path, rows=lambda plan: Killing(at)))
        assert os.WIFSIGNALED(status)
    run(tmp_path)
    files, log = snapshot(tmp_path)
    assert log == undisturbed[1]
    assert files == undisturbed[0]


@pytest.mark.parametrize("total", [35, 36, 37], ids=["before", "at", "after"])
def test_e12_a_run_that_ends_beside_an_epoch_border_resumes_exactly(tmp_path, total):
    """9 steps of 4 rows end one row before, at, and one row after the border."""
    run(tmp_path / "whole", rows=lambda plan: Rows(total))
    in_child(lambda: run(tmp_path / "killed", rows=lambda plan: Killing(8, total=total)))
    run(tmp_path / "killed", rows=lambda plan: Rows(total))
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_a10_a_stop_commits_within_a_step_and_the_same_command_continues(tmp_path, undisturbed):
    with pytest.raises(Interrupted, match="interrupted at step 2 of 9, saved") as caught:
        run(tmp_path, stop=Stop(at=2))
    assert caught.value.code == 75
    assert (tmp_path / "step_2/manifest.json").is_file()
    run(tmp_path)
    assert snapshot(tmp_path) == undisturbed


def test_a13_a_finished_run_is_only_read(tmp_path):
    first = run(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "curves" not in p.parts}
    again = run(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert all(torch.equal(again.weights[n], t) for n, t in first.weights.items())


def test_e07_runtime_settings_change_no_byte_of_a_resumed_run(tmp_path, undisturbed):
    """Intervals of logs and checkpoints are runtime; curves and weights do not follow them."""
    other = replace(RUNTIME, log_every=5, checkpoint_every_steps=2, activation_checkpointing=True)
    in_child(lambda: run(tmp_path, rows=lambda plan: Killing(5), runtime=other))
    run(tmp_path, runtime=other)
    files, _ = snapshot(tmp_path)
    tensors = [n for n in files if n.endswith((".safetensors", ".csv"))]
    assert {n: files[n] for n in tensors} == {n: undisturbed[0][n] for n in tensors}


def test_e08_another_stack_continues_and_is_named(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=Stop(at=3))
    said: list[str] = []
    torch.set_num_threads(2)
    try:
        run(tmp_path, said=said)
    finally:
        torch.set_num_threads(1)
    assert any("threads was 1, is 2" in line for line in said)


def test_a_changed_file_of_code_is_remembered(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=Stop(at=3), extra={"code": {"a.py": "1", "b.py": "1"}})
    outcome = run(tmp_path, extra={"code": {"a.py": "2", "b.py": "1"}})
    assert outcome.position.code_changes == ["a.py"]


# ---------------------------------------------------------------- what stops it


class Poisoned(Bigram):
    """Rows that hold `poison` make the loss, or only a gradient, not finite."""

    def __init__(self, poison: str, bad_rows: torch.Tensor) -> None:
        super().__init__()
        self.poison, self.bad_rows = poison, bad_rows

    def losses(self, batch):
        bad = any(bool((row == b[:-1]).all()) for row in batch.tokens for b in self.bad_rows)
        for loss in super().losses(batch):
            if bad and self.poison == "loss":
                yield loss * float("nan")
            elif bad:
                edge = self.head.bias.sum() * 0  # sqrt has an infinite slope at 0, its value is 0
                yield loss + torch.sqrt(edge) * 1.0
            else:
                yield loss


def poisoned(poison: str) -> Poisoned:
    rows = Rows()
    number = rows.row_numbers(4)[2]  # step 5 updates, its second micro-batch of two rows
    model = Poisoned(poison, torch.from_numpy(rows.data[number : number + 1]))
    model.init_weights(0)
    return model


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_e01_a_non_finite_number_stops_before_the_update_and_is_named(tmp_path, poison):
    """One NaN through clipping would poison every weight and Adam's moments for good."""
    # The poisoned row comes once an epoch: find the first step that reads it.
    model, rows = poisoned(poison), Rows()
    number = rows.row_numbers(4)[2]
    first = next(s for s in range(9) if number in rows.row_numbers(s))
    place = rows.row_numbers(first).tolist().index(number)
    mine = " ".join(map(str, rows.row_numbers(first)[place // 2 * 2 :][:2]))
    with pytest.raises(InputError, match=f"not finite at step {first + 1}") as caught:
        run(tmp_path, model=model)
    assert caught.value.code == 3
    value = str(caught.value.value)
    assert f"micro-batch {place // 2} of rank 0, rows {mine}" in value
    assert ", the loss" in value if poison == "loss" else ", the gradient of " in value, value
    for path in tmp_path.rglob("*.safetensors"):
        held = read_tensors(path)
        assert all(bool(t.isfinite().all()) for t in held.values() if t.is_floating_point())


def test_e01_skipped_updates_are_counted_and_capped(tmp_path):
    model, rows = poisoned("loss"), Rows()
    number = rows.row_numbers(4)[2]
    bad = [s + 1 for s in range(9) if number in rows.row_numbers(s)]
    assert len(bad) >= 3
    said: list[str] = []
    allowed = replace(BASE, skip_steps=len(bad))
    outcome = run(tmp_path / "a", model=model, settings=allowed, said=said)
    assert outcome.position.skipped == len(bad)
    assert [f"update {s} is left out" in " ".join(said) for s in bad] == [True] * len(bad)
    with pytest.raises(InputError, match=f"step {bad[1]}"):
        capped = replace(BASE, skip_steps=1)
        run(tmp_path / "b", model=poisoned("loss"), settings=capped)


class Greedy(Bigram):
    def losses(self, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 EB")
        yield


def test_e02_out_of_memory_shows_in_the_dry_step_with_the_three_knobs(tmp_path):
    model = Greedy()
    model.init_weights(0)
    with pytest.raises(EnvError, match=r"device_batch_size.*context.*width") as caught:
        run(tmp_path, model=model)
    assert caught.value.code == 4
    assert not list(tmp_path.glob("step_*"))
    assert (tmp_path / "training_log.jsonl").read_bytes() == b""


def test_b02_a_disk_too_small_for_the_checkpoints_stops_before_any_work(tmp_path, monkeypatch):
    """Four at once: two kept, the best, the one being written."""
    need = 4 * (3 * 315 + 5) * 4 + 4 * 315 * 4  # weights, two moments, steps; the average
    monkeypatch.setattr("lib.core.files.free_bytes", lambda folder: need - 1)
    with pytest.raises(EnvError, match=r"disk too small.* needed") as caught:
        model = Greedy()  # whose first step fails, were it made
        model.init_weights(0)
        run(tmp_path, model=model)
    assert caught.value.code == 4
    monkeypatch.setattr("lib.core.files.free_bytes", lambda folder: 2 * need)
    run(tmp_path)


def test_a_bug_is_not_dressed_up_as_a_user_error(tmp_path):
    class Broken(Bigram):
        def losses(self, batch):
            raise RuntimeError("shapes do not match")
            yield

    model = Broken()
    model.init_weights(0)
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, model=model)


# ---------------------------------------------------------------- what the knobs do


def losses_of(work: Path) -> list[float]:
    lines = (work / "curves/loss.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[3]) for line in lines]


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_micro_batch_changes_nothing_but_rounding(tmp_path, rows):
    """Seen 2e-8 relative; bound: a few fp32 roundings."""
    plain = make_model(dropout=0.0)
    run(tmp_path / "two", model=plain)
    runtime = replace(RUNTIME, device_batch_size=rows)
    run(tmp_path / "other", model=make_model(dropout=0.0), runtime=runtime)
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "two"), rel=1e-6)


def test_the_average_follows_its_formula(tmp_path):
    """theta <- d theta + (1 - d) p, d = min(decay, (1 + t) / (10 + t)), by hand over 3 updates."""
    settings = replace(BASE, steps=3, ema_ramp=True, ema_decay=0.15, eval_every=1)
    runtime = replace(RUNTIME, checkpoint_every_steps=1)
    seen = []

    class Seen(Bigram):
        def log_scalars(self):
            seen.append(self.head.bias.detach().clone())
            return {}

    model = Seen()
    model.init_weights(0)
    shadow = model.head.bias.detach().clone()
    outcome = run(tmp_path, settings=settings, runtime=replace(runtime, log_every=1), model=model)
    for t, value in enumerate(seen):
        decay = min(0.15, (1 + t) / (10 + t))
        shadow = decay * shadow + (1 - decay) * value
    assert torch.allclose(outcome.weights["head.bias"], shadow, atol=1e-7)
    assert not torch.allclose(model.head.bias, shadow, atol=1e-4)


def test_the_global_norm_is_clipped_once_over_everything(tmp_path):
    """A clip far below the norm makes a step that follows its direction only."""
    torch.manual_seed(0)
    runs = {}
    for clip in (0.0, 1e-3):
        settings = replace(BASE, steps=1, grad_clip=clip, eps=1.0, warmup=0, weight_decay=0.0)
        model = make_model(dropout=0.0)
        before = model.head.weight.detach().clone()
        run(tmp_path / str(clip), settings=settings, model=model)
        runs[clip] = model.head.weight.detach() - before
    norm = float((tmp_path / "0.0/curves/loss.csv").read_text().split(",")[-1])
    # With eps = 1 Adam's first step is nearly proportional to the gradient.
    ratio = runs[1e-3].norm() / runs[0.0].norm()
    assert ratio.item() == pytest.approx(1e-3 / norm, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_like_fp32_and_resumes_exactly(tmp_path, dtype):
    """Losses within 1e-2 (bf16), 2e-3 (fp16) of fp32; the loss scale is in the checkpoint."""
    model = make_model(dropout=0.0)
    run(tmp_path / "fp32", model=model)
    run(tmp_path / "half", model=make_model(dropout=0.0), dtype=dtype)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert losses_of(tmp_path / "half") == pytest.approx(losses_of(tmp_path / "fp32"), rel=bound)
    assert losses_of(tmp_path / "half") != losses_of(tmp_path / "fp32")
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", stop=Stop(at=5), model=make_model(dropout=0.0), dtype=dtype)
    run(tmp_path / "stopped", model=make_model(dropout=0.0), dtype=dtype)
    assert snapshot(tmp_path / "stopped") == snapshot(tmp_path / "half")


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_while():
    scaler = LossScaler(torch.float16)
    assert scaler.scale == 65536
    assert scaler.overflowed() and scaler.scale == 32768
    for _ in range(2000):
        scaler.went_well()
    assert scaler.scale == 65536
    twin = LossScaler(torch.float16)
    twin.load(scaler.state())
    assert (twin.scale, twin.state()) == (scaler.scale, scaler.state())
    scaler.scale = 1.0
    assert not scaler.overflowed(), "below 1 the loss itself is at fault"
    assert scaler.skipped == 1, "only updates that a smaller scale would save"
    assert not LossScaler(torch.bfloat16).overflowed()


def test_twenty_overflows_in_a_row_are_not_the_scales_fault():
    """Also through a checkpoint, and at a scale of 1, which is no other run's (ramgpt.md 6.3)."""
    scaler = LossScaler(torch.float16)
    scaler.scale = 2.0**40
    assert all(scaler.overflowed() for _ in range(18))
    twin = LossScaler(torch.float16)
    twin.load(scaler.state())
    assert twin.overflowed() and not twin.overflowed() and twin.skipped == 19
    assert scaler.overflowed()
    scaler.went_well()
    assert scaler.overflowed(), "one good update begins the count anew"
    scaler.scale = 1.0
    twin.load(scaler.state())
    assert twin.scale == 1.0
    twin.load(LossScaler(torch.float32).state())
    assert twin.scale == 1.0, "a run that had no scale has none to give"


def test_an_overflowing_fp16_step_is_made_smaller_not_skipped_for_good(tmp_path):
    """A loss times 3e4 overflows at scale 65536 and is trained after a few halvings."""

    class Steep(Bigram):
        def losses(self, batch):
            for loss in super().losses(batch):
                yield loss * 100

    model = Steep(dropout=0.0)
    model.init_weights(0)
    outcome = run(tmp_path, model=model, dtype=torch.float16)
    state = json.loads((tmp_path / "step_9/state.json").read_text())
    lost = outcome.position.skipped
    assert lost > 0 and state["scaler"]["skipped"] == lost
    assert state["scaler"]["scale"] == 65536 / 2**lost
    rows = map(json.loads, (tmp_path / "training_log.jsonl").read_text().splitlines())
    last = [row for row in rows if "loss" in row][-1]
    assert (last["skipped"], last["loss_scale"]) == (lost, 65536 / 2**lost)
    assert all(math.isfinite(x) for x in losses_of(tmp_path))


def test_precision_auto_is_bf16_only_where_the_cpu_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda native=native: native)
        assert compute_dtype("auto", cpu) == dtype
    assert compute_dtype("fp32", cpu) == torch.float32
    assert compute_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "maker", "faster"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "GenuineIntel", False),
        (False, True, "AuthenticAMD", True),
        (False, False, "AuthenticAMD", False),
    ],
)
def test_a_cpu_multiplies_bf16_with_amx_or_amds_dot_product(
    monkeypatch, amx, avx512_bf16, maker, faster
):
    from lib.train import precision

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(precision, "_cpu_maker", lambda: f"vendor_id : {maker}")
    assert precision.cpu_multiplies_bf16() is faster


def test_activation_checkpointing_changes_no_bit(tmp_path, undisturbed):
    runtime = replace(RUNTIME, activation_checkpointing=True)
    run(tmp_path, runtime=runtime)
    files, log = snapshot(tmp_path)
    assert (files, log) == undisturbed


@pytest.mark.slow
def test_compiled_training_follows_eager_training(tmp_path):
    """Seen 1e-7; bound 1e-5. Slow: the compiler starts."""
    run(tmp_path / "eager", model=make_model(dropout=0.0))
    runtime = replace(RUNTIME, compile=True)
    run(tmp_path / "compiled", model=make_model(dropout=0.0), runtime=runtime)
    found, wanted = losses_of(tmp_path / "compiled"), losses_of(tmp_path / "eager")
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_step_without_losses_changes_nothing_and_counts(tmp_path):
    """A family may use its first steps to look only."""

    class Looks(Bigram):
        def losses(self, batch):
            if batch.step >= 2:
                yield from super().losses(batch)

    model = Looks(dropout=0.0)
    model.init_weights(0)
    run(tmp_path, model=model)
    steps = [line.split(",")[0] for line in (tmp_path / "curves/loss.csv").read_text().split()[1:]]
    assert steps == [str(n) for n in range(3, 10)]


def test_several_losses_add_up(tmp_path):
    """One loss in two halves gives the same gradients, and the log shows the sum."""

    class Halves(Bigram):
        def losses(self, batch):
            for share in (0.25, 0.75):
                for loss in super().losses(batch):
                    yield share * loss

    model = Halves(dropout=0.0)
    model.init_weights(0)
    run(tmp_path / "halves", model=model)
    run(tmp_path / "whole", model=make_model(dropout=0.0))
    found, wanted = losses_of(tmp_path / "halves"), losses_of(tmp_path / "whole")
    assert found == pytest.approx(wanted, rel=1e-6)


class Twice(Bigram):
    """Two losses, each with an update of its own."""

    def losses(self, batch):
        for weight in (0.25, 0.75):
            yield weight * self.token_losses(batch.tokens, batch.targets).mean()
            if weight < 0.5:
                yield STEP


def twice(**changes) -> Twice:
    model = Twice(**changes)
    model.init_weights(0)
    return model


def test_updates_within_a_batch_are_the_ordinary_ones_and_resume_exactly(tmp_path):
    """A batch is logged and committed once, by the sum of its losses; the optimizer moves twice."""
    runtime = replace(RUNTIME, device_batch_size=4)
    whole = train(make_job(tmp_path / "a", model=twice(), runtime=runtime))
    with pytest.raises(Interrupted):
        train(make_job(tmp_path / "b", model=twice(), runtime=runtime, stop=Stop(at=4)))
    again = train(make_job(tmp_path / "b", model=twice(), runtime=runtime))
    assert all(torch.equal(again.weights[n], whole.weights[n]) for n in whole.weights)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    (newest,) = (tmp_path / "a").glob(f"step_{BASE.steps}")
    assert read_tensors(newest / "optimizer.safetensors")["head.weight.step"] == 2 * BASE.steps
    plain = replace(BASE, ema_decay=0.0, eval_every=0, grad_clip=0.0)
    looped, by_hand = twice(dropout=0.0), twice(dropout=0.0)
    train(make_job(tmp_path / "c", plain, model=looped, runtime=runtime))
    optimizer = build_optimizer(by_hand.param_groups(Optim(lr=BASE.lr, betas=(0.9, 0.95))))
    schedule = make_schedule("cosine", BASE.steps, warmup=BASE.warmup)
    for step, ids in enumerate(Rows().prefetch(0, BASE.steps)):
        rows = torch.from_numpy(ids)
        for loss in by_hand.losses(Batch(tokens=rows[:, :-1], targets=rows[:, 1:], step=step)):
            if loss is not STEP:
                loss.backward()
                optimizer.step(schedule.at(step))
                optimizer.zero_grad()
    assert torch.equal(looped.head.weight, by_hand.head.weight)


def test_updates_within_a_batch_need_it_in_one_piece(tmp_path):
    with pytest.raises(UserError, match=r"supervision_update is step.*device_batch_size") as error:
        train(make_job(tmp_path, model=twice()))
    assert error.value.code == 2


def test_a_family_may_ask_for_a_checkpoint_and_keeps_its_own_files(tmp_path):
    """sweep_end commits before the next step; flush comes before, describe into the manifest."""
    events = []

    class Sweeps(Bigram):
        def attach(self, folder):
            events.append("attach")

        def flush(self):
            events.append("flush")

        def describe(self):
            return {"generation": len(events)}

        def sweep_end(self):
            return True

    model = Sweeps()
    model.init_weights(0)
    run(tmp_path, model=model, settings=replace(BASE, steps=3, eval_every=0))
    assert events == ["attach"] + ["flush"] * 3
    state = json.loads((tmp_path / "step_3/state.json").read_text())
    assert state["attached"] == {"generation": 4}


def test_state_on_disk_of_another_generation_is_refused(tmp_path):
    """A buffer that is newer than the checkpoint would be silently wrong weights."""

    class Buffered(Bigram):
        generation = 3

        def describe(self):
            return {"generation": self.generation}

    model = Buffered()
    model.init_weights(0)
    with pytest.raises(Interrupted):
        run(tmp_path, model=model, stop=Stop(at=2))
    model.generation = 4
    with pytest.raises(InputError, match=r"needs {'generation': 3}, holds {'generation': 4}"):
        run(tmp_path, model=model)
    model.generation = 3
    run(tmp_path, model=model)


def test_the_hub_gets_the_averaged_weights_at_its_interval(tmp_path):
    pushed = {}
    runtime = replace(RUNTIME, hub=Hub(repo="me/tiny", every_steps=4))
    outcome = run(
        tmp_path, runtime=runtime, push=lambda step, weights, last: pushed.update({step: weights})
    )
    assert sorted(pushed) == [4, 8, 9], "at its interval, and the finished model"
    assert pushed[9].keys() == outcome.weights.keys()
    assert all(torch.equal(pushed[9][n], t) for n, t in outcome.weights.items())
    raw = read_tensors(tmp_path / "step_9/model.safetensors")
    assert not torch.equal(raw["head.weight"], pushed[9]["head.weight"])


def test_ranks_and_rows_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="no multiple of the context: batch_tokens 25"):
        run(tmp_path, settings=replace(BASE, batch_tokens=25))


def test_validation_and_samples_leave_no_trace_in_training(tmp_path):
    """A validation that draws random numbers must not move dropout's."""

    def noisy(model):
        torch.rand(3)
        return 1.0 + torch.rand(()).item()

    def texts(model):
        torch.rand(5)
        assert not model.training
        return ["\x1b[31mred\x1b[0m"]

    quiet = replace(BASE, eval_every=0)
    run(tmp_path / "a", settings=quiet)
    loud = replace(BASE, eval_every=2, sample_every=3)
    run(tmp_path / "b", settings=loud, validate=noisy, sample=texts)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert "red" in (tmp_path / "b/training_log.jsonl").read_text()


def test_best_is_the_checkpoint_of_the_lowest_validation(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 2.5])
    settings = replace(BASE, eval_every=2, steps=8)
    outcome = run(tmp_path, settings=settings, validate=lambda model: next(scores))
    assert outcome.position.best == {"step": 4, "bpb": 1.0}
    assert json.loads((tmp_path / "best/state.json").read_text())["step"] == 4
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert names == ["best", "curves", "step_8"]


def test_a_run_ends_when_patience_is_spent_and_stays_ended(tmp_path):
    """Two validations in a row without a better one; asked again, it takes no further step."""
    scores = iter([3.0, 1.0, 2.0, 1.0])
    settings = replace(BASE, eval_every=2, steps=12, patience=2)
    outcome = run(tmp_path, settings=settings, validate=lambda model: next(scores))
    assert (outcome.position.step, outcome.position.best) == (8, {"step": 4, "bpb": 1.0})
    again = run(tmp_path, settings=settings, validate=lambda model: next(scores))
    assert again.position.step == 8
    falling = iter(range(9, 0, -1))
    whole = run(tmp_path / "b", settings=settings, validate=lambda model: float(next(falling)))
    assert whole.position.step == 12


def test_the_loop_is_one_screenful():
    lines = Path(trainer.__file__).read_text().splitlines()
    assert len(lines) <= 200
