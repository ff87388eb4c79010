"""Exports opened by transformers as a stranger would: equal logits, equal greedy text, no leaks."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.core.data_settings import BpeTokenizer
from lib.core.errors import InputError, UserError
from lib.data.vocab import chat
from lib.data.vocab.tokenizer import Tokenizer, load_tokenizer, train_bpe, write_tokenizer
from lib.export import hf
from lib.export.generate import Sampling, generate
from lib.export.saved import open_folder
from lib.models import gpt, load_family, trm
from lib.models.base import build
from tests.conftest import HANG_S
from tests.test_family_contract import TINY, T, every_family

pytest.importorskip("transformers", reason="exports are opened with transformers")

TOY = {"depth": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}
TEXT = "the function returns a list of values and the class holds them. " * 3


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    model = train_bpe(
        [TEXT, "吾輩は猫である"], BpeTokenizer(kind="bpe", documents="x", vocab_size=300)
    )
    write_tokenizer(folder, Tokenizer(model), {}, "0" * 16)
    return folder


def moved_apart(model: torch.nn.Module) -> None:
    """Zero heads would make any two models agree."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def exportable(tokenizer_folder: Path, **switches) -> hf.Exportable:
    tokenizer = load_tokenizer(tokenizer_folder)
    config = gpt.Config(**{**TOY, **switches})
    model = build(gpt, config, tokenizer.vocab_size, seed=3)
    moved_apart(model)
    return hf.Exportable(
        family="gpt",
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        boundary="bos",
        framed=False,
        facts={"run": "toy"},
    )


