"""What a run tells: the line, the log, the curves; sinks that fail are switched off, once."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from pathlib import Path

import pytest

from lib import kernels
from lib.core.run_settings import Hub, Runtime, Wandb
from lib.train.observe import Observer, console_line, perplexity, printable
from lib.train.sinks import HubPush, Trackers

RUNTIME = Runtime(log_every=10)


class Silent:
    """A family that adds nothing."""

    predicts = True

    def log_scalars(self) -> dict[str, float]:
        return {}

    def progress(self) -> str | None:
        return None


def observer(folder: Path, runtime: Runtime = RUNTIME, steps: int = 100, **changes) -> Observer:
    options = {
        "run": "tiny", "steps": steps, "tokens": lambda step: step * 24, "flops_per_token": 1000,
        "bytes_per_token": 2.5, "warn": lambda text: None,
    }  # fmt: skip
    kernels.news()  # what other tests of this process have decided is no news of this run
    return Observer(folder, runtime, **{**options, **changes})


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_the_console_line_is_the_published_one():
    line = console_line(1000, 3.21446, 2.5e-4, 0.8231, 0.4549)
    assert line == (
        "Step   1000 | Loss: 3.2145 | PPL: 24.89 | LR: 2.50e-04 | Grad: 0.823 | Time: 0.45s"
    )
    assert f"{math.exp(3.2145):.2f}" == "24.89"


def test_perplexity_is_of_the_unrounded_loss():
    """exp(9.00004999) is 8103.49, exp of the printed 9.0000 would be 8103.08."""
    line = console_line(1, 9.00004999, 1e-3, 1.0, 1.0)
    assert "Loss: 9.0000 | PPL: 8103.49" in line
    assert math.isfinite(perplexity(1e9)), "JSON has no infinity"


def test_the_same_numbers_stand_in_line_and_log(tmp_path, capsys):
    watched = observer(tmp_path)
    for step in range(1, 31):
        watched.step(step, 3 - step / 100, 1e-3 * step, 0.5, Silent())
    watched.close()
    lines = capsys.readouterr().out.splitlines()
    assert [r["step"] for r in records(tmp_path)] == [10, 20, 30]
    for line, record in zip(lines, records(tmp_path), strict=True):
        numbers = [record[k] for k in ("step", "loss", "lr", "grad", "time")]
        assert line == console_line(*numbers)
        assert record["ppl"] == math.exp(record["loss"])
        assert record["tokens"] == 24 * record["step"]


def test_a_familys_own_numbers_and_lines_appear_at_log_steps(tmp_path, capsys):
    class Speaks(Silent):
        def log_scalars(self):
            return {"loss/rank": 0.25}

        def progress(self):
            return "sweep 1, chunk 2"

    watched = observer(tmp_path)
    for step in range(1, 11):
        watched.step(step, 1.0, 1e-3, 0.5, Speaks())
    watched.close()
    assert records(tmp_path)[0]["loss/rank"] == 0.25
    assert capsys.readouterr().out.splitlines()[1] == "sweep 1, chunk 2"


def test_a_loss_that_is_no_cross_entropy_has_no_perplexity(tmp_path, capsys):
    """And a step without a loss is told by the family's lines alone."""

    class Contexts(Silent):
        predicts = False

        def log_scalars(self):
            return {"converged": 0.5}

        def progress(self):
            return "Processing chunk 1/2"

    watched = observer(tmp_path)
    watched.step(10, 0.0, 1e-3, 0.0, Contexts(), learned=False)
    watched.step(20, 0.5, 1e-3, 0.1, Contexts())
    watched.close()
    silent, learned = records(tmp_path)
    assert "loss" not in silent and silent["converged"] == 0.5
    assert learned["loss"] == 0.5 and "ppl" not in learned
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[2] == "Processing chunk 1/2"
    assert "| PPL: - |" in lines[1]


@pytest.mark.parametrize(
    ("steps", "rows"), [(1, 1), (2000, 2000), (2001, 1001), (5000, 1667), (21_400, 1946)]
)
def test_the_loss_curve_has_at_most_2000_rows_by_step_and_the_last(tmp_path, steps, rows):
    watched = observer(tmp_path, Runtime(log_every=10**6), steps=steps)
    for step in range(1, steps + 1):
        watched.step(step, 1 / 3, 1e-3, 0.5, Silent())
    watched.close()
    watched.write_curves(tmp_path)
    text = (tmp_path / "loss.csv").read_text()
    lines = text.splitlines()
    assert lines[0] == "step,tokens,flops,loss,lr,grad"
    assert len(lines) - 1 == rows
    assert lines[-1] == f"{steps},{24 * steps},{24000 * steps},0.3333333333,0.001,0.5"
    assert text.endswith("\n") and "\r" not in text


