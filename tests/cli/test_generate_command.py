"""The `kumiki` command as a user meets it: what goes to stdout, which code, how fast."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.cli import main as cli
from lib.data.vocab.tokenizer import load_tokenizer
from lib.export import saved
from lib.export.generate import Sampling, generate
from lib.export.hf import stop_ids
from lib.models import ramgpt
from tests.conftest import HANG_S, ROOT, cpu_seconds
from tests.project import add_model, make_project, run_module

COMMAND = (sys.executable, "-m", "lib.cli.main")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("日本語のプロジェクト"))
    add_model(folder)
    return folder


@pytest.fixture
def kumiki(project, monkeypatch, capfdbinary):
    """Runs a command in this process: (code, stdout, stderr)."""
    monkeypatch.chdir(project)

    def call(*words: str) -> tuple[int, bytes, str]:
        capfdbinary.readouterr()
        code = cli.main(words)
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return call


def expected(project: Path, prompt: str, new: int, sampling: Sampling) -> str:
    opened = saved.open_model("gpt", project)
    ids = [opened.tokenizer.bos_id, *opened.tokenizer.encode(prompt).tolist()]
    stop = stop_ids(opened.tokenizer)
    row = generate(opened.model, ids, sampling, max_new_tokens=new, stop_ids=stop)[0]
    return opened.tokenizer.decode(row.ids)


# ---------------------------------------------------------------- the parser


@pytest.mark.parametrize(
    "words, code",
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        (["generate", "--temprature", "1"], 2),
        (["generate", "--top-k", "many"], 2),
        (["dream"], 2),
        ([], 2),
    ],
)
def test_help_and_parse_errors_need_no_torch(words, code, tmp_path):
    script = (
        "import sys\n"
        "from lib.cli.main import main\n"
        "try:\n"
        f"    code = main({words!r})\n"
        "except SystemExit as end:\n"
        "    code = end.code or 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "raise SystemExit(code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    else:
        assert done.stdout


def test_help_costs_little_more_than_a_parser():
    """Seen 1.1 times an interpreter that imports as much of the standard library."""
    ours = "from lib.cli.main import main; main(['generate', '--help'])"
    assert cpu_seconds(ours) < 4 * cpu_seconds("import argparse, dataclasses, json, pathlib")


def test_every_command_of_the_help_has_its_module(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        module = f"lib.cli.commands.{name}"
        assert name in text and importlib.util.find_spec(module) is not None


# ---------------------------------------------------------------- generate


def test_stdout_is_the_text_and_nothing_else(project, kumiki):
    code, out, err = kumiki("generate", "gpt", "--prompt", "the list", "--max-new-tokens", "20")
    assert code == 0
    assert out.decode() == expected(project, "the list", 20, Sampling())
    assert "checkpoints/gpt/final" in err.splitlines()[0]
    for word in ("seed 0", "new_tokens", "tokens_per_s", "stop length", "temperature 0.8"):
        assert word in err, word


def test_the_same_seed_gives_the_same_text(kumiki):
    words = ("generate", "gpt", "--prompt", "a", "--max-new-tokens", "15")
    assert kumiki(*words)[1] == kumiki(*words, "--no-stream")[1]
    assert kumiki(*words)[1] != kumiki(*words, "--seed", "1")[1]


def test_prompts_come_from_file_and_stdin(project, kumiki, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes("猫の".encode()[:-1])  # cut inside a character
    words = ("generate", "gpt", "--temperature", "0", "--max-new-tokens", "9")
    first = kumiki(*words, "-f", str(path))
    assert first[0] == 0
    with path.open("rb") as stream:
        monkeypatch.setattr(sys, "stdin", _Wrapped(stream))
        assert kumiki(*words)[1] == first[1]


class _Wrapped:
    def __init__(self, stream) -> None:
        self.buffer = stream


def test_json_is_one_document(kumiki):
    code, out, _ = kumiki(
        "generate", "gpt", "--prompt", "x", "--json", "--n", "3", "--logprobs",
        "--max-new-tokens", "5",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and len(found["texts"]) == 3
    for text in found["texts"]:
        assert len(text["logprobs"]) == len(text["ids"]) and max(text["logprobs"]) <= 0
        assert text["stop"] in ("eos", "length")
    assert found["seed"] == 0 and found["peak_memory_bytes"] > 0


def test_stop_strings_end_the_text(project, kumiki):
    words = ("generate", "gpt", "--prompt", "the", "--max-new-tokens", "30")
    whole = kumiki(*words)[1].decode()
    stop = whole[5:8]
    code, out, err = kumiki(*words, "--stop", stop)
    assert out.decode() == whole[: whole.index(stop)]
    assert code == 0 and "stop stop" in err


def test_the_context_ends_a_text_and_is_named(kumiki):
    _, _, err = kumiki("generate", "gpt", "--prompt", "", "--temperature", "0")
    assert "stop context" in err or "stop eos" in err


def test_echo_puts_the_prompt_in_front(kumiki):
    words = ("generate", "gpt", "--prompt", "abc", "--max-new-tokens", "3")
    assert kumiki(*words, "--echo")[1] == b"abc" + kumiki(*words)[1]


def test_score_is_the_evaluations_number(project, kumiki, tmp_path):
    from lib.eval.bpb import validate
    from lib.eval.scorer import Rules

    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox 猫\n" * 20)
    code, out, _ = kumiki("generate", "gpt", "--score", str(path), "--json")
    opened = saved.open_model("gpt", project)
    rules = Rules.of(opened.tokenizer, "bos", 64)
    wanted = validate(opened.model, [("x", path.read_text())], opened.tokenizer, rules)
    assert code == 0
    assert json.loads(out)["bpb"] == wanted.bpb
    assert kumiki("generate", "gpt", "--score", str(path))[1].startswith(b"bpb ")


@pytest.mark.parametrize(
    "words, code, parts",
    [
        (["nothing"], 2, "no model in checkpoints: nothing; run `dvc repro train_nothing`"),
        (["--temperature", "-1"], 2, "temperature is -1"),
        (["--max-new-tokens", "0"], 2, "nothing to generate"),
        (["gpt", "--raw"], 2, "one set of weights"),
        (["gpt", "--depth", "3"], 2, "no depth"),
        (["gpt", "--score", "absent.txt"], 2, "cannot read"),
        (["x.pt"], 2, "x.pt; it is never opened"),
        (["gpt", "--prompt", "a" * 4000], 2, "prompt fills the context"),
        (["gpt", "--checkpoint", "gpt"], 2, "two models"),
    ],
)
def test_errors_are_one_line_with_a_remedy(kumiki, words, code, parts):
    given = [] if any(w in words for w in ("--score", "--prompt")) else ["--prompt", "a"]
    found, out, err = kumiki("generate", *words, *given)
    last = err.splitlines()[-1]
    assert (found, out) == (code, b"")
    assert last.startswith("error: ") and parts in last and ";" in last


def test_another_tokenizer_is_refused(project, kumiki, tmp_path):
    other = make_project(tmp_path, texts=40)
    code, _, err = kumiki(
        "generate", "gpt", "--prompt", "a", "--tokenizer", str(other / "data/tokenizers/bpe")
    )
    assert code == 2 and "tokenizer differs" in err and "leave out --tokenizer" in err


def test_the_newest_whole_model_is_taken_without_a_name(project, tmp_path, monkeypatch, kumiki):
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    old = tmp_path / "p/checkpoints/gpt/final"
    os.utime(old / "manifest.json", (1, 1))
    new = add_model(tmp_path / "p", "other", seed=9)
    words = ("generate", "--prompt", "a", "--max-new-tokens", "2")
    assert "checkpoints/other/final" in kumiki(*words)[2]
    weights = new / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    code, _, err = kumiki(*words)
    assert code == 0 and "warning: passed over: sha256 differs" in err
    assert "model: checkpoints/gpt/final" in err
    named = kumiki("generate", str(new), "--prompt", "a")
    assert named[0] == 3 and "model.safetensors" in named[2]
    shutil.rmtree(tmp_path / "p/checkpoints")
    code, _, err = kumiki(*words)
    assert code == 2 and "no model in checkpoints" in err


def test_a_checkpoint_gives_averaged_or_raw_weights(project, tmp_path, monkeypatch, kumiki):
    import torch

    from lib.models import gpt
    from lib.models.base import build
    from lib.train.checkpoint import Checkpoints
    from tests.project import CONFIG

    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    shutil.rmtree(tmp_path / "p/checkpoints")
    fingerprint = load_tokenizer(tmp_path / "p/data/tokenizers/bpe").fingerprint
    identity = {"family": "gpt", "vocab_size": 300, "tokenizer": fingerprint}
    work = tmp_path / "p/checkpoints/gpt/work/pretrain_gpt/abc"
    raw, averaged = (build(gpt, CONFIG, 300, seed=seed).state_dict() for seed in (1, 2))
    for step in (3, 12):
        Checkpoints(work, identity).commit(step, {"model": raw, "ema": averaged}, {})
    for weights, wanted in (("ema", averaged), ("raw", raw)):
        opened = saved.open_model("gpt", tmp_path / "p", weights=weights)
        assert "step 12" in opened.weights
        for name, tensor in opened.model.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
    code, _, err = kumiki("generate", "gpt", "--raw", "--prompt", "a", "--max-new-tokens", "2")
    assert code == 0 and "step 12, raw" in err
    older = str(work.relative_to(tmp_path / "p") / "step_3")
    for command in (("generate", "--prompt", "a"), ("chat", "--once", "a")):
        words = (*command, "--max-new-tokens", "2", "--checkpoint")
        for model in ("gpt", "checkpoints/gpt"):
            for checkpoint in (older, str(Path(older).absolute()), "step_3"):
                code, _, err = kumiki(*words, checkpoint, model)
                assert code == 0 and f"model: {older} (step 3" in err, err
        add_model(tmp_path / "p", "other")
        for checkpoint in (older, "step_3", "checkpoints/gpt/../gpt", "checkpoints"):
            code, _, err = kumiki(*words, checkpoint, "other")
            assert code == 2 and "two models named: other and" in err, err
        copied = tmp_path / "p/checkpoints/other/work/result/final"
        shutil.copytree(tmp_path / "p/checkpoints/other/final", copied, dirs_exist_ok=True)
        assert "model: checkpoints/other/final" in kumiki(*words, "final", "other")[2]


# ---------------------------------------------------------------- as a process


def test_export_opens_outside_of_the_project(project, tmp_path):
    made = run_module(project, "stages.export", "--run", "gpt")
    assert made.returncode == 0, made.stderr.decode()
    assert b"native, NanoChatForCausalLM" in made.stderr
    folder = project / "checkpoints/gpt/export"
    words = ("--prompt", "the", "--max-new-tokens", "12", "--temperature", "0")
    done = run_module(
        tmp_path, "lib.cli.main", "generate", str(folder), *words,
        environment={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == expected(project, "the", 12, Sampling(temperature=0))
    raw = run_module(tmp_path, "lib.cli.main", "generate", str(folder), "--raw", *words)
    assert raw.returncode == 2 and b"holds one set of weights" in raw.stderr
    (folder / "tokenizer.json").chmod(0o644)
    again = run_module(project, "stages.export", "--run", "gpt")
    assert again.returncode == 0 and b"up to date" in again.stderr


def test_an_export_is_made_anew_when_code_that_goes_along_changed(project, monkeypatch):
    """Even by a comment, which no hash of syntax sees: the files are copied word for word."""
    from lib.core import stage
    from lib.export import hf, sources
    from stages import export

    words = ["--run", "gpt", "--set", "export.form=auto_map"]
    monkeypatch.chdir(project)

    def exported() -> str:
        made = stage.main(
            export.STAGE, export.body, export.identity, modules=export.modules, argv=words
        )
        assert made == 0
        return Path("checkpoints/gpt/export/lib_models_gpt.py").read_text()

    before, plain = exported(), sources.auto_map_sources
    for module in (sources, hf):
        commented = lambda names: {name: text + "# x" for name, text in plain(names).items()}  # noqa: E731
        monkeypatch.setattr(module, "auto_map_sources", commented)
    assert exported() == before + "# x"


def test_outside_of_a_project_a_name_is_no_model(tmp_path):
    done = run_module(tmp_path, "lib.cli.main", "generate", "gpt", "--prompt", "a")
    assert done.returncode == 2 and b"inside the project" in done.stderr


def test_a_closed_pipe_ends_quietly(project):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, "generate", "gpt", "--prompt", "a", "--max-new-tokens", "50"],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(HANG_S) == 0, err
    assert "Traceback" not in err and "Broken pipe" not in err


@pytest.mark.parametrize("command", [("generate", "--prompt", "a b"), ("chat", "--once", "a b")])
def test_weights_that_wait_in_ram_give_the_same_text(kumiki, project, command):
    """Larger than the device is no other model; the engine in use is told (ramgpt.md 4.16)."""
    config = ramgpt.Config(depth=2, width=16, heads=2, context=32)
    add_model(project, "gpt2", module=ramgpt, config=config)
    words = (command[0], "gpt2", *command[1:], "--max-new-tokens", "9", "--offload")
    code, text, told = kumiki(*words, "on")
    assert code == 0 and "stream: on | 2 units" in told, told
    assert kumiki(*words, "off")[1] == text and len(text) > 3
    assert "stream:" not in kumiki(*words, "auto")[2], "a CPU has nothing to wait for"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_models_of_one_moment_are_tried_in_the_order_of_their_names(fast_folder, order):
    """Not in that of the folder on disk, which follows when and where it was made."""
    for run in order:
        for place in (f"{run}/final", f"c/work/{run}/step_7"):
            path = fast_folder / "checkpoints" / place / "manifest.json"
            path.parent.mkdir(parents=True)
            path.touch()
            os.utime(path, ns=(10**18, 10**18))
    found = [p.parent.name for p in saved._places(None, fast_folder)]
    found += [p.parent.name for p in saved._places("c", fast_folder)]
    assert found == ["b", "a", "b", "a"]
