"""Contrastive training of the text encoder: CLIP's loss, and an encoder that knows every word."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import save_model
from tests.test_fit import OPTIM, TEXT, VAE
from train.batches.latents import Bucket, CacheKey, Latents
from train.batches.plan import Draw
from train.fit.loop import fit
from train.tasks.contrastive import Contrastive, ContrastiveRecipe
from train.tasks.text import TextConfig, build_text_encoder

COLOURS, SUBJECTS = ("red", "blue", "green", "pink"), ("fox", "boat", "house", "fish")
RECIPE = ContrastiveRecipe(
    output="run",
    autoencoder="",
    steps=60,
    batch_size=16,
    text_encoder=TEXT,
    tower=(8, 16),
    groups=4,
    optim=OPTIM,
)


def pairs() -> Latents:
    """Latents of 16 scenes, whose colour changes every value a lot and whose subject few values a little."""
    mean = torch.zeros(16, 4, 8, 8)
    captions = {}
    for k, (colour, subject) in enumerate(itertools.product(range(4), range(4))):
        mean[k, colour] = 2.0
        mean[k, :, subject * 2, subject * 2] += 1.0
        captions[k] = [f"a {COLOURS[colour]} {SUBJECTS[subject]} in snow"]
    mean = mean[:, None].half()
    bucket = Bucket(list(range(16)), mean, torch.full_like(mean, 0.02))
    return Latents([bucket], captions, CacheKey("", "made up", 4, 2, [[16, 16, 16]], 1, False))


@pytest.fixture
def task(tmp_path: Path) -> Contrastive:
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "autoencoder")
    return Contrastive(replace(RECIPE, output=str(tmp_path / "run")), tmp_path / "autoencoder", pairs())


def draws(count: int) -> list[Draw]:
    return [Draw(index=i, step=0, position=i, count=count, seed=0) for i in range(count)]


def test_the_loss_is_that_of_clip(task):
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    batch = task.batch(draws(7))
    loss, parts = task.module(**batch)
    logits = task.contrast.similarity(batch["x0"], batch["tokens"])
    assert loss.shape == parts["found"].shape == (7,)
    torch.testing.assert_close(loss.mean(), image_text_contrastive_loss(logits.T))
    assert logits.abs().max() <= task.contrast.logit_scale.exp()  # cosines, scaled


def test_a_caption_is_read_up_to_its_end(task):
    """What stands after the end token changes nothing."""
    tokens = task.batch(draws(3))["tokens"]
    x0 = task.batch(draws(3))["x0"]
    ends = (tokens == task.tokenizer.end_id).int().argmax(1)
    other = tokens.clone()
    other[:, int(ends.max()) + 1 :] = 5
    assert torch.equal(task.contrast.similarity(x0, tokens), task.contrast.similarity(x0, other))


@pytest.mark.slow
def test_it_learns_every_word_and_a_recipe_takes_the_result(task, tmp_path):
    outcome = fit(task, task.recipe)
    with torch.no_grad():
        _, parts = task.module(**task.batch(draws(16)))
        told, easier = task.validate([range(16)]), task.validate([range(4), range(4, 16)])
    assert told["found"] == parts["found"].mean()
    assert told["candidates"] == 16
    assert easier["candidates"] == (4 * 4 + 12 * 12) / 16
    assert parts["found"].mean() > 0.9  # a guess finds one in 16; who knows the colour alone, one in 4
    assert (tmp_path / "run/samples/step-00000060.png").exists()
    config = TextConfig(train=False, path=str(outcome.model))
    encoder, tokenizer = build_text_encoder(config, [])
    tokens = tokenizer(["a red fox in snow"])
    assert torch.equal(tokens, task.tokenizer(["a red fox in snow"]))
    assert encoder(tokens).shape == (1, 16, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size=1: there is nothing to tell a single caption from"),
        ({"tower": (8, 10)}, r"tower=\(8, 10\): expected multiples of groups=4"),
        ({"tower": ()}, r"tower=\(\)"),
    ],
)
def test_recipes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **options)


def test_a_picture_that_comes_twice_is_not_told_from_itself(task):
    batch = task.batch([Draw(index, 0, k, 3, 0) for k, index in enumerate([4, 9, 4])])
    alone = task.batch([Draw(index, 0, k, 3, 0) for k, index in enumerate([4, 9])])
    with torch.no_grad():
        torch.testing.assert_close(task.module(**batch)[0][0], task.module(**alone)[0][0])
