from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from lib.core import artifact, files
from lib.core.data_settings import BpeTokenizer, Gpt2Tokenizer, SentencePieceTokenizer
from lib.core.errors import EnvError, InputError, UserError
from lib.data.vocab import bpe
from lib.data.vocab.tokenizer import Tokenizer, build, load_tokenizer, measure, take_gpt2, train_bpe

from .texts import HOSTILE, english, japanese, unicode_texts

ROOT = Path(__file__).resolve().parents[2]


def section(**changes) -> BpeTokenizer:
    return BpeTokenizer(**{"kind": "bpe", "documents": "en", "vocab_size": 400} | changes)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(train_bpe(english(), section()))


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> Tokenizer:
    return Tokenizer(take_gpt2(shared / "data" / "gpt2_bpe"))


@pytest.fixture(params=["small", "gpt2"])
def either(request) -> Tokenizer:
    """Both kinds that run on tiktoken."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A committed tokenizer folder."""
    out = tmp_path_factory.mktemp("made") / "bpe"
    build(section(), english(), lambda: english(20, seed=9), out, recipe={"documents": "ab" * 32})
    commit(out)
    return out


def commit(out: Path) -> None:
    artifact.Manifest(kind="tokenizer", recipe={}, files=artifact.describe(out)).write(
        out / files.MANIFEST
    )


@pytest.fixture(scope="module")
def val(shared: Path) -> list[str]:
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(shared / "data/en_shards/shard_00009.parquet")["text"].to_pylist()


