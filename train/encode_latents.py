"""Compute the latents of a data set once, for many runs of train_ldm.py.

  python train/encode_latents.py --autoencoder runs/pictograms-autoencoder --output runs/latents \\
      --data.source pictograms --data.subjects few --data.size 128

Without it train_ldm.py computes them into its own run folder. Name them there with --latents runs/latents.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.batches.encoding import compute_latents
from train.batches.latents import autoencoder_folder
from train.command import command
from train.config import parse
from train.data.sources import DataConfig


@dataclass(frozen=True, kw_only=True)
class EncodeRecipe:
    """Latents of pictures."""

    autoencoder: str  # folder: of an autoencoder, of the run that trained it, or of a pipeline
    output: str  # folder for the latents
    data: DataConfig = field(default_factory=DataConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Encode as the command line says; goes on where it stopped."""
    recipe = parse(EncodeRecipe, sys.argv[1:] if argv is None else argv, None, __doc__ or "")
    latents = compute_latents(recipe.data, autoencoder_folder(recipe.autoencoder), Path(recipe.output))
    shapes = ", ".join(f"{len(one.indices)} of {tuple(one.mean.shape[1:])}" for one in latents.buckets)
    print(f"{recipe.output}: {len(latents)} latents, {shapes} (views, channels, height, width)")
    return 0


if __name__ == "__main__":
    command(main)
