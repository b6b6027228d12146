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

from train.batches.cache import cached_latents
from train.batches.latents import autoencoder_folder
from train.command import carry_out, command
from train.config import parse
from train.tasks.classifying import ClassifierRecipe, Classifying
from train.tasks.models import named_folder

DEFAULT = "configs/pictograms-classifier.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(ClassifierRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    folder = named_folder(recipe.model)
    latents = cached_latents(recipe, autoencoder_folder(folder))
    return carry_out("classifier", Classifying(recipe, folder, latents), recipe)


if __name__ == "__main__":
    command(main)
