"""Export to the Hugging Face layout: weights, config, tokenizer and card in one folder.

In:    a model of any family with its Config and tokenizer.   Out: a folder that transformers opens.
Forms: native = a class that transformers has, where the family offers `hf_native`; auto_map = the
       family's own code, copied from this tree with its imports made relative.
Law:   the logits of the opened folder are the model's. No secret, no absolute path in any file.
Note:  `kumiki.json` and `tokenizer/` are ours: with them `kumiki generate` opens the folder too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lib.core import files
from lib.core.errors import InputError, UserError, redact
from lib.data.vocab import chat
from lib.export.gguf import has_gguf
from lib.export.sources import MODELING, ROOT, auto_map_sources, families_of
from lib.models.base import Native

OURS, TOKENIZER, WEIGHTS = "kumiki.json", "tokenizer", "model.safetensors"
FACTS = ("steps", "train_tokens", "train_flops", "seed", "fingerprint")  # of the provenance
Form = Literal["auto", "native", "auto_map"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """What an export is made from."""

    family: str  # name of the file in lib/models
    config: Any  # its Config
    model: Any  # its Model, with weights, on the CPU
    tokenizer: Any  # lib.data.vocab.tokenizer.Tokenizer
    tokenizer_folder: Path  # its files
    boundary: str | None  # what stood between documents in training; None: not recorded
    framed: bool  # turns of conversations stood between their ids in training
    facts: Mapping[str, str]  # lines of the model card, name -> text


def export(what: Exportable, folder: Path, form: Form = "auto") -> str:
    """Write the layout into `folder`; returns the form, and why it is not native.

    form auto: native where the family has it and no switch stands against it. UserError when native
    is asked for and cannot be.
    """
    native, reason = _native(what.model)
    if native is None and form == "native":
        raise UserError(
            "no native class", value=f"{what.family}: {reason}", remedy="export.form: auto_map"
        )
    state = what.model.state_dict()
    if native is not None and form != "auto_map":
        config, names = dict(native.config), native.names
        turned = [theirs for theirs, ours in names.items() if ours in native.transposed]
        tensors = {theirs: _as_theirs(state, ours, native) for theirs, ours in names.items()}
        said = f"native, {config['architectures'][0]}"
    else:
        names, turned = {f"model.{name}": name for name in state}, []
        tensors = {theirs: state[ours] for theirs, ours in names.items()}
        config = _auto_map_config(what)
        families = families_of(what.family, asdict(what.config))
        for name, text in auto_map_sources(families).items():
            files.write_bytes(folder / name, text.encode())
        said = "auto_map" if native else f"auto_map: {reason}"
    _write_tensors(folder / WEIGHTS, tensors)
    stop = stop_ids(what.tokenizer)
    ids = {"bos_token_id": what.tokenizer.bos_id, "pad_token_id": None}
    eos = what.tokenizer.eos_id
    kind = next(t.dtype for t in tensors.values() if t.is_floating_point())  # others are ids
    dtype = str(kind).removeprefix("torch.")
    config |= {**ids, "eos_token_id": eos, "vocab_size": what.tokenizer.vocab_size, "dtype": dtype}
    _write_json(folder / "config.json", config)
    generation = {**ids, "eos_token_id": stop or None, "do_sample": True, "temperature": 0.8}
    cache = {"use_cache": False} if "auto_map" in config else {}
    _write_json(folder / "generation_config.json", {**generation, "top_k": 40, **cache})
    _write_tokenizer(what, folder)
    files.write_bytes(folder / "README.md", _card(what, config, said).encode())
    ours = {
        "format": "kumiki/export",
        "version": 1,
        "family": what.family,
        "config": asdict(what.config),
        "vocab_size": what.tokenizer.vocab_size,
        "boundary": what.boundary,
        "tokenizer": what.tokenizer.fingerprint,
        "names": dict(names),
        "transposed": sorted(turned),
    }
    _write_json(folder / OURS, ours)
    refuse_leaks(folder)
    return said


def stop_ids(tokenizer: Any) -> list[int]:
    """Ids at which a text ends: start of document, end of an assistant's turn, end of document."""
    named = [tokenizer.specials.get(name) for name in ("<|bos|>", "<|assistant_end|>")]
    return sorted({i for i in (*named, tokenizer.bos_id, tokenizer.eos_id) if i is not None})


def _native(model: Any) -> tuple[Native | None, str]:
    """What transformers has for the model and "", or None and the reason."""
    offered = getattr(model, "hf_native", None)
    if offered is None:
        return None, "transformers has no class for this family"
    try:
        return offered(), ""
    except UserError as error:
        return None, str(error)


