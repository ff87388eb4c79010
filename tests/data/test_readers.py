"""Reading shards: exact counts by reason, whole-file damage, streaming, both library paths."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.core.errors import InputError
from lib.data.raw import lines, readers
from lib.data.raw.lines import ReadCounts
from lib.data.raw.readers import Batch, LongText, Shard, read_shard
from lib.data.raw.strict_json import Rejected, field_chunks, field_of

GOOD = b'{"text": "ok"}'


def shard(path: Path, kind: str = "jsonl", **more) -> Shard:
    return Shard(source="s", split="train", index=0, path=path, kind=kind, **more)


def read(one: Shard) -> tuple[list[tuple[str, str]], ReadCounts]:
    """(id, text) of all documents and the counts; long texts are joined."""
    counts, documents = ReadCounts(), []
    for item in read_shard(one, counts):
        if isinstance(item, LongText):
            documents.append((item.id, "".join(item.chunks())))
        else:
            documents += zip(item.ids, item.texts, strict=True)
    assert counts.lines == counts.records + counts.blank
    assert len(documents) == counts.accepted
    return documents, counts


def write_gz(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, mtime=0))
    return path


@pytest.fixture(params=["fast", "standard"])
def library(request, monkeypatch):
    """isal and orjson, or the standard library alone."""
    if request.param == "standard":
        monkeypatch.setattr(lines, "zlib_module", zlib)
        monkeypatch.setattr(lines, "_InflateError", zlib.error)
        monkeypatch.setattr(readers, "_LENIENT", True)
        monkeypatch.setattr(
            readers,
            "quick_loads",
            lambda line: json.loads(line.decode(), parse_constant=readers._refuse_constant),
        )
    return request.param


# One line each beside a good one: (bytes, reason or the text it must give).
HOSTILE: dict[str, tuple[bytes, str | None, str | None]] = {
    "not_json": (b"hello", "malformed", None),
    "torn": (b'{"text": "a', "malformed", None),
    "single_quotes": (b"{'text': 'a'}", "malformed", None),
    "trailing_comma": (b'{"text": "a",}', "malformed", None),
    "two_values": (b'{"text": "a"} {"text": "b"}', "malformed", None),
    "nan": (b'{"text": "a", "x": NaN}', "malformed", None),
    "nan_text": (b'{"text": NaN}', "malformed", None),
    "infinity": (b'{"x": -Infinity, "text": "a"}', "malformed", None),
    "leading_zero": (b'{"x": 01, "text": "a"}', "malformed", None),
    "plus": (b'{"x": +1, "text": "a"}', "malformed", None),
    "long_integer": (b'{"x": ' + b"7" * 4301 + b', "text": "a"}', "malformed", None),
    "long_fraction": (b'{"x": 0.' + b"7" * 5000 + b', "text": "a"}', "malformed", None),
    "longest_number": (b'{"x": ' + b"7" * 4300 + b', "text": "a"}', None, "a"),
    "digits_in_text": (b'{"text": "' + b"7" * 9000 + b'", "x": 1}', None, "7" * 9000),
    "huge_exponent": (b'{"x": 1e999, "text": "a"}', None, "a"),
    "deep": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "a"}', "malformed", None),
    "too_deep": (b'{"x": ' + b"[" * 1000 + b"]" * 1000 + b', "text": "a"}', "malformed", None),
    "deepest": (b'{"x": ' + b"[" * 999 + b"]" * 999 + b', "text": "a"}', None, "a"),
    "brackets_in_text": (b'{"text": "' + b"[" * 3000 + b'", "x": 1}', None, "[" * 3000),
    "raw_control": (b'{"text": "a\x01b"}', "malformed", None),
    "raw_nul": (b'{"text": "a\x00b"}', "malformed", None),
    "bad_escape": (b'{"text": "\\x41"}', "malformed", None),
    "short_escape": (b'{"text": "\\u00e"}', "malformed", None),
    "bom_inside": (b'\xef\xbb\xbf{"text": "a"}', "malformed", None),
    "list": (b'["text", "a"]', "not_object", None),
    "string": (b'"text"', "not_object", None),
    "number": (b"17", "not_object", None),
    "null": (b"null", "not_object", None),
    "absent": (b'{"txt": "a"}', "no_text", None),
    "null_text": (b'{"text": null}', "no_text", None),
    "number_text": (b'{"text": 5}', "no_text", None),
    "list_text": (b'{"text": ["text"]}', "no_text", None),
    "nested_only": (b'{"x": {"text": "a"}}', "no_text", None),
    "high_surrogate": (b'{"text": "a\\ud800b"}', "lone_surrogate", None),
    "low_surrogate": (b'{"text": "\\udc00"}', "lone_surrogate", None),
    "swapped_pair": (b'{"text": "\\ude00\\ud83d"}', "lone_surrogate", None),
    "pair": (b'{"text": "\\ud83d\\ude00"}', None, "\U0001f600"),
    "surrogate_elsewhere": (b'{"x": "\\ud800", "text": "a"}', None, "a"),
    "duplicate": (b'{"text": "a", "text": "b"}', "duplicate_key", None),
    "duplicate_spelt": (b'{"text": "a", "te\\u0078t": "b"}', "duplicate_key", None),
    "duplicate_null": (b'{"text": null, "text": "b"}', "duplicate_key", None),
    "duplicate_other": (b'{"x": 1, "x": 2, "text": "a"}', None, "a"),
    "spelt_once": (b'{"t\\u0065xt": "a"}', None, "a"),
    "nested_twice": (b'{"x": {"text": 1}, "text": "a"}', None, "a"),
    "value_named_text": (b'{"x": "text", "text": "a"}', None, "a"),
    "invalid_byte": (b'{"text": "a\xffb"}', "invalid_utf8", None),
    "malformed_then_invalid": (b"{oops}" + b" " * 200 + b"\xff", "invalid_utf8", None),
    "torn_character": (b'{"text": "a", "x": \xe3\x81', "invalid_utf8", None),
    "encoded_surrogate": (b'{"text": "\xed\xa0\x80"}', "invalid_utf8", None),
    "overlong": (b'{"text": "\xc0\xaf"}', "invalid_utf8", None),
    "latin1": ('{"text": "caf\u00e9"}'.encode("latin-1"), "invalid_utf8", None),
    "delete": (b'{"text": "a\x7fb"}', None, "a\x7fb"),
    "escaped_nul": (b'{"text": "a\\u0000b"}', None, "a\x00b"),
    "empty_text": (b'{"text": ""}', None, ""),
    "inner_newlines": (b'{"text": "a\\r\\nb\\n"}', None, "a\r\nb\n"),
    "separators": ('{"text": "a\u2028b\u2029c\u0085d"}'.encode(), None, "a\u2028b\u2029c\u0085d"),
    "special_token": (b'{"text": "<|bos|>"}', None, "<|bos|>"),
    "spaced": (b' \t{ "text" : "a" } ', None, "a"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_line_has_exactly_one_fate(tmp_path, name, library):
    """A parser's leniency or a crash in one line must neither add nor lose a record around it."""
    line, reason, text = HOSTILE[name]
    path = write_gz(tmp_path / "h.jsonl.gz", b"\n".join([GOOD, line, b"", GOOD]) + b"\n")
    documents, counts = read(shard(path))
    assert (counts.lines, counts.records, counts.blank) == (4, 3, 1)
    if reason is None:
        assert documents == [("h.jsonl.gz:1", "ok"), ("h.jsonl.gz:2", text), ("h.jsonl.gz:4", "ok")]
        assert counts.rejected == {}
    else:
        assert documents == [("h.jsonl.gz:1", "ok"), ("h.jsonl.gz:4", "ok")]
        assert counts.rejected == {reason: 1}
        assert counts.positions == {reason: ["h.jsonl.gz:2"]}


