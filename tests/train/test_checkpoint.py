"""Checkpoints: nothing damaged is read, nothing foreign is continued, two good ones stay."""

from __future__ import annotations

import json
import random
import shutil
import stat
import subprocess
import sys

import pytest
import torch

from lib.core import files
from lib.core.artifact import Manifest, describe
from lib.core.errors import InputError, UserError
from lib.train.checkpoint import VERSION, Checkpoints, read_tensors, verify, write_tensors
from tests.conftest import ROOT

IDENTITY = {"fingerprint": "a" * 16, "vocab_size": 11, "tokenizer": "7c1e90aa" + "0" * 56}
STATE = {"scaler": {}, "told": {}}


def groups(step: int) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(step)
    weights = {"a.weight": torch.randn(16, 8, generator=draw), "b": torch.randn(3, generator=draw)}
    random_state = {"cpu.0": torch.arange(64, dtype=torch.uint8)}
    return {
        "model": weights,
        "optimizer": {"b.step": torch.tensor(float(step))},
        "rng": random_state,
    }


@pytest.fixture
def kept(tmp_path):
    """Checkpoints after steps 3 and 6."""
    said: list[str] = []
    found = Checkpoints(tmp_path / "work", IDENTITY, 2, said.append)
    for step in (3, 6):
        found.commit(step, groups(step), STATE)
    return found, said


def again(kept, **changes) -> tuple[Checkpoints, list[str]]:
    """As the next process sees it."""
    said: list[str] = []
    return Checkpoints(kept[0].folder, {**IDENTITY, **changes}, 2, said.append), said


def test_a_checkpoint_reads_back_equal(kept):
    found = again(kept)[0].newest_good()
    assert found is not None and found.step == 6
    for name, tensors in groups(6).items():
        read = found.tensors(name)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[n], t) for n, t in tensors.items())
    assert found.tensors("ema") == {}
    modes = {stat.S_IMODE(p.stat().st_mode) for p in found.path.iterdir()}
    assert modes == {0o644}


# ---------------------------------------------------------------- damage


