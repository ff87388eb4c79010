"""The commands around the models: success, each exit code, JSON, recipes, scratch, push, chat."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.cli import data_costs, estimate, machines
from lib.cli import main as cli
from lib.cli.commands import chat
from lib.cli.commands.config import load_profile
from lib.core import dag, files, params
from lib.core.artifact import Manifest
from lib.core.lock import exclusive_lock
from lib.models.base import load_family
from lib.train.inputs import require_context
from tests.conftest import ROOT
from tests.project import add_model, make_project, run_module
from tests.test_family_contract import TINY

D20 = {"steps": 21_400, "tokens": 11_219_763_200, "parameters": 560_988_160}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("プロジェクト" + "x" * 150))
    add_model(folder)
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "p"


@pytest.fixture
def kumiki(project, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def has_family(name: str) -> None:
    if not (ROOT / f"lib/models/{name}.py").is_file():
        pytest.skip(f"family {name} is not in the tree yet")


# ---------------------------------------------------------------- all commands


def test_outside_a_project_only_some_commands_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status"]) == 2
    assert "no project here" in capsys.readouterr().err
    assert cli.main(["completion", "bash"]) == 0
    assert "_kumiki_runs" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"harness"}))
def test_help_of_every_command(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert "usage: kumiki" in capsys.readouterr().out


@pytest.mark.parametrize("words", (["config"], ["status"], ["recipe"], ["scratch", "list"]))
def test_json_is_one_document_and_text_has_no_controls(kumiki, words):
    code, out, _ = kumiki(*words, "--json")
    assert code == 0 and json.loads(out) is not None and out.count("\n") == 1
    code, out, err = kumiki(*words)
    assert code == 0 and not {"\x1b", "\r"} & set(out + err)


@pytest.fixture(scope="module")
def read_only(made) -> list[str]:
    """Words that run a command in `made` with nothing there to be written, whoever we are."""
    place = shlex.quote(str(made))
    mounts = f"mount --bind {place} {place} && mount -o remount,ro,bind {place}"
    words = ["unshare", "--mount", "sh", "-c", f'{mounts} && cd {place} && exec "$@"', "sh"]
    probe = subprocess.run([*words, "touch", "x"], capture_output=True, text=True, check=False)
    if "Read-only" not in probe.stderr:
        pytest.skip(f"no read-only mount here: {probe.stderr.strip()}")
    return words


@pytest.mark.parametrize(
    "words",
    [["doctor"], ["estimate"], ["config"], ["status"], ["recipe"], ["scratch", "list"],
     ["generate", "gpt", "--prompt", "a", "--max-new-tokens", "3"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_commands_work_under_the_c_locale_in_a_read_only_checkout(made, read_only, words, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    environment["KUMIKI_SCRATCH"] = str(tmp_path)  # doctor asks for a scratch that can be written
    command = [*read_only, sys.executable, "-m", "lib.cli.main", *words]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_completion_is_a_script_that_bash_reads(kumiki, tmp_path):
    code, out, _ = kumiki("completion", "bash")
    (tmp_path / "kumiki.bash").write_text(out)
    assert code == 0
    subprocess.run(["bash", "-n", str(tmp_path / "kumiki.bash")], check=True)


# ---------------------------------------------------------------- config, status, doctor


def test_config_names_the_place_of_a_value(kumiki, project):
    values = {v["key"]: v for v in json.loads(kumiki("config", "--json")[1])["values"]}
    assert values["train.gpt.steps"] == {
        "key": "train.gpt.steps", "value": 1, "origin": "train.gpt.steps", "default": None,
    }  # fmt: skip
    assert values["train.gpt.model.width"]["origin"] == "model.gpt.width"
    assert values["train.gpt.lr"]["origin"] == "default"
    (project / ".kumiki.yaml").write_text("runtime: {threads: 3}\n")
    values = {v["key"]: v for v in json.loads(kumiki("config", "--changed", "--json")[1])["values"]}
    assert values["runtime.threads"]["origin"] == ".kumiki.yaml runtime.threads"
    assert "train.gpt.lr" not in values
    code, _, err = kumiki("config", "--profile", "large")
    assert code == 2 and "choose one of small" in err


def test_config_marks_the_active_profile_whichever_is_shown(kumiki, project):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text + "  other: {seed: 8}\n")
    assert kumiki("config")[1].splitlines()[:2] == ["profiles: other, *small", ""]
    shown = kumiki("config", "--profile", "other")[1].splitlines()
    assert shown[:3] == ["profiles: other, *small", "values of other", ""]


STAGE = """
stages:
  make:
    cmd: exec python -m stages.extract_texts --out made.txt
    deps: [params.yaml]
    params: [seed]
    outs: [made.txt]
