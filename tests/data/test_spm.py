from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from lib.core.data_settings import SentencePieceTokenizer
from lib.core.errors import InputError, UserError
from lib.data.vocab import spm
from lib.data.vocab.spm_file import read_spec, without_circumstances
from lib.data.vocab.tokenizer import Tokenizer, build, load_tokenizer, measure
from tests.conftest import HANG_S, ROOT

from .texts import HOSTILE, english, japanese, unicode_texts


def section(**changes) -> SentencePieceTokenizer:
    base = {"kind": "sentencepiece", "documents": "ja", "vocab_size": 420}
    return SentencePieceTokenizer(**base | {"character_coverage": 1.0} | changes)


@pytest.fixture(scope="module")
def lossless() -> Tokenizer:
    return Tokenizer(spm.train_sentencepiece(iter(japanese() + english(20)), section()))


@pytest.fixture(scope="module")
def seed_texts() -> list[str]:
    return [*japanese(), *english(20), "長い行" * 500]  # the last has 4,500 bytes


@pytest.fixture(scope="module")
def seed(seed_texts) -> Tokenizer:
    made = section(recipe="seed", vocab_size=300)
    return Tokenizer(spm.train_sentencepiece(iter(seed_texts), made))


def real_texts(shared: Path, name: str) -> list[str]:
    with gzip.open(shared / f"data/ja_jsonl/{name}.jsonl.gz") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def real_val(shared: Path) -> list[str]:
    return real_texts(shared, "validation_0")


def assert_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


# ---------------------------------------------------------------- the lossless recipe


