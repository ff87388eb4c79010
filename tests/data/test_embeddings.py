"""Embeddings in scratch: rows are the table's, a killed run goes on, others are refused."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lib.core import artifact, chunkstore, files, hosts
from lib.core.chunkstore import RowFile
from lib.core.data_settings import CheckpointTable, Gpt2Table, HiddenVectors, RandomTable
from lib.core.data_settings import Embeddings as Section
from lib.core.errors import EnvError, InputError, Interrupted, UserError
from lib.core.refusal import Refused
from lib.core.rng import torch_generator
from lib.core.run_settings import Runtime
from lib.data import embeddings, vector_source
from lib.data.embeddings import Embeddings, open_store, precompute
from lib.models import cvfp, gpt
from lib.models.base import build
from lib.train.final import write_final
from tests.train.project import make_project

SECTION = Section(
    source="random", mode="memmap", chunk_tokens=300, random=RandomTable(width=8, seed=1)
)
V = 300
HIDDEN = cvfp.Hidden(layer=1, context=7)


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
    plain = torch.randn(V, 8, generator=torch_generator(1, "embeddings"))
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


@pytest.fixture
def hidden(project):
    """A GPT of two blocks, and the section that takes vectors from behind its first."""
    config = gpt.Config(depth=2, width=16, heads=2, context=12)
    model = build(gpt, config, V, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)  # a zero projection would hide the past
    card = {
        "family": "gpt", "config": artifact.plain(config), "vocab_size": V, "context": 12,
        "tokenizer": "unknown",
    }  # fmt: skip
    write_final(project / "gpt", model.state_dict(), card, {"fingerprint": "f"})
    return model, replace(
        SECTION, source="hidden", checkpoint=CheckpointTable(path=str(project / "gpt")),
        hidden=HiddenVectors(layer=1, context=7),
    )  # fmt: skip


def test_hidden_rows_are_those_of_the_blocks_at_their_place(project, hidden):
    model, section = hidden
    manifest = run(project, section)
    found = opened(project)
    store, offsets = found.store, found.store.documents("train").offsets
    for start, stop in itertools.pairwise(int(x) for x in offsets[:4]):
        ids = found.ids(start, stop)
        for first in range(0, len(ids), 7):
            window = ids[None, first : first + 7]
            x = model.apply_unit(0, model.embed(window, (0, 0)), (0, 0))
            wanted = torch.nn.functional.layer_norm(x, (16,), eps=1e-5)[0]
            own = found.rows(start + first, start + first + window.shape[1])
            assert (own - wanted).abs().max() < 2e-3, "fp16 of numbers below 4"
    config = cvfp.Config(
        width=16, hidden=replace(HIDDEN, model=artifact.plain(model.config)), phase="fixed_point"
    )
    learner = build(cvfp, config, V, seed=1)
    learner.read_from(found)
    row = next(n for n in range(store.rows) if store.row_positions(n)[0] in offsets)
    read = found.packed(np.array([row]))[0]
    start = int(store.row_positions(row)[0])
    ids = torch.from_numpy(store.tokens("train", start, len(read)).astype(np.int64))
    alone = learner.contextual(ids[:, None])[0][:, 0]
    assert (alone - read).abs().max() < 2e-3, "the model makes what the file holds"
    other = build(cvfp, replace(config, hidden=replace(config.hidden, layer=2)), V, seed=1)
    with pytest.raises(UserError, match="other hidden states"):
        other.read_from(found)
    with pytest.raises(Refused, match="no function of the id"):
        replace(section, mode="gather")
    assert not manifest.counts["function_of_token"]


def test_hidden_rows_are_the_same_bytes_after_a_kill_and_after_a_rebuild(project, hidden):
    _, section = hidden
    whole = run(project, section)
    folder = artifact.scratch_folder("embeddings", whole.key)
    files.remove_tree(folder)
    asked = iter([None, None])
    with pytest.raises(StopIteration):
        run(project, section, should_stop=lambda: next(asked))
    assert run(project, section).to_bytes() == whole.to_bytes()
    data = bytearray((folder / "embeddings.npy").read_bytes())
    data[5000] ^= 1
    (folder / "embeddings.npy").write_bytes(bytes(data))
    opened(project)
    (folder / "blocks.safetensors").unlink()
    with pytest.raises(InputError, match=r"blocks\.safetensors"):
        opened(project)


def test_hidden_states_outside_the_model_are_refused(project, hidden):
    _, section = hidden
    for own in (HiddenVectors(layer=3), HiddenVectors(context=13)):
        with pytest.raises(UserError, match="outside the model"):
            run(project, replace(section, hidden=own))


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

    def fetch(job, policy, *, log):
        if not job.target.is_file():
            asked.append(job.url)
            files.write_bytes(job.target, data)

    monkeypatch.setattr(vector_source.fetch, "fetch", fetch)
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
