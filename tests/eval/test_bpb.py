"""Bits per byte: closed forms, the golden file, windows against a loop, and every known trap."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib.core.errors import EnvError, InputError, UserError
from lib.eval import bpb
from lib.eval.bpb import Measured, Ranks, measure
from lib.eval.scorer import Rules, Scorer, bits_per_byte, plan_windows, sum_rows
from tests.conftest import HANG_S
from tests.standins import ByteTokenizer, Causal, Fixed, PairTokenizer, uniform

T = 16
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "吾輩は猫である",
    "🙂",
]


def text_of(length: int, seed: int = 0) -> str:
    """ASCII text of `length` bytes."""
    draw = np.random.default_rng(seed)
    return "".join(chr(c) for c in draw.integers(32, 127, length))


DOCUMENTS = [
    (f"d{i}", text) for i, text in enumerate([*WORDS, text_of(70, 1), "", text_of(33, 2), "aabbb"])
]


def scorer_of(model, tokenizer=None, *, boundary="bos", stride=None, context=T, **more) -> Scorer:
    tokenizer = tokenizer or ByteTokenizer()
    rules = Rules.of(tokenizer, boundary, context, stride)
    return Scorer(model=model, rules=rules, token_bytes=tokenizer.token_bytes, **more)


def measured(model, documents=DOCUMENTS, tokenizer=None, **more) -> Measured:
    tokenizer = tokenizer or ByteTokenizer()
    return measure(documents, tokenizer, scorer_of(model, tokenizer, **more))


def one_by_one(model, ids, rules: Rules) -> float:
    """The definition: each target alone, in the first window that contains it."""
    b, nats = rules.boundary_id, []
    targets = len(ids) if b is not None else len(ids) - 1
    if b is None and len(ids):
        nats.append(math.log(rules.vocab_size))
    for i in range(targets):
        k = 0
        while k * rules.stride + rules.context <= i:
            k += 1
        start = k * rules.stride
        row = [b, *ids[start:i]] if b is not None else ids[start : i + 1]
        target = ids[i] if b is not None else ids[i + 1]
        logits, _ = model(torch.tensor([list(row)]))
        z = logits[0, -1, : rules.vocab_size].double()
        nats.append(float(F.cross_entropy(z[None], torch.tensor([int(target)]))))
    return math.fsum(nats)


# ---------------------------------------------------------------- golden and closed forms


def test_golden_accumulation(shared):
    golden = json.loads((shared / "golden" / "bpb.json").read_text())
    token_bytes = np.array(golden["token_bytes"], np.int32)
    assert len(golden["cases"]) == 5
    for case in golden["cases"]:
        nats, total = [], 0
        for losses, targets in zip(case["loss_nats"], case["targets"], strict=True):
            rows, counts = sum_rows(np.float32(losses), np.array(targets), token_bytes)
            nats += rows.tolist()
            total += int(counts.sum())
        value = bits_per_byte(math.fsum(nats), total)
        wanted = case["bpb"]
        wanted = math.inf if wanted == "inf" else wanted
        assert value == pytest.approx(wanted, rel=1e-12), case["name"]
        if "total_bytes" in case:
            assert total == case["total_bytes"], case["name"]


def test_golden_uniform_gpt2(shared):
    """With GPT-2's real ids; the trailing end-of-text id has no bytes and costs nothing."""
    golden = json.loads((shared / "golden" / "bpb.json").read_text())["uniform_gpt2"]
    ids = np.array(golden["token_ids"])
    token_bytes = np.ones(golden["vocab"], np.int32)
    token_bytes[50256] = 0
    losses = np.full((1, len(ids)), math.log(golden["vocab"]))
    nats, counted = sum_rows(losses, ids[None], token_bytes)
    assert counted[0] == golden["n_tokens_counted"]
    value = bits_per_byte(float(nats[0]), golden["utf8_bytes"])
    assert value == pytest.approx(golden["bpb"], rel=1e-12)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PairTokenizer()])
def test_uniform_model_costs_log2_v_a_token(tokenizer):
    result = measured(uniform(tokenizer.vocab_size), tokenizer=tokenizer)
    tokens = sum(len(tokenizer.encode(text)) for _, text in DOCUMENTS)
    total = sum(len(text.encode()) for _, text in DOCUMENTS)
    assert result.tokens.sum() == tokens
    assert result.total_bytes == total
    assert result.bpb == pytest.approx(tokens * math.log2(tokenizer.vocab_size) / total, rel=1e-14)


def test_certain_model_costs_nothing():
    probs = torch.full((258,), -math.inf, dtype=torch.float64)
    probs[97] = 0
    assert measured(Fixed(probs), [("a", "a" * 40)]).bpb == 0


