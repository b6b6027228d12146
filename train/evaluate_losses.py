"""Measure the validation loss of a diffusion model by timestep, on any data.

  python -m train.evaluate_losses --output losses --data.source pictograms --data.subjects few --data.size 128
  python -m train.evaluate_losses --output losses --model runs/mine --data.source photos --pictures 64
  python -m train.evaluate_losses --output losses --model runs/mine --data.source photos --pictures 64 \\
      --latents runs/mine/latents

The loss is that of a training's validation: without weights, and with one fixed noise a picture. With the
--data.* of a training, --pictures 64 gives the very numbers of its --validation-samples 64, as the same
pictures are chosen. Their latents are computed into the output, or taken from the cache of a run. --output
holds losses.json, losses.png and report.md; python -m ldm.evaluate losses sets several such folders, and
runs, side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from accelerate import PartialState

import ldm
from ldm.files.checkpoint import model_hash
from ldm.formats.stock import MODELS
from ldm.metrics.drawing import averaged
from ldm.metrics.losses import by_timestep, save_measured, write_losses
from ldm.pipeline import LatentDiffusionPipeline
from train.batches.encoding import compute_latents
from train.batches.latents import Latents
from train.batches.plan import hold_out
from train.command import command
from train.config import parse
from train.data.sources import DataConfig
from train.fit.loop import cpu_only
from train.tasks.diffusion import validation_losses
from train.tasks.models import pipeline_folder


@dataclass(frozen=True, kw_only=True)
class LossesRecipe:
    """Of which model the loss is measured, and on which pictures."""

    output: str  # folder for the losses; other ones that are there are replaced
    model: str | None = None  # folder of a pipeline, or of the run that trained it; null: the bundled one
    data: DataConfig = field(default_factory=DataConfig)
    pictures: int = 512  # evenly spread over the data: those that as many validation_samples hold out
    latents: str | None = None  # folder of those of all the data, as runs/mine/latents; null: computed

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"pictures={self.pictures}: expected 1 or more")


def check_model(pipe: LatentDiffusionPipeline, latents: Latents) -> None:
    """Raises ValueError for a model that is told more than latents, captions and classes."""
    config = pipe.unet.config
    if config.in_channels != pipe.vae.config.latent_channels or config.pooled_channels:
        raise ValueError(
            f"this UNet takes {config.in_channels} channels, and latents have "
            f"{pipe.vae.config.latent_channels}: inpainting, upscaling and SDXL models see more than a "
            "picture and its caption, and no validation here shows it to them"
        )
    if config.time_cond_proj_dim is not None:
        raise ValueError(
            "this model was distilled with its guidance and answers guided: no validation here asks for that"
        )
    told = len(latents.classes) + 1 if latents.classes else None
    if config.num_class_embeds != told:
        raise ValueError(
            f"the model has {config.num_class_embeds} classes, with the one for none, and the data {told}: "
            "set data.label as its training did"
        )


@torch.no_grad()
def measure(recipe: LossesRecipe) -> tuple[dict[str, float], dict[str, Any]]:
    """The losses by the names of validation_losses, and all that decides them."""
    folder = pipeline_folder(recipe.model)
    cache = Path(recipe.latents) if recipe.latents else Path(recipe.output, "latents")
    some = None if recipe.latents else recipe.pictures
    latents = compute_latents(
        recipe.data, folder / "vae", cache, accept_new_data=some is not None, pictures=some
    )
    _, chosen = hold_out([bucket.indices for bucket in latents.buckets], recipe.pictures)
    pipe = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    check_model(pipe, latents)
    losses = validation_losses(pipe.to(PartialState(cpu=cpu_only()).device), latents, chosen)
    protocol = {
        "model": recipe.model or "bundled",
        "model_hash": model_hash(folder / name for name in MODELS),
        "ema": averaged(str(folder)),
        "data": latents.key.data,
        "pictures": sum(map(len, chosen)),
        "version": ldm.__version__,
        "torch": str(torch.__version__),
    }
    return losses, protocol


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, and print where the report is."""
    recipe = parse(LossesRecipe, sys.argv[1:] if argv is None else argv, None, __doc__ or "")
    output = Path(recipe.output)
    losses, protocol = measure(recipe)
    save_measured(output, losses, protocol)
    told = (
        f"Mean squared error of what the model predicts, by timestep, on {protocol['pictures']} pictures "
        f"({protocol['data']}); its mean is {losses['loss']:.4f}."
    )
    print(write_losses(output, protocol["model"], {protocol["model"]: by_timestep(losses)}, told))
    return 0


if __name__ == "__main__":
    command(main)
