"""Train a text-to-image latent diffusion model.

  python train/train_ldm.py                                   shapes, within minutes on two cores
  accelerate launch train/train_ldm.py --config configs/pictograms.yaml
  accelerate launch train/train_ldm.py --data.source my_pictures --output runs/mine

This trains the autoencoder (unless the recipe names a trained one), computes the latents, and trains the
UNet and the text encoder on them. The run folder gets checkpoints, metrics.jsonl, samples/ and, at the end,
model/: draw with `python -m ldm.generate "a red circle" --model RUN/model`. The same command goes on where it
stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.autoencoding import AutoencoderRecipe, Autoencoding
from train.config import command, parse, read_recipe
from train.diffusion import DiffusionRecipe, LatentDiffusion
from train.latents import autoencoder_folder, compute_latents
from train.loop import Outcome, fit

DEFAULT = "configs/shapes.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(DiffusionRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    trained = recipe.autoencoder
    if trained.endswith((".yaml", ".yml")):
        outcome = train_autoencoder(recipe)
        if not outcome.finished:
            return outcome.exit_code
        trained = str(outcome.model)
    autoencoder = autoencoder_folder(trained)
    latents = compute_latents(
        recipe.data, autoencoder, Path(recipe.latents or Path(recipe.output, "latents"))
    )
    outcome = fit(LatentDiffusion(recipe, autoencoder, latents), recipe)
    if outcome.finished:
        print(outcome.model)
    return outcome.exit_code


def train_autoencoder(recipe: DiffusionRecipe) -> Outcome:
    """The autoencoder's recipe on this run's data, in a folder of this run; returns at once if it is done."""
    stage = dataclasses.replace(
        read_recipe(AutoencoderRecipe, recipe.autoencoder),
        data=recipe.data,
        output=str(Path(recipe.output, "autoencoder")),
        precision=recipe.precision,
        max_minutes=recipe.max_minutes,
    )
    return fit(Autoencoding(stage), stage)


if __name__ == "__main__":
    command(main)
