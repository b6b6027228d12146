"""A pipeline's folder in diffusers' layout: its parts read, and written so that a broken write is seen."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.diffusion.scheduler import Scheduler
from ldm.files.checkpoint import has_variant, load_model, save_model
from ldm.files.config import read_config, read_json, write_json
from ldm.formats import stock
from ldm.recipes import options
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.drawing.base import Drawing

log = logging.getLogger(__name__)

SCHEDULER = "scheduler_config.json"  # in the folder of each scheduler
DEFAULTS = "generation.json"  # beside model_index.json: the options that suit the model, see options.Defaults
TRAINED = "training.json"  # there too: at which step training exported it, and which average of the weights


def read_parts(
    folder: Path, layouts: Mapping[str, stock.Layout], dtype: torch.dtype, variant: str | None = None
) -> dict[str, Any]:
    """The arguments of a pipeline of one of these layouts that a folder holds, on the CPU.

    variant: for the models that have it. Raises ValueError unless every part is whole and of a known class.
    """
    layout, settings = stock.read_index(folder, layouts)
    variants = {name: variant and has_variant(folder / name, variant) for name in layout.models}
    if variant and not any(variants.values()):
        raise ValueError(f"{folder} has no variant {variant!r} of any part")
    models = {
        name: load_model(stock.CLASSES[name], folder / name, dtype, variant if variants[name] else None)
        for name in layout.models
    }
    tokenizers = {name: Tokenizer.from_folder(folder / name) for name in layout.tokenizers}
    schedulers = {
        name: Scheduler.from_config(read_json(folder / name / SCHEDULER)) for name in layout.schedulers
    }
    path = folder / DEFAULTS
    return {
        **models,
        **tokenizers,
        **schedulers,
        **settings,
        "defaults": read_config(options.Defaults, read_json(path), path) if path.exists() else None,
    }


def write_parts(pipe: Drawing, folder: Path, variant: str | None = None) -> None:
    """Writes a folder that read_parts and diffusers read; model_index.json comes last."""
    layout = pipe.layout
    for name in layout.models:
        save_model(getattr(pipe, name), folder / name, variant=variant)
    for name in layout.tokenizers:
        getattr(pipe, name).save(folder / name)
    schedulers = {name: getattr(pipe, name).config for name in layout.schedulers}
    for name, config in schedulers.items():
        write_json(folder / name / SCHEDULER, stock.scheduler_json(config))
    for name in (DEFAULTS, TRAINED):
        (folder / name).unlink(missing_ok=True)  # another model's
    if pipe.defaults != pipe.stock_defaults:
        write_json(folder / DEFAULTS, dataclasses.asdict(pipe.defaults))
    settings = {name: getattr(pipe, name) for name in layout.settings}
    classes = {name: stock.scheduler_class(config) for name, config in schedulers.items()}
    write_json(folder / "model_index.json", stock.model_index(layout, classes, settings))
