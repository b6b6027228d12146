"""Train a small CLIP text encoder on captions and cached latents.

  accelerate launch train/train_text_encoder.py --config configs/pictograms-text-encoder.yaml

It learns to tell which caption of a batch belongs to which latents (CLIP's loss). The run folder gets
checkpoints, metrics.jsonl, samples/ (captions' own pictures beside those found for them) and model/, which
`text_encoder.path` of a diffusion recipe names. train_ldm.py runs this by itself where that is a recipe.
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
from train.tasks.contrastive import Contrastive, ContrastiveRecipe
from train.tasks.text import tell_lengths

DEFAULT = "configs/shapes-text-encoder.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(ContrastiveRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    autoencoder = autoencoder_folder(recipe.autoencoder)
    latents = cached_latents(recipe, autoencoder)
    task = Contrastive(recipe, autoencoder, latents)
    if not recipe.plan:
        tell_lengths(task.tokenizer, latents.captions.values())
    return carry_out("text encoder", task, recipe)


if __name__ == "__main__":
    command(main)
