"""Train an inpainting model from one that draws from text: GLIDE's recipe, in latents.

  python train/train_inpainting.py                          the bundled model learns it, in minutes
  accelerate launch train/train_inpainting.py --model my_sd15 --data.source my_pictures --data.size 512
  python train/train_inpainting.py --masks.everything 0.1 --masks.strokes 1      brushes rather than boxes

The run folder gets checkpoints, metrics.jsonl, samples/ (masked, repainted, original) and, at the end,
model/: a pipeline folder that stock diffusers reads as StableDiffusionInpaintPipeline. The same command goes
on where it stopped, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import carry_out, command
from train.config import parse
from train.tasks.inpainting import Inpainting, InpaintingRecipe
from train.tasks.tuning import latents_of, model_folder

DEFAULT = "configs/pictograms-inpainting.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(InpaintingRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    folder = model_folder(recipe)
    return carry_out("inpainting", Inpainting(recipe, folder, latents_of(recipe, folder)), recipe)


if __name__ == "__main__":
    command(main)
