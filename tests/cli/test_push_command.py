"""`kumiki push` against a hub on the loopback: what arrives, how often, and that no token leaks."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lib.cli.commands.push import refuse_text
from lib.core import files
from lib.core.errors import UserError
from lib.core.run_settings import Hub as HubSettings
from lib.export.saved import open_folder
from lib.export.sources import auto_map_sources
from lib.models import families
from lib.train.sinks import HubPush
from tests.conftest import ROOT
from tests.project import add_model, make_project, run_module

TOKEN = "hf_" + "secretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: create, preupload (everything regular), commit."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    tokens: ClassVar[set[str | None]] = set()
    refuse: ClassVar[list[int]] = []  # status codes of the next commits

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append(self.path)
        self.tokens.add(self.headers.get("authorization"))
        if "/preupload/" in self.path:
            wanted = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            if self.refuse:
                self.answer({"error": f"token {TOKEN} is wrong"}, self.refuse.pop(0))
                return
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['host']}/me/x/commit/abc"
            self.answer({"commitUrl": url, "commitOid": "abc", "hookOutput": ""})
        else:
            self.answer({"url": f"http://{self.headers['host']}/me/x"})

    def answer(self, value: dict, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    for held in (Hub.files, Hub.asked, Hub.tokens, Hub.refuse):
        held.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("push"))
    add_model(folder)
    done = run_module(folder, "stages.export", "--run", "gpt")
    assert done.returncode == 0, done.stderr.decode()
    return folder


def environment_of(hub: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


def push(project: Path, hub: str, *words: str):
    return run_module(project, "lib.cli.main", "push", "gpt", "--repo", "me/x", *words,
                      environment=environment_of(hub))  # fmt: skip


def test_every_file_arrives_with_a_card_of_the_project(project, hub):
    (project / "metrics/gpt").mkdir(parents=True, exist_ok=True)
    (project / "metrics/gpt/eval.json").write_text('{"bpb": 1.5, "core": null}')
    done = push(project, hub, "--yes", "--json")
    assert done.returncode == 0, done.stderr.decode()
    folder = project / "checkpoints/gpt/export"
    wanted = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert Hub.files.keys() == wanted and not [n for n in Hub.files if "optim" in n]
    for name in wanted - {"README.md", "manifest.json"}:
        assert Hub.files[name] == (folder / name).read_bytes(), name
    card = Hub.files["README.md"].decode()
    assert "| bpb | 1.5 |" in card and "fingerprint" in card and "| core |" not in card
    assert json.loads(done.stdout)["pushed"] and Hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("name", ["gpt", "checkpoints/gpt/export"])
def test_what_arrived_opens_again(project, hub, tmp_path, name):
    """The card that is sent is not the folder's; the manifest that is sent fits it."""
    done = run_module(project, "lib.cli.main", "push", name, "--repo", "me/x", "--yes",
                      environment=environment_of(hub))  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    for path, data in Hub.files.items():
        files.write_bytes(tmp_path / path, data)
    assert open_folder(tmp_path).weights == "export"


def test_a_damaged_export_is_not_pushed(project, hub, tmp_path):
    shutil.copytree(project / "checkpoints/gpt/export", tmp_path / "x")
    weights = tmp_path / "x/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    done = run_module(project, "lib.cli.main", "push", str(tmp_path / "x"), "--repo", "me/x",
                      "--yes", environment=environment_of(hub))  # fmt: skip
    assert done.returncode == 3 and b"sha256 differs" in done.stderr and not Hub.asked


def test_a_refusal_is_the_users_and_a_failure_is_resumed(project, hub):
    Hub.refuse.append(403)
    done = push(project, hub, "--yes")
    assert done.returncode == 2 and b"hub refuses" in done.stderr
    Hub.refuse.append(400)
    failed = push(project, hub, "--yes")
    assert failed.returncode == 4 and b"run the same command again" in failed.stderr
    assert TOKEN.encode() not in done.stderr + failed.stderr
    assert push(project, hub, "--yes").returncode == 0 and "model.safetensors" in Hub.files


def test_an_unreachable_hub_is_the_environments(project):
    done = push(project, "http://127.0.0.1:9", "--yes")
    assert done.returncode == 4 and b"out of reach" in done.stderr
    assert b"Traceback" not in done.stderr


def test_nobody_is_asked_without_a_terminal(project, hub):
    done = push(project, hub)
    assert done.returncode == 2 and b"add --yes" in done.stderr and not Hub.asked


def test_the_push_beside_a_run_sends_every_file(project, hub, monkeypatch):
    """lib.train.sinks, a process of its own: the same hub; what it warns of holds no token."""
    folder = project / "checkpoints/gpt/export"
    wanted = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for name, value in environment_of(hub).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for refused in (False, True):
        told: list[str] = []
        warned: list[str] = []
        sink = HubPush(HubSettings(repo="me/x"), told.append, warned.append)
        Hub.refuse.extend([403] * refused)
        sink.start(folder)
        sink.close()
        assert Hub.files.keys() == wanted and Hub.tokens == {f"Bearer {TOKEN}"}
        assert len(warned) == refused and TOKEN not in str(warned)
        assert told == ["1 pushes to me/x" + ", 1 failed" * refused]


def test_code_that_goes_along_holds_nothing_private():
    """lib/core/errors.py is among it: its patterns of secrets are none."""
    sources = auto_map_sources(families())
    assert "lib_core_errors.py" in sources
    for name, text in sources.items():
        refuse_text(name, text)


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        "Bearer abcdefghijklmnop0",
        "authorization: bearer abc",
        '{"Authorization": "Bearer a"}',
        "see /home/me/x",
    ],
)
def test_a_secret_or_a_path_in_a_text_is_refused(text):
    with pytest.raises(UserError, match="in the export"):
        refuse_text("x.py", f"x = {text}")
