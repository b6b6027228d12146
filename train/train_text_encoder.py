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

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import load_model
from train.batches.encoding import compute_latents
from train.batches.latents import autoencoder_folder
from train.command import command, ended
from train.config import parse
from train.fit.loop import fit
from train.tasks.contrastive import Contrastive, ContrastiveRecipe
from train.tasks.text import tell_lengths

DEFAULT = "configs/shapes-text-encoder.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(ContrastiveRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    autoencoder = autoencoder_folder(recipe.autoencoder)
    if recipe.plan:
        from train.fit.planning import Stage, made_up, show_plan

        model = load_model(AutoencoderKL, autoencoder).config
        task = Contrastive(recipe, autoencoder, made_up(recipe.data, model))
        show_plan([Stage("text encoder", task, recipe)], recipe.price)
        return 0
    folder = Path(recipe.latents or Path(recipe.output, "latents"))
    latents = compute_latents(recipe.data, autoencoder, folder)
    task = Contrastive(recipe, autoencoder, latents)
    tell_lengths(task.tokenizer, latents.captions.values())
    outcome = fit(task, recipe)
    return ended(outcome.model, outcome.exit_code)


if __name__ == "__main__":
    command(main)
