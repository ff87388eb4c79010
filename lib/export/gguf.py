"""GGUF from an exported folder, by llama.cpp's own converter, which is never downloaded or bundled.

In:   a folder in Hugging Face layout whose class the converter knows.   Out: `model.gguf` in it.
Note: the converter is looked for on PATH under its two names; its absence is an environment error
      that gives the command, and nothing is written.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from lib.core import files
from lib.core.errors import EnvError, UserError, redact

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
ARCHITECTURES = ("GPT2LMHeadModel",)  # of our exports, those that llama.cpp has a graph for
NAME = "model.gguf"


def has_gguf(architecture: str) -> bool:
    """Whether the converter has a graph for this class."""
    return architecture in ARCHITECTURES


def convert(folder: Path) -> Path:
    """Write `folder`/model.gguf in fp16; returns its path.

    UserError where llama.cpp has no such graph, EnvError where the converter is missing or fails.
    """
    architecture = files.read_json(folder / "config.json")["architectures"][0]
    if not has_gguf(architecture):
        raise UserError(
            "no GGUF form", value=architecture,
            remedy=f"set export.gguf: false; llama.cpp has {', '.join(ARCHITECTURES)}",
        )  # fmt: skip
    converter = next((found for name in CONVERTERS if (found := shutil.which(name))), None)
    if converter is None:
        raise EnvError(
            "GGUF converter is missing",
            value=CONVERTERS[0],
            remedy=f"put llama.cpp's {CONVERTERS[0]} on PATH, or convert later: "
            f"python {CONVERTERS[0]} <export folder> --outfile {NAME} --outtype f16",
        )
    size = (folder / "model.safetensors").stat().st_size
    with files.library_file(folder / NAME, size) as temp:
        command = [converter, str(folder), "--outfile", str(temp), "--outtype", "f16"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not temp.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise EnvError(
                "GGUF converter failed", value=redact(last), remedy="see its requirements"
            )
    return folder / NAME
