"""Train an upscaler beside a model: its small pictures become as many times as large as a latent is.

  python train/train_upscaler.py                          of pictograms, four times as large
  accelerate launch train/train_upscaler.py --model my_sd --data.source my_pictures --data.size 512
  python train/train_upscaler.py --plan                   what it will take

This is the second stage of a cascade (CDM, Ho et al. 2022), in latents. It learns from crops of large
pictures; the small picture of each gets noise of a random level below max_noise_level, which the UNet is
told. The run folder gets checkpoints, metrics.jsonl, samples/ (small, enlarged, true) and, at the end,
model/, in the layout of Stable Diffusion 2's x4 upscaler:

  python -m ldm.generate "a red fox in snow" --upscale RUN/model --upscale-noise 50

More noise repairs more of what the first stage got wrong, and keeps less. The same command goes on where a
run stopped, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import carry_out, command
from train.config import parse
from train.tasks.upscaling import UpscalerRecipe, Upscaling

DEFAULT = "configs/pictograms-upscaler.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(UpscalerRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    return carry_out("upscaler", Upscaling(recipe), recipe)


if __name__ == "__main__":
    command(main)
