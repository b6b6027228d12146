"""Distil a model that draws from text into one that needs few steps: latent consistency models (LCM).

  python train/train_consistency.py                         the bundled model learns it, in minutes
  accelerate launch train/train_consistency.py --model my_sd15 --data.source my_pictures --data.size 512
  python train/train_consistency.py --min-guidance-scale 2 --max-guidance-scale 2     one guidance alone
  python train/train_consistency.py --plan                  what it will take

The model is the teacher and stays as it is; the student begins as a copy of it and is told its guidance, of
which it learns a range. The run folder gets checkpoints, metrics.jsonl, samples/ (in four steps) and, at the
end, model/: a pipeline folder that stock diffusers reads as LatentConsistencyModelPipeline.

  python -m ldm.generate "a red fox in snow" --model RUN/model --steps 4 --guidance-scale 2.5

A step of drawing is one call of the UNet, and one or two are enough to see. Validation says how far pictures
of one step and of four are from the teacher's: --validation-samples 64. The same command goes on where it
stopped, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import carry_out, command
from train.config import parse
from train.tasks.consistency import Consistency, ConsistencyRecipe
from train.tasks.tuning import latents_of, model_folder

DEFAULT = "configs/pictograms-consistency.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(ConsistencyRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    folder = model_folder(recipe)
    return carry_out("student", Consistency(recipe, folder, latents_of(recipe, folder)), recipe)


if __name__ == "__main__":
    command(main)
