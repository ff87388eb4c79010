"""params.yaml: every profile loads, every slip is told at once, YAML is read as DVC reads it."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

from lib.core import params
from lib.core.data_settings import (
    ArchiveSource,
    BpeTokenizer,
    EmbeddedSource,
    FilesSource,
    Gpt2Tokenizer,
    HubDatasetSource,
    JsonlSource,
    ParquetSource,
    SentencePieceTokenizer,
)
from lib.core.errors import KumikiError, SeveralErrors, UserError, report_lines
from lib.core.settings import Settings
from tests.conftest import ROOT

RAW = params.read_yaml(ROOT / params.PARAMS)
PROFILES = [
    *("small", "micro_test", "nanochat_d20", "ramgpt_1b", "ramgpt_0p1b", "trm_ja", "trm_ja_best"),
    *("cvfp_ultrachat", "phase7_1p5b", "phase7_1p0b", "phase7_0p7b", "phase7_small"),
    *("phase8_1p5b", "phase8_small"),
]


def resolved(profile: str) -> Settings:
    settings, problems = params.resolve(RAW, profile)
    assert settings is not None and problems == []
    return settings


def test_the_shipped_profiles_are_these():
    assert list(RAW["profiles"]) == PROFILES
    assert RAW["profile"] == "small"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_is_laid_over_the_base(profile):
    settings = resolved(profile)
    assert settings.profile == profile
    used = {s for r in settings.extract_texts.recipes.values() for s in r.sources}
    other = FilesSource | ArchiveSource  # tokenizers and evaluation tasks
    texts = {n for n, s in settings.download_shards.sources.items() if not isinstance(s, other)}
    assert used == texts  # nothing is fetched that no recipe reads


def test_the_small_profile_is_an_empty_overlay_and_offline():
    """It is the skeleton that all others inherit: a value here would change every profile."""

    def leaves(tree):
        return [x for v in tree.values() for x in (leaves(v) if isinstance(v, dict) else [v])]

    assert leaves(RAW["profiles"]["small"]) == []
    settings = resolved("small")
    kinds = {type(s) for s in settings.download_shards.sources.values()}
    assert kinds == {EmbeddedSource, JsonlSource}
    for source in settings.download_shards.sources.values():
        if isinstance(source, JsonlSource):
            assert all((ROOT / source.folder / n).is_file() for n in source.train + source.val)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_overlay_has_every_tracked_key(profile):
    """DVC finds a missing one only when the stage starts, and `--dry` passes."""
    overlay = RAW["profiles"][profile]
    assert set(overlay) >= {"download_shards", "extract_texts", "train_tokenizer", "encode_tokens"}


def test_the_published_figures_stand_in_their_profiles():
    small = resolved("small")
    assert isinstance(small.train_tokenizer["bpe"], BpeTokenizer)
    assert isinstance(small.train_tokenizer["spm"], SentencePieceTokenizer)
    assert small.train_tokenizer["bpe"].vocab_size == 4096
    assert small.train_tokenizer["spm"].vocab_size == 2048
    assert small.encode_tokens["bpe"].crop == "requeue"
    assert small.extract_texts.recipes["en"].dedup.near
    assert resolved("micro_test").encode_tokens["bpe"].context == 128

    d20 = resolved("nanochat_d20")
    web = d20.download_shards.sources["fineweb_edu"]
    assert isinstance(web, ParquetSource)
    assert (web.shards, web.count, web.val_name) == (240, 1823, "shard_01822.parquet")
    assert d20.train_tokenizer["bpe"].vocab_size == 65_536
    bundle = d20.download_shards.sources[d20.eval.core.bundle or ""]
    assert isinstance(bundle, ArchiveSource) and bundle.url is not None
    assert (d20.eval.core.max_per_task, small.eval.core.bundle) == (0, None)
    assert (d20.encode_tokens["bpe"].context, d20.encode_tokens["bpe"].crop) == (2048, "drop")

    for profile, context, train, val in (
        ("ramgpt_1b", 1024, 5_000_000, 50_000),
        ("ramgpt_0p1b", 768, 1_000_000, 10_000),
    ):
        settings = resolved(profile)
        source = settings.download_shards.sources["fineweb2_edu_ja"]
        assert isinstance(source, HubDatasetSource) and source.config == "sample_10BT"
        assert (source.max_train_samples, source.max_eval_samples) == (train, val)
        assert isinstance(settings.train_tokenizer["bpe"], Gpt2Tokenizer)
        encoding = settings.encode_tokens["bpe"]
        assert (encoding.boundary, encoding.context) == ("eos", context)

    trm = resolved("trm_ja")
    files = trm.download_shards.sources["jsonl_ja"]
    assert isinstance(files, JsonlSource)
    assert files.train[9:] == ("train_9.jsonl.gz", "train_10.jsonl.gz")
    assert trm.train_tokenizer["spm"].vocab_size == 16_000
    assert (trm.encode_tokens["spm"].boundary, trm.encode_tokens["spm"].context) == ("both", 512)

    chat = resolved("cvfp_ultrachat")
    source = chat.download_shards.sources["ultrachat"]
    assert isinstance(source, HubDatasetSource) and source.max_train_samples == 200_000
    encoding = chat.encode_tokens["bpe"]
    assert (encoding.truncate_tokens, encoding.boundary) == (128, "none")

    for profile, context in (("phase7_1p5b", 1024), ("phase8_1p5b", 1024), ("phase7_small", 256)):
        settings = resolved(profile)
        weights = settings.extract_texts.recipes["muse7"].sources
        assert sum(weights.values()) == pytest.approx(1.0) and len(weights) == 7
        assert settings.encode_tokens["bpe"].context == context


# ---------------------------------------------------------------- slips


def load(tmp_path: Path, *edits: tuple[str, str]) -> Settings:
    """The real file with pieces replaced."""
    text = (ROOT / params.PARAMS).read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    (tmp_path / params.PARAMS).write_text(text)
    return params.load(tmp_path)


def test_an_added_run_begins_from_its_familys_own(tmp_path):
    """What its line does not say is equal: rates and batches for one size suit no other."""
    line = "  mine: {family: gpt, tokens: bpe, steps: 5}\n"
    found = load(tmp_path, ("runs: &added\n", f"runs: &added\n{line}")).train
    assert found["mine"].steps == 5 != found["gpt"].steps
    assert found["mine"].batch_tokens == found["gpt"].batch_tokens != 524_288


SLIPS = {
    "top level": ("seed: 1234", "sead: 1234", "sead; did you mean seed?"),
    "profile": ("profile: small ", "profile: smal ", "smal"),
    "section": ("  sources:\n", "  sorces:\n", "download_shards.sorces; did you mean"),
    "source key": ("min_chars: 100 ", "min_char: 100 ", "python_docs.min_char; did you mean"),
    "source kind": ("kind: embedded", "kind: embeded", "did you mean embedded?"),
    "recipe key": ("on_exhausted: stop  ", "on_exausted: stop  ", "en.on_exausted; did you mean"),
    "recipe's source": ("python_docs: 1.0", "python_doc: 1.0", "python_doc"),
    "dedup": ("near: true", "neer: true", "dedup.neer; did you mean"),
    "tokenizer": ("vocab_size: 4096", "vocabsize: 4096", "bpe.vocabsize; did you mean"),
    "choice": ("packing: bestfit", "packing: best_fit", "did you mean bestfit?"),
    "encoding's tokenizer": ("tokenizer: bpe", "tokenizer: bpee", "choose one of bpe, spm"),
    "a run's tokenizer": ("tokenizer: spm", "tokenizer: bpe", "its tokenizer's name, bpe"),
    "overlay": ("shards: 240", "shard: 240", "profiles.nanochat_d20.download_shards"),
    "overlay section": ("    encode_tokens: {}", "    encode_token: {}",
                        "profiles.small.encode_token; did you mean"),
    "runtime": ("workers: 2  ", "worker: 2  ", "runtime.worker; did you mean"),
    "type": ("seed: 1234", "seed: '1234'", "give an integer"),
    "range": ("shards: 240", "shards: 1823", "at most 1822"),
    "float for int": ("context: 2048", "context: 2048.0", "write 2048"),
    "a source in no recipe": ("        ja_sample: 1.0", "        python_docs: 1.0", "in no recipe"),
}  # fmt: skip


@pytest.mark.parametrize("place", SLIPS)
def test_a_slip_anywhere_is_exit_2_and_names_the_way_out(place, tmp_path):
    old, new, told = SLIPS[place]
    with pytest.raises(KumikiError) as caught:
        load(tmp_path, (old, new))
    assert caught.value.code == 2
    assert told in "\n".join(report_lines(caught.value))
    assert "params.yaml" in str(caught.value)


def test_all_errors_are_told_at_once(tmp_path):
    with pytest.raises(SeveralErrors) as caught:
        load(
            tmp_path,
            ("seed: 1234", "seed: x"),
            ("packing: bestfit", "packing: best"),
            ("min_chars: 100 ", "min_char: 100 "),
            ("shards: 240", "shard: 240"),
            ("workers: 2  ", "worker: 2  "),
        )
    text = "\n".join(report_lines(caught.value))
    for part in ("seed", "packing", "min_char", "nanochat_d20", "runtime.worker"):
        assert part in text, part


def test_secrets_are_refused_with_the_variable_to_use(tmp_path):
    for key in ("hf_token", "wandb_api_key"):
        with pytest.raises(UserError, match=f"secret.*{key}; remove it and export {key.upper()}"):
            load(tmp_path, ("  device: auto", f"  {key}: abc\n  device: auto"))
    (tmp_path / params.LOCAL).write_text("seed: 3\n")
    with pytest.raises(UserError, match=r"unknown key in \.kumiki\.yaml: seed"):
        load(tmp_path)


# ---------------------------------------------------------------- YAML


TRAPS = """
learning: 3e-4
negative: -1.5E+3
plain: yes
switch: off
octal: 010
real_octal: 0o10
time: 12:30:45
hex: 0x1F
nothing: ~
under: 1_000
version: 20231101.en
point: 1.
text: "3e-4"
date: 2020-01-01
merged: &m {a: 1, b: 2}
both: {<<: *m, b: 3}
"""


def _dvc_parse(text: str) -> dict:
    from dvc.utils.serialize import loads_yaml

    return loads_yaml(text, typ="safe")


def _same(ours, theirs, where=""):
    if isinstance(ours, dict):
        assert isinstance(theirs, dict) and list(ours) == list(theirs), where
        for key in ours:
            _same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            _same(*pair, f"{where}.{index}")
    else:
        assert type(ours) is type(theirs) and ours == theirs, where


def test_yaml_is_read_as_dvc_reads_it(tmp_path):
    """A value that the two read differently would be tracked as one thing and used as another."""
    (tmp_path / "traps.yaml").write_text(TRAPS)
    found = params.read_yaml(tmp_path / "traps.yaml")
    assert found["learning"] == 3e-4 and type(found["learning"]) is float
    assert found["plain"] == "yes" and found["switch"] == "off"
    assert found["octal"] == 10 and found["real_octal"] == 8
    assert found["time"] == "12:30:45" and found["version"] == "20231101.en"
    assert found["both"] == {"a": 1, "b": 3}
    _same(found, _dvc_parse(TRAPS))
    _same(RAW, _dvc_parse((ROOT / params.PARAMS).read_text()))


def test_the_file_is_in_block_style():
    """`dvc exp run -S` rewrites flow style; only empty collections may stand in it."""
    for number, line in enumerate((ROOT / params.PARAMS).read_text().splitlines(), 1):
        code = f" {line}".split(" #")[0]  # comments may say anything
        bare = code.replace("{}", "").replace("[]", "")
        quoted = bare.split('"')[::2]  # text inside quotation marks is no syntax
        assert not any(c in part for part in quoted for c in "{}[]"), f"line {number}"


def test_checking_every_profile_takes_less_than_a_second_and_no_heavy_import():
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from lib.core import params\n"
        "params.load()\n"
        "heavy = {'torch', 'pyarrow', 'numpy', 'datasets', 'dvc'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "spent = time.process_time() - start\n"
        "assert spent < 1.0, spent\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_stage_says_what_it_does_in_a_moment():
    """`--help` imports neither torch nor what reads data."""
    code = (
        "import sys, runpy\n"
        "sys.argv = ['stages.download_shards', '--help']\n"
        "try:\n"
        "    runpy.run_module('stages.download_shards', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'pyarrow', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Fetch, read or build the shards" in done.stdout


def test_deep_nesting_is_refused_before_it_is_parsed(tmp_path):
    """The parser's time grows with the square of the depth: 20,000 brackets took minutes."""
    for text in ("a: " + "[" * 20_000, "a:\n" + "- " * 20_000):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(UserError, match="nested too deep"):
            params.read_yaml(tmp_path / "params.yaml")