"""


def test_status_tells_missing_done_stale_and_running(kumiki, project):
    (project / "dvc.yaml").write_text(STAGE)

    def state() -> dict:
        return json.loads(kumiki("status", "--json")[1])["stages"][0]

    assert state()["state"] == "missing"
    units = project / "data/work/extract_texts/abc/units"
    files.write_bytes(units / "one", b"1")
    assert state()["state"] == "interrupted" and "units are kept" in state()["reason"]
    shutil.rmtree(project / "data/work")
    (project / "made.txt").write_text("x")
    from lib.cli import pipeline

    locked = {
        "cmd": "exec python -m stages.extract_texts --out made.txt",
        "deps": [{"path": "params.yaml", "md5": pipeline.md5(Path("params.yaml"))}],
        "params": {"params.yaml": {"seed": 7}},
    }
    (project / "dvc.lock").write_text(json.dumps({"stages": {"make": locked}}))
    assert state()["state"] == "done"
    with exclusive_lock(project / "made.txt"):
        found = state()
        assert found["state"] == "running" and found["pid"] == os.getpid()
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("seed: 7", "seed: 8"))
    assert state()["state"] == "stale"


@pytest.mark.parametrize("pause", ("-1", "0", "nan", "inf"))
def test_status_watches_at_times_that_a_clock_knows(kumiki, pause):
    code, out, err = kumiki("status", "--watch", pause)
    assert code == 2 and not out and f"--watch {pause}" in err and "above 0" in err


def test_status_verify_finds_a_flipped_bit(kumiki, project):
    assert kumiki("status", "--verify")[0] == 0
    path = next((project / "scratch/tokens").glob("*/train_00000.bin"))
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    code, out, err = kumiki("status", "--verify")
    assert code == 3 and "train_00000.bin" in out and err.startswith("error: ")


def test_doctor_passes_for_small_and_fails_on_a_broken_kernel(kumiki, monkeypatch):
    from lib import kernels

    code, out, _ = kumiki("doctor")
    assert code == 0 and out.splitlines()[-1] == "small: everything needed is here"
    if not hasattr(kernels, "report"):
        pytest.skip("kernels cannot be asked yet")
    wrong = kernels.Decision("scan", False, "self-test: error 9.1 of the bound", 9.1, 1e-3)
    monkeypatch.setattr(kernels, "report", lambda device, dtype: [wrong])
    code, out, err = kumiki("doctor", "--kernels", "--json")
    found = json.loads(out)
    assert code == 4 and not found["ok"] and found["rows"][-1]["state"] == "fail"
    assert "kernel scan" in err and "reference" in err


def test_doctor_fails_where_the_estimate_does(kumiki, monkeypatch):
    """Memory and disk of the profile asked for, not of `small`; the two commands never disagree."""
    from lib.cli import checkup

    here = machines.this_machine()
    small = {name: row for name, row in doctor_rows(kumiki)[1].items() if name in SPACE}
    assert {row["state"] for row in small.values()} == {"ok"} and small["RAM"]["needed"]
    for change, name in (({"ram_bytes": 10}, "RAM"), ({"disk_bytes": 10}, "scratch space")):
        poor = replace(here, **change)
        for place in (checkup, machines):
            monkeypatch.setattr(place, "this_machine", lambda poor=poor: poor)
        code, rows = doctor_rows(kumiki)
        assert code == kumiki("estimate")[0] == 4
        assert {n for n, row in rows.items() if row["state"] == "fail"} == {name}
    needed = small["scratch space"]["needed"]
    assert f"(needed: {needed})" in kumiki("doctor")[2]


SPACE = ("RAM", "scratch space")


def doctor_rows(kumiki) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, _ = kumiki("doctor", "--json")
    return code, {row["name"]: row for row in json.loads(out)["rows"]}


def test_doctor_fails_where_triton_is_wished_for_and_cannot_run(kumiki, project):
    """phase7.md 12.17; training with the same wish stops with exit 2 (test_dispatch)."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("here it can run")
    (project / ".kumiki.yaml").write_text("runtime: {kernels: triton}\n")
    code, out, err = kumiki("doctor", "--json")
    failed = [row for row in json.loads(out)["rows"] if row["state"] == "fail"]
    assert code == 4 and not json.loads(out)["ok"]
    assert failed and all("reference" in row["remedy"] for row in failed), failed
    assert "triton" in err or "kernel" in err


def test_doctor_full_keeps_rates_and_judges_the_model(kumiki, monkeypatch):
    from lib.cli import checkup, selfcheck

    monkeypatch.setattr(checkup, "measure_rates", lambda: {"matmul_flops": 8e10})
    code, out, _ = kumiki("doctor", "--family", "gpt", "--full", "--json")
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and rows["gpt causality"]["state"] == rows["gpt gradients"]["state"] == "ok"
    assert files.read_json(machines.cache_file()) == {"matmul_flops": 8e10}
    monkeypatch.setattr(selfcheck, "verify", lambda *a: {"causality": "editing token 1 changes"})
    code, _, err = kumiki("doctor", "--family", "gpt", "--full")
    assert code == 4 and "gpt causality: editing token 1 changes" in err and "gpt.py" in err