def assert_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    return json.loads((shared / "golden" / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def golden_bpe(golden: dict, shared: Path) -> tuple[Tokenizer, list[str]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(shared / "data/en_shards/shard_00000.parquet")
    texts = table["text"].to_pylist()[:200]
    made = train_bpe(iter(texts), section(vocab_size=golden["vocab_size"], doc_cap=2000))
    return Tokenizer(made), texts


def test_merges_ids_and_lengths_equal_the_reference(golden, golden_bpe):
    tokenizer, texts = golden_bpe
    assert tokenizer.model.pattern == golden["split_pattern"]
    assert [list(pair) for pair in tokenizer.model.merges] == golden["merge_ids"]
    named = [[tokenizer.model.table[i].hex() for i in pair] for pair in tokenizer.model.merges]
    assert named == golden["merges"]
    assert tokenizer.token_bytes.tolist() == golden["token_bytes"]
    assert list(tokenizer.specials) == golden["special_tokens"]
    for case in golden["encodings"]:
        assert tokenizer.encode(case["text"]).tolist() == case["ids"], case["text"]
    counts = [len(tokenizer.encode(text[:2000])) for text in texts]
    assert counts == golden["shard_tokens_first_200_docs"]


def reference_merges(texts: list[str], count: int) -> list[tuple[int, int]]:
    """The rule of data.md 8.3: most frequent pair first, ties to the smallest pair of ids."""
    words = Counter(w for text in texts for w in regex.findall(bpe.PATTERN, text))
    split = {word: list(word.encode()) for word in words}
    merges: list[tuple[int, int]] = []
    for k in range(count):
        pairs: Counter = Counter()
        for word, ids in split.items():
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, ids in split.items():
            out: list[int] = []
            for value in ids:
                # Left to right: an id that has just been merged is not merged again in this pass.
                if out and (out[-1], value) == best and out[-1] != 256 + k:
                    out[-1] = 256 + k
                else:
                    out.append(value)
            split[word] = out
    return merges


def test_ties_go_to_the_smallest_pair_of_ids():
    """Every word occurs equally often, so almost every choice is a tie."""
    rng = random.Random(5)
    words = sorted({"".join(rng.choices("abc", k=rng.randrange(2, 7))) for _ in range(60)})
    texts = [word for word in words for _ in range(3)]
    rng.shuffle(texts)
    model = train_bpe(texts, section(vocab_size=256 + 60 + 9))
    assert list(model.merges) == reference_merges(texts, 60)


def test_merges_equal_the_rule_on_prose():
    texts = english(20)
    model = train_bpe(iter(texts), section(vocab_size=256 + 80 + 9))
    assert list(model.merges) == reference_merges(texts, 80)


_CHILD = """
import sys
from lib.core.data_settings import BpeTokenizer
from lib.data.vocab.tokenizer import Tokenizer, train_bpe
from tests.data.texts import english
for trainer in ("rustbpe", "hf"):
    made = train_bpe(iter(english(40)), BpeTokenizer(
        kind="bpe", documents="en", vocab_size=500, trainer=trainer))
    print(Tokenizer(made).fingerprint)
"""


def test_vocabulary_follows_neither_threads_nor_process_nor_hash_seed():
    outputs = set()
    for threads, hash_seed in (("1", "0"), ("2", "1"), ("16", "1")):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", _CHILD], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 2  # the two trainers break ties differently


def test_hf_trainer_gives_a_working_tokenizer():
    tokenizer = Tokenizer(train_bpe(english(), section(trainer="hf")))
    assert tokenizer.vocab_size == 400
    for text in (*HOSTILE, *english(5, seed=3)):
        assert_exact(tokenizer, text)


@pytest.mark.parametrize("trainer", ["rustbpe", "hf"])
def test_a_size_out_of_reach_is_refused_with_the_reached_one(trainer):
    with pytest.raises(UserError, match=r"vocab_size 4096 asked, (\d+) reached") as caught:
        train_bpe(["abcd abcd"] * 3, section(vocab_size=4096, trainer=trainer))
    reached = int(str(caught.value).split(" reached")[0].split()[-1])
    assert len(
        train_bpe(["abcd abcd"] * 3, section(vocab_size=reached, trainer=trainer)).table
    ) == (reached)


def test_the_smallest_vocabulary_is_bytes_and_specials():
    tokenizer = Tokenizer(train_bpe(iter([]), section(vocab_size=265)))
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.bos_id == tokenizer.eos_id == 256
    assert tokenizer.pad_id is None


def test_training_reads_up_to_the_document_that_passes_max_chars():
    read = []

    def texts():
        for i in range(100):
            read.append(i)
            yield "ab" * 50

    train_bpe(texts(), section(vocab_size=266, doc_cap=30, max_chars=100))
    assert len(read) == 4  # 30, 60, 90, 120 > 100
    capped = train_bpe(["aaaabbbbcccc"], section(vocab_size=266, doc_cap=4))
    assert capped.table[256] == b"aa"


def test_training_survives_endless_whitespace():
    model = train_bpe([" " * 1_000_000], section(vocab_size=270, doc_cap=2_000_000))
    assert model.table[256] == b"  "


# ---------------------------------------------------------------- encoding


@given(unicode_texts)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_by_bpe(small, text):
    assert_exact(small, text)


@given(unicode_texts)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_by_gpt2(gpt2, text):
    assert_exact(gpt2, text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(small, text):
    assert_exact(small, text)


def test_special_strings_in_text_are_text(either):
    for name, index in either.specials.items():
        assert index not in either.encode(f"a {name}{name} b")
        assert either.token_bytes[index] == 0
        assert either.decode([index]) == ""


def test_token_bytes_count_raw_bytes_of_pieces_that_are_no_text_alone(gpt2):
    """An id that is half a character decodes to U+FFFD, which has three bytes of its own."""
    trap = [i for i in range(50_256) if len(gpt2.decode([i]).encode()) != gpt2.token_bytes[i]]
    assert len(trap) > 100
    assert gpt2.token_bytes.max() == 128
    assert [int(gpt2.token_bytes[i]) for i in gpt2.encode("日")] == [2, 1]


@pytest.mark.parametrize("make", [lambda: " " * 1_000_000, lambda: "\t\n \u3000" * 250_000])
def test_a_million_spaces_are_encoded(either, make):
    text = make()
    assert either.decode_bytes(either.encode(text)) == text.encode()


def test_a_word_of_a_million_letters_is_encoded(either):
    text = "".join(random.Random(3).choices("abcdefgh", k=1_000_000))
    assert either.decode_bytes(either.encode(text)) == text.encode()


@given(st.lists(st.tuples(st.sampled_from([" ", "\n", "x", "\u3000"]), st.integers(0, 25_000))))
@settings(max_examples=25, deadline=None)
def test_cut_runs_joins_to_the_text_and_leaves_no_long_run(parts):
    text = "".join(letter * count for letter, count in parts)
    slices = bpe.cut_runs(text)
    assert "".join(slices) == text
    assert all(not regex.search(r"\s{10001}", piece) for piece in slices)
    if not regex.search(r"\s{10001}", text):
        assert slices == [text]


def test_a_panic_of_the_splitter_becomes_an_input_error(small, monkeypatch):
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode_to_numpy(self, text, disallowed_special):
            raise PanicException("called `Result::unwrap()` on an `Err` value")

    broken = Tokenizer(train_bpe(iter([]), section(vocab_size=265)))
    monkeypatch.setitem(vars(broken.model), "_encoding", Panicking())
    with pytest.raises(InputError, match="cannot be split"):
        broken.encode("text")


def test_lone_surrogates_are_refused_by_name(small):
    with pytest.raises(InputError, match=r"ud800"):
        small.encode("a\ud800")


def test_ids_outside_the_vocabulary_are_refused(small):
    for ids in ([-1], [small.vocab_size], np.array([5, 70_000])):
        with pytest.raises(UserError, match="outside the vocabulary"):
            small.decode(ids)


def test_batches_equal_single_texts_for_every_thread_count(small):
    texts = english(30, seed=4)
    single = [small.encode(text).tolist() for text in texts]
    for threads in (1, 2, 5):
        assert [ids.tolist() for ids in small.encode_batch(texts, threads)] == single
    assert small.encode_batch([], 2) == []


# ---------------------------------------------------------------- GPT-2


def test_gpt2_equals_the_published_vectors(gpt2, shared):
    vectors = json.loads((shared / "data/refs/gpt2_token_vectors.json").read_text())
    for case in vectors["gpt2_plain"]:
        assert gpt2.encode(case["text"]).tolist() == case["ids"], case["text"]
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id, gpt2.pad_id) == (50257, 50256, 50256, 50256)


def test_gpt2_token_counts_of_the_shards(gpt2, shared, val):
    known = json.loads((shared / "data/refs/gpt2_token_vectors.json").read_text())
    expected = known["own_measurements"]["en_shards"]["shard_00009.parquet"]
    ids = gpt2.encode_batch(val, 2)
    assert sum(map(len, ids)) == expected["gpt2_tokens"] == 1_197_496
    total = sum(int(gpt2.token_bytes[one].sum()) for one in ids)
    assert total == expected["utf8_bytes"] == 5_360_189


def test_gpt2_is_found_in_every_place(gpt2, shared, tmp_path):
    source = shared / "data" / "gpt2_bpe"
    for index, names in enumerate([("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")]):
        place = tmp_path / str(index)
        place.mkdir()
        for name in names:
            shutil.copy(source / name, place)
        assert Tokenizer(take_gpt2(place)).fingerprint == gpt2.fingerprint
    cached = take_gpt2(None, source / "tiktoken_cache")
    assert Tokenizer(cached).fingerprint == gpt2.fingerprint


def test_gpt2_that_is_nowhere_names_three_ways(tmp_path):
    with pytest.raises(EnvError) as caught:
        take_gpt2(tmp_path, None)
    for way in ("files", "folder", "TIKTOKEN_CACHE_DIR"):
        assert way in str(caught.value)


def test_gpt2_with_another_hash_is_refused(shared, tmp_path):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copyfile(shared / "data/gpt2_bpe" / name, tmp_path / name)
    data = bytearray((tmp_path / "vocab.bpe").read_bytes())
    data[1000] ^= 1
    (tmp_path / "vocab.bpe").write_bytes(data)
    with pytest.raises(InputError, match="expected sha256 1ce16647"):
        take_gpt2(tmp_path)


# ---------------------------------------------------------------- the HF file


def hf_of(tokenizer: Tokenizer) -> HfTokenizer:
    return HfTokenizer.from_str(tokenizer.model.hf_json())


def test_hf_file_gives_equal_ids(small):
    hf = hf_of(small)
    for text in (*english(20, seed=5), *japanese(5), *HOSTILE):
        hf.encode_special_tokens = True
        assert hf.encode(text).ids == small.encode(text).tolist(), text
    assert hf.get_vocab_size() == small.vocab_size
    assert hf.decode(small.encode("naïve 日本\n x")) == "naïve 日本\n x"
    hf.encode_special_tokens = False
    assert hf.encode("<|bos|>").ids == [small.bos_id]
    assert hf.decode([small.bos_id, *small.encode("a")]) == "a"


def test_hf_file_gives_equal_ids_on_real_documents(golden_bpe, gpt2, val):
    for tokenizer in (golden_bpe[0], gpt2):
        hf = hf_of(tokenizer)
        theirs = [one.ids for one in hf.encode_batch(val[:1000])]
        assert theirs == [ids.tolist() for ids in tokenizer.encode_batch(val[:1000], 2)]


# ---------------------------------------------------------------- the folder


def test_a_folder_loads_as_the_same_tokenizer(folder, small):
    loaded = load_tokenizer(folder)
    assert loaded.fingerprint == small.fingerprint
    assert loaded.token_bytes.tolist() == small.token_bytes.tolist()
    for text in (*english(5, seed=6), *HOSTILE):
        assert loaded.encode(text).tolist() == small.encode(text).tolist()
    assert sorted(path.name for path in folder.iterdir()) == [
        *("bpe.json", "manifest.json", "report.json", "token_bytes.npy"),
        *("tokenizer.hf.json", "tokenizer.json"),
    ]
    card = json.loads((folder / "tokenizer.json").read_bytes())
    assert card["trainer"]["name"] == "rustbpe"
    assert card["lossless"] is True
    assert card["fingerprint"] == small.fingerprint
    assert np.load(folder / "token_bytes.npy").dtype == np.int32


def test_building_again_gives_the_same_bytes(folder, tmp_path):
    again = tmp_path / "again"
    val_texts = english(20, seed=9)
    build(
        section(), english(), lambda: val_texts, again, recipe={"documents": "ab" * 32}, threads=2
    )
    for path in again.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_the_recipe_hash_follows_section_and_inputs(folder, tmp_path):
    hashes = {json.loads((folder / "tokenizer.json").read_bytes())["recipe_hash"]}
    for index, (changes, recipe) in enumerate(
        [({"doc_cap": 9_999}, {"documents": "ab" * 32}), ({}, {"documents": "cd" * 32})]
    ):
        build(section(**changes), english(), english, tmp_path / str(index), recipe=recipe)
        hashes.add(
            json.loads((tmp_path / str(index) / "tokenizer.json").read_bytes())["recipe_hash"]
        )
    assert len(hashes) == 3


def test_gpt2_folder_round_trips(gpt2, shared, tmp_path, caplog):
    caplog.set_level("INFO")
    made = Gpt2Tokenizer(kind="gpt2", documents="en", folder=str(shared / "data/gpt2_bpe"))
    report = build(made, iter([]), lambda: english(5), tmp_path / "gpt2")
    assert report["round_trip_share"] == 1
    assert "Japanese" in caplog.text
    assert load_tokenizer(tmp_path / "gpt2").fingerprint == gpt2.fingerprint


def test_fingerprints_tell_tokenizers_apart(small, gpt2):
    others = [section(vocab_size=401), section(trainer="hf"), section(doc_cap=50)]
    prints = {Tokenizer(train_bpe(english(), one)).fingerprint for one in others}
    assert len(prints | {small.fingerprint, gpt2.fingerprint}) == 5


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        path.write_bytes(data[:-1])
    else:
        data[int(how) % len(data)] ^= 1 << int(how) % 8
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["bpe.json", "token_bytes.npy", "tokenizer.hf.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "short", "77", "90001"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_file_is_named(folder, tmp_path, name, how, with_manifest):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / name, how)
    if not with_manifest:
        (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match=name):
        load_tokenizer(copy)


def test_every_flip_in_the_card_is_seen(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    whole = (copy / "tokenizer.json").read_bytes()
    for _with_manifest in (True, False):
        for seed in range(60):
            damage(copy / "tokenizer.json", str(random.Random(seed).randrange(len(whole))))
            with pytest.raises((InputError, UserError)):
                load_tokenizer(copy)
            (copy / "tokenizer.json").write_bytes(whole)
        (copy / "manifest.json").unlink(missing_ok=True)
    assert load_tokenizer(copy).vocab_size == 400


def test_files_of_another_tokenizer_do_not_pass(folder, tmp_path):
    """Hashes that were made to fit still meet the fingerprint."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    other = train_bpe(english(seed=8), section())
    (copy / "bpe.json").write_bytes(other.files["bpe.json"])
    card = json.loads((copy / "tokenizer.json").read_bytes())
    del card["sha256"]
    card["files"]["bpe.json"] = hashlib.sha256(other.files["bpe.json"]).hexdigest()
    card["sha256"] = hashlib.sha256(files.canonical_json(card)).hexdigest()
    files.write_json(copy / "tokenizer.json", card)
    with pytest.raises(InputError, match="fingerprint"):
        load_tokenizer(copy)


def test_a_whole_tokenizer_under_the_manifest_of_another_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    build(section(), english(seed=8), english, copy)
    assert load_tokenizer(copy).vocab_size == 400
    shutil.copyfile(folder / "manifest.json", copy / "manifest.json")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(copy)


@pytest.mark.parametrize("change", [{"kind": "wordpiece"}, {"version": 99}, {"format": "x"}])
def test_an_unknown_kind_or_format_is_a_user_error(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    card = json.loads((copy / "tokenizer.json").read_bytes()) | change
    files.write_json(copy / "tokenizer.json", card)
    with pytest.raises(UserError):
        load_tokenizer(copy)


def test_a_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError):
        load_tokenizer(tmp_path / "nothing")


def test_a_model_file_of_another_shape_is_damage():
    card = {"kind": "bpe", "trainer": {}}
    good = {"format": "kumiki/bpe", "version": 1, "pattern": bpe.PATTERN, "merges": [[97, 98]]}
    assert bpe.read_bpe({"bpe.json": files.canonical_json(good)}, card).table[256] == b"ab"
    for change in (
        {"merges": [[97, 300]]},
        {"merges": [[-1, 98]]},
        {"merges": [[97, 98], [97, 98]]},
        {"merges": [[97]]},
        {"version": 2},
        {"pattern": "."},
    ):
        with pytest.raises(ValueError):
            bpe.read_bpe({"bpe.json": files.canonical_json(good | change)}, card)


# ---------------------------------------------------------------- the report


def test_the_report_counts_what_it_says(small):
    texts = ["the board", "zq", ""]
    report = measure(small, texts)
    ids = [small.encode(text) for text in texts]
    used = {index for one in ids for index in one.tolist()}
    assert report["documents"] == 3
    assert report["bytes"] == 11
    assert report["tokens"] == sum(map(len, ids))
    assert report["bytes_per_token"] == pytest.approx(11 / report["tokens"], abs=1e-9)
    assert report["unknown_rate"] == 0
    assert report["round_trip_share"] == 1
    assert report["unused_ids"] == 400 - 9 - len(used)
    assert (report["hf_documents"], report["hf_equal"]) == (3, 3)
    assert "losses" not in report


def test_no_validation_text_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no validation text"):
        build(section(), english(), list, tmp_path / "x")


def test_build_takes_every_kind(tmp_path):
    spm = SentencePieceTokenizer(
        kind="sentencepiece", documents="ja", vocab_size=400, character_coverage=1.0
    )
    for name, made, texts in (("bpe", section(), english()), ("spm", spm, japanese())):
        report = build(made, iter(texts), lambda texts=texts: texts[:5], tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert (loaded.vocab_size, report["round_trip_share"]) == (400, 1)