def test_order_0_model_costs_the_entropy():
    text = text_of(500, 3)
    counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=258)
    share = counts / counts.sum()
    entropy = -sum(p * math.log2(p) for p in share if p)
    log_probs = torch.from_numpy(np.log(np.maximum(share, 1e-300)))
    assert measured(Fixed(log_probs), [("a", text)]).bpb == pytest.approx(entropy, rel=1e-12)


def test_two_tokenizers_give_one_number_where_bytes_cost_the_same():
    """CE that adds up over a token's bytes: the division into tokens must not show."""
    log_byte = torch.log_softmax(torch.sin(torch.arange(256, dtype=torch.float64)), 0)
    specials = torch.full((2,), -math.inf, dtype=torch.float64)
    one = Fixed(torch.cat((log_byte, specials)))
    two = _Unnormalised(torch.cat((log_byte, 2 * log_byte, specials)))
    a = measured(one)
    pair = PairTokenizer()
    losses = []
    for _, text in DOCUMENTS:
        ids = pair.encode(text)
        losses.append(-two.scores[torch.from_numpy(ids).long()].sum().item())
    assert a.total_bytes == measured(uniform(514), tokenizer=pair).total_bytes
    assert a.val_sha256 == measured(uniform(514), tokenizer=pair).val_sha256
    assert a.bpb == pytest.approx(bits_per_byte(math.fsum(losses), a.total_bytes), rel=1e-12)


