"""Train an autoencoder: pictures to latents and back.

  python train/train_autoencoder.py                       shapes, minutes on two cores
  python train/train_autoencoder.py --config configs/pictograms-autoencoder.yaml --steps 20000
  accelerate launch train/train_autoencoder.py --data.source my_pictures --data.size 128

The run folder gets checkpoints, metrics.jsonl, samples/ and, at the end, model/: the autoencoder as stock
diffusers reads it. The same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import carry_out, command
from train.config import parse
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding

DEFAULT = "configs/shapes-autoencoder.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(AutoencoderRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    return carry_out("autoencoder", Autoencoding(recipe), recipe)


if __name__ == "__main__":
    command(main)
