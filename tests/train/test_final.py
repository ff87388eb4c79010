"""The finished model: opens as it was written, or says what is wrong with it."""

from __future__ import annotations

import json
import random

import pytest
import torch

from lib.core.artifact import plain
from lib.core.errors import InputError, KumikiError, UserError
from lib.core.heads import config_class
from lib.models.base import load_family
from lib.train.final import Final, write_final

TOKENIZER = "7c1e90aa" + "0" * 56


@pytest.fixture
def final(tmp_path):
    """A tiny GPT, written; returns its folder and the model itself."""
    family = load_family("gpt")
    config = family.Config(depth=1, width=16, heads=2, context=8)
    model = family.Model(config, 20)
    model.init_weights(1)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "merges.bin", "manifest.json"):
        (tokenizer / name).write_text(name)
    card = {
        "family": "gpt", "config": plain(config), "vocab_size": 20, "context": 8,
        "tokenizer": TOKENIZER,
    }  # fmt: skip
    write_final(tmp_path / "final", model.state_dict(), card, {"fingerprint": "f"}, tokenizer)
    model.place("cpu", torch.float32)
    return tmp_path / "final", model


def test_a_finished_model_opens_with_the_same_logits(final):
    folder, model = final
    found = Final.open(folder, TOKENIZER)
    assert (found.family, found.vocab_size, found.context) == ("gpt", 20, 8)
    assert isinstance(found.config, config_class("gpt"))
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(found.model()(tokens)[0], model.eval()(tokens)[0])
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "config.json", "manifest.json", "merges.bin", "model.safetensors", "provenance.json",
        "tokenizer.json",
    ]  # fmt: skip
    assert (folder / "manifest.json").read_text() != "manifest.json", "the tokenizer's manifest"


def test_e04_another_tokenizer_is_refused_with_both_fingerprints(final):
    with pytest.raises(UserError, match="made with 7c1e90aa, given 02d4f1b3"):
        Final.open(final[0], "02d4f1b3" + "0" * 56)


def test_weights_of_another_size_are_refused_by_name(final):
    wanted = {n: tuple(t.shape) for n, t in final[1].state_dict().items()} | {
        "wte.weight": (21, 16)
    }
    with pytest.raises(UserError, match=r"wte.weight: \(20, 16\), the model has \(21, 16\)"):
        Final.open(final[0]).weights(wanted)


def test_every_damaged_file_is_named(final):
    rng = random.Random(3)
    for path in sorted(final[0].iterdir()):
        whole = path.read_bytes()
        for _ in range(5):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.unlink()
            path.write_bytes(damaged)
            with pytest.raises(KumikiError) as caught:
                Final.open(final[0])
            named = path.name in str(caught.value)
            assert named or path.name == "manifest.json"  # which then names the file it belies
        path.write_bytes(whole)
    (final[0] / "model.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        Final.open(final[0])


def test_no_path_or_host_of_this_machine_is_in_it(final, tmp_path):
    for path in final[0].iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    note = json.loads((final[0] / "config.json").read_text())
    assert note["format"] == "kumiki/model"
