"""Train a text-to-image latent diffusion model.

  python train/train_ldm.py                                   shapes, within minutes on two cores
  accelerate launch train/train_ldm.py --config configs/pictograms.yaml
  accelerate launch train/train_ldm.py --data.source my_pictures --output runs/mine
  accelerate launch --use_fsdp --fsdp_version 2 train/train_ldm.py     weights in shards, one a rank

This trains the autoencoder (unless the recipe names a trained one), computes the latents, trains the text
encoder on them where the recipe names a recipe for it, and then the UNet. --steps and the other options of a
training are the UNet's: a short first try needs a copy of those recipes with fewer steps, named by
--autoencoder and --text_encoder.path, or a trained autoencoder's folder. The run folder gets checkpoints,
metrics.jsonl, samples/ and, at the end, model/: draw with
`python -m ldm.generate "a red circle" --model RUN/model`. A run that is stopped ends with exit code 75 (which
accelerate launch turns into 1), and the same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import command, ended
from train.config import parse
from train.stages import show_stages, train_stages
from train.tasks.diffusion import DiffusionRecipe

DEFAULT = "configs/shapes.yaml"
log = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(DiffusionRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    if recipe.plan:
        show_stages(recipe)
        return 0
    for stage in train_stages(recipe):
        log.info(stage)
    return ended(stage.folder, stage.exit_code)


if __name__ == "__main__":
    command(main)
