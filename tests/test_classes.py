"""Classes: told beside the prompt, left out together with it, learnt, drawn by name and by number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.drawing.classes import numbers_of
from ldm.model.context import Context
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from ldm.recipes.requests import Request
from tests.test_fit import OPTIM, UNET, autoencoder, diffusion_recipe, losses, state, stop_at
from tests.tiny import tiny_pipeline
from train.batches.latents import Bucket, CacheKey, Latents
from train.batches.plan import Draw
from train.data.labels import named
from train.data.sources import DataConfig
from train.fit.loop import fit
from train.tasks.denoising import ObjectiveConfig
from train.tasks.diffusion import LatentDiffusion

__all__ = ["autoencoder"]  # a fixture
NAMES = ("fox", "cat", "7")


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    """The tiny pipeline with three classes."""
    small = tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet(replace(small.unet.config, num_class_embeds=4)).eval()
    defaults = Defaults(num_inference_steps=2, height=16, width=16, class_names=NAMES)
    return LatentDiffusionPipeline(**small.components | {"unet": unet}, defaults=defaults)


def told(pipe: LatentDiffusionPipeline, *prompt: object, **options: object) -> list[list[int]]:
    """The labels that a call tells the UNet, with and without its wish."""
    seen = []

    def guidance(unet, context, uncond, scale, kind):
        seen[:] = [context.labels.tolist(), uncond.labels.tolist()]
        assert len(context) == len(uncond) == len(context.labels)
        return lambda xt, level: 0 * xt

    pipe(*prompt, guidance=guidance, output_type="latent", **options)
    return seen


def test_labels_are_one_for_all_or_one_for_each(pipe):
    assert told(pipe, "", class_labels=[2, 0]) == [[2, 0], [3, 3]]
    assert told(pipe, ["a", "b"], class_labels="cat") == [[1, 1], [3, 3]]
    assert told(pipe, ["a", "b"], class_labels=torch.tensor([0, 3]))[0] == [0, 3]
    assert told(pipe, ["a", "b"], class_labels=["fox", ""], num_images_per_prompt=2)[0] == [0, 0, 3, 3]
    assert told(pipe, "a", class_labels=[0, 1], num_images_per_prompt=2)[0] == [0, 0, 1, 1]


def test_a_name_goes_before_a_number():
    """A class may be called 7, as in a folder of digits."""
    assert numbers_of("7", 3, NAMES) == [2]
    assert numbers_of(["1", 1, "cat"], 3, NAMES) == [1, 1, 1]


def test_what_is_told_is_what_the_unet_takes(pipe):
    """And guidance compares with no class: uncond + scale * (cond - uncond)."""
    xt, t, text = torch.randn(2, 4, 5, 6), torch.tensor([500]), torch.randn(2, 16, 24)
    labels, nothing = torch.tensor([0, 2]), torch.tensor([3, 3])
    with torch.no_grad():
        plain = pipe.unet(xt, t, text, labels)
        assert torch.equal(pipe.unet(xt, t, Context(text, labels=labels)), plain)
        both = Context.of(Context(text, labels=nothing), Context(text, labels=labels))
        without, wish = pipe.unet(xt, t, both).chunk(2)
        torch.testing.assert_close(wish, plain)
        torch.testing.assert_close(without, pipe.unet(xt, t, text, nothing))
    assert not torch.allclose(without, wish)


def test_a_folder_of_classes_comes_back_and_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.defaults.class_names == NAMES
    call = {"class_labels": "cat", "seed": 3, "output_type": "latent"}
    first = pipe("", **call).images
    assert torch.equal(again("", **call).images, first)
    assert not torch.equal(again("", **call | {"class_labels": 0}).images, first)
    drawn = dict(pipe.each([Request(prompt="", seed=3, class_label=name) for name in ("fox", "cat")]))
    assert [request.class_label for request in drawn] == ["fox", "cat"]


def test_classes_that_cannot_be(pipe, tiny_pipeline):
    for label, message in (
        (
            None,
            r"this model draws classes: give a class label, 0 to 2 or a name \(fox, cat, 7\), or 3, which",
        ),
        (4, "class label 4 is not known: expected 0 to 2, or 3, which says nothing"),
        (-1, "class label -1 is not known"),
        (True, "class label True is not known"),
        ("cta", r"class label 'cta' is not known: .* did you mean cat\?"),
        ([0, 1, 2], "3 class labels for 2 prompts: give one, or one for each"),
        ([], "class labels are an empty list"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(["a", "b"], class_labels=label)
    with pytest.raises(ValueError, match=r"class label 1: this model has no classes, leave it out"):
        tiny_pipeline("a", class_labels=1)
    with pytest.raises(ValueError, match=r"request 0: this model draws classes"):
        next(pipe.each([Request(prompt="a")]))
    with pytest.raises(ValueError, match=r"2 class_names and unet.num_class_embeds=4"):
        LatentDiffusionPipeline(**pipe.components, defaults=Defaults(class_names=("a", "b")))
    with pytest.raises(ValueError, match=r"is told no classes: its UNet2DConditionModel reads the unet"):
        pipe.to_diffusers()


# Training


def of_two() -> Latents:
    """Pictures of two classes that differ in sign, all with the empty caption."""
    mean = torch.ones(8, 1, 4, 8, 6) / 0.18215  # the tiny autoencoder's scale
    mean[4:] *= -1
    bucket = Bucket(list(range(8)), mean.half(), torch.full_like(mean, 1.5).half())
    latents = Latents(
        [bucket], {i: [""] for i in range(8)}, CacheKey("", "two", 4, 2, [[12, 16, 8]], 1, False)
    )
    latents.classify(named(["plus"] * 4 + ["minus"] * 4))
    return latents


def test_caption_and_class_are_dropped_together():
    latents = of_two()
    draws = [Draw(i % 8, 5, i, 64, 0) for i in range(64)]
    latents.captions = {i: ["text"] for i in range(8)}
    captions, labels = latents.choose_captions(draws, 0.3), latents.choose_labels(draws, 0.3).tolist()
    assert {(text, label == 2) for text, label in zip(captions, labels, strict=True)} == {
        ("", True),
        ("text", False),
    }
    assert latents.choose_labels(draws[:8]).tolist() == [1] * 4 + [0] * 4  # minus, plus: sorted


CLASSES = {"unet": replace(UNET, num_class_embeds=3), "data": DataConfig(size=16, label="subject")}


@pytest.mark.slow
def test_classes_are_learnt_resumed_bit_for_bit_and_drawn(tmp_path, autoencoder):
    def train(name: str, stop_after: int = 0) -> None:
        recipe = diffusion_recipe(
            tmp_path / name, steps=120, optim=replace(OPTIM, lr=3e-3), sample_every=120, **CLASSES
        )
        task = LatentDiffusion(recipe, autoencoder, of_two())
        stop_at(task, stop_after)
        fit(task, recipe)

    train("whole")
    train("halves", stop_after=50)
    train("halves")
    assert state(tmp_path / "halves", 120) == state(tmp_path / "whole", 120)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    drawn = LatentDiffusionPipeline.from_pretrained(tmp_path / "whole/model", dtype=torch.float32)
    call = {"num_inference_steps": 8, "height": 16, "width": 12, "seed": 0, "output_type": "latent"}
    minus, plus = drawn("", class_labels=["minus", "plus"], guidance_scale=2.0, **call).images.mean((1, 2, 3))
    assert minus < -0.5 < 0.5 < plus


def test_recipes_and_data_of_classes_that_do_not_fit(tmp_path, autoencoder):
    with pytest.raises(ValueError, match=r"unet.num_class_embeds=3 and data.label=None: set both"):
        diffusion_recipe(tmp_path, unet=CLASSES["unet"])
    with pytest.raises(ValueError, match=r"unet.num_class_embeds=None and data.label=subject: set both"):
        diffusion_recipe(tmp_path, data=CLASSES["data"])
    recipe = diffusion_recipe(tmp_path, **CLASSES | {"unet": replace(UNET, num_class_embeds=2)})
    with pytest.raises(
        ValueError, match=r"=2: the data has 2 classes by data.label=subject, minus, plus; set 3"
    ):
        LatentDiffusion(recipe, autoencoder, of_two())
    recipe = diffusion_recipe(tmp_path, sampling=Defaults(class_names=("a", "b")), **CLASSES)
    with pytest.raises(
        ValueError, match=r"sampling.class_names=\['a', 'b'\]: the data has \['minus', 'plus'\]"
    ):
        LatentDiffusion(recipe, autoencoder, of_two())


def test_the_task_tells_the_unet_its_classes(tmp_path, autoencoder):
    """Its loss depends on them, and what validates it too."""
    recipe = diffusion_recipe(tmp_path, objective=ObjectiveConfig(caption_dropout=0.0), **CLASSES)
    task = LatentDiffusion(recipe, autoencoder, of_two())
    batch = task.batch([Draw(index, 0, place, 3, 0) for place, index in enumerate((0, 4, 7))])
    assert batch["labels"].tolist() == [1, 0, 0]
    assert task.facts["classes"] == ["minus", "plus"]
    with torch.no_grad():
        loss = task.module(**batch)[0]
        other = task.module(**batch | {"labels": 1 - batch["labels"]})[0]
        told = task.validate([[0, 4]])["loss"]
        task.latents.labels = {index: 1 - label for index, label in task.latents.labels.items()}
        assert task.validate([[0, 4]])["loss"] != told
    assert (loss != other).all()
