"""Training an inpainting model: at first nothing is other, what it sees is the picture, stock reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.diffusion.noise import start_noise
from tests.test_fit import OPTIM, losses, state, stop_at
from tests.test_train_scripts import plans_and_trains
from tests.tiny import CAPTIONS, tiny_pipeline
from train import train_inpainting
from train.batches.buckets import Size
from train.batches.latents import Latents
from train.batches.masks import MaskConfig, draw_masks
from train.batches.plan import Draw, Plan
from train.data.sources import DataConfig
from train.fit.loop import fit
from train.tasks.diffusion import LatentDiffusion
from train.tasks.inpainting import Inpainting, InpaintingRecipe, shown, widen
from train.tasks.tuning import latents_of, whole_recipe

DATA = DataConfig(source="shapes", size=16, length=6, crops=2, flip=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory, model) -> Latents:
    return latents_of(recipe_of(tmp_path_factory.mktemp("run"), model), model)


def recipe_of(output: Path, model: Path, **options: Any) -> InpaintingRecipe:
    base = InpaintingRecipe(
        output=str(output), model=str(model), steps=6, batch_size=2, optim=OPTIM, data=DATA, mask_weight=2.0
    )
    return replace(base, **{"sample_every": 0, "precision": "fp32", **options})


def draws_of(count: int, seed: int = 0) -> list[Draw]:
    return [Draw(0, step, 0, 1, seed) for step in range(count)]


def test_masks_are_counted_and_as_often_of_each_kind_as_asked():
    size, draws = Size(24, 32), draws_of(120)
    masks = draw_masks(draws, size, MaskConfig())
    assert masks.shape == (120, 1, 32, 24)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(draw_masks(draws[7:9], size, MaskConfig()), masks[7:9])
    assert not torch.equal(draw_masks(draws_of(120, seed=1), size, MaskConfig()), masks)
    assert masks.flatten(1).any(1).all()  # something to paint in each
    none = draw_masks(draws, size, MaskConfig(everything=0.0))
    whole = masks.flatten(1).all(1)
    assert 0.12 < (whole & ~none.flatten(1).all(1)).float().mean() < 0.4
    assert torch.equal(masks[~whole], none[~whole])
    assert 0.1 < none.mean() < 0.9


def test_boxes_are_boxes_and_strokes_are_not():
    def filled(mask: torch.Tensor) -> float:
        """The share of its bounding box that a mask fills."""
        rows, columns = (mask[0].any(axis).nonzero() for axis in (1, 0))
        return float(mask.sum() / ((rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)))

    shares = []
    for strokes in (0.0, 1.0):
        masks = draw_masks(draws_of(40), Size(48, 48), MaskConfig(everything=0.0, strokes=strokes))
        shares.append([filled(mask) for mask in masks])
    assert sum(share == 1 for share in shares[0]) > 6  # a single box is one time in four
    assert sum(share == 1 for share in shares[1]) < 4


def test_a_widened_unet_answers_as_before_whatever_the_mask():
    unet = tiny_pipeline().unet
    xt, t, context = torch.randn(2, 4, 6, 10), torch.tensor([900, 30]), torch.randn(2, 16, 24)
    with torch.no_grad():
        before = unet(xt, t, context)
        widen(unet, 5)
        first, second = (unet(torch.cat([xt, torch.randn(2, 5, 6, 10)], 1), t, context) for _ in range(2))
    assert unet.config.in_channels == 9
    assert torch.equal(first, second)
    torch.testing.assert_close(first, before, rtol=0, atol=1e-6)


def test_the_first_loss_is_that_of_the_model_from_text(tmp_path, model, cache):
    recipe = recipe_of(tmp_path, model)
    whole = LatentDiffusion(whole_recipe(recipe, model), model / "vae", cache)
    task = Inpainting(recipe, model, cache)
    draws = Plan(task.buckets, 2, 0).batch(3)
    batch = task.batch(draws)
    with torch.no_grad():
        expected = whole.module.eval()(**whole.batch(draws))[0]
        for mask in (batch["mask"], 1 - batch["mask"]):
            loss = task.module.eval()(**batch | {"mask": mask})[0]
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert {name.split(".")[0] for name in task.module.state_dict()} == {"unet"}


def test_what_is_seen_is_the_picture_of_the_latents(tmp_path, model, cache):
    """In the same view, of crops and their mirror images; and what is masked is not in it."""
    task = Inpainting(recipe_of(tmp_path, model), model, cache)
    views = set()
    for step in range(4):
        draws = Plan(task.buckets, 3, 0).batch(step)
        seen = task.seen(draws, task.masks)
        bucket, rows, chosen = cache.rows(draws)
        views |= set(chosen)
        with torch.no_grad():
            mean = task.vae.encode(seen["picture"]).mean
        torch.testing.assert_close(mean, bucket.mean[rows, chosen].float(), rtol=0, atol=2e-3)
    assert len(views) > 1
    other = seen["picture"].where(seen["mask"] == 0, torch.randn(()))
    beside = shown(task.module.to_latents, **seen)
    assert torch.equal(beside, shown(task.module.to_latents, **seen | {"picture": other}))
    assert torch.equal(beside[:, :1], seen["mask"][:, :, ::2, ::2])


@pytest.mark.slow
def test_a_run_in_pieces_is_the_run_and_other_masks_are_refused(tmp_path, model, cache):
    def run(folder: str, stop_after: int = 0, **options: Any) -> None:
        recipe = recipe_of(tmp_path / folder, model, validation_samples=2, validate_every=3, **options)
        task = Inpainting(recipe, model, cache)
        stop_at(task, stop_after)
        assert fit(task, recipe).step == (stop_after or recipe.steps)

    run("whole")
    run("halves", stop_after=4)
    run("halves")
    assert state(tmp_path / "halves", 6) == state(tmp_path / "whole", 6)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"(?s)is of another run.*masks: .*0.25.*0.1"):
        run("whole", masks=MaskConfig(everything=0.1))


@pytest.mark.slow
def test_stock_diffusers_reads_the_folder_and_draws_the_same(tmp_path, model, cache):
    from diffusers import StableDiffusionInpaintPipeline

    task = Inpainting(recipe_of(tmp_path, model), model, cache)
    torch.nn.init.normal_(task.unet.conv_in.weight, std=0.1)  # as if it had learnt
    task.export(tmp_path / "model")
    stock = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "model")
    stock.set_progress_bar_config(disable=True)
    seen = task.seen(Plan(task.buckets, 2, 0).batch(0), MaskConfig(everything=0.0))
    pipe, picture = task.pipeline(), seen["picture"] / 2 + 0.5
    call: dict[str, Any] = {"mask_image": seen["mask"], "output_type": "latent", "height": 16, "width": 16}
    call |= {"num_inference_steps": 3, "guidance_scale": 4.0, "latents": start_noise([0, 1], (4, 8, 8))}
    hole = pipe.encode(torch.where(seen["mask"] > 0, 0.5, picture))  # stock would draw a sample of it
    theirs = stock(CAPTIONS[:2], image=seen["picture"], masked_image_latents=hole, **call).images
    ours = pipe(CAPTIONS[:2], image=picture, **call).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.02
    other = stock(CAPTIONS[:2], image=seen["picture"], **call | {"mask_image": 1 - seen["mask"]}).images
    assert (other - theirs).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"everything": 1.5}, r"masks.everything=1.5: a fraction"),
        ({"strokes": -0.1}, r"masks.strokes=-0.1: a fraction"),
        ({"everything": 1.0}, r"masks.everything=1: the model would never see a picture"),
    ],
)
def test_what_masks_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**options)


@pytest.mark.slow
def test_the_command_trains_and_plans(tmp_path, model, capsys):
    argv = (
        f"--model {model} --output {tmp_path / 'run'} --steps 2 --batch-size 2 --optim.warmup-steps 1".split()
    )
    argv += ["--data.source", "shapes", "--data.size", "16", "--data.length", "8", "--precision", "fp32"]
    argv += ["--sample-every", "2", "--validation-samples", "2", "--masks.strokes", "1"]
    plans_and_trains(train_inpainting.main, argv, "inpainting", capsys)
    assert len(list((tmp_path / "run/samples").iterdir())) == 1