def test_the_curve_of_validations_has_text_bytes(tmp_path):
    watched = observer(tmp_path)
    watched.validated(50, 2.345678901234)
    watched.close()
    watched.write_curves(tmp_path)
    assert (tmp_path / "curve.csv").read_text() == (
        "step,tokens,bytes,flops,bpb\n50,1200,3000,1200000,2.345678901\n"
    )


def test_logs_and_curves_are_cut_to_the_checkpoint(tmp_path):
    """Lines after the position are of steps that will be made again."""
    watched = observer(tmp_path)
    for step in range(1, 41):
        watched.step(step, 1.0, 1e-3, 0.5, Silent())
        if step == 20:
            watched.validated(20, 2.0)
            position = json.loads(json.dumps(watched.position()))
    watched.validated(40, 1.5)
    watched.close()
    whole = (tmp_path / "training_log.jsonl").read_bytes()
    (tmp_path / "training_log.jsonl").write_bytes(whole + b'{"step": 41, "lo')  # torn
    again = observer(tmp_path)
    again.cut(position)
    for step in range(21, 31):
        again.step(step, 1.0, 1e-3, 0.5, Silent())
    again.close()
    assert [r["step"] for r in records(tmp_path)] == [10, 20, 20, 30]
    again.write_curves(tmp_path)
    steps = [line.split(",")[0] for line in (tmp_path / "loss.csv").read_text().split()[1:]]
    assert steps == [str(n) for n in range(1, 31)]
    assert (tmp_path / "curve.csv").read_text().count("\n") == 2


def test_curves_need_nothing_but_the_checkpoint(tmp_path):
    """Lines lost from a file beside it once were a warning, and published curves lacked them."""
    watched = observer(tmp_path / "a")
    for step in range(1, 31):
        watched.step(step, 1 / 3, 1e-3, 0.5, Silent())
    watched.validated(30, 2.345678901234)
    position = json.loads(json.dumps(watched.position()))
    watched.close()
    again = observer(tmp_path / "b")
    again.cut(position)
    again.close()
    for folder, one in (("a", watched), ("b", again)):
        one.write_curves(tmp_path / folder)
    for name in ("curve.csv", "loss.csv"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_run_without_a_checkpoint_begins_its_log_anew(tmp_path):
    watched = observer(tmp_path)
    watched.step(10, 1.0, 1e-3, 0.5, Silent())
    watched.close()
    again = observer(tmp_path)
    again.cut(None)
    assert again.position() == {"log": 0, "curves": {"curve": [], "loss": []}}
    again.close()


def test_lines_that_a_log_has_lost_are_said(tmp_path):
    said: list[str] = []
    watched = observer(tmp_path, warn=said.append)
    watched.cut({"log": 3, "curves": {"curve": [], "loss": []}})
    watched.close()
    assert said == ["training_log.jsonl has 0 lines, the checkpoint saw 3"]


def test_the_first_steps_are_left_out_of_rates(tmp_path):
    watched = observer(tmp_path, Runtime(log_every=5), peak_flops=1e15)
    for step in range(1, 21):
        watched.step(step, 1.0, 1e-3, 0.5, Silent())
    watched.close()
    rates = [r["tokens_per_s"] for r in records(tmp_path)]
    assert rates[:2] == [None, None] and all(r > 0 for r in rates[2:])
    assert "mfu" not in records(tmp_path)[0] and records(tmp_path)[3]["mfu"] >= 0


def test_a_quiet_observer_writes_and_says_nothing(tmp_path, capsys):
    watched = observer(tmp_path / "x", quiet=True)
    watched.cut(None)
    watched.begin(0)
    watched.step(10, 1.0, 1e-3, 0.5, Silent())
    watched.validated(10, 1.0)
    watched.sampled(10, ["text"])
    assert watched.position() == {}
    watched.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "x").exists()


def test_samples_lose_their_terminal_escapes(tmp_path, capsys):
    watched = observer(tmp_path)
    watched.sampled(10, ["a\x1b[31mb\nc"])
    watched.close()
    assert capsys.readouterr().out == "  | a [31mb c\n"
    assert records(tmp_path) == [{"step": 10, "samples": ["a\x1b[31mb\nc"]}]
    assert printable("日本\t語") == "日本 語"


def test_a_bar_is_drawn_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    watched = observer(tmp_path / "a")
    watched.begin(0)
    assert watched._bar is None
    watched.close()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = observer(tmp_path / "b")
    shown.begin(5)
    for step in range(6, 31):
        shown.step(step, 1.0, 1e-3, 0.5, Silent())
    shown.close()
    text = capsys.readouterr()
    assert "tiny" in text.err and "/100" in text.err
    assert re.findall(r"Step +(\d+)", text.out) == ["10", "20", "30"]


# ---------------------------------------------------------------- sinks


class Failing:
    def __init__(self, fail_at: int) -> None:
        self.calls, self.fail_at = [], fail_at

    def log(self, numbers, step):
        self.calls.append(step)
        if len(self.calls) == self.fail_at:
            raise KeyError("no such project")

    def close(self):
        self.calls.append("closed")