@given(unicode_texts)
@settings(max_examples=400, deadline=None)
def test_any_text_comes_back(lossless, text):
    assert_exact(lossless, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(lossless, text):
    assert_exact(lossless, text)


def test_a_literal_space_mark_is_its_three_bytes(lossless):
    ids = lossless.encode("\u2581 ").tolist()
    byte_ids = [lossless.model.processor.piece_to_id(f"<0x{b:02X}>") for b in b"\xe2\x96\x81"]
    assert ids[:3] == byte_ids
    assert [lossless.model.table[i] for i in ids] == [b"\xe2", b"\x96", b"\x81", b" "]
    plain = lossless.encode("a b").tolist()
    assert not set(byte_ids) & set(plain)  # ordinary spaces cost no bytes: required_chars


def test_spaces_come_back_though_no_training_text_has_one():
    """required_chars: without its own mark the library spells a space as the bytes of U+2581."""
    tokenizer = Tokenizer(spm.train_sentencepiece(japanese(), section()))
    assert len(tokenizer.encode("木 木")) == 3
    assert_exact(tokenizer, " 木  を\u2581 ")


def test_ids_of_the_special_pieces_are_fixed(lossless):
    assert (lossless.unk_id, lossless.pad_id, lossless.bos_id, lossless.eos_id) == (0, 1, 2, 3)
    assert lossless.specials == {"<unk>": 0, "<pad>": 1, "<s>": 2, "</s>": 3}
    assert lossless.token_bytes[:4].tolist() == [0, 0, 0, 0]
    assert lossless.decode([2, *lossless.encode("木"), 3]) == "木"
    assert lossless.encode("\n").tolist() == [4]
    assert not np.isin(lossless.encode("<s></s><unk><pad>"), [0, 1, 2, 3]).any()


def test_a_million_letters_and_spaces_come_back(lossless):
    for text in (" " * 1_000_000, "木" * 300_000 + "q" * 700_000):
        assert lossless.decode_bytes(lossless.encode(text)) == text.encode()


def test_model_bytes_are_equal_for_one_and_two_threads():
    """The library writes its thread count into the model; it is taken out before hashing."""
    made = [spm.train_sentencepiece(japanese(), section(threads=n)).proto for n in (1, 2)]
    assert made[0] == made[1]
    assert b"num_threads" not in made[0]


def test_taking_out_the_circumstances_leaves_a_model_of_equal_pieces(lossless, shared):
    raw = (shared / "data/refs/sentencepiece/test_model.model").read_bytes()
    stripped = without_circumstances(raw)
    assert len(stripped) < len(raw)
    assert b"botchan.txt" in raw
    assert b"botchan.txt" not in stripped
    assert read_spec(stripped) == read_spec(raw)
    assert without_circumstances(stripped) == stripped


_CHILD = """
import io, sys
from lib.data.vocab import spm
from tests.data.test_spm import section
from tests.data.texts import HOSTILE, japanese
texts = [*japanese(), *HOSTILE, "a" * 200_000, " " * 70_000, "\\n\\n"]
lines = list(spm._paragraphs(texts))
print(len(lines))
original = spm._train.__globals__["_guarded"]
import sentencepiece
train = sentencepiece.SentencePieceTrainer.train
sentencepiece.SentencePieceTrainer.train = staticmethod(
    lambda **options: train(**options | {"minloglevel": 0}))
spm.train_sentencepiece(texts, section(character_coverage=0.98))
"""


def test_the_trainer_skips_no_line():
    """Its own log says so: every line that is fed is loaded, whatever characters the text holds."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Loaded all {done.stdout.strip()} sentences" in done.stderr
    for word in ("Skipped", "skipped", "null character", "too long"):
        assert word not in done.stderr


def test_training_lines_are_short_and_clean():
    lines = list(spm._paragraphs(["a\n\nb\0c\u2581d\u2585e", "x" * 130_000, ""]))
    assert [len(line) for line in lines] == [1, 1, 1, 1, 1, 60_000, 60_000, 10_000]
    assert "".join(lines[:5]) == "abcde"


def test_the_sample_follows_the_texts_and_not_their_number_or_order():
    texts = [f"{i} " * 10 for i in range(200)]
    kept = spm._sample(iter(texts), 1500)
    assert 1400 < sum(len(text) for text in kept) <= 1500
    assert kept == [text for text in texts if text in set(kept)]  # in stream order
    shuffled = random.Random(1).sample(texts, len(texts))
    assert sorted(spm._sample(iter(shuffled), 1500)) == sorted(kept)
    assert spm._sample(iter(texts), 10**6) == texts
    assert set(spm._sample(iter(texts), 700)) <= set(kept)


def test_a_vocabulary_too_large_is_refused_with_the_reached_size():
    with pytest.raises(UserError, match=r"vocab_size 60000 asked, (\d+) reached") as caught:
        spm.train_sentencepiece(japanese(), section(vocab_size=60_000))
    reached = int(str(caught.value).split(" reached")[0].split()[-1])
    model = spm.train_sentencepiece(japanese(), section(vocab_size=reached))
    assert len(model.table) == reached


def test_a_vocabulary_too_small_for_the_characters_is_refused_with_both_numbers():
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 500)))]
    with pytest.raises(UserError, match=r"vocab_size 420, 76\d needed.*character_coverage"):
        spm.train_sentencepiece(texts, section())


def test_no_text_is_an_input_error():
    with pytest.raises(InputError, match="no training text"):
        spm.train_sentencepiece(iter([]), section())


def test_an_error_of_the_text_source_arrives_as_it_was():
    def texts():
        yield from japanese(5)
        raise InputError("damaged part", file="x.parquet")

    with pytest.raises(InputError, match="damaged part"):
        spm.train_sentencepiece(texts(), section())
    lines = (line for line in ["木", 5])
    with pytest.raises(AttributeError):  # raised while the library is reading
        spm._train(lines, section())


_REAL = """
import hashlib, sys
from pathlib import Path
from lib.data.vocab import spm
from tests.data.test_spm import SIXTEEN, real_texts, section
texts = real_texts(Path(sys.argv[1]), "train_0")
made = spm.train_sentencepiece(iter(texts), section(**SIXTEEN, threads=2))
print(hashlib.sha256(made.proto).hexdigest())
"""
SIXTEEN = {"vocab_size": 16_000, "character_coverage": 0.9995}


def test_texts_of_real_japanese_come_back_and_a_second_run_gives_the_same_bytes(shared, real_val):
    """At the size of the recipe; the other run is a process with another thread count."""
    tokenizer = Tokenizer(
        spm.train_sentencepiece(iter(real_texts(shared, "train_0")), section(**SIXTEEN, threads=1))
    )
    report = measure(tokenizer, real_val, threads=2)
    assert report["round_trips"] == report["documents"] == len(real_val) == 577
    assert report["unknown_rate"] == 0
    assert report["hf_equal"] == report["hf_documents"] == len(real_val)
    child = [sys.executable, "-c", _REAL, str(shared)]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == hashlib.sha256(tokenizer.model.proto).hexdigest()


# ---------------------------------------------------------------- the seed recipe


def test_seed_recipe_shows_its_losses(seed, seed_texts):
    assert not seed.lossless
    report = measure(seed, ["木を組む", "a\nb", "①㈱ｶﾞ", "日本 鬱", "雨の日も  組む"])
    assert report["round_trip_share"] < 1
    assert report["unknown_rate"] > 0
    assert report["losses"] == {
        "rewritten": 1,
        "newline_or_space_run": 2,
        "train_documents": len(seed_texts),
        "train_bytes": sum(len(text.encode()) for text in seed_texts),
        "skipped_documents": sum(len(text.encode()) > 4192 for text in seed_texts),
        "skipped_bytes": sum(n for t in seed_texts if (n := len(t.encode())) > 4192),
    }
    assert report["losses"]["skipped_documents"] >= 1


def test_seed_recipe_is_the_librarys_default(seed):
    spec = seed.model.spec
    assert spec.charsmap
    assert spec.dummy_prefix
    assert spec.collapse_spaces
    assert not spec.byte_fallback
    assert seed.encode("木  を").tolist() == seed.model.processor.encode_as_ids("木 を")
    assert seed.decode(seed.encode("木 を組む")) == "木 を組む"
    assert (seed.unk_id, seed.pad_id, seed.bos_id, seed.eos_id) == (0, 1, 2, 3)


# ---------------------------------------------------------------- the HF file


def test_hf_file_of_a_lossless_model_gives_equal_ids_and_texts(lossless):
    hf = HfTokenizer.from_str(lossless.model.hf_json())
    hf.encode_special_tokens = True
    for text in (*HOSTILE, *japanese(20, seed=5), *english(10, seed=6)):
        ids = lossless.encode(text).tolist()
        assert hf.encode(text).ids == ids, text
        assert hf.decode(ids) == text
    hf.encode_special_tokens = False
    assert hf.encode("<s>木</s>").ids == [2, *lossless.encode("木").tolist(), 3]


@given(st.text(st.sampled_from("木を組むaabb \u2581\n…ーー、。"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_hf_file_merges_as_the_library_does(lossless, text):
    hf = vars(lossless).setdefault("hf", HfTokenizer.from_str(lossless.model.hf_json()))
    assert hf.encode(text).ids == lossless.encode(text).tolist()


def test_hf_file_of_a_lossy_model_gives_equal_ids_on_prose(seed):
    hf = HfTokenizer.from_str(seed.model.hf_json())
    for text in (*japanese(20, seed=5), *english(10, seed=6), "", " ", "①㈱ｶﾞ"):
        assert hf.encode(text).ids == seed.encode(text).tolist(), text


# ---------------------------------------------------------------- ready-made files


@pytest.mark.parametrize("name", ["test_model", "test_ja_model"])
def test_published_models_load(shared, real_val, name):
    folder = shared / "data" / "refs" / "sentencepiece"
    expected = json.loads((folder / "expected.json").read_text())[name]
    tokenizer = Tokenizer(spm.take_sentencepiece(folder / f"{name}.model"))
    assert not tokenizer.lossless
    assert tokenizer.vocab_size == expected["piece_size"]
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        *(expected["unk_id"], expected["bos_id"], expected["eos_id"]),
        None,
    )
    processor = tokenizer.model.processor
    for text in real_val[:20]:
        assert tokenizer.encode(text).tolist() == processor.encode_as_ids(text)
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(
            processor.encode_as_ids(text)
        )
    report = measure(tokenizer, real_val[:40])
    assert report["hf_equal"] >= 39  # graphemes against longest prefixes: 1 of 577 seen


def test_a_ready_made_file_is_lossless_when_nothing_is_lost(lossless, seed, tmp_path):
    (tmp_path / "a.model").write_bytes(lossless.model.proto)
    (tmp_path / "b.model").write_bytes(seed.model.proto)
    exact = spm.take_sentencepiece(tmp_path / "a.model")
    assert exact.lossless
    assert Tokenizer(exact).fingerprint == lossless.fingerprint
    assert not spm.take_sentencepiece(tmp_path / "b.model").lossless


def test_a_model_without_the_space_mark_is_not_lossless(monkeypatch, tmp_path):
    """Spaces then fall to the three bytes of U+2581, which is another text."""
    monkeypatch.setattr(spm, "SPACE_MARK", "木")  # so required_chars asks for something else
    made = spm.train_sentencepiece(japanese(), section())
    monkeypatch.undo()
    (tmp_path / "a.model").write_bytes(made.proto)
    assert not spm.take_sentencepiece(tmp_path / "a.model").lossless


def test_build_with_a_ready_made_file_says_when_the_size_differs(lossless, tmp_path, caplog):
    (tmp_path / "a.model").write_bytes(lossless.model.proto)
    made = section(file=str(tmp_path / "a.model"), vocab_size=16_000)
    build(made, iter([]), lambda: japanese(5), tmp_path / "out")
    assert "420 pieces" in caplog.text
    loaded = load_tokenizer(tmp_path / "out")
    assert loaded.fingerprint == lossless.fingerprint
    assert loaded.lossless


def test_folders_keep_whether_they_are_lossless(tmp_path):
    for recipe in ("lossless", "seed"):
        made = section(recipe=recipe, vocab_size=320)
        build(made, iter(japanese()), lambda: japanese(5), tmp_path / recipe)
        loaded = load_tokenizer(tmp_path / recipe)
        assert loaded.lossless is (recipe == "lossless")
        assert (tmp_path / recipe / "spm.model").is_file()


def test_a_missing_or_damaged_file_has_one_sentence(lossless, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        spm.take_sentencepiece(tmp_path / "none.model")
    whole = lossless.model.proto
    rng = random.Random(7)
    damaged = [b"", b"garbage", whole[:1000], whole[:-1], whole[100:], bytes(5000)]
    for _ in range(150):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for index, data in enumerate(damaged):
        path = tmp_path / f"{index}.model"
        path.write_bytes(data)
        try:
            taken = spm.take_sentencepiece(path)
            taken.encode("木 \u2581")
        except InputError:
            refused += 1
    assert refused >= 6


@given(st.binary(max_size=200))
def test_reading_any_bytes_ends_in_a_spec_or_a_value_error(data):
    with contextlib.suppress(ValueError):
        assert read_spec(data).pieces
