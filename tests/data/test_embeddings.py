"""Embeddings in scratch: rows are the table's, a killed run goes on, others are refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lib.core import artifact, chunkstore, files, hosts
from lib.core.chunkstore import RowFile
from lib.core.data_settings import Embeddings as Section
from lib.core.data_settings import Gpt2Table, RandomTable
from lib.core.errors import EnvError, InputError, Interrupted, UserError
from lib.core.run_settings import Runtime
from lib.data import embeddings
from lib.data.embeddings import Embeddings, open_store, precompute
from tests.train.project import make_project

SECTION = Section(
    source="random", mode="memmap", chunk_tokens=300, random=RandomTable(width=8, seed=1)
)
V = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(made, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.delenv("KUMIKI_SCRATCH", raising=False)
    monkeypatch.setattr(chunkstore, "SPARE_BYTES", 0)
    return tmp_path / "p"


def run(project, section=SECTION, **more):
    manifest = precompute(
        section, project / "data/tokens/bpe.manifest.json", Runtime(), lambda line: None, **more
    )
    manifest.write(project / "data/embeddings.manifest.json")
    return manifest


def opened(project) -> Embeddings:
    tokens = project / "data/tokens/bpe.manifest.json"
    return Embeddings.open(project / "data/embeddings.manifest.json", tokens, open_store(tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_row_is_the_normalised_table_row_of_its_id(project, dtype):
    manifest = run(project, replace(SECTION, dtype=dtype))
    folder = artifact.scratch_folder("embeddings", manifest.key)
    rows = np.load(folder / "embeddings.npy", mmap_mode="r")
    table, ids = (np.load(folder / f"{name}.npy") for name in ("table", "token_ids"))
    assert rows.offset == 4096 and np.array_equal(rows, table[ids])
    assert rows.dtype == ("float16" if dtype == "float16" else "uint16")
    plain = torch.randn(V, 8, generator=embeddings.torch_generator(1, "embeddings"))
    wanted = torch.nn.functional.layer_norm(plain, (8,), eps=1e-5)
    assert (opened(project).table() - wanted).abs().max() < 2e-2
    assert len(np.load(folder / "offsets.npy")) == manifest.counts["documents"] + 1


def test_memmap_and_gather_read_the_same_vectors(project):
    run(project)
    read = opened(project)
    run(project, replace(SECTION, mode="gather"))
    looked = opened(project)
    assert read.has_rows and not looked.has_rows
    assert torch.equal(read.rows(5, 500), looked.rows(5, 500))
    assert torch.equal(torch.cat(list(read.stream(3, 700, 64))), looked.rows(3, 700))
    store, numbers = read.store, np.arange(min(9, read.store.rows))
    ids = np.empty((len(numbers), store.context + 1), np.int64)
    for number, row in enumerate(ids):
        store.read_row(number, row)
    wanted = looked.table()[torch.from_numpy(ids[:, :-1])]
    assert torch.equal(read.packed(numbers), wanted)
    starts = read.starts(0, read.tokens)
    assert torch.equal(starts, read.ids(0, read.tokens) == read.reset_id)


def test_a_killed_run_goes_on_with_the_first_missing_chunk(project):
    whole = run(project)
    folder = artifact.scratch_folder("embeddings", whole.key)
    chunks = -(-whole.counts["tokens"] // 300)
    for stop_at in (1, chunks - 1):
        files.remove_tree(folder)
        left = [stop_at]

        def asked(left=left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted("stop")

        with pytest.raises(Interrupted):
            run(project, should_stop=asked)
        part = folder / "embeddings.npy.part"
        assert part.is_file() and not (folder / "embeddings.npy").exists()
        calls = []
        again = run(project, should_stop=lambda calls=calls: calls.append(1))
        assert len(calls) == chunks - stop_at, "finished chunks are not written again"
        assert again.to_bytes() == whole.to_bytes()


def test_a_flipped_bit_in_the_last_chunk_is_found_and_mended(project):
    whole = run(project)
    folder = artifact.scratch_folder("embeddings", whole.key)
    path = folder / "embeddings.npy"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(bytes(data))
    found = opened(project)  # rebuilt from the table, compared with the manifest
    assert files.sha256_file(path) == next(
        e.sha256 for e in whole.files if e.path == "embeddings.npy"
    )
    assert torch.equal(found.rows(0, 50), found.table()[found.ids(0, 50)])


def test_a_damaged_table_and_a_damaged_journal_are_named(project):
    whole = run(project)
    folder = artifact.scratch_folder("embeddings", whole.key)
    (folder / "table.npy").write_bytes(b"x" + (folder / "table.npy").read_bytes()[1:])
    with pytest.raises(InputError, match=r"table\.npy"):
        opened(project)
    run(project)
    (folder / "embeddings.npy").rename(folder / "embeddings.npy.part")
    (folder / "journal.jsonl").write_text('{"chunk": 0}\n{"chunk": 1, "crc32": 5}\n')
    with pytest.raises(InputError, match=r"journal is damaged.*line 1"):
        run(project)


def test_other_token_files_and_vocabularies_are_refused(project):
    run(project)
    manifest = project / "data/tokens/bpe.manifest.json"
    store = open_store(manifest)
    other = project / "other.json"
    other.write_bytes(b"{}")
    with pytest.raises(UserError, match="other token files"):
        Embeddings.open(project / "data/embeddings.manifest.json", other, store)
    save_file({"wte.weight": torch.ones(V - 1, 4)}, project / "model.safetensors")
    files.write_json(project / "manifest.json", {})
    with pytest.raises(UserError, match="different vocabularies"):
        table = replace(SECTION.checkpoint, path=str(project))
        run(project, replace(SECTION, source="checkpoint", checkpoint=table))


def test_a_disk_that_is_too_small_is_refused_before_any_file(project, monkeypatch):
    monkeypatch.setattr("lib.core.files.free_bytes", lambda place: 1000)
    with pytest.raises(EnvError, match="disk too small"):
        run(project)
    assert not (project / "scratch/embeddings").exists()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_is_taken_from_its_pinned_file_alone(project, monkeypatch, prefix):
    """A stand-in with the real names; asked for once, its hash and its vocabulary are checked."""
    draw = torch.Generator().manual_seed(1)
    tensors = {
        f"{prefix}wte.weight": torch.randn(V, 768, generator=draw),
        f"{prefix}ln_f.weight": torch.rand(768, generator=draw),
        f"{prefix}ln_f.bias": torch.rand(768, generator=draw),
    }
    save_file(tensors, project / "there.safetensors")
    data = (project / "there.safetensors").read_bytes()
    own = open_store(project / "data/tokens/bpe.manifest.json").fingerprint
    pin = Gpt2Table(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), tokenizer=own)
    section = replace(SECTION, source="gpt2", gpt2=pin, mode="gather")
    asked = []

    def fetch(url, target, policy, *, size, sha256, log):
        if not target.is_file():
            asked.append(url)
            files.write_bytes(target, data)

    monkeypatch.setattr(embeddings.fetch, "fetch", fetch)
    run(project, section)
    run(project, section)
    assert len(asked) == 1
    with pytest.raises(UserError, match="tokenizer is not that of the table"):
        run(project, replace(section, gpt2=replace(pin, tokenizer="0" * 64)))
    e = [tensors[f"{prefix}{n}"] for n in ("wte.weight", "ln_f.weight", "ln_f.bias")]
    wanted = torch.nn.functional.layer_norm(e[0], (768,), e[1], e[2], 1e-5)
    assert (opened(project).table() - wanted).abs().max() < 4e-3


def test_gpt2_without_a_network_says_where_the_file_belongs(project, monkeypatch):
    def nothing(self, host, port, log):
        raise hosts.Trouble("no address", reached=False)

    monkeypatch.setattr(hosts.Policy, "addresses", nothing)
    monkeypatch.setattr(hosts.Clock, "pause", lambda *a, **k: None)
    with pytest.raises(EnvError, match="source: checkpoint"):
        own = open_store(project / "data/tokens/bpe.manifest.json").fingerprint
        run(project, replace(SECTION, source="gpt2", mode="gather", gpt2=Gpt2Table(tokenizer=own)))


def test_vectors_that_fp16_cannot_hold_are_refused(project, monkeypatch):
    monkeypatch.setattr(embeddings, "source_table", lambda *a: torch.full((V, 8), float("nan")))
    with pytest.raises(InputError, match="not finite"):
        run(project)


def test_the_header_tells_the_key(project):
    manifest = run(project)
    folder = artifact.scratch_folder("embeddings", manifest.key)
    with pytest.raises(InputError, match="another generation"):
        RowFile.open(
            folder / "embeddings.npy", {"kind": "embeddings", "key": "0" * 16, "dtype": "float16"}
        )