def damages(folder, seed: int):
    """100 ways to damage a checkpoint: flipped bits, truncations, missing and empty files."""
    rng = random.Random(seed)
    names = sorted(p.name for p in folder.iterdir())
    for number in range(100):
        path = folder / rng.choice(names)
        data = bytearray(path.read_bytes())
        kind = number % 5
        if kind == 3:
            data = data[: rng.choice([0, 1, len(data) // 2, len(data) - 1])]
        elif kind == 4 and number % 2:
            data = None
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield path, data


def test_e03_every_damage_is_seen_and_the_older_one_taken(kept):
    """100 of 100: safetensors itself loads a flipped bit without complaint."""
    folder = kept[0].path(6)
    for path, data in list(damages(folder, seed=5)):
        whole = path.read_bytes()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        found, said = again(kept)
        newest = found.newest_good()
        assert newest is not None and newest.step == 3, f"{path.name} was believed"
        assert len(said) == 1 and "checkpoint passed over" in said[0], said
        path.write_bytes(whole)
    assert again(kept)[0].newest_good().step == 6


def test_e03_all_damaged_is_an_error_never_a_fresh_start(kept):
    for step in (3, 6):
        (kept[0].path(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint is whole") as caught:
        again(kept)[0].newest_good()
    assert caught.value.code == 3
    assert again(kept)[0].steps() == [6, 3]


def test_e03_a_checkpoint_swapped_with_another_runs_is_passed_over(kept, tmp_path):
    other = Checkpoints(tmp_path / "other", {**IDENTITY, "fingerprint": "b" * 16}, 2)
    other.commit(6, groups(60), STATE)
    shutil.rmtree(kept[0].path(6))
    shutil.copytree(other.path(6), kept[0].path(6))
    found, said = again(kept)
    assert found.newest_good().step == 3
    assert "fingerprint does not match" in said[0] and "a" * 16 in said[0] and "b" * 16 in said[0]


def test_e03_two_checkpoints_under_swapped_names_are_passed_over(kept):
    three, six = kept[0].path(3), kept[0].path(6)
    six.rename(six.with_name("x"))
    three.rename(six)
    assert "another step's name" in str(caught_reason(kept))


def caught_reason(kept):
    with pytest.raises(InputError) as caught:
        again(kept)[0].newest_good()
    return caught.value


def test_e04_another_tokenizer_vocabulary_or_family_is_refused_with_both_values(kept):
    for name, value in (
        ("tokenizer", "02d4f1b3" + "0" * 56),
        ("vocab_size", 12),
        ("family", "trm"),
    ):
        with pytest.raises(UserError, match=f"{name} does not match in the checkpoint") as caught:
            again(kept, **{name: value})[0].newest_good()
        shown = str(caught.value)
        assert str(value)[:8] in shown and str(IDENTITY.get(name))[:8] in shown
        assert caught.value.code == 2


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_e05_another_format_version_is_refused_by_number(kept, version):
    for step in (3, 6):
        folder = kept[0].path(step)
        state = json.loads((folder / "state.json").read_text())
        files.write_json(folder / "state.json", {**state, "version": version})
        old = Manifest.read(folder / "manifest.json")
        Manifest(kind=old.kind, recipe=old.recipe, files=describe(folder)).write(
            folder / "manifest.json"
        )
    with pytest.raises(UserError, match=f"format version in .*: {version}, this is {VERSION}"):
        again(kept)[0].newest_good()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_e09_a_pickle_under_a_weights_name_is_never_unpickled(kept, tmp_path):
    """With its hash in the manifest, so that the format alone must refuse it."""
    import pickle

    folder = kept[0].path(6)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    (folder / "model.pt").write_bytes(pickle.dumps(Bomb()))
    old = Manifest.read(folder / "manifest.json")
    Manifest(kind=old.kind, recipe=old.recipe, files=describe(folder)).write(
        folder / "manifest.json"
    )
    with pytest.raises(InputError, match="not a safetensors file") as caught:
        verify(folder).tensors("model")
    assert caught.value.code == 3


def test_another_shape_is_refused_before_anything_is_read(kept):
    found = kept[0].newest_good()
    with pytest.raises(UserError, match=r"a.weight: \(16, 8\), the model has \(16, 9\)"):
        found.tensors("model", {"a.weight": (16, 9), "b": (3,)})
    with pytest.raises(UserError, match=r"c: absent, the model has \(1,\)"):
        found.tensors("model", {"a.weight": (16, 8), "b": (3,), "c": (1,)})


# ---------------------------------------------------------------- retention


def test_two_stay_and_an_older_one_goes_only_behind_two_good_ones(kept):
    found, _ = kept
    found.commit(9, groups(9), STATE)
    assert found.steps() == [9, 6]
    (found.path(6) / "model.safetensors").write_bytes(b"damaged")
    later, _ = again(kept)
    later.newest_good()
    later.commit(12, groups(12), STATE)  # 6 is damaged: 12 and 9 are the good ones
    assert later.steps() == [12, 9]
    (later.path(9) / "rng.safetensors").write_bytes(b"damaged")
    last, _ = again(kept)
    last.commit(15, groups(15), STATE)
    assert last.steps() == [15, 12, 9][:2]


def test_a_damaged_one_does_not_count_among_those_kept(kept):
    """After damage to the newer of two, a third commit must not remove the older good one."""
    found, _ = again(kept)
    (found.path(6) / "model.safetensors").write_bytes(b"damaged")
    found.commit(9, groups(9), STATE)
    good = [s for s in found.steps() if found._is_good(s)]
    assert good == [9, 3]


def test_e10_a_reader_of_a_retired_checkpoint_gets_a_sentence(kept):
    found = kept[0].newest_good()
    kept[0].commit(9, groups(9), STATE)
    kept[0].commit(12, groups(12), STATE)
    with pytest.raises(UserError, match="not there any more"):
        read_tensors(found.path / "model.safetensors")


def test_best_is_a_second_name_for_the_same_bytes(kept):
    found, _ = kept
    found.set_best(6)
    best = found.folder / "best"
    assert (best / "model.safetensors").samefile(found.path(6) / "model.safetensors")
    assert verify(best).step == 6
    found.commit(9, groups(9), STATE)
    found.commit(12, groups(12), STATE)
    assert found.steps() == [12, 9]
    assert verify(best).step == 6, "retention took the best one along"
    found.set_best(None)
    assert not best.exists()


def test_keeping_one_checkpoint_is_refused(tmp_path):
    from lib.core.refusal import Refused
    from lib.core.run_settings import Runtime

    with pytest.raises(Refused, match="keep_last: 1; use 2 or more"):
        Runtime(keep_last=1)


# ---------------------------------------------------------------- the tensor file


def test_tied_weights_are_written_once_and_named(tmp_path):
    table = torch.randn(5, 4)
    write_tensors(tmp_path / "x.safetensors", {"wte": table, "head": table, "z": torch.zeros(2)})
    read = read_tensors(tmp_path / "x.safetensors")
    assert sorted(read) == ["head", "wte", "z"]
    assert torch.equal(read["head"], table)
    assert (tmp_path / "x.safetensors").stat().st_size < 2 * table.nbytes + 8 + 300
    shapes = {"wte": (5, 4), "head": (5, 4), "z": (2,)}
    assert read_tensors(tmp_path / "x.safetensors", shapes).keys() == shapes.keys()


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    """Rows of one stacked tensor, as the optimizer holds them, and a transposed matrix."""
    stack = torch.randn(3, 50, 40)
    tensors = {f"m{i}": stack[i] for i in range(3)} | {"t": stack[0].mT}
    write_tensors(tmp_path / "x.safetensors", tensors)
    read = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(read[n], t) for n, t in tensors.items())
    write_tensors(tmp_path / "one.safetensors", {"m1": stack[1]})
    assert (tmp_path / "one.safetensors").stat().st_size < stack[1].nbytes + 500


def test_equal_tensors_give_equal_bytes_in_every_process(tmp_path):
    """Two metadata keys would come out in random order; ours is one."""
    script = (
        "import sys, torch; from pathlib import Path; from lib.train.checkpoint import *;"
        "write_tensors(Path(sys.argv[1]), {n: torch.ones(3) for n in sys.argv[2:]})"
    )
    there, here = tmp_path / "there.safetensors", tmp_path / "here.safetensors"
    subprocess.run([sys.executable, "-c", script, there, "a", "b", "c"], cwd=ROOT, check=True)
    write_tensors(here, {n: torch.ones(3) for n in "cba"})
    found = {there.read_bytes(), here.read_bytes()}
    assert len(found) == 1
    header = found.pop()
    length = int.from_bytes(header[:8], "little")
    assert list(json.loads(header[8 : 8 + length])["__metadata__"]) == ["kumiki"]
