"""Train a text-to-image latent diffusion model.

  python train/train_ldm.py                                   shapes, within minutes on two cores
  accelerate launch train/train_ldm.py --config configs/pictograms.yaml
  accelerate launch train/train_ldm.py --data.source my_pictures --output runs/mine

This trains the autoencoder (unless the recipe names a trained one), computes the latents, trains the text
encoder on them where the recipe names a recipe for it, and then the UNet. The run folder gets checkpoints,
metrics.jsonl, samples/ and, at the end, model/: draw with
`python -m ldm.generate "a red circle" --model RUN/model`. A run that is stopped ends with exit code 75 (which
accelerate launch turns into 1), and the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.autoencoding import AutoencoderRecipe, Autoencoding
from train.command import command
from train.config import is_recipe, parse, read_recipe
from train.contrastive import Contrastive, ContrastiveRecipe
from train.diffusion import DiffusionRecipe, LatentDiffusion
from train.encoding import compute_latents
from train.latents import autoencoder_folder
from train.loop import fit
from train.text import build_text_encoder, tell_lengths

DEFAULT = "configs/shapes.yaml"
RecipeT = TypeVar("RecipeT", AutoencoderRecipe, ContrastiveRecipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(DiffusionRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    if recipe.text_encoder.path and not is_recipe(recipe.text_encoder.path):
        build_text_encoder(recipe.text_encoder, [])  # a folder that holds none is found out now
    trained = recipe.autoencoder
    if recipe.plan:
        from train.planning import show_plan, stages_of

        with TemporaryDirectory() as folder:
            first = autoencoder_stage(recipe) if is_recipe(trained) else None
            second = text_encoder_stage(recipe) if is_recipe(recipe.text_encoder.path) else None
            show_plan(stages_of(recipe, first, second, Path(folder)), recipe.price)
        return 0
    if is_recipe(trained):
        stage = autoencoder_stage(recipe)
        outcome = fit(Autoencoding(stage), stage)
        if not outcome.finished:
            return outcome.exit_code
        trained = str(outcome.model)
    autoencoder = autoencoder_folder(trained)
    cache = Path(recipe.latents or Path(recipe.output, "latents"))
    latents = compute_latents(recipe.data, autoencoder, cache, masks=recipe.objective.mask_weight != 1)
    if is_recipe(recipe.text_encoder.path):
        words = text_encoder_stage(recipe)
        outcome = fit(Contrastive(words, autoencoder, latents), words)
        if not outcome.finished:
            return outcome.exit_code
        text_encoder = dataclasses.replace(recipe.text_encoder, path=str(outcome.model))
        recipe = dataclasses.replace(recipe, text_encoder=text_encoder)
    task = LatentDiffusion(recipe, autoencoder, latents)
    tell_lengths(task.tokenizer, latents.captions.values())
    outcome = fit(task, recipe)
    if outcome.finished:
        print(outcome.model)
    return outcome.exit_code


def autoencoder_stage(recipe: DiffusionRecipe) -> AutoencoderRecipe:
    """The autoencoder's recipe on this run's data."""
    return stage_of(recipe, read_recipe(AutoencoderRecipe, recipe.autoencoder), "autoencoder")


def text_encoder_stage(recipe: DiffusionRecipe) -> ContrastiveRecipe:
    """The text encoder's recipe, likewise."""
    path = str(recipe.text_encoder.path)
    return stage_of(recipe, read_recipe(ContrastiveRecipe, path), "text_encoder")


def stage_of(recipe: DiffusionRecipe, stage: RecipeT, name: str) -> RecipeT:
    """The recipe of an earlier stage on this run's data, in a folder of this run."""
    return dataclasses.replace(
        stage,
        data=recipe.data,
        output=str(Path(recipe.output, name)),
        precision=recipe.precision,
        max_minutes=recipe.max_minutes,
    )


if __name__ == "__main__":
    command(main)
