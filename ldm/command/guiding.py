"""The guidance that a recipe asks for, and the class that its UNet is told."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ldm.command.loading import worse_folder
from ldm.diffusion.classifier import GAINS
from ldm.diffusion.guidance import Guidance, apg, autoguidance, classifier_free, thresholded
from ldm.drawing.classifier_folder import load_classifier
from ldm.files.checkpoint import load_model
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.recipe import Recipe


def load_worse(path: str, pipe: LatentDiffusionPipeline) -> UNet:
    """A worse UNet than the pipeline's, to guide away from. Raises ValueError for one of other channels."""
    worse = load_model(UNet, worse_folder(path), pipe.unet.dtype)
    for name in ("in_channels", "out_channels", "cross_attention_dim", "num_class_embeds"):
        theirs, ours = getattr(worse.config, name), getattr(pipe.unet.config, name)
        if theirs != ours:
            raise ValueError(f"worse={path!r}: its {name} is {theirs}, the model's {ours}: not of one kind")
    return worse.to(device=pipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def guided(pipe: LatentDiffusionPipeline, recipe: Recipe) -> tuple[Guidance | None, int | str | None]:
    """The guidance of a call, None where it is the usual one, and the class that the UNet is told, or None.

    Raises ValueError for a worse UNet or a classifier of another model, and for a class that is not known.
    """
    if pipe.unet.config.time_cond_proj_dim is not None and (recipe.worse or recipe.guidance != "cfg"):
        option = "--worse" if recipe.worse else f"--guidance {recipe.guidance}"
        raise ValueError(f"{option}: this model was distilled with its guidance, leave it out")
    usual = partial(classifier_free, rescale=recipe.guidance_rescale)
    guidance: Guidance | None = None
    if recipe.worse is not None:
        guidance = partial(autoguidance, worse=load_worse(recipe.worse, pipe))
    elif recipe.guidance == "apg":
        guidance = apg
    if recipe.threshold is not None:
        guidance = thresholded(guidance or usual, recipe.threshold)
    if recipe.classifier is None or recipe.class_label is None:
        return guidance, recipe.class_label
    gain = GAINS[recipe.classifier_form](pipe.tableau(recipe.steps, recipe.sampler, recipe.strength or 1.0))
    classifier = load_classifier(Path(recipe.classifier[0]).parent)
    asked = recipe.class_label, recipe.classifier_scale, gain, guidance or usual
    told = None if pipe.unet.config.num_class_embeds is None else recipe.class_label
    return classifier.guidance(pipe, *asked), told
