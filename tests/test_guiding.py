"""Guidances of the literature on the command line: each draws what its function does, and repeats."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm import generate
from ldm.diffusion.guidance import apg, autoguidance, thresholded
from ldm.files.checkpoint import save_model
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.picture import read_recipe
from tests.tiny import tiny_pipeline

PROMPT = "a red fox"
SIZE = ["--width=16", "--height=16", "--steps=3", "--guidance-scale=6", "--seed=3", "--model=model"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command line where a model and another of its kind lie; its status and errors."""
    tiny_pipeline(seed=0).save_pretrained(tmp_path / "model")
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "early")
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str]:
        status = generate.main([*words, "--device=cpu", "--dtype=fp32"])
        return status, capsys.readouterr().err

    return command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apg", "worse and threshold"])
def test_a_picture_is_that_of_the_function_and_repeats(run, name):
    pipe = LatentDiffusionPipeline.from_pretrained("model", dtype=torch.float32)
    other = LatentDiffusionPipeline.from_pretrained("early", dtype=torch.float32).unet
    away = partial(autoguidance, worse=other)
    words, guidance = {
        "apg": (["--guidance=apg"], apg),
        "worse and threshold": (["--worse=early", "--threshold=0.5"], thresholded(away, 0.5)),
    }[name]
    assert run(PROMPT, *SIZE, *words, "--output=a.png") == (0, "")
    call = {"guidance_scale": 6, "seed": 3}
    expected = pipe(PROMPT, 16, 16, 3, guidance=guidance, **call).images[0]
    picture = Image.open("a.png")
    assert picture.tobytes() == expected.tobytes() != pipe(PROMPT, 16, 16, 3, **call).images[0].tobytes()
    assert run("--from=a.png", "--output=b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    recipe = read_recipe(Path("a.png"))
    assert (recipe.worse_hash is None) == (recipe.worse is None) == (name == "apg")


@pytest.mark.slow
def test_another_worse_model_is_told(run):
    assert run(PROMPT, *SIZE, "--worse=early", "--output=a.png") == (0, "")
    tiny_pipeline(seed=2).save_pretrained("early")
    status, said = run("--from=a.png", "--output=b.png")
    assert status == 2
    assert "name the right one with --worse" in said
    assert run("--from=a.png", "--worse=early", "--output=b.png")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance=cgf"], "guidance='cgf' is unknown: expected one of cfg, apg"),
        (["--threshold=0"], "threshold=0.0: expected above 0"),
        (["--worse=nowhere"], "worse='nowhere' holds no UNet"),
        (["--worse=early", "--guidance=apg"], "two ways to guide"),
        (["--guidance=apg", "--guidance-rescale=0.5"], "guidance_rescale has no effect with guidance=apg"),
        (["--worse=early", "--negative-prompt=blue"], "negative_prompt has no effect with worse='early'"),
    ],
)
def test_what_cannot_be(run, words, message):
    status, said = run(PROMPT, *SIZE, *words, "--output=a.png")
    assert status == 2
    assert message in said
    assert not Path("a.png").exists()


def test_a_worse_model_of_another_kind(run, tmp_path):
    config = replace(tiny_pipeline().unet.config, cross_attention_dim=48)
    save_model(UNet(config), tmp_path / "odd")
    assert "its cross_attention_dim is 48" in run(PROMPT, *SIZE, "--worse=odd", "--output=a.png")[1]
