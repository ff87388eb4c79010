"""Hostile archives (reliability.md C10): each is refused, and nothing of it is on disk."""

from __future__ import annotations

import gzip
import io
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from lib.core import files
from lib.core.archive import Limits, unpack
from lib.core.errors import InputError

GOOD = {"core.yaml": b"a: 1\n", "eval_data/x/one.jsonl": b"{}\n" * 5, "eval_data/two.jsonl": b"{}"}
NAMES = [
    "../escape", "a/../../escape", "/absolute", "//absolute", "C:/drive", "c:drive", "a\\b",
    "..\\escape", "nul\x00byte", "line\nbreak", "a//b", "..", "x" * 256, "a/" + "y" * 300,
]  # fmt: skip


def make_zip(path: Path, members, **options) -> Path:
    """members: (name or ZipInfo, bytes); duplicate names are wanted here."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members:
            info = name
            if isinstance(name, str):
                info = zipfile.ZipInfo()  # its constructor would mend the name
                info.filename = info.orig_filename = name
                info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return path


def tar_header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def tar_bytes(members) -> bytes:
    return b"".join(tar_header(n, len(d)) + padded(d) for n, d in members) + bytes(1024)


def make_tar(path: Path, members) -> Path:
    path.write_bytes(gzip.compress(tar_bytes(members), mtime=0))
    return path


def make(kind: str, folder: Path, members) -> Path:
    return (make_zip if kind == "zip" else make_tar)(folder / f"x.{kind}", list(members))


def refused(archive: Path, *parts: str, limits: Limits | None = None) -> None:
    """Refused with a sentence that names the archive; nothing was written anywhere."""
    target = archive.parent / "deep" / "target"
    with pytest.raises(InputError) as caught, files.atomic_folder(target) as part:
        part.joinpath("canary").mkdir()
        unpack(archive, part, limits=limits)
    message = str(caught.value)
    assert archive.name in message and all(p in message for p in parts), message
    assert sorted(p.name for p in archive.parent.rglob("*")) == sorted([archive.name, "deep"])


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_good_archives_are_unpacked_and_filtered(kind, tmp_path):
    members = [*GOOD.items(), ("readme.txt", b"no"), ("eval_data/x/run.py", b"no"), ("d.csv", b"")]
    archive = make(kind, tmp_path, members)
    with files.atomic_folder(tmp_path / "all") as part:
        assert len(unpack(archive, part)) == 6
    keep = ["core.yaml", "*.csv", "eval_data/**/*.jsonl"]
    with files.atomic_folder(tmp_path / "some") as part:
        assert unpack(archive, part, keep) == sorted([*GOOD, "d.csv"])
    for name, data in GOOD.items():
        path = tmp_path / "some" / name
        assert path.read_bytes() == data and stat.S_IMODE(path.stat().st_mode) == 0o644
    found = [p for p in (tmp_path / "some").rglob("*") if p.is_file()]
    assert len(found) == 4


def test_globs_stay_within_a_level(tmp_path):
    archive = make_zip(tmp_path / "x.zip", [("a.csv", b""), ("b/a.csv", b""), ("b/c/a.csv", b"")])
    for keep, expected in {
        "*.csv": ["a.csv"],
        "b/*": ["b/a.csv"],
        "b/**": ["b/a.csv", "b/c/a.csv"],
        "**/a.csv": ["a.csv", "b/a.csv", "b/c/a.csv"],
        "?.CSV": [],
    }.items():
        with files.atomic_folder(tmp_path / "out") as part:
            assert unpack(archive, part, [keep]) == expected, keep


def test_tar_long_names_folders_and_dots_are_normalised(tmp_path):
    """GNU long names, PAX records, `./` in front, and an uncompressed tar."""
    long = "d/" * 80 + "file"
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=style) as archive:
            for name in ("./a", long, "e\u0301"):
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
            folder = tarfile.TarInfo("./folder")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
        with files.atomic_folder(tmp_path / "out") as part:
            assert unpack(tmp_path / "x.tar", part) == sorted(["a", long, "\u00e9"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_c10_names_that_leave_the_folder(kind, name, tmp_path):
    if kind == "tar.gz":
        record = f"path={name}\n".encode()
        length = len(record) + 4  # three digits and a blank, for names of this length
        record = b"%03d " % length + record
        data = tar_header("h", len(record), tarfile.XHDTYPE) + padded(record)
        data += tar_header("short") + bytes(1024)
        archive = tmp_path / "x.tar.gz"
        archive.write_bytes(gzip.compress(data))
    else:
        archive = make(kind, tmp_path, [("a", b"first"), (name, b"x")])
    refused(archive, "archive refused")


@pytest.mark.parametrize(
    "mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK]
)
def test_c10_zip_links_and_devices(mode, tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (mode | 0o777) << 16
    refused(make_zip(tmp_path / "x.zip", [(info, b"/etc/passwd")]), "a link or a device")


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"7", b"S", b"K", b"?"])
def test_c10_tar_links_and_devices(kind, tmp_path):
    data = tar_header("link", kind=kind, link="/etc/passwd") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    refused(tmp_path / "x.tar", "a link, a device or sparse")


def test_c10_tar_writes_through_a_link(tmp_path):
    """A link first, then a file below it: the classic way out."""
    data = tar_header("d", kind=tarfile.SYMTYPE, link=str(tmp_path))
    (tmp_path / "x.tar").write_bytes(data + tar_bytes([("d/escape", b"x")]))
    refused(tmp_path / "x.tar", "a link")


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2000])
def test_c10_encrypted_members(flag, tmp_path):
    archive = make_zip(tmp_path / "x.zip", [("a", b"x")])
    data = bytearray(archive.read_bytes())
    at = data.rfind(b"PK\1\2")
    data[at + 8 : at + 10] = flag.to_bytes(2, "little")
    archive.write_bytes(data)
    refused(archive, "'a' is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_c10_other_methods(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("a", b"x" * 100)
    refused(tmp_path / "x.zip", "unknown method")


@pytest.mark.filterwarnings("ignore:Duplicate name")  # it is made on purpose
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize(
    "names",
    [
        ("A.txt", "a.txt"), ("stra\u00dfe", "STRASSE"), ("\u00e9", "e\u0301"), ("a", "a"),
        ("D/x", "d/y"), ("a", "a/b"), ("a/b", "a"), ("a", "./a"),
    ],
)  # fmt: skip
def test_c10_names_that_are_one_on_some_system(kind, names, tmp_path):
    refused(make(kind, tmp_path, [(n, b"x") for n in names]), "archive refused")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_c10_expansion(kind, tmp_path):
    refused(make(kind, tmp_path, [("zeros", bytes(20 << 20))]), "expand", "200 times")


def test_c10_expansion_of_one_member(tmp_path):
    """Behind incompressible company the archive as a whole looks harmless."""
    noise = random.Random(3).randbytes(200_000)
    archive = make_zip(tmp_path / "x.zip", [("noise", noise), ("zeros", bytes(20 << 20))])
    refused(archive, "'zeros' is expanding more than 200 times")


def test_c10_expansion_in_all_of_a_zip(tmp_path):
    """Members that share one stretch of data: none is above the ratio, all together are."""
    archive = make_zip(tmp_path / "x.zip", [("a", random.Random(1).randbytes(50_000))])
    data = archive.read_bytes()
    at = data.rfind(b"PK\1\2")
    entry, end = data[at : data.rfind(b"PK\5\6")], bytearray(data[data.rfind(b"PK\5\6") :])
    count = 300
    end[8:12] = struct.pack("<HH", count, count)
    end[12:16] = (len(entry) * count).to_bytes(4, "little")
    archive.write_bytes(data[:at] + entry * count + bytes(end))
    refused(archive, "archive refused")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_c10_sizes(kind, tmp_path):
    noise = random.Random(0).randbytes(3000)
    archive = make(kind, tmp_path, [("a", noise), ("b", noise)])
    refused(archive, "a has 3000 bytes, at most 2999", limits=Limits(member_bytes=2999))
    refused(archive, "more than 5999 bytes in all", limits=Limits(total_bytes=5999))
    with files.atomic_folder(tmp_path / "out") as part:
        assert len(unpack(archive, part, limits=Limits(member_bytes=3000, total_bytes=6000))) == 2


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_c10_members(kind, tmp_path):
    archive = make(kind, tmp_path, [(f"{n}", b"") for n in range(11)])
    refused(archive, "more than 10 members", limits=Limits(members=10))


@pytest.mark.parametrize("kind", ["zip64", "lying zip", "tar.gz"])
def test_c10_a_million_entries_cost_no_memory(kind, tmp_path):
    """The count is bounded before an object is built for each."""
    archive = tmp_path / "x"
    if kind == "tar.gz":
        headers = b"".join(tar_header(str(n)) for n in range(10_002))
        archive.write_bytes(gzip.compress(headers + headers[-512:] * 90_000, 1))
    else:
        entry = bytearray(46)  # a central directory entry with a name of one byte
        entry[:4], entry[28] = b"PK\1\2", 1
        directory = (bytes(entry) + b"a") * 1_000_000
        total = len(directory)
        locator = b""
        if kind == "zip64":
            record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 10**6, 10**6, total, 0)
            locator = record + struct.pack("<4sLQL", b"PK\6\7", 0, total, 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 5, 5, total if not locator else 5, 0, 0)
        archive.write_bytes(directory + locator + end)
    tracemalloc.start()
    try:
        refused(archive, "more than 10000 members")
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def patch_size(archive: Path, size: int, crc: int | None = None) -> None:
    """State another size (and checksum) in both headers of the only member."""
    data = bytearray(archive.read_bytes())
    for magic, at_crc, at_size in ((b"PK\3\4", 14, 22), (b"PK\1\2", 16, 24)):
        at = data.find(magic)
        data[at + at_size : at + at_size + 4] = size.to_bytes(4, "little")
        if crc is not None:
            data[at + at_crc : at + at_crc + 4] = crc.to_bytes(4, "little")
    archive.write_bytes(data)


@pytest.mark.parametrize("stated", [5, 9, 11, 400])
def test_c10_zip_sizes_unlike_the_header(stated, tmp_path):
    """Ten bytes come. The library alone would give the first five, if their checksum is stated."""
    body = b"0123456789"
    archive = make_zip(tmp_path / "x.zip", [("a", body)])
    patch_size(archive, stated, zlib.crc32(body[:stated]))
    refused(archive)


def test_c10_tar_ends_early(tmp_path):
    whole = tar_bytes([("a", b"x" * 2000), ("b", b"y" * 700)])
    for length in (100, 512, 1500, 2100, 3000, 3700):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        refused(tmp_path / "x.tar", "damaged archive")
        (tmp_path / "x.tar").unlink()


def test_c10_tar_damage_is_never_an_early_end(tmp_path):
    """A library's walk stops at a damaged header and calls it a day: half the files, no error."""
    data = bytearray(tar_bytes([("a", b"x"), ("b", b"y"), ("c", b"z")]))
    data[1024 + 5] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with tarfile.open(tmp_path / "x.tar") as library:
        assert library.getnames() == ["a"]
    refused(tmp_path / "x.tar", "damaged archive")
    (tmp_path / "x.tar").write_bytes(tar_bytes([("a", b"x")]) + b"garbage" * 100)
    refused(tmp_path / "x.tar", "data after the end")


