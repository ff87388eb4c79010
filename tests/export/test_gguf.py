"""GGUF by a converter that lies on PATH: a stand-in here; missing, failing and unknown are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.core.errors import EnvError, UserError
from lib.export import gguf

STANDIN = """#!/bin/sh
test -f "$1/config.json" || exit 3
test "$2 $4 $5" = "--outfile --outtype f16" || exit 4
printf GGUF > "$3"
"""


def folder_of(tmp_path: Path, architecture: str) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text(json.dumps({"architectures": [architecture]}))
    (tmp_path / "export/model.safetensors").write_bytes(b"x")
    return tmp_path / "export"


def put(tmp_path: Path, monkeypatch, text: str | None) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    if text is not None:
        (place / gguf.CONVERTERS[0]).write_text(text)
        (place / gguf.CONVERTERS[0]).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")


def test_the_converter_writes_beside_the_weights(tmp_path, monkeypatch):
    put(tmp_path, monkeypatch, STANDIN)
    folder = folder_of(tmp_path, "GPT2LMHeadModel")
    assert gguf.convert(folder).read_bytes() == b"GGUF"
    assert not list(folder.glob("*.part"))


def test_a_missing_converter_gives_the_command(tmp_path, monkeypatch):
    put(tmp_path, monkeypatch, None)
    with pytest.raises(EnvError, match=r"convert_hf_to_gguf.py <export folder> --outfile") as told:
        gguf.convert(folder_of(tmp_path, "GPT2LMHeadModel"))
    assert told.value.code == 4


def test_a_failing_converter_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    put(tmp_path, monkeypatch, "#!/bin/sh\necho no gguf module >&2; exit 1\n")
    folder = folder_of(tmp_path, "GPT2LMHeadModel")
    with pytest.raises(EnvError, match="no gguf module"):
        gguf.convert(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_class_without_a_graph_is_refused_with_the_list(tmp_path, monkeypatch):
    put(tmp_path, monkeypatch, STANDIN)
    with pytest.raises(UserError, match="GPT2LMHeadModel") as told:
        gguf.convert(folder_of(tmp_path, "KumikiForCausalLM"))
    assert told.value.code == 2
