"""The training stage on real token files: published once, resumed, refused with a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib.core import stage
from lib.train.final import Final
from stages import pretrain
from tests.conftest import HANG_S, ROOT
from tests.faults.crash import tree
from tests.train.project import PARAMS, command, make_project, outcome
from tests.train.test_observe import FAKE_HUB


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project, untouched by tests."""
    return make_project(tmp_path_factory.mktemp("project") / "p")


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of it as the current folder."""
    shutil.copytree(made, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """The project with its run trained in a process of its own, never disturbed."""
    folder = tmp_path_factory.mktemp("trained") / "p"
    shutil.copytree(made, folder)
    code, out, err = outcome(folder)
    assert code == 0, err
    (folder / "stdout.txt").write_text(out)
    return folder


def pretrain_here(*arguments: str) -> int:
    """The stage within this process."""
    run = ["--run", "gpt", *arguments] if "--run" not in arguments else list(arguments)
    return stage.main(
        pretrain.STAGE, pretrain.body, pretrain.identity, modules=pretrain.modules, argv=run
    )


def imported(err: str) -> set[str]:
    """Modules in what PYTHONPROFILEIMPORTTIME=1 makes Python say."""
    found = {line.split("|")[-1].strip() for line in err.splitlines() if "|" in line}
    assert "json" in found
    return found


def outputs(project: Path) -> dict[str, str]:
    found = tree(project / "checkpoints/gpt/final")
    return found | tree(project / "metrics/gpt")


def test_a_run_publishes_a_model_and_its_curves(trained):
    final = Final.open(trained / "checkpoints/gpt/final")
    assert final.model().config.width == 16
    assert final.provenance["steps"] == 6
    assert final.provenance["train_tokens"] == 6 * 128
    names = {p.name for p in (trained / "checkpoints/gpt/final").iterdir()}
    assert {"tokenizer.json", "token_bytes.npy", "provenance.json", "manifest.json"} <= names
    curve = (trained / "metrics/gpt/curve.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in curve] == ["step", "3", "6"]
    loss = (trained / "metrics/gpt/loss.csv").read_text().splitlines()
    first = float(loss[1].split(",")[3])
    assert abs(first - 5.703782) < 1e-5, "ln 300: the head begins at zero"
    assert "Step      6 | Loss: " in (trained / "stdout.txt").read_text()


def test_the_final_model_keeps_no_path_or_host(trained):
    for path in (trained / "checkpoints/gpt/final").iterdir():
        data = path.read_bytes()
        assert str(trained).encode() not in data, path.name
        # The text before the numbers: in those, two bytes such as "vm" stand somewhere by chance.
        is_weights = path.suffix == ".safetensors"
        text = data[8 : 8 + int.from_bytes(data[:8], "little")] if is_weights else data
        assert os.uname().nodename.encode() not in re.findall(rb"[\w.-]+", text), path.name


def test_a13_a_finished_run_is_a_no_op_that_touches_no_file(trained):
    """Torch is not even imported, which is what would take seconds."""
    watched = [p for p in trained.rglob("*") if p.is_file() and p.suffix != ".lock"]
    before = {p: p.stat().st_mtime_ns for p in watched if p.name != "stage.log"}
    code, out, err = outcome(trained, PYTHONPROFILEIMPORTTIME="1")
    assert (code, "up to date" in err, out) == (0, True, ""), err
    assert "torch" not in imported(err)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_outputs_removed_by_dvc_come_back_without_training(trained, tmp_path, monkeypatch):
    """DVC deletes outputs before a run; another stage's file beside the curves stays."""
    folder = tmp_path / "p"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    wanted = outputs(folder)
    shutil.rmtree(folder / "checkpoints/gpt/final")
    (folder / "metrics/gpt/curve.csv").unlink()
    (folder / "metrics/gpt/eval.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "lib.train.trainer", None)  # importing it would fail
    assert pretrain_here() == 0
    found = outputs(folder)
    assert found.pop("eval.json") and found == wanted


def test_a10_a_signal_commits_and_the_same_command_ends_with_the_same_bytes(project, tmp_path):
    """SIGTERM: the step in hand is committed, exit 75; then as if nothing had been."""
    process = interrupted(project, LONGER, [signal.SIGTERM])
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 75, err
    assert "saved; run the same command to continue" in err and "Traceback" not in err
    assert len(list((project / "checkpoints/gpt/work").rglob("step_*/manifest.json"))) == 1
    assert not (project / "checkpoints/gpt/final").exists()
    assert_ends_like_a_twin(project, tmp_path / "twin")


@pytest.mark.slow
def test_a10_two_signals_to_the_group_leave_at_once_and_lose_no_bit(project, tmp_path):
    """As a terminal sends them; whatever was being written bears no final name. Slow: a process."""
    process = interrupted(project, LONGER, [signal.SIGINT, signal.SIGINT])
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 75, err
    assert_ends_like_a_twin(project, tmp_path / "twin")


LONGER = [
    word
    for change in ("train.gpt.steps=30", "train.gpt.eval_every=0", "runtime.log_every=1")
    for word in ("--set", change)
]


def assert_ends_like_a_twin(project: Path, twin: Path) -> None:
    """The run of `project`, continued, publishes what an undisturbed one in `twin` publishes."""
    twin.mkdir()
    for name in ("params.yaml", "data", "scratch"):
        source = project / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, twin / name)
    for folder in (project, twin):  # monkeypatch brings the first folder back
        os.chdir(folder)
        assert pretrain_here(*LONGER) == 0
    assert outputs(project) == outputs(twin)