def test_doctor_shows_no_secret(kumiki, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    out = kumiki("doctor")[1]
    assert "HF_TOKEN is set" in out and "abcdefgh" not in out


# ---------------------------------------------------------------- estimate


def shipped(monkeypatch, profile: str):
    monkeypatch.chdir(ROOT)
    return load_profile(profile)


@pytest.mark.parametrize("profile", params.read_yaml(ROOT / "params.yaml")["profiles"])
def test_a_profiles_own_runs_have_rows_as_long_as_their_models_context(monkeypatch, profile):
    """Training refuses others, which a user would learn after hours of data (gpt.md 13)."""
    settings = shipped(monkeypatch, profile)
    sized = {f for f, value in (data_costs.overlay(settings).get("model") or {}).items() if value}
    for name in estimate.runs_of(settings):
        run = settings.train[name]
        if sized and (run.family or name) not in sized:
            continue  # a small model beside the profile's own, which no one trains there
        encoding = settings.encode_tokens[run.tokens or "bpe"]
        with torch.device("meta"):
            ids = data_costs.vocab_size_of(settings, run.tokens or "bpe")
            model = load_family(run.family or name).Model(run.model, ids)
        require_context(encoding.context, model)


@pytest.mark.parametrize("profile", params.read_yaml(ROOT / "params.yaml")["profiles"])
def test_a_profiles_own_runs_can_be_planned(monkeypatch, profile):
    """Horizon, warm-up and batch fit the size; what `kumiki estimate --profile` says of each."""
    settings = shipped(monkeypatch, profile)
    costs = [
        estimate.train_cost(settings, name, machines.TABLE["h200"])
        for name in estimate.runs_of(settings)
    ]
    assert costs and all(dict(cost.facts)["parameters"] > 0 for cost in costs)


def test_reference_point_nanochat_d20(monkeypatch):
    cost = estimate.train_cost(shipped(monkeypatch, "nanochat_d20"), "gpt", machines.TABLE["h200"])
    facts = dict(cost.facts)
    assert {name: facts[name] for name in D20} == D20


def test_reference_point_cvfp_ultrachat(monkeypatch):
    settings = shipped(monkeypatch, "cvfp_ultrachat")
    facts = dict(data_costs.embedding_cost(settings).facts)
    sizes = [round(facts[f"{name}_bytes"] / 1e9, 1) for name in ("embeddings", "contexts")]
    assert sizes == [39.3, 78.6]


def test_reference_point_ramgpt_1b(monkeypatch):
    has_family("ramgpt")
    settings = shipped(monkeypatch, "ramgpt_1b")
    cost = estimate.train_cost(settings, "ramgpt", machines.TABLE["rtx3050-6gb"])
    facts = dict(cost.facts)
    assert facts["parameters"] == 1_098_705_408 and facts["non_embedding"] == 1_019_937_792
    assert round(facts["checkpoint_bytes"] / 1e9, 1) == 13.2
    assert cost.scratch_bytes == 10 * facts["checkpoint_bytes"], "eight, the best, the one written"
    half = replace(settings.train["ramgpt"], moments="bfloat16", ema_decay=0.9)
    assert estimate.checkpoint_bytes(half, 10) == 120
    assert [
        estimate.state_bytes(replace(half, **keys))
        for keys in ({"moments": "float32"}, {}, {"weights": "bf16_sr"}, {"optimizer": "adamw8bit"},
                     {"optimizer": "adamw8bit", "weights": "bf16_sr"})
    ] == pytest.approx([16, 12, 8, 10.03, 6.03])  # fmt: skip
    assert (cost.seconds or 0) / 86400 == pytest.approx(1147, rel=0.02)


def test_estimate_counts_refuses_and_fits(kumiki):
    code, out, _ = kumiki("estimate", "--json", "--device", "cpu2", "--fit", "1h")
    found = json.loads(out)
    assert code == 0 and found["fit"]["train@gpt"]["steps"] == 1
    assert found["machine"]["source"] == "from table, not measured"
    assert kumiki("estimate", "--device", "abacus")[0] == 2
    for time_ in ("soon", "", "0d", "0.0h", "9" * 300 + "d"):
        code, out, err = kumiki("estimate", "--fit", time_)
        assert code == 2 and not out and "12h" in err
    assert kumiki("estimate", "--run", "nobody")[0] == 2


def test_every_stage_has_its_row_and_evaluation_costs_a_third_of_training(monkeypatch):
    settings = shipped(monkeypatch, "small")
    found = {c.stage: c for c in estimate.costs(settings, machines.TABLE["cpu2"])}
    stages = {name.split("@")[0] for name in found}
    assert stages == set(dag.stages_of(ROOT))
    monkeypatch.setattr(estimate, "text_tokens", lambda settings, encoding, split: 1000)
    trained = found["train_gpt"]
    rows = estimate.finished_costs(settings, "gpt", trained, machines.TABLE["cpu2"])
    evaluation, export = rows
    facts = dict(trained.facts)
    assert evaluation.seconds == 1000 * facts["flops_per_token"] / 3 / machines.TABLE["cpu2"].flops
    assert export.scratch_bytes == 4 * facts["parameters"]


def test_what_does_not_fit_names_need_and_knobs(kumiki, monkeypatch):
    tiny = machines.Machine(name="tiny", flops=1e9, vram_bytes=1e6, ram_bytes=1e12)
    monkeypatch.setitem(machines.TABLE, "cpu2", tiny)
    code, _, err = kumiki("estimate", "--device", "cpu2")
    assert code == 4 and "GPU memory too small for train@gpt" in err and "device_batch_size" in err


def test_rates_of_doctor_full_are_used(kumiki, project):
    files.write_json(machines.cache_file(), {"matmul_flops": 8e10})
    found = json.loads(kumiki("estimate", "--json")[1])
    assert found["machine"]["flops"] == 4e10 and "measured" in found["machine"]["source"]


# ---------------------------------------------------------------- recipe


ANSWERS = "mine\nown\nown\n0.25\n1000\n"


def test_a_dialogue_and_its_replay_give_the_same_bytes(project):
    (project / "answers.txt").write_text(ANSWERS)
    replay = run_module(project, "lib.cli.main", "recipe", "--from", "answers.txt")
    assert replay.returncode == 0, replay.stderr
    ours, theirs = pty.openpty()
    os.write(ours, ANSWERS.encode())
    asked = run_module(project, "lib.cli.main", "recipe", "--ask", stdin=theirs)
    os.close(theirs)
    os.close(ours)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == replay.stdout and b"own: 0.25" in asked.stdout


def test_ask_needs_a_terminal(project):
    done = run_module(project, "lib.cli.main", "recipe", "--ask", stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and b"nobody to ask" in done.stderr


def test_write_touches_the_recipe_alone(tmp_path, monkeypatch, capsys):
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "params.yaml").read_text().splitlines()
    words = ["recipe", "en", "--set", "python_docs=0.75", "--set", "ja_sample=0.25", "--write"]
    assert cli.main(words) == 0
    assert "{'python_docs': 1.0} -> {'python_docs': 0.75" in capsys.readouterr().err
    after = (tmp_path / "params.yaml").read_text().splitlines()
    at = before.index("        python_docs: 1.0")
    assert after == [*before[:at], "        python_docs: 0.75", "        ja_sample: 0.25",
                     *before[at + 1 :]]  # fmt: skip
    assert params.load().extract_texts.recipes["en"].sources == {"python_docs": 0.75,
                                                                   "ja_sample": 0.25}  # fmt: skip
    assert cli.main(["recipe", "--set", "nobody=1"]) == 2
    assert cli.main(["recipe", "--set", "ja_sample=much"]) == 2


def test_write_without_a_mixture_says_what_to_give(kumiki, project):
    before = (project / "params.yaml").read_bytes()
    code, out, err = kumiki("recipe", "--write")
    assert code == 2 and not out and "nothing written" in err and "--init" in err
    assert (project / "params.yaml").read_bytes() == before


def test_groups_share_out_and_local_files_are_sources(tmp_path, monkeypatch, capsys):
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    files.write_bytes(tmp_path / "data/local/notes.txt", b"a\n")
    monkeypatch.chdir(tmp_path)
    words = ["recipe", "muse7", "--profile", "phase7_1p5b", "--init", "japanese", "--json"]
    assert cli.main(words) == 0
    weights = json.loads(capsys.readouterr().out)["sources"]
    assert weights["dolly_ja"] == weights["wikipedia_ja"] == 0.35 and weights["evol_code"] == 0.15
    assert cli.main(["recipe", "own", "--set", "notes=1", "--write"]) == 0
    settings = params.load()
    assert settings.download_shards.sources["notes"].paths == ("data/local/notes.txt",)
    assert settings.extract_texts.recipes["own"].sources == {"notes": 1.0}


# ---------------------------------------------------------------- scratch


def test_gc_removes_what_nobody_names_and_only_after_asking(kumiki, project):
    files.write_bytes(project / "scratch/tokens/feedfeedfeedfeed/x.bin", b"123")
    files.write_bytes(project / "scratch/contexts/state/x.bin", b"123")
    rows = {r["key"]: r for r in json.loads(kumiki("scratch", "list", "--json")[1])}
    manifest = Manifest.read(project / "data/tokens/bpe.manifest.json")
    assert rows[manifest.key]["needed_by"] == ["bpe.manifest.json"]
    assert rows["feedfeedfeedfeed"]["needed_by"] == []
    code, _, err = kumiki("scratch", "gc")
    assert code == 2 and "add --yes" in err
    assert kumiki("scratch", "gc", "--yes")[0] == 0
    assert not (project / "scratch/tokens/feedfeedfeedfeed").exists()
    assert (project / "scratch/contexts/state/x.bin").is_file(), "state of a run is not an artefact"
    assert kumiki("scratch", "verify")[0] == 0


def test_a_branch_whose_manifest_is_nowhere_keeps_everything(kumiki, project):
    run = lambda *w: subprocess.run(["git", *w], cwd=project, check=True, capture_output=True)  # noqa: E731
    run("init", "-q")
    lock = "outs:\n- path: data/tokens/other.manifest.json\n  hash: md5\n  md5: 0123456789abcdef\n"
    (project / "dvc.lock").write_text(lock)
    run("add", "dvc.lock")
    run("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    files.write_bytes(project / "scratch/tokens/feedfeedfeedfeed/x.bin", b"123")
    code, _, err = kumiki("scratch", "gc", "--yes")
    assert code == 2 and "other.manifest.json of" in err
    assert (project / "scratch/tokens/feedfeedfeedfeed").is_dir()


def test_push_and_pull_bring_keys_back(kumiki, project, tmp_path):
    store = str(tmp_path / "store")
    assert kumiki("scratch", "push", store)[0] == 0
    shutil.rmtree(project / "scratch")
    assert kumiki("scratch", "pull", store)[0] == 0
    assert kumiki("scratch", "verify")[0] == 0
    assert "0 keys copied" in kumiki("scratch", "pull", store)[1], "what is there is not fetched"
    code, _, err = kumiki("scratch", "push", "nowhere://bucket")
    assert code == 2 and "no such store: nowhere://bucket" in err and "name a folder" in err


def test_an_unknown_key_or_store_is_no_success(kumiki, project, tmp_path):
    store = str(tmp_path / "store")
    nowhere = str(tmp_path / "nowhere")
    key = Manifest.read(project / "data/tokens/bpe.manifest.json").key
    assert kumiki("scratch", "push", store, "--key", key)[0] == 0
    for words in (["list"], ["verify"], ["gc", "--yes"], ["push", nowhere], ["pull", store]):
        code, out, err = kumiki("scratch", *words, "--key", "nope")
        assert code == 2 and not out and ": nope; see" in err, words
        if words[0] != "gc":
            assert kumiki("scratch", *words, "--key", key)[0] == 0, words
            shutil.rmtree(nowhere, ignore_errors=True)
    code, out, err = kumiki("scratch", "pull", nowhere)
    assert code == 2 and not out and f"no such store: {nowhere[:60]}" in err


def test_verify_looks_at_the_keys_asked_for(kumiki, project):
    from lib.cli import pipeline

    manifest = Manifest.read(project / "data/tokens/bpe.manifest.json")
    (project / "scratch/tokens" / manifest.key / manifest.files[0].path).unlink()
    assert kumiki("scratch", "verify", "--key", manifest.key)[0] == 3
    assert pipeline.scratch_problems(full=True, keys=["another"]) == []


def test_a_store_behind_a_url_gives_whole_keys_or_none(kumiki, project):
    """`memory://` stands for s3:// and its like: fsspec, not a folder."""
    import fsspec

    store, fs = "memory://scratch", fsspec.filesystem("memory")
    assert kumiki("scratch", "push", store)[0] == 0
    notes = fs.glob("/scratch/*/*/whole.json")
    ids = next(path for path in fs.find("/scratch/tokens") if path.endswith("train_00000.bin"))
    shutil.rmtree(project / "scratch")
    fs.pipe_file(ids, fs.cat_file(ids)[:-1] + b"?")
    code, _, err = kumiki("scratch", "pull", store)
    assert code == 3 and "sha256 differs" in err and "train_00000.bin" in err
    assert not list((project / "scratch/tokens").glob("[0-9a-f]*[0-9a-f]")), "nothing half"
    text = fs.cat_file(notes[0]).decode().replace("train_00000.bin", "../../x")
    fs.pipe_file(notes[0], text.encode())
    code, _, err = kumiki("scratch", "pull", store)
    assert code == 3 and "name leaves its folder: ../../x" in err
    fs.rm(notes[0])
    assert "0 keys copied" in kumiki("scratch", "pull", store)[1], "no note, no key"


# ---------------------------------------------------------------- push


def exported(project: Path) -> Path:
    done = run_module(project, "stages.export", "--run", "gpt")
    assert done.returncode == 0, done.stderr.decode()
    return project / "checkpoints/gpt/export"


def test_push_shows_what_it_sends_and_refuses_what_is_private(kumiki, project, monkeypatch):
    folder = exported(project)
    code, out, _ = kumiki("push", "gpt", "--repo", "me/x", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and found["visibility"] == "private" and found["pushed"] is None
    assert {"model.safetensors", "README.md"} <= {f["path"] for f in found["files"]}
    assert kumiki("push", "gpt")[0] == 2, "no repository"
    code, _, err = kumiki("push", "gpt", "--repo", "me/x", stdin_closed := "--yes")
    assert stdin_closed and code == 2 and "no token" in err
    for text in ('{"a": "/home/me/data"}', '{"a": "hf_abcdefghijklmnop"}'):
        (folder / "note.json").write_text(text)
        code, _, err = kumiki("push", "gpt", "--repo", "me/x", "--dry-run")
        assert code == 2 and "in the export" in err and "abcdefgh" not in err
    (folder / "note.json").unlink()
    assert kumiki("push", "nobody", "--repo", "me/x")[0] == 2


# ---------------------------------------------------------------- chat


def test_chat_once_equals_generate(kumiki):
    words = ("--max-new-tokens", "12", "--seed", "3")
    code, said, err = kumiki("chat", "gpt", "--once", "the list", *words)
    assert code == 0 and "note: base model, it continues text" in err and "seed 3" in err
    assert said == kumiki("generate", "gpt", "--prompt", "the list", *words)[1]


def test_turns_are_the_whole_conversation_and_orders_work(project):
    lines = '{"role": "user", "content": "a"}\n' * 2
    done = run_module(
        project, "lib.cli.main", "chat", "gpt", "--json", "--max-new-tokens", "4",
        input=lines.encode(),
    )  # fmt: skip
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [r["role"] for r in replies] == ["assistant"] * 2
    orders = b"/seed 5\n/temp x\n/temp\n/temp -1\n/seed\n/seed 1.5\n/save data\n"
    text = b"hello\n" + orders + b"/save turns.json\n/reset\n/quit\n"
    done = run_module(project, "lib.cli.main", "chat", "gpt", "--max-new-tokens", "3", input=text)
    told = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert done.returncode == 0 and [line.split(";")[0] for line in told] == [
        "error: /temp takes a number: x", "error: /temp takes a number: nothing",
        "error: not possible: temperature is -1.0", "error: /seed takes a whole number: nothing",
        "error: /seed takes a whole number: 1.5", "error: cannot write in data: Is a directory",
    ]  # fmt: skip
    assert files.read_json(project / "turns.json")[0] == {"role": "user", "content": "hello"}


def test_the_oldest_turns_go_when_the_context_is_full(project, capsys):
    from lib.export import saved
    from lib.export.generate import Sampling

    talk = chat.Conversation(saved.open_model("gpt", project), Sampling(), 4, [], False)
    for n in range(30):
        talk.add("user", f"word {n}")
    ids = talk.prompt()
    assert len(ids) < 64 and talk.turns[-1].ids == ids[-len(talk.turns[-1].ids) :]
    assert "oldest turns are left out" in capsys.readouterr().err
    talk.prompt()
    assert not capsys.readouterr().err, "said once"


def test_a_reply_has_its_room_in_a_full_context(project, capsys):
    """A message longer than the context is cut at its start, and told so once."""
    from lib.export import saved
    from lib.export.generate import Sampling

    opened = saved.open_model("gpt", project)
    for new, room in ((12, 12), (200, 32)):
        talk = chat.Conversation(opened, Sampling(temperature=0), new, [], False)
        for _ in range(2):
            talk.add("user", "many words " * 100)
            ids = talk.prompt()
            assert len(ids) == 64 - room and ids[1:] == talk.turns[-1].ids[1 + room - 64 :]
            "".join(talk.reply())
        assert capsys.readouterr().err.count("its start is left out") == 1


def test_a_message_may_end_inside_a_character(kumiki, project):
    """As a prompt may; other bytes that are no text are told, and the conversation goes on."""
    cut = "日本の".encode() + b"\xe3\x81"
    words = ("--max-new-tokens", "4")
    once = run_module(project, "lib.cli.main", "chat", "gpt", "--once", cut, *words,
                      environment={"LC_ALL": "C"})  # fmt: skip
    prompted = run_module(project, "lib.cli.main", "generate", "gpt", *words, input=cut)
    assert once.returncode == 0 and once.stdout == prompted.stdout, once.stderr.decode()
    lines = cut + b"\n\xff\xfe\n/seed 1\nagain\n"
    for locale in ("C", "C.UTF-8"):
        talked = run_module(project, "lib.cli.main", "chat", "gpt", *words, input=lines,
                            environment={"LC_ALL": locale})  # fmt: skip
        told = talked.stderr.decode()
        assert talked.returncode == 0 and told.count("error: prompt is not UTF-8") == 1, told
        assert talked.stdout.startswith(once.stdout + b"\n")
    for line in (b'{"role": "user", "content": "\\ud800"}', b'{"role": "user", "content": "\xff"}'):
        done = run_module(project, "lib.cli.main", "chat", "gpt", "--json", input=line)
        assert done.returncode == 2 and b"error: not a message" in done.stderr


def test_chat_refuses_what_it_cannot_do(kumiki):
    assert kumiki("chat", "gpt", "--once", "a", "--temperature", "-1")[0] == 2
    assert kumiki("chat", "nobody", "--once", "a")[0] == 2
    code, _, err = kumiki(
        "chat", "gpt", "--once", "x", "--template", "chat", "--max-new-tokens", "2"
    )
    assert code in (0, 2) and "Traceback" not in err


# ---------------------------------------------------------------- bench


def test_dry_run_and_plan_need_no_files(kumiki, project):
    before = sorted(p for p in project.rglob("*") if "cache" not in p.parts)
    code, out, _ = kumiki("bench", "gpt", "--dry-run", "6", "--json")
    found = json.loads(out)
    assert code == 0 and found["problems"] == [] and found["losses"][-1] < found["losses"][0]
    assert kumiki("bench", "gpt", "--plan")[0] == 0
    assert kumiki("bench", "gpt", "--dry-run", "1")[0] == 2
    assert kumiki("bench", "nothing")[0] == 2
    assert sorted(p for p in project.rglob("*") if "cache" not in p.parts) == before


@pytest.mark.parametrize(
    ("words", "told"),
    (
        (["gpt", "trm", "--plan"], "--plan is of one family: gpt trm"),
        (["gpt", "trm", "--largest"], "--largest is of one family: gpt trm"),
        (["gpt", "trm", "--dry-run", "2"], "--dry-run is of one family: gpt trm"),
        (["gpt", "--plan", "--largest"], "options exclude each other: --plan --largest"),
        (["nosuch"], "unknown benchmark: nosuch"),
        (["stream", "--plan"], "--plan is of families: stream"),
        (["stream", "--largest"], "--largest is of families: stream"),
        (["stream", "--dry-run", "2"], "--dry-run is of families: stream"),
        (["gpt", "stream"], "a benchmark is named alone: gpt stream"),
    ),
)
def test_bench_refuses_what_it_would_drop(kumiki, project, monkeypatch, words, told):
    from lib.cli.commands import bench

    for name in ("stream", "trm"):  # `trm` is a family and a benchmark
        files.write_bytes(project / f"benchmarks/{name}.py", b"")
    monkeypatch.setattr(bench, "suite", lambda name: pytest.fail(f"{name} ran"))
    code, out, err = kumiki("bench", *words)
    assert code == 2 and not out and told in err
    listed = err.partition("choose one of ")[2]
    assert len(re.findall(r"\btrm\b", listed)) == bool(listed), "a name stands once in a list"


def test_decoding_of_trained_models_is_measured(project):
    done = run_module(project, "benchmarks.generate", "gpt", "nobody")
    told, out = done.stderr.decode(), done.stdout.decode().splitlines()
    assert done.returncode == 0, told
    assert out[0].split()[:3] == ["model", "prefill", "tokens/s"]
    model, prefill, decoding = out[1].split()[:3]
    assert model == "gpt" and float(prefill) > 0 and float(decoding) > 0
    assert "no model in checkpoints: nobody" in out[2]
    assert len((project / "benchmarks/out/generate.csv").read_text().splitlines()) == 3
    shutil.rmtree(project / "checkpoints")
    done = run_module(project, "benchmarks.generate")
    assert done.returncode == 2 and done.stderr.startswith(b"error: no model in checkpoints")


def test_kernels_without_a_gpu_name_a_command_that_works(project):
    if torch.cuda.is_available():
        pytest.skip("here they are timed")
    done = run_module(project, "benchmarks.kernels")
    assert done.returncode == 2 and b"`python -m benchmarks.kernels --cpu`" in done.stderr


SLOW = """
import pathlib, time
try:
    pathlib.Path("began").touch()
    time.sleep(60)
finally:
    time.sleep(1)  # longer than subprocess.run lets an interrupted child live
    pathlib.Path("tidied").touch()
"""


def test_an_interrupted_benchmark_may_put_its_files_away(project):
    files.write_bytes(project / "benchmarks/__init__.py", b"")
    files.write_bytes(project / "benchmarks/slow.py", SLOW.encode())
    words = [sys.executable, "-P", "-m", "lib.cli.main", "bench", "slow"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, start_new_session=True, stderr=-1) as process:
        deadline = time.monotonic() + 60
        while not (project / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to both
        assert process.wait(30) == 75
    assert (project / "tidied").exists()


def test_benchmarks_write_outside_of_the_project(project, tmp_path, monkeypatch):
    from benchmarks._work import work_folder

    monkeypatch.delenv("KUMIKI_SCRATCH", raising=False)
    with work_folder() as name:
        assert Path(name).is_dir() and project not in Path(name).parents
    monkeypatch.setenv("KUMIKI_SCRATCH", str(tmp_path / "disk"))
    with work_folder() as name:
        assert Path(name).parent == tmp_path / "disk"
    assert not Path(name).exists()
    for path in (ROOT / "benchmarks").glob("*.py"):  # nobody makes a folder of another kind
        own = path.name == "_work.py" or "dir=arguments.folder" in path.read_text()
        assert own or "TemporaryDirectory(" not in path.read_text(), path


def test_two_families_are_measured_side_by_side(kumiki, project, monkeypatch):
    """Equal tokens at every length, a CSV beside the table, and which is faster from where on."""
    from lib.cli.commands import bench

    monkeypatch.setattr(bench, "LENGTHS", (16, 32))
    sizes = {name: {**TINY[name][0]} for name in ("phase7", "phase8")}
    text = (project / "params.yaml").read_text()
    text = text.replace("train:\n", "train:\n" + "".join(f"  {n}: {{steps: 1}}\n" for n in sizes))
    text = text.replace(
        "model:\n",
        f"model:\n{''.join(f'  {n}: {json.dumps(s)}' + chr(10) for n, s in sizes.items())}",
    )
    (project / "params.yaml").write_text(text)
    code, out, err = kumiki("bench", "phase7", "phase8", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(r["run"], r["context"]) for r in found["rows"]] == [
        (n, length) for n in ("phase7", "phase8") for length in (16, 32)
    ]
    assert len({r["tokens"] for r in found["rows"]}) == 1
    assert all(0 < r["step_p20_s"] <= r["step_s"] <= r["step_p80_s"] for r in found["rows"])
    table = (project / found["csv"]).read_text().splitlines()
    assert len(table) == 5 and table[0].startswith("run,context,parameters")
    rows = [{"run": r, "context": c, "step_s": s, "tokens": 1} for r, c, s in
            (("a", 16, 1.0), ("a", 32, 3.0), ("b", 16, 2.0), ("b", 32, 2.0))]  # fmt: skip
    assert bench.crossover(rows, "a", "b") == ["b is faster than a from a context of 32"]


def test_largest_is_the_deepest_model_that_fits(kumiki, project, monkeypatch):
    """Bisection ends where one block more does not fit; a trial is a process with a budget."""
    from lib.cli import bench_trials

    real, tried = bench_trials._trial, {}

    def fits_up_to_five(trial, depth, budget):
        tried[depth] = depth <= 5
        return {"fits": tried[depth], "parameters": 100 * depth, "peak_bytes": depth}

    monkeypatch.setattr(bench_trials, "_trial", fits_up_to_five)
    code, out, _ = kumiki("bench", "gpt", "--largest", "--budget", "1", "--json")
    found = json.loads(out)
    assert code == 0 and found["depth"] == 5 and found["measured"] and tried[6] is False
    monkeypatch.setattr(bench_trials, "_trial", lambda trial, depth, budget: {"fits": False})
    code, _, err = kumiki("bench", "gpt", "--largest", "--budget", "1")
    assert code == 4 and "not even one block" in err
    monkeypatch.chdir(project)
    trial = bench_trials.trial_of(params.load(), "gpt")
    assert real(trial, 1, 50e9)["fits"] and not real(trial, 1, 1e6)["fits"]


def test_largest_is_a_table_whether_measured_or_not(kumiki, monkeypatch):
    from lib.cli import bench_trials

    monkeypatch.setattr(
        bench_trials, "_trial",
        lambda trial, depth, budget: {"fits": depth <= 2, "parameters": 1000, "peak_bytes": 5e6},
    )  # fmt: skip
    header = ["run", "depth", "parameters", "peak"]
    lines = kumiki("bench", "gpt", "--largest", "--budget", "1")[1].splitlines()
    assert [line.split() for line in lines] == [
        header, ["gpt", "2", "1,000", "5.00", "MB", "measured"],
    ]  # fmt: skip
    here = replace(machines.this_machine(), vram_bytes=None)
    monkeypatch.setattr(machines, "this_machine", lambda: here)
    code, out, _ = kumiki("bench", "gpt", "--largest")
    assert code == 0 and out.split()[:4] == header and "not measured" in out and "{" not in out
    assert json.loads(kumiki("bench", "gpt", "--largest", "--json")[1])["measured"] is False


def test_a_frozen_gradient_is_told(kumiki, monkeypatch):
    from lib.cli import measure

    names = measure.reached_by_gradient
    monkeypatch.setattr(
        measure, "reached_by_gradient", lambda model: {n for n in names(model) if "wte" not in n}
    )
    code, _, err = kumiki("bench", "gpt", "--dry-run", "4")
    assert code == 4 and "wte" in err and sys.version_info


def test_state_is_carried_from_turn_to_turn_and_changes_nothing(project, monkeypatch):
    """The second reply reads its own message only; greedy, it is what a fresh pass would say."""
    from lib.export import saved
    from lib.export.generate import Generation, Sampling

    opened = saved.open_model("gpt", project)
    read = []
    logits_at = opened.model.logits_at
    monkeypatch.setattr(
        opened.model, "logits_at", lambda x, *rest: read.append(x.shape[1]) or logits_at(x, *rest)
    )
    talk = chat.Conversation(opened, Sampling(temperature=0), 5, [], False)
    for text in ("the list", "of words"):
        talk.add("user", text)
        prompt, held = talk.prompt(), len(talk.carried[0])
        del read[:]
        "".join(talk.reply())
    assert held > 0 and read[0] == len(prompt) - held
    fresh = Generation(
        opened.model, prompt, Sampling(temperature=0), max_new_tokens=5, cached=False
    )
    list(fresh)
    assert opened.tokenizer.decode(fresh.rows[0].ids) == talk.turns[-1].content