DEFINED = ("core/run_settings.py", "core/data_settings.py", "core/settings.py")


def read_names(path: Path, defines: bool) -> set[str]:
    """Names that a file reads: attributes, words, parameters, fields that it takes over.

    defines: the file declares settings; what its checks look at is no reader.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if defines else ():
        if isinstance(node, ast.ClassDef):
            node.body = [
                n for n in node.body if isinstance(n, ast.FunctionDef) and n.name != "__post_init__"
            ]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_every_key_has_a_reader():
    """Nine keys of a published configuration were read by nothing (ramgpt.md 3.6)."""
    lib = ROOT / "lib"
    heads = sorted(p for p in (lib / "models").glob("*.py") if p.stem not in ("__init__", "base"))
    modules = [lib / name for name in DEFINED] + heads
    files = [*lib.rglob("*.py"), *(ROOT / "stages").glob("*.py")]
    read = set().union(*(read_names(p, p in modules) for p in files))
    keys = {
        (module.stem, one.__name__, field.name)
        for module in modules
        for one in vars(
            import_module(".".join(module.relative_to(ROOT).with_suffix("").parts))
        ).values()
        if is_dataclass(one) and isinstance(one, type)
        for field in fields(one)
    }
    assert len(keys) > 200, "the settings were not found"
    assert not [key for key in sorted(keys) if key[2] not in read]


def test_a_file_read_twice_is_a_mapping_of_its_own_each_time_and_an_edit_is_seen(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: {b: 1}\n")
    first = params.read_yaml(path)
    first["a"]["b"] = 2
    assert params.read_yaml(path) == {"a": {"b": 1}}
    path.write_text("a: {b: 3}\n")
    assert params.read_yaml(path) == {"a": {"b": 3}}