def interrupted(project: Path, options: list[str], signals: list[int]) -> subprocess.Popen:
    """The stage in a session of its own, sent `signals` after its first step, where it waits."""
    words = ("--run", "gpt", *options)
    process = command(project, *words, module="tests.train.held", start_new_session=True)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("Step ") for line in lines), "no step before its end"
    for number in signals:
        os.killpg(process.pid, number)
    return process


def test_e07_a_changed_parameter_begins_beside_and_its_return_finds_the_old_model(
    trained, tmp_path, monkeypatch
):
    folder = tmp_path / "p"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    wanted = outputs(folder)
    assert pretrain_here("--set", "train.gpt.steps=2") == 0
    assert outputs(folder) != wanted
    work = folder / "checkpoints/gpt/work/pretrain_gpt"
    assert len([p for p in work.iterdir() if p.is_dir()]) == 2
    monkeypatch.setitem(sys.modules, "lib.train.trainer", None)
    assert pretrain_here() == 0
    assert outputs(folder) == wanted


def test_a_reverted_parameter_returns_the_old_model_from_the_run_cache(made, tmp_path):
    """Without working state: DVC alone brings it back, and the trainer is not even started."""
    folder = tmp_path / "p"
    shutil.copytree(made, folder)
    run = [sys.executable, "-m", "stages.pretrain", "--run", "gpt", "--tokens",
           "data/tokens/bpe.manifest.json", "--tokenizer", "data/tokenizers/bpe",
           "--out", "checkpoints/gpt/final", "--curves", "metrics/gpt"]  # fmt: skip
    stage_lines = {
        "cmd": " ".join(run),
        "deps": ["data/tokens/bpe.manifest.json", "data/tokenizers/bpe"],
        "params": ["seed", "train", "model"],
        "outs": ["checkpoints/gpt/final", "metrics/gpt/curve.csv", "metrics/gpt/loss.csv"],
    }
    (folder / "dvc.yaml").write_text(json.dumps({"stages": {"train_gpt": stage_lines}}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}

    def dvc(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder,
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    dvc("init", "-q", "--no-scm")
    dvc("repro")
    wanted, params = outputs(folder), (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("steps: 6", "steps: 2"))
    dvc("repro")
    assert outputs(folder) != wanted
    shutil.rmtree(folder / "checkpoints/gpt/work")
    (folder / "params.yaml").write_text(params)
    assert "is cached - skipping run" in dvc("repro")
    assert outputs(folder) == wanted and not (folder / "checkpoints/gpt/work").exists()


def test_the_familys_file_is_part_of_the_code_that_a_run_remembers(trained):
    (state,) = (trained / "checkpoints/gpt/work/pretrain_gpt").glob("*/state.json")
    code = json.loads(state.read_text())["code"]
    assert {"lib/models/gpt.py", "lib/train/trainer.py", "lib/nn/rope.py"} <= code.keys()
    assert not [name for name in code if name.startswith("tests/")]


def test_e04_another_tokenizer_is_refused_with_both_fingerprints(project, tmp_path, capsys):
    other = make_project(tmp_path / "other", seed=2)
    place = str(other / "data/tokenizers/bpe")
    assert pretrain_here("--tokenizer", place) == 2
    err = capsys.readouterr().err
    made = json.loads((project / "data/tokenizers/bpe/tokenizer.json").read_text())["fingerprint"]
    given = json.loads((Path(place) / "tokenizer.json").read_text())["fingerprint"]
    assert "tokenizer does not match" in err and made[:8] in err and given[:8] in err


def test_a_flipped_bit_in_the_token_files_is_named_before_training(project, capsys):
    (path,) = project.rglob("train_00000.bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    assert pretrain_here() == 3
    err = capsys.readouterr().err
    assert "sha256 differs in" in err and "train_00000.bin" in err


def test_e06_mistakes_are_all_named_at_once_before_torch(project):
    text = (project / "params.yaml").read_text()
    text = text.replace("ema_decay: 0.9", "warmpu: 3\n    ema_decay: 1.5").replace("0.01", '"1e-2"')
    (project / "params.yaml").write_text(text.replace("depth: 1", "depht: 1"))
    process = command(project, "--run", "gpt", PYTHONPROFILEIMPORTTIME="1")
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 2
    for words in (
        "train.gpt.warmpu; did you mean train.gpt.warmup?",
        "train.defaults.lr is '1e-2'; give a number",
        "model.gpt.depht; did you mean model.gpt.depth?",
        "3 errors",
    ):
        assert words in err
    assert "torch" not in imported(err)


def test_an_unknown_run_is_answered_with_those_there_are(project, capsys):
    assert pretrain_here("--run", "gtp") == 2
    assert "unknown run in pretrain: gtp; choose one of gpt" in capsys.readouterr().err


def test_a_run_may_begin_with_anothers_weights(trained, tmp_path, monkeypatch, capsys):
    """Weights only: step 0, fresh optimizer; the source's manifest is a parent of the result."""
    folder = tmp_path / "p"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    text = (folder / "params.yaml").read_text()
    more = "runs:\n  tuned:\n    family: gpt\n    init_from: checkpoints/gpt/final\n"
    more += "    steps: 2\n    batch_tokens: 128\n    eval_every: 0\n    eval_bytes: 400\n"
    (folder / "params.yaml").write_text(text + more)
    assert pretrain_here("--run", "tuned") == 0
    source = Final.open(folder / "checkpoints/gpt/final")
    tuned = Final.open(folder / "checkpoints/tuned/final")
    assert tuned.provenance["parents"]["init_from"] == source.sha256
    first = (folder / "metrics/tuned/loss.csv").read_text().splitlines()[1]
    assert float(first.split(",")[3]) < 5.0, "the weights of the source are not there"
    (folder / "params.yaml").write_text(text + more + "    model:\n      depth: 2\n")
    assert pretrain_here("--run", "tuned") == 2
    assert "depth 1, here 2" in capsys.readouterr().err


@pytest.mark.parametrize(("context", "told"), [(16, "longer"), (64, "shorter")])
def test_rows_of_another_length_than_the_models_context_are_refused(project, capsys, context, told):
    """Shorter ones would leave positions that are offered to a user and were never trained."""
    assert pretrain_here("--set", f"model.gpt.context={context}") == 2
    err = capsys.readouterr().err
    assert f"rows are {told} than the model's context: rows of 32, model {context}" in err
    assert f"run the encode_tokens stage again with context {context}" in err


def test_samples_are_text_of_the_tokenizer(project, capsys):
    assert pretrain_here("--set", "train.gpt.sample_every=3", "--set", "train.gpt.steps=3") == 0
    assert sum(line.startswith("  | ") for line in capsys.readouterr().out.splitlines()) == 2


SINKS = """
  trackers: [wandb]
  hub: {repo: me/toy, every_steps: 6}
"""
BROKEN_WANDB = "def init(**_):\n    raise ConnectionError('no route to the tracker')\n"


def with_sinks(folder: Path, modules: Path) -> tuple[int, str, str]:
    """The run with a hub and a tracker, stand-ins for both first on the path."""
    text = (folder / "params.yaml").read_text()
    before = "  checkpoint_every_steps: 2\n"
    (folder / "params.yaml").write_text(text.replace(before, before.rstrip("\n") + SINKS))
    return outcome(folder, PYTHONPATH=f"{modules}:{ROOT}", SEEN=str(folder / "seen"))


def test_sinks_out_of_reach_change_no_byte_and_are_counted(trained, project, tmp_path):
    """Weights & Biases and the hub are down: one warning each, the same model, exit 0."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "wandb.py").write_text(BROKEN_WANDB)
    down = FAKE_HUB.replace('if "broken" in repo', "if True")
    (modules / "huggingface_hub.py").write_text(down)
    code, _, err = with_sinks(project, modules)
    assert code == 0, err
    assert outputs(project) == outputs(trained)
    assert err.count("tracker wandb is switched off: no route") == 1
    assert "without a whole record of this run: wandb" in err
    assert "1 pushes to me/toy, 1 failed" in err
    assert "hunter22" not in err


def test_what_the_hub_gets_is_the_exported_checkpoint(project, tmp_path):
    """Weights, card, config, every file of the tokenizer; committed before; no optimizer state.

    A slow hub misses steps between, never the finished model.
    """
    modules = tmp_path / "modules"
    modules.mkdir()
    slow = FAKE_HUB.replace("import os, sys\n", "import os, sys, time\ntime.sleep(3)\n")
    (modules / "huggingface_hub.py").write_text(slow)
    (modules / "wandb.py").write_text(BROKEN_WANDB)
    code, _, err = with_sinks(project, modules)
    assert code == 0, err
    names = set((project / "seen").read_text().partition("|")[2].split(","))
    wanted = {"model.safetensors", "README.md", "config.json", "kumiki.json", "tokenizer.json",
              "tokenizer_config.json", "tokenizer"}  # fmt: skip
    assert wanted <= names and not [n for n in names if "optimizer" in n]
    (pushed,) = (project / "checkpoints/gpt/work").glob("**/push")
    from lib.export.saved import open_folder

    assert open_folder(pushed).weights == "export"
    assert "| steps | 6 |" in (pushed / "README.md").read_text()


def test_conversations_are_framed_whatever_holds_the_model(tmp_path):
    """A step of the run, the finished model and what a hub gets: chat asks all in one way."""
    from lib.export.saved import open_folder

    project, modules = make_project(tmp_path / "p", framed=True), tmp_path / "modules"
    modules.mkdir()
    (modules / "huggingface_hub.py").write_text(FAKE_HUB)
    (modules / "wandb.py").write_text(BROKEN_WANDB)
    code, _, err = with_sinks(project, modules)
    assert code == 0, err
    work = project / "checkpoints/gpt/work"
    for place in (*work.rglob("step_6"), project / "checkpoints/gpt/final", *work.rglob("push")):
        assert open_folder(place).framed, place.name
    assert "nothing is pushed" not in err, err
    (pushed,) = work.rglob("push")
    told = json.loads((pushed / "tokenizer_config.json").read_text())
    assert "assistant" in told["chat_template"]


def test_a_tau_of_auto_is_a_number_in_the_finished_model(project):
    """Found on the averaged weights, after the last step; whoever opens the model halts by it."""
    (project / "params.yaml").write_text(PARAMS.replace("gpt:", "trm:"))
    asked = ("model.trm.halt=kl", "model.trm.halt_tau=auto")
    assert pretrain_here("--run", "trm", *(word for one in asked for word in ("--set", one))) == 0
    final = Final.open(project / "checkpoints/trm/final")
    tau = final.model().config.halt_tau
    assert isinstance(tau, float) and 0 <= tau <= 10
    assert final.provenance["steps"] == 6