class _Unnormalised:
    """Log-scores whose exponentials do not sum to 1: the scorer level only."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("boundary", ["bos", "eos", "none"])
@pytest.mark.parametrize("stride", [T, T // 2, 1])
@pytest.mark.parametrize("n", [0, 1, T - 1, T, T + 1, 3 * T + 1])
def test_windows_equal_a_one_by_one_loop(n, stride, boundary):
    ids = np.frombuffer(text_of(n, n).encode(), np.uint8).astype(np.int64)
    model = Causal(258)
    scorer = scorer_of(model, boundary=boundary, stride=stride)
    nats, counted = scorer([ids], ["x"])
    assert counted[0] == n
    assert nats[0] == pytest.approx(one_by_one(model, ids, scorer.rules), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
@pytest.mark.parametrize("n", range(0, 60, 7))
def test_every_target_is_scored_once(n, stride):
    scored = [t for w in plan_windows(n, T, stride) for t in range(w.scored, w.stop)]
    assert scored == list(range(n))
    for w in plan_windows(n, T, stride):
        assert len(w) <= T
        assert w.start == 0 or w.scored - w.start >= T - stride


def test_strides_differ_on_long_documents():
    """Else the stride would not be used at all."""
    values = {measured(Causal(258), stride=stride).bpb for stride in (T, T // 2, 1)}
    assert len(values) == 3


def test_short_documents_do_not_feel_the_stride():
    short = [d for d in DOCUMENTS if len(d[1].encode()) <= T]
    assert measured(Causal(258), short, stride=T).bpb == measured(Causal(258), short, stride=1).bpb


@pytest.mark.parametrize("stride", [0, -1, T + 1])
def test_impossible_stride_is_refused(stride):
    with pytest.raises(UserError, match="stride"):
        Rules.of(ByteTokenizer(), "bos", T, stride)


# ---------------------------------------------------------------- independence


@pytest.mark.parametrize("budget", [1, 100, 1000, 64_000])
def test_batch_budget_changes_nothing(budget):
    model = Causal(258)
    scorer = scorer_of(model, budget_tokens=budget)
    result = measure(DOCUMENTS, ByteTokenizer(), scorer)
    assert np.array_equal(result.nats, measured(Causal(258)).nats)
    assert model.largest_batch <= max(budget, T)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_documents_and_get_the_same_number(world, monkeypatch):
    monkeypatch.setattr(bpb, "BLOCK_BYTES", 12)  # blocks of many sizes
    alone = measured(Causal(258))
    barrier, slots, results = threading.Barrier(world), [None] * world, [None] * world

    def run(rank: int) -> None:
        def add(part):
            slots[rank] = part
            barrier.wait(HANG_S)
            total = np.sum(np.stack(slots), axis=0)
            barrier.wait(HANG_S)
            return total

        seen = []
        scorer = scorer_of(Causal(258))
        inner = Scorer.__call__

        class Spy(Scorer):
            def __call__(self, documents, names):
                seen.extend(names)
                return inner(self, documents, names)

        spy = Spy(model=scorer.model, rules=scorer.rules, token_bytes=scorer.token_bytes)
        result = measure(DOCUMENTS, ByteTokenizer(), spy, ranks=Ranks(rank, world, add))
        results[rank] = (result, seen)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    names = [name for name, _ in DOCUMENTS]
    for rank, (result, seen) in enumerate(results):
        assert seen == names[rank::world], f"rank {rank}"
        assert np.array_equal(result.nats, alone.nats), f"rank {rank}"
        assert result.bpb == alone.bpb
        assert result.val_sha256 == alone.val_sha256


@pytest.mark.parametrize("killed_after", range(5))
def test_kill_at_any_block_continues_to_the_same_number(tmp_path, monkeypatch, killed_after):
    monkeypatch.setattr(bpb, "BLOCK_BYTES", 12)
    tokenizer, blocks = ByteTokenizer(), len(list(bpb.blocks_of(DOCUMENTS)))
    assert blocks > 5

    class Dies(Causal):
        left = killed_after

        def train(self, mode=True):
            if not mode:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            return super().train(mode)

    with pytest.raises(KeyboardInterrupt):
        measure(DOCUMENTS, tokenizer, scorer_of(Dies(258)), units=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == killed_after
    result = measure(DOCUMENTS, tokenizer, scorer_of(Causal(258)), units=tmp_path)
    assert np.array_equal(result.nats, measured(Causal(258)).nats)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished blocks were redone"
    # And a third time nothing is computed at all.
    model = Causal(258)
    assert measure(DOCUMENTS, tokenizer, scorer_of(model), units=tmp_path).bpb == result.bpb
    assert model.largest_batch == 0


def test_changed_text_is_scored_again(tmp_path):
    tokenizer = ByteTokenizer()
    measure(DOCUMENTS, tokenizer, scorer_of(Causal(258)), units=tmp_path)
    other = [*DOCUMENTS[:-1], ("last", "other text")]
    result = measure(other, tokenizer, scorer_of(Causal(258)), units=tmp_path)
    assert np.array_equal(result.nats, measured(Causal(258), other).nats)


def test_training_mode_is_given_back():
    for mode in (True, False):
        model = Causal(258).train(mode)
        measured(model)
        assert model.training is mode


# ---------------------------------------------------------------- traps (evaluation.md 2), a to k


def test_trap_a_bytes_per_token_divides():
    """Multiplying is too large by its square, 4 here."""
    data = [("a", "aa" * 20)]
    pair = measured(uniform(514), data, PairTokenizer())
    per_token = math.log2(514)
    assert pair.total_bytes / pair.tokens.sum() == 2
    assert pair.bpb == pytest.approx(per_token / 2, rel=1e-14)


def test_trap_b_no_mean_of_batch_means():
    data = [("short", "zz"), ("long", text_of(60, 5))]
    result = measured(Causal(258), data, budget_tokens=T)
    means = [bits_per_byte(n, b) for n, b in zip(result.nats, result.bytes, strict=True)]
    assert abs(result.bpb - np.mean(means)) > 0.01
    assert result.bpb == bits_per_byte(math.fsum(result.nats), 62)


def test_trap_c_specials_cost_nothing_and_hold_nothing():
    losses, token_bytes = np.full((1, 3), 2.0), ByteTokenizer.token_bytes
    nats, counted = sum_rows(losses, np.array([[97, 256, 98]]), token_bytes)
    assert (nats[0], counted[0]) == (4.0, 2)


def test_trap_d_bytes_are_counted_not_decoded():
    """A third of a Japanese character is 1 byte; decoded alone it would become 3."""
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = np.array(
        [len(bytes([i]).decode(errors="replace").encode()) for i in range(256)] + [0, 0], np.int32
    )
    with pytest.raises(InputError, match="document d9"):
        measured(Causal(258), tokenizer=tokenizer)


def test_trap_e_sums_are_fp64():
    """In fp32 a sum of 4e7 moves by 4 nats at each step of 1.1, so a whole text is wrong."""
    losses = np.full((1, 1 << 20), np.float32(1.1))
    targets, token_bytes = np.zeros(losses.shape, np.int64), np.ones(1, np.int32)
    nats, _ = sum_rows(losses, targets, token_bytes)
    assert nats.dtype == np.float64
    assert nats[0] == pytest.approx(float(np.float32(1.1)) * (1 << 20), rel=1e-14)
    assert float(np.cumsum(losses, dtype=np.float32)[-1]) != pytest.approx(nats[0], rel=1e-6)


def test_trap_f_ignored_targets_touch_no_id():
    """token_bytes[-1] is the last id's: here 5 bytes that nobody wrote."""
    nats, counted = sum_rows(np.array([[1.0, 9.0]]), np.array([[0, -1]]), np.array([1, 5]))
    assert (nats[0], counted[0]) == (1.0, 1)