def trackers(monkeypatch, tracker) -> tuple[Trackers, list[str]]:
    said: list[str] = []
    monkeypatch.setattr("lib.train.sinks.TensorBoard", lambda folder: tracker)
    found = Trackers(["tensorboard"], said.append)
    found.open(Path(), "tiny", Wandb(), {})
    return found, said


def test_a_tracker_that_raises_is_switched_off_with_one_warning(monkeypatch):
    failing = Failing(fail_at=2)
    found, said = trackers(monkeypatch, failing)
    for step in range(1, 6):
        found.log({"loss": 1.0}, step)
    found.close()
    assert failing.calls == [1, 2]
    assert len(said) == 2 and "tensorboard is switched off" in said[0] and "project" in said[0]
    assert said[1] == "without a whole record of this run: tensorboard"


def test_a_tracker_that_fails_at_once_is_named_by_its_first_error(monkeypatch):
    failing = Failing(fail_at=1)
    found, said = trackers(monkeypatch, failing)
    for step in range(1, 4):
        found.log({"loss": 1.0}, step)
    found.close()
    assert failing.calls == [1]
    assert len(said) == 2 and "no such project" in said[0]


def test_a_working_tracker_gets_every_step_and_is_closed(monkeypatch):
    working = Failing(fail_at=-1)
    found, said = trackers(monkeypatch, working)
    for step in range(1, 4):
        found.log({"loss": 1.0}, step)
    found.close()
    assert working.calls == [1, 2, 3, "closed"] and said == []


def test_an_absent_package_is_a_warning_with_the_way_to_get_it(monkeypatch):
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = Trackers(["wandb"], said.append)
    found.open(Path(), "tiny", Wandb(), {})
    found.log({"loss": 1.0}, 1)
    found.close()
    assert len(said) == 2 and "pip install -e '.[trackers]'" in said[0]


def test_wandb_runs_offline_and_continues_its_page(monkeypatch, tmp_path):
    """WANDB_MODE wins over the setting; the id follows the working folder, so a resume finds it."""
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (calls.append(options), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    found = Trackers(["wandb"], said.append)
    found.open(tmp_path / "0123abcd", "gpt", Wandb(project="p"), {"lr": 1})
    found.log({"loss": 1.0}, 7)
    found.close()
    options = calls[0]
    assert (options["mode"], options["project"], options["name"]) == ("offline", "p", "gpt")
    assert (options["id"], options["resume"]) == ("0123abcd", "allow")
    assert calls[1:] == [(7, {"loss": 1.0}), "finished"] and said == []


@pytest.mark.slow
def test_tensorboard_writes_events(tmp_path):
    """Slow: the import takes seconds."""
    pytest.importorskip("tensorboard")
    found = Trackers(["tensorboard"], pytest.fail)
    found.open(tmp_path, "tiny", Wandb(), {})
    found.log({"loss": 1.5}, 3)
    found.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


FAKE_HUB = """
import os, sys, time
from pathlib import Path

class HfApi:
    def create_repo(self, repo, private, exist_ok):
        while Path(os.environ["SEEN"] + ".hold").exists():
            time.sleep(0.01)
        if "broken" in repo:
            raise ConnectionError("https://user:hunter22@host/ is down")
        Path(os.environ["SEEN"]).write_text(f"{repo} {private} {exist_ok}")

    def upload_folder(self, repo_id, folder_path, commit_message):
        with open(os.environ["SEEN"], "a") as seen:
            seen.write("|" + ",".join(sorted(p.name for p in Path(folder_path).iterdir())))
"""


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/huggingface_hub.py").write_text(FAKE_HUB)
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'lib'}:{root}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"w")
    return tmp_path


def test_weights_are_pushed_in_the_background(fake_hub):
    said: list[str] = []
    push = HubPush(Hub(repo="me/model", every_steps=5), said.append, pytest.fail)
    assert push.is_free()
    hold = fake_hub / "seen.hold"
    hold.touch()
    push.start(fake_hub / "weights")
    assert not push.is_free(), "one push at a time"
    hold.unlink()
    push.close()
    assert (fake_hub / "seen").read_text() == "me/model True True|model.safetensors"
    assert said == ["1 pushes to me/model"] and push.is_free()


def test_a_failed_push_is_said_without_secrets_and_counted_at_the_end(fake_hub):
    said: list[str] = []
    told: list[str] = []
    push = HubPush(Hub(repo="me/broken", every_steps=5), told.append, said.append)
    for _ in range(2):
        push.start(fake_hub / "weights")
        push._process.wait()
        assert push.is_free(), "the next interval tries again"
    push.close()
    assert len(said) == 2 and "me/broken failed, tried again later" in said[0]
    assert "hunter22" not in said[0]
    assert told == ["2 pushes to me/broken, 2 failed"]