def opened(folder: Path, **options):
    """As a stranger does: the dtype is the one that the folder names."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@every_family
def test_every_family_opens_elsewhere(tokenizer_folder, tmp_path, name, i):
    """With transformers and the folder alone: it asks for nothing else. And with ours."""
    tokenizer, family = load_tokenizer(tokenizer_folder), load_family(name)
    config = family.Config(**TINY.get(name, [{}])[i])
    model = build(family, config, tokenizer.vocab_size, seed=3).eval()
    moved_apart(model)
    config, model = model.exported(config)
    what = hf.Exportable(
        family=name, config=config, model=model, tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder, boundary="bos", framed=False, facts={},
    )  # fmt: skip
    assert hf.export(what, tmp_path, "auto_map").startswith("auto_map")
    for path in tmp_path.glob("*.py"):
        assert not re.search(r"^\s*(from|import) lib\b", path.read_text(), re.MULTILINE), path
    elsewhere, here = opened(tmp_path, trust_remote_code=True), open_folder(tmp_path).model
    tokens = TOKENS[:, :T]
    with torch.no_grad():
        wanted = model(tokens)[0]
        assert torch.equal(elsewhere(tokens).logits, wanted)
        assert torch.equal(here(tokens)[0], wanted)


def ours(what: hf.Exportable) -> torch.Tensor:
    with torch.no_grad():
        return what.model(TOKENS)[0]


@pytest.mark.parametrize("switches", [{}, {"kv_heads": 4, "mlp_ratio": 3}, {"vocab_pad": 64}])
def test_base_equals_transformers_own_class(tokenizer_folder, tmp_path, switches):
    what = exportable(tokenizer_folder, **switches)
    assert hf.export(what, tmp_path).startswith("native")
    theirs = opened(tmp_path)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    with torch.no_grad():
        assert (theirs(TOKENS).logits - ours(what)).abs().max() == 0.0
    assert theirs.config.pad_token_id is None
    assert theirs.config.bos_token_id == what.tokenizer.bos_id


def test_greedy_text_is_the_same_there(tokenizer_folder, tmp_path):
    what = exportable(tokenizer_folder)
    hf.export(what, tmp_path)
    prompt = [what.tokenizer.bos_id, *what.tokenizer.encode("the function").tolist()]
    rows = generate(
        what.model,
        prompt,
        Sampling(temperature=0),
        max_new_tokens=20,
        stop_ids=hf.stop_ids(what.tokenizer),
    )
    theirs = opened(tmp_path).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
    )
    made = theirs[0, len(prompt) :].tolist()
    assert made[: len(rows[0].ids)] == rows[0].ids
    assert len(made) - len(rows[0].ids) <= 1  # they return the id that stopped them


@pytest.mark.parametrize("switches", [{"variant": "modern"}, {"softcap": 0.0}, {}])
def test_our_own_code_gives_the_same_logits_elsewhere(tokenizer_folder, tmp_path, switches):
    what = exportable(tokenizer_folder, **switches)
    said = hf.export(what, tmp_path, "auto_map")
    assert said.startswith("auto_map")
    model = opened(tmp_path, trust_remote_code=True)
    assert type(model.model).__module__.startswith("transformers_modules")
    with torch.no_grad():
        out = model(TOKENS, labels=TOKENS)
    assert torch.equal(out.logits, ours(what))
    wanted = torch.nn.functional.cross_entropy(
        ours(what)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    )
    assert out.loss == wanted
    made = model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    mine = generate(what.model, TOKENS[0].tolist(), Sampling(temperature=0), max_new_tokens=8)
    assert made[0, TOKENS.shape[1] :].tolist()[: len(mine[0].ids)] == mine[0].ids[:8]
    with pytest.raises(ValueError, match="right"):
        model(TOKENS, attention_mask=torch.tensor([[0] + [1] * 39] * 2))


def test_a_strange_process_opens_it_without_this_project(tokenizer_folder, tmp_path):
    """Only the folder, torch and transformers; the working folder is elsewhere."""
    what = exportable(tokenizer_folder, variant="modern")
    folder = tmp_path / "export"
    hf.export(what, folder)
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"t = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "assert not any(n == 'lib' or n.startswith('lib.') for n in sys.modules)\n"
        "ids = t('the 猫', return_tensors='pt').input_ids\n"
        "print(json.dumps([ids[0].tolist(), m(ids).logits[0, -1].tolist()]))\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    ids, logits = json.loads(run.stdout.splitlines()[-1])
    assert ids == what.tokenizer.encode("the 猫").tolist()
    with torch.no_grad():
        wanted = what.model(torch.tensor([ids]))[0][0, -1]
    assert torch.allclose(torch.tensor(logits), wanted, rtol=0, atol=1e-5)


def test_a_recursion_opens_there_with_its_drawn_vectors(tokenizer_folder, tmp_path):
    """y0 and z0 are buffers that lie in the weights file: filled anew they would be others."""
    tokenizer = load_tokenizer(tokenizer_folder)
    config = trm.Config(width=32, heads=4, context=64)
    model = build(trm, config, tokenizer.vocab_size, seed=3).eval()
    what = replace(
        exportable(tokenizer_folder), family="trm", config=config, model=model, boundary="both"
    )
    assert hf.export(what, tmp_path).startswith("auto_map")
    theirs = opened(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, ours(what))
    card = (tmp_path / "README.md").read_text()
    assert "trust_remote_code" in card and "no GGUF form" in card


def test_native_is_refused_by_the_name_of_the_switch(tokenizer_folder, tmp_path):
    what = exportable(tokenizer_folder, qk_scale=1.1)
    with pytest.raises(UserError, match="qk_scale"):
        hf.export(what, tmp_path, "native")
    assert "qk_scale" in hf.export(what, tmp_path)


def test_export_restores_the_familys_own_weights(tokenizer_folder, tmp_path):
    from safetensors.torch import load_file

    for form in ("native", "auto_map"):
        what = exportable(tokenizer_folder, vocab_pad=64)
        hf.export(what, tmp_path / form, form)
        note = hf.read_names(tmp_path / form)
        assert gpt.Config(**note["config"]) == what.config
        shapes = {name: tensor.shape for name, tensor in what.model.state_dict().items()}
        state = hf.restore(load_file(tmp_path / form / hf.WEIGHTS), note, shapes)
        model = build(gpt, what.config, note["vocab_size"], weights=state)
        with torch.no_grad():
            assert torch.equal(model(TOKENS)[0], ours(what))
        assert load_tokenizer(tmp_path / form / hf.TOKENIZER).fingerprint == note["tokenizer"]


def test_a_template_is_written_where_rows_were_framed_and_gives_their_ids(
    tokenizer_folder, tmp_path
):
    """transformers' template and our encoding must make the same ids of a conversation."""
    from transformers import AutoTokenizer

    what = exportable(tokenizer_folder)
    hf.export(what, tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    hf.export(replace(what, framed=True), tmp_path / "framed")
    talk = [("user", "the list"), ("assistant", "of values")]
    (ids,), _ = chat.encode([chat.frame(talk)], what.tokenizer, 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "framed").apply_chat_template(
        [{"role": role, "content": content} for role, content in talk], return_dict=False
    )
    assert theirs == [what.tokenizer.bos_id, *ids.tolist()]
    assert (tmp_path / "framed" / chat.CARD).is_file()


def test_files_are_plain_and_equal_every_time(tokenizer_folder, tmp_path):
    what = exportable(tokenizer_folder, variant="modern")
    for name in "ab":
        hf.export(what, tmp_path / name)
    first = sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {p.name for p in first} >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "README.md", "modeling_kumiki.py",
    }  # fmt: skip
    for path in first:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path.name
        twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == twin.read_bytes(), path.name
        if path.suffix in (".py", ".json", ".md"):
            assert str(Path.cwd()) not in path.read_text()


def test_a_secret_or_a_path_stops_the_export(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    for text in ("canary-0123456789", str(Path.home() / "x"), "hf_abcdefghijkl"):
        what = exportable(tokenizer_folder)
        object.__setattr__(what, "facts", {"note": text})
        with pytest.raises(InputError, match="path or a secret"):
            hf.export(what, tmp_path)
