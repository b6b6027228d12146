"""Train a classifier of noisy latents, which leads the pictures of a model to a class.

  python train/train_classifier.py                            24 pictograms, for the bundled model, in minutes
  accelerate launch train/train_classifier.py --model my_sd15 --data.source my_folders --data.label folder
  python train/train_classifier.py --data.source my_pictures --data.label species     a column of its metadata

The run folder gets checkpoints, metrics.jsonl, samples/ (how often each class is known at each timestep) and,
at the end, model/: `python -m ldm.generate PROMPT --classifier RUN/model --class-label fox`. It leads the
model that it was trained for, as it reads that one's latents. The same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import load_model
from train.batches.encoding import compute_latents
from train.batches.latents import autoencoder_folder
from train.command import command, ended
from train.config import parse
from train.fit.loop import fit
from train.tasks.classifying import ClassifierRecipe, Classifying, model_folder

DEFAULT = "configs/pictograms-classifier.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(ClassifierRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    folder = model_folder(recipe)
    if recipe.plan:
        from train.fit.planning import Stage, made_up, show_plan

        latents = made_up(recipe.data, load_model(AutoencoderKL, autoencoder_folder(folder)).config)
        show_plan([Stage("classifier", Classifying(recipe, folder, latents), recipe)], recipe.price)
        return 0
    latents = compute_latents(
        recipe.data,
        autoencoder_folder(folder),
        Path(recipe.latents or Path(recipe.output, "latents")),
        accept_new_data=recipe.accept_new_data and recipe.latents is None,
    )
    outcome = fit(Classifying(recipe, folder, latents), recipe)
    return ended(outcome.model, outcome.exit_code)


if __name__ == "__main__":
    command(main)
