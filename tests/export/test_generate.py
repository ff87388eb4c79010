"""Generation: the sampler, cache against no cache, rows apart from each other, text streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.core.errors import InputError, UserError
from lib.export import generate as module
from lib.export.generate import (
    Generation,
    Sampling,
    TextStream,
    choose,
    encode_prompt,
    generate,
    penalise,
)
from tests.standins import ByteTokenizer, Causal

V = 258
GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.0, top_k=0)


def logits_of(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size) * 3


# ---------------------------------------------------------------- choosing


def test_greedy_takes_the_lowest_id_of_equals():
    assert choose(np.array([1.0, 5.0, 5.0, 2.0]), GREEDY, 0.99) == 1


@pytest.mark.parametrize(
    "sampling",
    [
        WARM,
        Sampling(temperature=0.5, top_k=7),
        Sampling(temperature=2.0, top_k=0, top_p=0.6),
        Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.05),
        Sampling(temperature=1.3, top_k=0, min_p=0.2),
    ],
)
def test_chosen_ids_follow_the_distribution(sampling):
    """A grid of uniform numbers meets each id in proportion to its probability."""
    z = logits_of(1)
    n = 4000
    counts = np.zeros(50)
    for u in (np.arange(n) + 0.5) / n:
        counts[choose(z, sampling, u)] += 1
    assert np.allclose(counts / n, definition(z, sampling), rtol=0, atol=2 / n)


def definition(z: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution by its words, one step after the other."""
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    kept = order[: sampling.top_k] if sampling.top_k else order
    p = np.zeros(len(z))
    p[kept] = np.exp(z[kept] / sampling.temperature)
    p /= p.sum()
    total = 0.0
    for place, i in enumerate(kept):
        if total >= sampling.top_p:
            p[kept[place:]] = 0
            break
        total += p[i]
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def test_ties_at_the_border_of_top_k_go_to_the_lower_ids():
    z, two = np.zeros(10), Sampling(temperature=1.0, top_k=2)
    assert {choose(z, two, u) for u in np.linspace(0, 0.999, 50)} == {0, 1}


def test_uniform_1_stays_inside():
    assert choose(logits_of(2), WARM, 1.0) < 50


def test_masked_ids_are_never_chosen():
    z = np.full(5, -math.inf)
    z[3] = 0
    assert {choose(z, WARM, u) for u in (0.0, 0.5, 0.999)} == {3}


def test_repetition_penalty_lowers_both_signs():
    z = penalise(np.array([2.0, -2.0, 2.0, -2.0]), [0, 1, 1], 2.0)
    assert z.tolist() == [1.0, -4.0, 2.0, -2.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
    ],
)
def test_meaningless_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


# ---------------------------------------------------------------- rows


class Long(Causal):
    max_context = 4000


@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(repetition_penalty=1.5)])
@pytest.mark.parametrize("rows", [1, 3])
def test_state_gives_what_whole_rows_give(sampling, rows):
    options = {"max_new_tokens": 12, "rows": rows}
    with_state = generate(Long(V), [256, 5, 6], sampling, **options)
    without = generate(Long(V), [256, 5, 6], sampling, cached=False, **options)
    assert [row.ids for row in with_state] == [row.ids for row in without]
    for a, b in zip(with_state, without, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-12)


def test_long_prompts_go_in_pieces(monkeypatch):
    prompt = [256, *np.random.default_rng(0).integers(0, 256, 40).tolist()]
    whole = generate(Long(V), prompt, WARM, max_new_tokens=10)
    monkeypatch.setattr(module, "PREFILL", 7)
    model = Long(V)
    assert generate(model, prompt, WARM, max_new_tokens=10)[0].ids == whole[0].ids
    assert model.largest_batch == 7


def test_a_row_does_not_feel_the_others():
    many = generate(Long(V), [256], WARM, max_new_tokens=20, rows=5)
    assert len({tuple(row.ids) for row in many}) == 5
    for n in (1, 2):
        some = generate(Long(V), [256], WARM, max_new_tokens=20, rows=n)
        assert [row.ids for row in some] == [row.ids for row in many[:n]]


def test_seeds_decide_everything():
    def ids(seed):
        return generate(Long(V), [256], Sampling(seed=seed), max_new_tokens=20)[0].ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_logprobs_are_of_the_models_own_distribution():
    row = generate(Long(V), [256, 9], Sampling(temperature=0.3, top_k=5), max_new_tokens=3)[0]
    logits, _ = Long(V)(torch.tensor([[256, 9, *row.ids]]))
    wanted = torch.log_softmax(logits[0, 1:4], -1)
    for at, token in enumerate(row.ids):
        assert row.logprobs[at] == pytest.approx(wanted[at, token].item(), abs=1e-12)