def test_hostile_file_of_all_lines_counts_by_reason(tmp_path, library):
    """All at once, in one block: the reasons add up and the first 20 positions are kept."""
    everything = [line for line, _, _ in HOSTILE.values()] * 11
    path = write_gz(tmp_path / "all.jsonl.gz", b"\r\n".join(everything))
    _, counts = read(shard(path))
    expected: dict[str, int] = {}
    for _, reason, _ in HOSTILE.values():
        if reason:
            expected[reason] = expected.get(reason, 0) + 11
    assert counts.rejected == expected
    assert all(len(p) == min(20, expected[r]) for r, p in counts.positions.items())
    first = list(HOSTILE).index("absent") + 1
    assert counts.positions["no_text"][0] == f"all.jsonl.gz:{first}"


def test_both_libraries_accept_the_same_real_records(shared, monkeypatch):
    """orjson and isal are accelerators, never judges."""
    path = shared / "data/ja_jsonl/train_3.jsonl.gz"
    fast, fast_counts = read(shard(path))
    monkeypatch.setattr(lines, "zlib_module", zlib)
    monkeypatch.setattr(lines, "_InflateError", zlib.error)
    monkeypatch.setattr(readers, "quick_loads", lambda line: json.loads(line.decode()))
    monkeypatch.setattr(readers, "_LENIENT", True)
    assert read(shard(path)) == (fast, fast_counts)
    strict = [
        field_of(line, "text") for line in gzip.decompress(path.read_bytes()).split(b"\n") if line
    ]
    assert strict == [text for _, text in fast]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    record=st.dictionaries(st.sampled_from(["text", "a", "b"]) | st.text(), JSON, max_size=4),
    ascii_only=st.booleans(),
    cut=st.integers(0, 400),
    size=st.integers(1, 9),
)
def test_strict_parser_agrees_with_the_standard_library(record, ascii_only, cut, size):
    """Any cut into blocks, whole or torn lines: the same verdict and the same text."""
    line = json.dumps(record, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    line = line[: len(line) - cut] if cut < 200 else line
    blocks = [line[i : i + size] for i in range(0, len(line), size)]
    try:
        found: object = "".join(field_chunks(blocks, "text"))
    except Rejected as rejected:
        found = rejected
    try:
        value = json.loads(line.decode(), parse_constant=readers._refuse_constant)
    except UnicodeDecodeError:
        expected = "invalid_utf8"
    except ValueError:
        expected = "malformed"
    else:
        expected = None if isinstance(value, dict) else "not_object"
    if expected is None:
        text = value.get("text")
        if not isinstance(text, str):
            expected = "no_text"
        elif any("\ud800" <= c <= "\udfff" for c in text):
            expected = "lone_surrogate"
        else:
            assert found == text
            return
    assert isinstance(found, Rejected), f"{line!r}: expected {expected}, got {found!r}"
    assert found.reason == expected


# ---------------------------------------------------------------- lines


def test_lines_bom_blanks_and_carriage_returns(tmp_path, library):
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \t\n" + GOOD + b"\n" + GOOD  # no newline at the end
    documents, counts = read(shard(write_gz(tmp_path / "l.jsonl.gz", data)))
    assert (counts.lines, counts.records, counts.blank, counts.bom) == (5, 3, 2, 1)
    assert [i for i, _ in documents] == ["l.jsonl.gz:1", "l.jsonl.gz:4", "l.jsonl.gz:5"]


@settings(max_examples=120, deadline=None)
@given(
    parts=st.lists(st.sampled_from([b"a", b"\n", b"\r", b" ", "あ".encode(), b"\xff", b"bcdefgh"])),
    block=st.integers(1, 7),
    long=st.integers(2, 12),
)
def test_lines_do_not_depend_on_blocks(tmp_path_factory, parts, block, long):
    """A line may end anywhere in a block, and be too long to hold: same documents, same counts."""
    path = tmp_path_factory.mktemp("lines") / "t.txt"
    path.write_bytes(b"".join(parts) + b"\nz")
    whole = read(shard(path, "txt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        patch.setattr(lines, "LONG", long)
        assert read(shard(path, "txt")) == whole


def test_long_json_lines_are_streamed_with_the_same_verdict(tmp_path, monkeypatch):
    """Every hostile line again, each too long to hold."""
    everything = b"\n".join(line for line, _, _ in HOSTILE.values())
    path = write_gz(tmp_path / "all.jsonl.gz", b"\xef\xbb\xbf" + everything)
    whole = read(shard(path))
    monkeypatch.setattr(lines, "BLOCK", 64)
    monkeypatch.setattr(lines, "LONG", 3)
    assert read(shard(path)) == whole


def test_memory_is_bounded_by_blocks_not_by_the_file(tmp_path):
    """64 MB of text in one line, then 400,000 tiny lines: neither is held."""
    with gzip.GzipFile(tmp_path / "big.jsonl.gz", "wb", compresslevel=1) as out:
        out.write(b'{"text": "' + b"0123456 " * (1 << 23) + b'"}\n')
        out.write(b'{"text": "x"}\n' * 400_000)
    counts, characters = ReadCounts(), 0
    tracemalloc.start()
    for item in read_shard(shard(tmp_path / "big.jsonl.gz"), counts):
        texts = item.chunks() if isinstance(item, LongText) else item.texts
        characters += sum(map(len, texts))
        del item, texts
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.accepted == 400_001
    assert characters == (1 << 26) + 400_000
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"  # seen 45: LONG is 16 MB, a block's lines 20


# ---------------------------------------------------------------- damage (reliability.md D4)

TWO = b"".join(b'{"text": "%d"}\n' % i for i in range(500))
DAMAGE = {
    "truncated": lambda g: g[:-20],
    "without_trailer": lambda g: g[:-8],
    "half": lambda g: g[: len(g) // 2],
    "trailer_short": lambda g: g[:-1],
    "bit_flip": lambda g: g[: len(g) // 2] + bytes([g[len(g) // 2] ^ 4]) + g[len(g) // 2 + 1 :],
    "wrong_crc": lambda g: g[:-8] + bytes([g[-8] ^ 1]) + g[-7:],
    "wrong_length": lambda g: g[:-1] + bytes([g[-1] ^ 1]),
    "trailing_garbage": lambda g: g + b"garbage",
    "trailing_zeros": lambda g: g + bytes(512),
    "trailing_byte": lambda g: g + b"\x1f",
    "second_member_torn": lambda g: g + g[: len(g) // 2],
    "no_bytes": lambda g: b"",
    "no_gzip": lambda g: TWO,
    "header_only": lambda g: g[:10],
    "empty_member": lambda g: gzip.compress(b"", mtime=0),
    "blank_lines": lambda g: gzip.compress(b"\n\n \n", mtime=0),
    "all_rejected": lambda g: gzip.compress(b"[]\n{}\n", mtime=0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_d04_damaged_gzip_is_refused_whole(tmp_path, name, library):
    """A truncated gzip yields half of its lines before it fails; none of them may count."""
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(DAMAGE[name](gzip.compress(TWO, mtime=0)))
    with pytest.raises(InputError) as caught:
        read(shard(path))
    assert "d.jsonl.gz" in str(caught.value)


def test_d04_concatenated_members_are_one_file(tmp_path, library):
    path = tmp_path / "m.jsonl.gz"
    middle = len(TWO) // 2 + 3  # inside a line
    path.write_bytes(gzip.compress(TWO[:middle]) + gzip.compress(b"") + gzip.compress(TWO[middle:]))
    documents, counts = read(shard(path))
    assert [t for _, t in documents] == [str(i) for i in range(500)]
    assert counts.records == 500


def test_every_cut_of_a_gzip_is_refused(tmp_path, library):
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(40)), mtime=0)
    path = tmp_path / "c.jsonl.gz"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read(shard(path))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 258, 4096])
def test_output_waiting_inside_the_decompressor_is_not_lost(tmp_path, monkeypatch, block, library):
    """Input may be used up while a full block of output hides the rest: that is no truncation."""
    monkeypatch.setattr(lines, "BLOCK", block)
    data = b'{"text": "' + b"a" * 3000 + b'"}\n' + TWO[:200].rsplit(b"\n", 1)[0]
    for reading in (1, 5, 1 << 18):
        monkeypatch.setattr(lines, "_READ", reading)
        path = write_gz(tmp_path / "w.jsonl.gz", data)
        assert b"".join(lines.blocks_of(path)) == data


def test_zstd_and_plain_give_the_same_documents(tmp_path):
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.zst"
    plain.write_bytes(TWO)
    data = pa.compress(TWO, codec="zstd", asbytes=True)
    packed.write_bytes(data + data)  # two frames
    texts = [t for _, t in read(shard(plain))[0]]
    assert [t for _, t in read(shard(packed))[0]] == texts * 2
    for broken in (data[:-3], data + b"xyz", data + b"garbage", b"", data[: len(data) // 2]):
        packed.write_bytes(broken)
        with pytest.raises(InputError):
            read(shard(packed))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing.*gone\.jsonl"):
        read(shard(tmp_path / "gone.jsonl"))


# ---------------------------------------------------------------- text


def test_txt_lines_and_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeff一行目\r\n\n  \n二行目\n\u3000\nlast".encode() + b"\n\xff\n")
    documents, counts = read(shard(path, "txt"))
    assert documents == [
        ("t.txt:1", "一行目"),
        ("t.txt:4", "二行目"),
        ("t.txt:5", "\u3000"),
        ("t.txt:6", "last"),
    ]
    assert (counts.lines, counts.blank, counts.bom) == (7, 2, 1)
    assert counts.rejected == {"invalid_utf8": 1}
    path.write_bytes("\ufeffa\r\n\nb".encode())
    documents, counts = read(shard(path, "txt", document="file"))
    assert documents == [("t.txt:1", "a\r\n\nb")]
    assert (counts.lines, counts.records, counts.bom) == (1, 1, 1)


def test_txt_val_fraction_keeps_equal_lines_on_one_side(tmp_path):
    path = tmp_path / "t.txt"
    numbers = [f"line {i % 700}" for i in range(1000)]
    path.write_text("\n".join(numbers))
    sides = {
        split: read(
            Shard(source="s", split=split, index=0, path=path, kind="txt", val_fraction=0.2)
        )
        for split in ("train", "val")
    }
    train, val = ([t for _, t in sides[s][0]] for s in ("train", "val"))
    assert sorted(train + val) == sorted(numbers)
    assert not set(train) & set(val)
    assert sides["train"][1].lines + sides["val"][1].lines == 1000
    assert 0.12 < len(val) / 1000 < 0.28


# ---------------------------------------------------------------- Parquet (reliability.md D5)


def write_parquet(path: Path, columns: dict, **more) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3, **more)
    return path


def test_parquet_rows_nulls_and_ids(tmp_path):
    texts = ["a", None, "c", "", "e\n", None, "g"]
    path = write_parquet(tmp_path / "p.parquet", {"n": list(range(7)), "text": texts})
    documents, counts = read(shard(path, "parquet"))
    assert documents == [(f"p.parquet:{i}", t) for i, t in enumerate(texts) if t is not None]
    assert counts.rejected == {"no_text": 2}
    assert counts.positions == {"no_text": ["p.parquet:1", "p.parquet:5"]}
    ids = ["x", "y", None, "z", "w", "v", "u"]
    path = write_parquet(tmp_path / "q.parquet", {"id": ids, "text": texts})  # id stands first
    documents, _ = read(shard(path, "parquet"))
    assert [i for i, _ in documents] == ["x", "q.parquet:2", "z", "w", "u"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet_string_types(tmp_path, kind):
    path = write_parquet(tmp_path / "p.parquet", {"text": pa.array(["a", "日本"], kind)})
    assert [t for _, t in read(shard(path, "parquet"))[0]] == ["a", "日本"]


def test_parquet_invalid_utf8_is_a_rejected_record(tmp_path):
    """Parquet readers do not look into strings."""
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    path = write_parquet(tmp_path / "p.parquet", {"text": raw})
    documents, counts = read(shard(path, "parquet"))
    assert [t for _, t in documents] == ["good", "fine"]
    assert counts.rejected == {"invalid_utf8": 1}


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"body": ["a"]}, "0 columns"),
        ({"text": [1, 2]}, "int64"),
        ({"text": [b"a"]}, "binary"),
        ({"text": [["a"]]}, "list"),
        ({"text": pa.array([], pa.string())}, "0 lines"),
        ({"text": pa.array([None], pa.string())}, "1 no_text"),
    ],
)
def test_d05_parquet_without_texts_is_refused(tmp_path, columns, found):
    path = write_parquet(tmp_path / "p.parquet", columns)
    with pytest.raises(InputError) as caught:
        read(shard(path, "parquet"))
    assert "p.parquet" in str(caught.value)
    assert found in str(caught.value)


def test_d05_a_column_whose_name_is_no_text_is_named(tmp_path):
    """Fuzzing found it: the library lets the decoder's own error out."""
    path = write_parquet(tmp_path / "d.parquet", {"text": ["a"], "beside": ["b"]})
    path.write_bytes(path.read_bytes().replace(b"beside", b"besid\x80"))
    with pytest.raises(InputError, match=r"d\.parquet: column text"):
        read(shard(path, "parquet"))


def test_d05_parquet_damage_is_named(tmp_path):
    """Cuts anywhere and flips in checksummed pages: refused, never another text."""
    texts = [f"document {i} " * 20 for i in range(200)]
    whole_path = write_parquet(tmp_path / "w.parquet", {"text": texts}, write_page_checksum=True)
    whole = whole_path.read_bytes()
    path = tmp_path / "d.parquet"
    for size in (0, 3, 4, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"d\.parquet: column text"):
            read(shard(path, "parquet"))
    refused = 0
    for at in range(60, len(whole) * 3 // 4, 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            found = [t for _, t in read(shard(path, "parquet"))[0]]
        except InputError:
            refused += 1
        else:
            assert found == texts, f"silently wrong after a flip at byte {at}"
    assert refused > 5


def test_parquet_empty_row_groups_are_fine(tmp_path):
    path = tmp_path / "e.parquet"
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as out:
        for part in ([], ["a"], [], ["b", "c"], []):
            out.write_table(pa.table({"text": pa.array(part, pa.string())}))
    assert [t for _, t in read(shard(path, "parquet"))[0]] == ["a", "b", "c"]


def test_batches_come_in_order_with_matching_ids(shared):
    path = shared / "data/en_shards/shard_00009.parquet"
    items = list(read_shard(shard(path, "parquet"), counts := ReadCounts()))
    assert all(isinstance(i, Batch) and len(i.texts) == len(i.ids) for i in items)
    table = pq.read_table(path).column("text").to_pylist()
    assert [t for i in items for t in i.texts] == table  # type: ignore[union-attr]
    assert counts.records == 3072
