"""Recipes: strict, typed, and helpful about what is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import empty_model
from ldm.model.unet import UNet
from tests.test_house import RECIPES
from train.command import command
from train.config import find_recipe, from_mapping, is_recipe, parse, read_recipe, to_mapping, to_yaml
from train.fit.optim import OptimConfig, learning_rate
from train.stages import autoencoder_stage, text_encoder_stage
from train.tasks.autoencoding import AutoencoderRecipe
from train.tasks.diffusion import DiffusionRecipe

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part."""

    lr: float = 1e-3  # peak, per optimizer step
    betas: tuple[float, float] = (0.9, 0.999)  # a step
    names: str | tuple[str, ...] = "all"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"inner.lr={self.lr}: expected more than 0")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A whole."""

    steps: int  # optimizer steps
    limit: float | None = None  # minutes
    kind: Literal["v", "eps"] = "v"
    fast: bool = False
    inner: Inner = field(default_factory=Inner)


def test_values_get_the_type_of_their_field():
    """YAML reads 1e-4 as text, and the command line has no lists."""
    values = yaml.safe_load("{steps: 1e3, limit: 2, inner: {lr: 1e-4, betas: [0, 1]}}")
    outer = from_mapping(Outer, values)
    assert outer == Outer(steps=1000, limit=2.0, inner=Inner(lr=1e-4, betas=(0.0, 1.0)))
    assert isinstance(outer.limit, float)
    assert from_mapping(Outer, yaml.safe_load(to_yaml(outer))) == outer


def test_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{steps: 5, inner: {lr: 0.5, names: [a, b]}}")
    argv = ["--config", str(recipe), "--inner.lr", "1e-4", "--limit=3", "--inner.betas", "0.5,0.9"]
    assert parse(Outer, argv, None, "") == Outer(
        steps=5, limit=3.0, inner=Inner(lr=1e-4, betas=(0.5, 0.9), names=("a", "b"))
    )
    changed = parse(Outer, [*argv, "--limit", "null", "--inner.names", "fox,cat"], None, "")
    assert (changed.limit, changed.inner.names) == (None, ("fox", "cat"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inner.lrr", "1"], "unknown key inner.lrr; did you mean lr?"),
        (["--step", "1"], "unknown key step; did you mean steps?"),
        (["--zzz", "1"], "unknown key zzz; did you mean fast or inner or kind or limit or steps?"),
        (["--steps", "many"], "steps='many': expected int"),
        (["--steps", "1.5"], "steps=1.5: expected int"),
        (["--steps", "1", "--fast", "3"], "fast=3: expected bool"),
        (["--steps", "1", "--kind", "epsilon"], "kind='epsilon' is not one of v, eps; did you mean eps?"),
        (["--steps", "1", "--inner.betas", "0.5"], "inner.betas"),
        (["--steps", "1", "--inner", "3"], "inner=3: expected a group of keys: lr, betas, names"),
        (["--steps", "1", "--inner.lr", "-1"], r"inner.lr=-1.0: expected more than 0"),
        ([], "steps has no default: set it in the recipe or as --steps"),
        (["--steps"], "steps=True: expected int"),
        (["--config"], "--config needs a file"),
        (["steps"], "unexpected argument 'steps'"),
        (["--config", "typo.yaml"], "no recipe typo.yaml; these come with the package: configs/"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(ValueError) as error:
        parse(Outer, argv, None, "")
    assert message in str(error.value)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    for text, message in [("{stps: 3}", "did you mean steps"), ("- a", "holds list"), ("{", "is not YAML")]:
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"r.yaml.*{message}"):
            read_recipe(Outer, tmp_path / "r.yaml")


def test_help_shows_units(capsys):
    with pytest.raises(SystemExit) as end:
        parse(AutoencoderRecipe, ["--help"], "configs/shapes-autoencoder.yaml", "About.")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--optim.warmup_steps [500]  optimizer steps, not batches" in text
    assert "--steps  optimizer steps" in text
    assert "--data.size [64]  pixels" in text


def test_a_command_shows_one_line_for_what_the_user_got_wrong(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    with pytest.raises(SystemExit) as end:
        command(lambda argv: parse(Outer, ["--stps", "1"], None, "").steps)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: unknown key stps; did you mean steps?\n"


def recipe_class(path: Path) -> type:
    """What the script reads that the recipe's first line names."""
    return RECIPES[re.search(r"train/(\w+)\.py", path.read_text())[1]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_recipes_are_valid_and_say_what_to_expect(path):
    head = path.read_text().splitlines()[:4]
    for line, word in zip(head, ("command", "hardware", "time", "result"), strict=True):
        assert line.startswith(f"# {word}:")
    cls = recipe_class(path)
    recipe = read_recipe(cls, path)
    assert from_mapping(cls, yaml.safe_load(to_yaml(recipe))) == recipe
    assert to_mapping(recipe)["optim"]["lr"] == recipe.optim.lr
    if isinstance(recipe, DiffusionRecipe):  # what does not fit an earlier stage is found out late otherwise
        if is_recipe(recipe.autoencoder):
            assert autoencoder_stage(recipe).model.latent_channels == recipe.unet.in_channels
        if is_recipe(recipe.text_encoder.path):
            assert text_encoder_stage(recipe).text_encoder.width == recipe.unet.cross_attention_dim


PUBLISHED = {  # numbers of the models as they were published: the architecture is theirs
    "autoencoder-kl-f8": 83_653_863,
    "sd15-from-scratch-256": 859_520_964,
    "sd15-from-scratch-512": 859_520_964,
    "sd15-finetune": 859_520_964,
    "sd2-v-from-scratch": 865_910_724,
}


COUNTED = [path for path in CONFIGS if "M parameters (counted)" in path.read_text()]


@pytest.mark.parametrize("path", COUNTED, ids=lambda path: path.name)
def test_parameters_are_as_the_recipe_says(path):
    """And as published, where they were."""
    said = re.search(r"([\d.,]+) M parameters \(counted\)", path.read_text())
    recipe = read_recipe(recipe_class(path), path)
    if isinstance(recipe, DiffusionRecipe):
        model = empty_model(UNet, recipe.unet)
    else:
        model = empty_model(AutoencoderKL, recipe.model)
    count = sum(p.numel() for p in model.parameters())
    assert said[1] == f"{count / 1e6:,.2f}"
    assert count == PUBLISHED.get(path.stem, count)


def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("configs/shapes.yaml") == find_recipe("shapes.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_values_out_of_range_are_refused_before_anything_is_made(path):
    cls = recipe_class(path)
    for key, value, message in [
        ("steps", "0", "steps=0: expected 1 or more"),
        ("optim.lr", "3", "optim.lr=3.0: a learning rate lies between 0 and 1"),
        ("data.size", "50", "data.size=50 is not a multiple of 8"),
        ("ema_decay", "1", "ema_decay=1.0"),
        ("max_minutes", "0", "max_minutes=0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(cls, ["--config", str(path), f"--{key}", value], None, "")


def test_learning_rate_is_a_function_of_the_step():
    config = OptimConfig(
        lr=1.0 - 1e-9, warmup_steps=10, curve="cooldown", cooldown_fraction=0.2, final_fraction=0.1
    )
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == pytest.approx([1.0] * 70)
    assert rates[90] == pytest.approx(0.55)
    cosine = OptimConfig(lr=0.5, warmup_steps=0, curve="cosine", final_fraction=0.0)
    assert learning_rate(cosine, 50, 100) == pytest.approx(0.25)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.0)
    assert learning_rate(OptimConfig(lr=0.5, warmup_steps=0, curve="constant"), 99, 100) == 0.5


def test_a_short_run_warms_up_for_half_of_it_and_any_recipe_can_be_short():
    """So that --steps alone makes a trial run."""
    config = OptimConfig(lr=0.5, warmup_steps=500, curve="constant")
    assert [learning_rate(config, step, 4) for step in range(4)] == [0.25, 0.5, 0.5, 0.5]
    assert learning_rate(config, 0, 1) == 0.5
    for curve in ("cosine", "cooldown"):
        falling = replace(config, curve=curve, final_fraction=0.1)
        rates = [learning_rate(falling, step, 20) for step in range(20)]
        assert rates[9] == max(rates) == 0.5
        assert 0.05 < rates[-1] < rates[0] + 0.2
    for path in CONFIGS:
        assert parse(recipe_class(path), ["--config", str(path), "--steps", "3"], None, "").steps == 3


def test_a_flag_alone_is_true():
    assert parse(Outer, ["--fast", "--steps", "1"], None, "").fast
    assert parse(Outer, ["--steps", "1", "--fast"], None, "").fast
    assert not parse(Outer, ["--steps", "1", "--fast", "false"], None, "").fast
