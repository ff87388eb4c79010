"""The messages that the commands promise: code, what, value, remedy, one line.

A loss that is not finite, and an interruption: tests/train/test_trainer.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.cli import estimate, machines
from lib.cli import main as cli
from lib.core import files, params
from lib.core.errors import EnvError, report_lines
from lib.core.kernel_choice import missing
from lib.core.lock import exclusive_lock
from tests.project import add_model, make_project, run_module


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("messages"))
    add_model(folder)
    make_project(folder / "other", texts=40)
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def change(old: str, new: str) -> None:
    path = Path("params.yaml")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def flip(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).unlink()
    Path(path).write_bytes(data)


GENERATE = ("generate", "gpt", "--prompt", "a")
MODEL = "checkpoints/gpt/final/model.safetensors"
SECRET = ("runtime: {", "runtime: {hub: {repo: a/b, every_steps: 1, hf_token: hf_abcdefghij}, ")
COMMANDS = {
    "key": (("model:\n  gpt: {width", "model:\n  gpt: {widht"), ("config",), 2,
            ("params.yaml", "model.gpt.widht", "did you mean", "width")),
    "profile": ((), ("config", "--profile", "trm_jp"), 2,
                ("profile", "params.yaml", "trm_jp", "choose one of small")),
    "model": ((), ("generate", "trm", "--prompt", "a"), 2,
              ("no model in checkpoints: trm", "run `dvc repro train_trm`", "folder")),
    "pickle": ((), ("generate", "step_1000.pt", "--prompt", "a"), 2,
               ("step_1000.pt", "never opened", "safetensors")),
    "tokenizer": ((), (*GENERATE, "--tokenizer", "other/data/tokenizers/bpe"), 2,
                  ("tokenizer differs in checkpoints/gpt/final", "given", "leave out --tokenizer")),
    "secret": (SECRET, ("config",), 2,
               ("params.yaml", "runtime.hub.hf_token", "export HF_TOKEN")),
    "damage": (MODEL, GENERATE, 3, ("sha256 differs", MODEL, "expected", "run the stage")),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_where_and_what_to_do(name, project, capsys):
    prepare, words, code, parts = COMMANDS[name]
    if isinstance(prepare, str):
        flip(prepare)
    elif prepare:
        change(*prepare)
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("error: ") and "; " in last, err
    assert all(part in last for part in parts), last
    assert "hf_abcdefghij" not in err


STAGES = {
    "file": (("stages.download_shards",), 2, ("missing", "data/local", "a", "download_shards")),
    "kernels": (("stages.pretrain", "--run", "gpt"), 2,
                ("kernels not available", "gpt", "triton", "pip install", "reference")),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_what_where_and_what_to_do(name, project):
    words, code, parts = STAGES[name]
    if name == "kernels":
        if not missing():
            pytest.skip("triton is installed, so nothing is missing")
        change("runtime: {", "runtime: {kernels: triton, ")
    done = run_module(project, *words)
    last = next(x for x in done.stderr.decode().splitlines()[::-1] if x.startswith("error"))
    assert (done.returncode, last.startswith("error: "), "; " in last) == (code, True, True), last
    assert all(part in last for part in parts), last


def test_a_full_disk_a_small_gpu_and_a_busy_run_are_sentences(project, monkeypatch):
    with pytest.raises(EnvError) as full:
        files.check_space(Path("scratch"), 10**18)
    told = report_lines(full.value)[0]
    assert told.startswith("error: disk too small in scratch: ") and "needed" in told
    assert " free; " in told and "set KUMIKI_SCRATCH" in told
    card = machines.Machine(name="card", flops=1e9, vram_bytes=1e6, ram_bytes=1e12)
    monkeypatch.setattr(estimate, "this_machine", lambda: card)
    change("device: cpu", "device: auto")
    with pytest.raises(EnvError) as small:
        estimate.preflight(params.load(), "pretrain", "gpt")
    told = report_lines(small.value)[0]
    assert "GPU memory too small for train" in told and "present; " in told
    assert told.index("device_batch_size") < told.index("width"), "knobs in order of effect"
    busy = exclusive_lock(Path("checkpoints/gpt"))
    with exclusive_lock(Path("checkpoints/gpt")), pytest.raises(EnvError) as held, busy:
        pass
    told = report_lines(held.value)[0]
    assert "checkpoints/gpt is busy: pid " in told and "wait for it, or stop it" in told
