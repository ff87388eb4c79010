"""Runs, families and model sections of params.yaml: inherited, typed, refused, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.core import heads
from lib.core.errors import KumikiError
from lib.core.params import load
from lib.core.refusal import Refused
from lib.core.run_settings import Hub, Train
from lib.core.typed import typed
from tests.conftest import ROOT, cpu_seconds

PARAMS = """
profile: small
train:
  defaults: {lr: 0.01, weight_decay: 0.2}
  gpt: {steps: 40, lr: 3e-4}
  second: {family: gpt, model: {depth: 2, heads: 4}}
model:
  gpt: {depth: 6, width: 64, heads: 2}
runs: &added
  mine: {family: gpt, steps: 9, warmup: 3}
families:
  <<: *added
  gpt: {family: gpt, eval_every: 5}
profiles:
  small: {}
  large:
    train:
      defaults: {lr: 0.5, beta1: 0.8}
      gpt: {weight_decay: 0.0}
    model:
      gpt: {depth: 8}
    runs:
      mine: {steps: 90}
"""


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path


def change(root: Path, *pairs: tuple[str, str]) -> None:
    text = (root / "params.yaml").read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    (root / "params.yaml").write_text(text)


def test_a_runs_own_steps_displace_the_epochs_it_would_inherit(root):
    change(root, ("gpt: {steps: 40, lr: 3e-4}", "gpt: {epochs: 2, batch_tokens: 64, lr: 3e-4}"))
    settings = load(root)
    assert (settings.train["gpt"].epochs, settings.train["gpt"].steps) == (2, None)
    assert (settings.train["mine"].epochs, settings.train["mine"].steps) == (None, 9)


def test_a_run_is_checked_as_the_active_profile_completes_it(root):
    """Another profile's longer warm-up is told when that profile is the active one."""
    change(root, ("runs: &added\n", "runs: &added\n  short: {family: gpt, steps: 9}\n"))
    change(root, ("gpt: {weight_decay: 0.0}", "gpt: {weight_decay: 0.0, warmup: 30}"))
    assert load(root).train["short"].warmup != 30
    change(root, ("profile: small", "profile: large"))
    with pytest.raises(KumikiError, match="warmup is 30"):
        load(root)


def test_a_run_inherits_the_defaults_and_its_own_values_win(root):
    train = load(root).train
    assert sorted(train) == ["gpt", "mine", "second"]
    assert (train["gpt"].lr, train["gpt"].weight_decay, train["gpt"].steps) == (3e-4, 0.2, 40)
    assert (train["mine"].lr, train["mine"].warmup, train["mine"].steps) == (3e-4, 3, 9)
    assert (train["second"].lr, train["second"].steps) == (0.01, None)
    assert train["gpt"].eval_every == 5, "families.<run> lies below train.<run>"
    assert train["gpt"].beta1 == 0.9, "the dataclass lies below everything"


def test_a_profile_is_laid_over_each_layer_not_over_the_result(root):
    """pipeline.md 4.2: defaults < their overlay < the run < its overlay."""
    change(root, ("profile: small", "profile: large"))
    train = load(root).train
    assert (train["gpt"].lr, train["gpt"].beta1, train["gpt"].weight_decay) == (3e-4, 0.8, 0.0)
    assert (train["mine"].lr, train["mine"].weight_decay, train["mine"].steps) == (3e-4, 0.0, 90)
    assert train["second"].lr == 0.5


def test_a_twin_starts_from_its_family_s_own_run(root):
    """Twins are compared at equal tokens: only what their line says may differ."""
    twin = "  twin: {family: gpt, model: {heads: 4}}\n"
    change(root, ("steps: 9, warmup: 3}\n", "steps: 9, warmup: 3}\n" + twin))
    found = load(root).train["twin"]
    assert (found.lr, found.weight_decay, found.steps) == (3e-4, 0.2, 40)
    assert (found.model.heads, found.model.depth) == (4, 6)
    change(root, ("profile: small", "profile: large"))
    change(root, ("mine: {steps: 90}", "twin: {lr: 0.7, model: {width: 128}}"))
    found = load(root).train["twin"]
    assert (found.lr, found.weight_decay, found.steps) == (0.7, 0.0, 40)
    assert (found.model.heads, found.model.depth, found.model.width) == (4, 8, 128)
    change(root, ("gpt: {steps: 40,", "gpt: {warmup: 41, steps: 40,"))
    with pytest.raises(KumikiError, match=r"train\.gpt\.warmup is 41"):
        load(root)


def test_an_override_of_the_command_line_wins(root):
    found = load(root, ["train.gpt.lr=7e-5", "model.gpt.depth=3"]).train["gpt"]
    assert (found.lr, found.model.depth) == (7e-5, 3)


def test_every_run_has_its_familys_config_with_its_own_overlay(root):
    settings = load(root)
    assert (settings.train["gpt"].model.depth, settings.train["gpt"].model.heads) == (6, 2)
    assert (settings.train["second"].model.depth, settings.train["second"].model.heads) == (2, 4)
    assert settings.train["second"].model.width == 64
    assert settings.model["gpt"] == settings.train["mine"].model
    change(root, ("profile: small", "profile: large"))
    settings = load(root)
    assert (settings.train["gpt"].model.depth, settings.train["second"].model.depth) == (8, 2)