def _as_theirs(state: Mapping[str, Tensor], ours: str, native: Native) -> Tensor:
    tensor = state[ours][: native.rows.get(ours)] if ours in native.rows else state[ours]
    return tensor.T if ours in native.transposed else tensor


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    files.write_bytes(path, text.encode() + b"\n")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; a tied weight is written under each of its names.

    One metadata key, the one that transformers asks for: two come out in random order.
    """
    from safetensors.torch import save_file

    kept = {name: tensors[name].detach().cpu().clone().contiguous() for name in sorted(tensors)}
    with files.library_file(path, sum(t.nbytes for t in kept.values())) as temp:
        save_file(kept, temp, {"format": "pt"})


def _auto_map_config(what: Exportable) -> dict[str, Any]:
    return {
        "model_type": "kumiki",
        "architectures": ["KumikiForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.KumikiConfig",
            "AutoModelForCausalLM": f"{MODELING}.KumikiForCausalLM",
        },
        "family": what.family,
        "family_config": asdict(what.config),
        "max_position_embeddings": what.model.max_context,
        "use_cache": False,
    }


# ---------------------------------------------------------------- tokenizer, card, leaks


def _write_tokenizer(what: Exportable, folder: Path) -> None:
    """transformers' files at the top, ours below `tokenizer/`: both are called tokenizer.json."""
    source = what.tokenizer_folder
    for name in ["tokenizer.json", *files.read_json(source / "tokenizer.json")["files"]]:
        files.write_bytes(folder / TOKENIZER / name, (source / name).read_bytes())
    files.write_bytes(folder / "tokenizer.json", (source / "tokenizer.hf.json").read_bytes())
    names = {index: name for name, index in what.tokenizer.specials.items()}
    tokenizer = what.tokenizer
    found = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id)
    special = dict(zip(_SPECIAL_NAMES, (names.get(i) for i in found), strict=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": what.model.max_context,
        **{name: text for name, text in special.items() if text is not None},
    }
    if what.framed:  # then both kinds of readers, transformers and we, frame theirs
        config["chat_template"] = chat.JINJA
        files.write_json(folder / chat.CARD, chat.card())
    _write_json(folder / "tokenizer_config.json", config)


def _card(what: Exportable, config: dict[str, Any], form: str) -> str:
    """README.md: what it is, how it is opened, where its numbers come from."""
    # In two parts, because the whole is a word that our own code may not use: this is for readers.
    trust = ", trust_remote_code" + "=True" if "auto_map" in config else ""
    params = sum(p.numel() for p in what.model.parameters())
    start = "" if what.tokenizer.bos_id is None else " Begin every text with the bos token."
    gguf = "There is no GGUF form: llama.cpp has no such graph."
    if has_gguf(config["architectures"][0]):
        gguf = "A GGUF form: `python convert_hf_to_gguf.py FOLDER --outfile model.gguf`."
    rows = {
        "family": what.family,
        "parameters": f"{params:,}",
        "context": f"{what.model.max_context} tokens",
        "vocabulary": f"{what.tokenizer.vocab_size:,} ({what.tokenizer.kind})",
        "tokenizer fingerprint": what.tokenizer.fingerprint[:16],
        "form": form,
        **what.facts,
    }
    table = "\n".join(f"| {name} | {_escape(str(text))} |" for name, text in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {_escape(what.family)}

A small language model trained from scratch with Kumiki. It continues text and follows no
instructions.{start}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
```

`kumiki generate FOLDER --prompt TEXT` opens the same folder. {gguf}
"""


def _escape(text: str) -> str:
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def refuse_leaks(folder: Path) -> None:
    """InputError when a file that settings or facts went into names a secret or a local path."""
    places = {str(Path.cwd()), str(Path.home()), str(ROOT)} - {"/"}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".md")):
        if path.parent.name == TOKENIZER or path.name == "tokenizer.json":
            continue  # vocabularies hold any string
        text = path.read_text(encoding="utf-8").replace("\\", "")  # as before Markdown's escapes
        found = next((place for place in sorted(places) if place in text), None)
        if found or redact(text) != text:
            raise InputError(
                "export holds a path or a secret",
                file=path,
                value="a path of this machine" if found else "***",
                remedy="take it out of params.yaml or the environment",
            )


# ---------------------------------------------------------------- opening an export again


def read_names(folder: Path) -> dict[str, Any]:
    """`kumiki.json` of an exported folder; UserError when there is none."""
    note = files.read_json(folder / OURS)
    if not isinstance(note, dict) or note.get("format") != "kumiki/export":
        raise UserError("not an export of ours", file=folder, remedy="name a run or its export")
    return note


def restore(tensors: Mapping[str, Tensor], note: Mapping[str, Any], wanted: Mapping[str, Any]):
    """Tensors of an export under the family's names; cropped vocabulary rows come back as zeros.

    note: what `read_names` gives. wanted: our name -> shape.
    """
    state = {}
    for theirs, ours in note["names"].items():
        tensor, shape = tensors[theirs], tuple(wanted[ours])
        tensor = tensor.T.contiguous() if theirs in note["transposed"] else tensor
        if tensor.ndim and tensor.shape[1:] == shape[1:] and len(tensor) < shape[0]:
            rows = torch.zeros(shape[0] - len(tensor), *shape[1:], dtype=tensor.dtype)
            tensor = torch.cat((tensor, rows))
        state[ours] = tensor
    return state
