"""Train an autoencoder: pictures to latents and back.

  python train/train_autoencoder.py                       shapes, minutes on two cores
  accelerate launch train/train_autoencoder.py --data.source my_pictures --data.size 128
  python train/train_autoencoder.py --config configs/pictograms-autoencoder.yaml

The last grows: it first trains one for pictures half as large, gives that a level more and then its decoder
more width, as the recipes in `grow` say. The latents stay the same: what draws on them goes on drawing.

The run folder gets checkpoints, metrics.jsonl, samples/ and, at the end, model/: the autoencoder as stock
diffusers reads it. The same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import command, ended
from train.config import parse
from train.stages import autoencoder_stages
from train.tasks.autoencoding import AutoencoderRecipe

DEFAULT = "configs/shapes-autoencoder.yaml"
log = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(AutoencoderRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    if recipe.plan:
        from train.fit.planning import autoencoder_plan, show_plan

        with TemporaryDirectory() as folder:
            show_plan(autoencoder_plan(recipe, Path(folder)), recipe.price)
        return 0
    for stage in autoencoder_stages(recipe):
        log.info(stage)
    return ended(stage.folder, stage.exit_code)


if __name__ == "__main__":
    command(main)
