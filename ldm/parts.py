"""A pipeline's folder in diffusers' layout: its parts read, and written so that a broken write is seen."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm import options, stock
from ldm.checkpoint import has_variant, load_model, save_model
from ldm.config import read_config, read_json, write_json
from ldm.scheduler import Scheduler
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

log = logging.getLogger(__name__)

DEFAULTS = "generation.json"  # beside model_index.json: the options that suit the model, see options.Defaults


def read_parts(folder: Path, dtype: torch.dtype, variant: str | None = None) -> dict[str, Any]:
    """The arguments of LatentDiffusionPipeline that a folder holds, on the CPU.

    variant: for the models that have it. Raises ValueError unless every part is whole and of a known class.
    """
    layout, settings = stock.read_index(folder)
    variants = {name: variant and has_variant(folder / name, variant) for name in layout.models}
    if variant and not any(variants.values()):
        raise ValueError(f"{folder} has no variant {variant!r} of any part")
    models = {
        name: load_model(stock.CLASSES[name], folder / name, dtype, variant if variants[name] else None)
        for name in layout.models
    }
    tokenizers = {name: Tokenizer.from_folder(folder / name) for name in layout.tokenizers}
    path = folder / DEFAULTS
    return {
        **models,
        **tokenizers,
        **settings,
        "scheduler": Scheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json")),
        "defaults": read_config(options.Defaults, read_json(path), path) if path.exists() else None,
    }


def write_parts(pipe: LatentDiffusionPipeline, folder: Path, variant: str | None = None) -> None:
    """Writes a folder that read_parts and diffusers read; model_index.json comes last."""
    layout = pipe.texts.layout
    for name in layout.models:
        save_model(getattr(pipe, name), folder / name, variant=variant)
    for name in layout.tokenizers:
        getattr(pipe, name).save(folder / name)
    write_json(folder / "scheduler/scheduler_config.json", stock.scheduler_json(pipe.scheduler.config))
    (folder / DEFAULTS).unlink(missing_ok=True)  # another model's
    if pipe.defaults != pipe.texts.defaults:
        write_json(folder / DEFAULTS, dataclasses.asdict(pipe.defaults))
    settings = {name: getattr(pipe, name) for name in layout.settings}
    index = stock.model_index(layout, stock.scheduler_class(pipe.scheduler.config), settings)
    write_json(folder / "model_index.json", index)