def test_trap_g_no_rank_leaves_documents_out():
    """Without the sum over ranks each would report its own documents; the check is exact above."""
    halves = []
    for rank in range(2):
        halves.append(
            measure(DOCUMENTS, ByteTokenizer(), scorer_of(Causal(258)), ranks=Ranks(rank, 2)).nats
        )
    assert np.array_equal(halves[0] + halves[1], measured(Causal(258)).nats)
    assert not np.array_equal(halves[0], measured(Causal(258)).nats)


def test_trap_h_document_tails_count():
    """Rows of best-fit packing crop documents; here every byte of a long one is there."""
    result = measured(Causal(258), [("long", text_of(10 * T + 3))])
    assert result.total_bytes == 10 * T + 3


def test_trap_i_padded_columns_are_no_ids():
    assert measured(Causal(258, extra=6)).bpb == measured(Causal(258)).bpb


def test_trap_j_val_sha256_tells_texts_apart():
    def sha(documents):
        return measured(uniform(258), documents).val_sha256

    assert sha([("a", "xy"), ("b", "z")]) == sha([("a", "xy"), ("b", "z")])
    others = [
        [("b", "z"), ("a", "xy")],  # order
        [("a", "xyz")],  # division into documents
        [("a", "x"), ("b", "yz")],
        [("a", "xy"), ("c", "z")],  # ids
        [("ax", "y"), ("b", "z")],  # border between id and text
    ]
    assert sha([("a", "xy"), ("b", "z")]) not in {sha(documents) for documents in others}


def test_trap_k_no_bytes_is_infinite():
    assert bits_per_byte(1.0, 0) == math.inf
    assert measured(uniform(258), []).bpb == math.inf


# ---------------------------------------------------------------- bad input


def test_lossy_tokenizer_gets_no_number():
    class Lossy(ByteTokenizer):
        lossless = False

        def encode(self, text):
            return super().encode(text.lower())

    tokenizer = Lossy()
    result = measured(Causal(258), [("a", "Hello"), ("b", "x")], tokenizer)
    assert result.bpb is None
    assert math.isfinite(result.loss)
    assert bpb.round_trip_share([("a", "Hello"), ("b", "x")], tokenizer) == 0.5


def test_ids_of_another_text_are_refused():
    class Wrong(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.swapcase())

    with pytest.raises(InputError, match="document d0"):
        measured(Causal(258), tokenizer=Wrong())


@pytest.mark.parametrize("boundary", ["bos", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_loss_names_document_and_position(value, boundary):
    text = text_of(50, 9)

    class Breaks(Causal):
        def forward(self, tokens, state=None):
            logits, state = super().forward(tokens)
            return torch.where((tokens == ord("#"))[..., None], value, logits), state

    documents = [("good", "fine"), ("bad", text[:40].replace("#", "x") + "#" + "tail")]
    with pytest.raises(InputError, match="document bad, position 41"):
        measured(Breaks(258), documents, boundary=boundary)


def test_memory_shortage_halves_the_batch_and_changes_nothing():
    class Small(Causal):
        def forward(self, tokens, state=None):
            if tokens.numel() > 3 * T:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return super().forward(tokens)

    said = []
    result = measured(Small(258), budget_tokens=1000, warn=said.append)
    assert np.array_equal(result.nats, measured(Causal(258)).nats)
    assert said and "out of memory" in said[0]


def test_one_row_that_does_not_fit_is_an_environment_error():
    class Tiny(Causal):
        def forward(self, tokens, state=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(EnvError, match=f"one row of {T} tokens"):
        measured(Tiny(258), [("a", text_of(40))])


def test_other_runtime_errors_are_bugs():
    class Bug(Causal):
        def forward(self, tokens, state=None):
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        measured(Bug(258))


# ---------------------------------------------------------------- for the trainer


def test_prefix_is_the_same_text_for_every_tokenizer():
    prefix = bpb.take_prefix(DOCUMENTS, 50)
    assert sum(len(text.encode()) for _, text in prefix) <= 50
    assert prefix == DOCUMENTS[: len(prefix)]
    assert bpb.take_prefix(DOCUMENTS, 1) == DOCUMENTS[:1]
    rules = Rules.of(ByteTokenizer(), "bos", T)
    result = bpb.validate(Causal(258), prefix, ByteTokenizer(), rules)
    assert result.bpb == measured(Causal(258), prefix).bpb


def test_missing_boundary_is_refused():
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = None
    with pytest.raises(UserError, match="boundary"):
        Rules.of(tokenizer, "bos", T)