def test_stop_ids_end_a_row_and_are_not_returned():
    free = generate(Long(V), [256], WARM, max_new_tokens=30, rows=3)
    stop = free[0].ids[4]
    rows = generate(Long(V), [256], WARM, max_new_tokens=30, rows=3, stop_ids=[stop])
    for before, row in zip(free, rows, strict=True):
        cut = before.ids.index(stop) if stop in before.ids else 30
        assert row.ids == before.ids[:cut]
        assert row.stop == ("eos" if cut < 30 else "length")


def test_an_outside_stop_ends_the_loop():
    generation = Generation(Long(V), [256], WARM, max_new_tokens=1000, rows=2)
    for number, _ in enumerate(generation):
        if number == 3:
            for row in generation.rows:
                row.stop = "stop"
    assert [len(row.ids) for row in generation.rows] == [4, 4]


@pytest.mark.parametrize("new, fits", [(13, True), (14, False)])
def test_context_is_kept(new, fits):
    prompt = [256, 1, 2]
    if fits:
        assert len(generate(Causal(V), prompt, WARM, max_new_tokens=new)[0].ids) == new
        return
    with pytest.raises(UserError, match="16 fit"):
        generate(Causal(V), prompt, WARM, max_new_tokens=new)
    rows = generate(Causal(V), prompt, WARM, max_new_tokens=new, beyond_context=True)
    assert len(rows[0].ids) == new


def test_empty_prompt_is_refused():
    with pytest.raises(UserError, match="empty prompt"):
        generate(Long(V), [], WARM, max_new_tokens=1)


def test_padded_columns_are_never_chosen():
    rows = generate(Long(V, extra=6), [256], GREEDY, max_new_tokens=10)
    assert rows[0].ids == generate(Long(V), [256], GREEDY, max_new_tokens=10)[0].ids


def test_nan_is_an_error_not_a_text():
    class Breaks(Long):
        def forward(self, tokens, state=None):
            logits, state = super().forward(tokens, state)
            return logits * math.nan, state

    with pytest.raises(InputError, match="position 1"):
        generate(Breaks(V), [256], WARM, max_new_tokens=1)


def test_training_mode_is_given_back_also_when_left_early():
    model = Long(V).train()
    for _ in Generation(model, [256], WARM, max_new_tokens=5):
        assert model.training is False
        break
    assert model.training is True


# ---------------------------------------------------------------- text


BYTES = ByteTokenizer()


def streamed(data: bytes, stop=(), pending=b"") -> tuple[list[str], bool]:
    stream = TextStream(BYTES.decode_bytes, stop, pending)
    pieces = [stream.feed(value) for value in data]
    return [*pieces, stream.finish()], stream.stopped


@given(st.binary(max_size=60))
def test_pieces_join_to_the_decoded_bytes(data):
    assert "".join(streamed(data)[0]) == data.decode(errors="replace")


@given(st.text(max_size=30))
def test_only_whole_characters_come_out(text):
    pieces, _ = streamed(text.encode())
    assert "".join(pieces) == text
    assert all(piece in ("", character) for piece, character in _aligned(pieces, text))


def _aligned(pieces, text):
    letters = iter(text)
    return [(piece, next(letters) if piece else "") for piece in pieces]


@given(
    st.text(alphabet="abc。", max_size=40),
    st.lists(st.text(alphabet="abc。", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text, stop):
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    pieces, stopped = streamed(text.encode(), stop)
    # A stop string that ends first may begin later than another one that is still growing.
    first_end = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    assert stopped is bool(found)
    if first_end is None:
        assert "".join(pieces) == text
    else:
        seen = text[:first_end]
        assert "".join(pieces) == seen[: min(a for a in map(seen.find, stop) if a >= 0)]


def test_nothing_is_held_back_without_need():
    stream = TextStream(BYTES.decode_bytes, ["END"])
    assert [stream.feed(value) for value in b"aENx"] == ["a", "", "", "ENx"]


def test_specials_have_no_text():
    stream = TextStream(BYTES.decode_bytes)
    assert stream.feed(256) == ""


# ---------------------------------------------------------------- prompts


@given(st.text(max_size=20), st.integers(0, 3))
def test_a_prompt_may_end_inside_a_character(text, cut):
    data = (text + "語").encode()
    data = data[: len(data) - cut]
    ids, pending = encode_prompt(BYTES, data)
    assert bytes(ids) == data
    assert len(pending) == (0 if cut in (0, 3) else 3 - cut)
    rest = "語".encode()[3 - cut :] if pending else b""
    assert "".join(streamed(rest, pending=pending)[0]) == ("語" if pending else "")


@pytest.mark.parametrize("data", [b"\xff", b"a\xc3(", b"\xed\xa0\x80"])
def test_other_bytes_are_refused(data):
    with pytest.raises(UserError, match="not UTF-8"):
        encode_prompt(BYTES, data)


def test_a_tokenizer_without_bytes_says_so():
    class Whole(ByteTokenizer):
        token_bytes = np.array([2] * 258)

    with pytest.raises(UserError, match="inside a character"):
        encode_prompt(Whole(), "語".encode()[:2])