def test_c10_tar_headers_are_bounded(tmp_path):
    record = tar_header("h", 1 << 20, tarfile.XHDTYPE) + bytes(1 << 20)
    (tmp_path / "x.tar").write_bytes(record + tar_bytes([("a", b"")]))
    refused(tmp_path / "x.tar", "too long a header")
    small = tar_header("h", 0, tarfile.XGLTYPE)
    (tmp_path / "x.tar").write_bytes(small * 5 + tar_bytes([("a", b"")]))
    refused(tmp_path / "x.tar", "too long a header")


def test_c10_tar_padding_is_bounded(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_bytes([("a", b"")]) + bytes(5 << 20)))
    refused(tmp_path / "x.tar.gz", "too much padding")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_c10_any_damage_is_a_sentence(kind, tmp_path):
    """Seeded flips and cuts: read as it was, or an InputError; never a traceback."""
    rng, good = random.Random(5), [*GOOD.items(), ("noise", random.Random(2).randbytes(900))]
    whole = make(kind, tmp_path, good).read_bytes()
    archive, outcomes = tmp_path / "damaged", {"read": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        archive.write_bytes(data)
        out = tmp_path / "out"
        out.mkdir()
        try:
            names = unpack(archive, out)
            outcomes["read"] += 1
            for name in set(names) & GOOD.keys():  # a flip in a date or in a zip's name is not seen
                assert (out / name).read_bytes() == GOOD[name]
        except InputError:
            outcomes["refused"] += 1
            assert list(out.iterdir()) == []
        files.remove_tree(out)
    assert outcomes["refused"] > 100, outcomes
    assert outcomes["read"] > 5 or kind != "zip", outcomes  # a gzip's checksum covers all of a tar


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\5\6" + bytes(18), b"\x1f\x8b", b"<html>" * 200])
def test_c10_what_is_no_archive(data, tmp_path):
    (tmp_path / "x").write_bytes(data)
    if data.startswith(b"PK\5\6"):  # an empty zip is one
        assert unpack(tmp_path / "x", tmp_path) == []
    else:
        refused(tmp_path / "x")