MISTAKES = [
    ("steps: 40", "stpes: 40", "unknown key in {}: train.gpt.stpes; did you mean train.gpt.steps?"),
    ("depth: 6", "dpeth: 6", "unknown key in {}: model.gpt.dpeth; did you mean model.gpt.depth?"),
    ("depth: 8", "depth: x", "wrong value in {}: profiles.large.model.gpt.depth is 'x'"),
    ("lr: 0.01", "lr: '3e-4'", "wrong value in {}: train.defaults.lr is '3e-4'; give a number"),
    ("lr: 0.5", "lr: -1", "profiles.large.train.defaults.lr is -1.0; use a number above 0"),
    ("warmup: 3", "warmup: 30", "runs.mine.warmup is 30; at most steps, 9"),
    ("heads: 4", "heads: 5", "train.second.model.width is 64; width 64 must split into 5 heads"),
    (
        "{family: gpt, model",
        "{family: gtp, model",
        "unknown family in {}: train.second.family; did you mean gpt?",
    ),
    ("  gpt: {depth: 6", "  gtp: {depth: 6", "unknown family in {}: model.gtp; did you mean gpt?"),
    ("profile: small", "profile: [small]", "unknown profile in {}: ['small']; choose one of large"),
    ("  small: {}", "  small: {}\n  7: {}", "wrong profile in {}: 7: {{}}; write a name"),
    ("  small: {}", "  small: text", "wrong profile in {}: small: text; write a name"),
    ("steps: 9", "tokens: bep, steps: 9", "runs.mine.tokens is bep; choose nothing"),
    ("steps: 9", "ema_decay: 1.0, steps: 9", "runs.mine.ema_decay is 1.0; use 0 <= x < 1"),
]


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES, ids=lambda x: str(x)[:20])
def test_e06_a_mistake_is_named_where_the_file_has_it(root, old, new, said):
    change(root, (old, new))
    with pytest.raises(KumikiError) as caught:
        load(root)
    assert said.format(root / "params.yaml") in str(caught.value)
    assert caught.value.code == 2


def test_e06_a_mistake_in_the_defaults_is_told_once_not_for_every_run(root):
    change(root, ("lr: 0.01, weight_decay: 0.2", "weight_dacay: 0.2"), ("steps: 40", "stpes: 40"))
    with pytest.raises(KumikiError) as caught:
        load(root)
    assert str(caught.value).count("weight_dacay") == 1
    assert len(str(caught.value).splitlines()) == 2


def test_e06_all_profiles_and_families_cost_little_more_than_parsing_and_no_torch():
    """The head of a family file needs the standard library and lib.core only; seen 2.5 times."""
    ours = (
        "import sys; from pathlib import Path; from lib.core.params import load;"
        "load(Path()); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    peer = (
        "from pathlib import Path; from ruamel.yaml import YAML;"
        "YAML(typ='safe', pure=True).load(Path('params.yaml').read_text())"
    )
    assert cpu_seconds(ours) < 6 * cpu_seconds(peer)


@pytest.mark.parametrize("family", heads.family_names())
def test_the_head_of_a_family_gives_the_config_of_its_module(family):
    """Same fields, same defaults, and no stump of the file is left for the real import."""
    from dataclasses import fields

    from lib.models.base import load_family

    head, real = heads.config_class(family), load_family(family).Config
    assert [(f.name, f.type, f.default) for f in fields(head)] == [
        (f.name, f.type, f.default) for f in fields(real)
    ]
    assert not hasattr(sys.modules[head.__module__], "Model")


def test_the_head_leaves_no_stump_among_the_cached_bytecode(tmp_path):
    """The loader's own cache would hand the head to the real import, and the other way round."""
    family = heads.family_names()[0]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    head = f"import sys; from lib.core.heads import config_class; config_class({family!r});"
    head += f"assert not hasattr(sys.modules['lib.core.heads.{family}'], 'Model')"
    cache = f"import py_compile; py_compile.compile('lib/models/{family}.py', doraise=True)"
    for script in (head, cache, head):
        if script == cache:
            assert not list(tmp_path.rglob(f"{family}.*.pyc")), "the stump is in the cache"
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_a_json_value_is_typed_as_strictly_as_yaml(tmp_path):
    found = typed(Train, {"steps": 3, "lr": 1}, tmp_path)
    assert (found.steps, found.lr) == (3, 1.0)
    with pytest.raises(KumikiError, match="did you mean steps"):
        typed(Train, {"step": 3}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Train, {"steps": 0}),
        (Train, {"batch_tokens": 0}),
        (Train, {"beta2": 1.0}),
        (Train, {"warmdown_ratio": 2.0}),
        (Train, {"grad_clip": -1.0}),
        (Train, {"skip_steps": -1}),
        (Hub, {"repo": "model"}),
    ],
)
def test_values_without_a_meaning_are_refused(kind, values):
    with pytest.raises(Refused, match=next(iter(values))):
        kind(**values)
