"""A pipeline in pieces, whatever its format: configurations, tokenizer and tensors, not yet a model.

Folders and single files are read to pieces and written from them, so that a converter needs no pipeline that
can draw: an upscaler has pieces too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.scheduler import Scheduler
from ldm.files.checkpoint import fill_model, has_variant, read_tensors, save_model, weight_file, write_json
from ldm.files.config import read_config, read_json
from ldm.formats import stock
from ldm.formats.kinds import INPAINT, MAX_NOISE_LEVEL, TO_IMAGE, UPSCALE, Kind
from ldm.formats.parts import DEFAULTS
from ldm.formats.report import Report
from ldm.formats.tensors import CLASSES, part_shapes
from ldm.recipes import options
from text_encoder.tokenizer import Tokenizer

TITLES = {
    **dict.fromkeys((TO_IMAGE, "LatentDiffusionPipeline"), "a model from text to image"),
    INPAINT: "a model for inpainting",
    stock.FEW_STEPS.stock_class: "a model from text to image in few steps",
    UPSCALE: "an upscaler by 4",
}
NOT_DRAWN = "can be converted, but no pipeline here draws with it: diffusers' {} does"
Tick = Callable[[], object]  # called after each tensor, for a progress bar


@dataclass(frozen=True)
class Pieces:
    """kind: the configurations. tensors: of each part, by our names, as they lie on the disk."""

    kind: Kind
    tokenizer: Tokenizer
    tensors: Mapping[str, Mapping[str, Tensor]]
    reports: list[Report]
    notes: list[str] = field(default_factory=list)  # what was recognised, chosen and left out
    defaults: options.Defaults = field(default_factory=options.Defaults)  # what suits the model

    def models(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """Our modules with copies of the tensors; None is float32."""
        configs = self.kind.configs()
        return {
            part: fill_model(CLASSES[part], configs[part], tensors, self.reports[0].source, dtype)
            for part, tensors in self.tensors.items()
        }

    def cast(self, dtype: torch.dtype | None, tick: Tick = lambda: None) -> dict[str, dict[str, Tensor]]:
        """The tensors in this dtype; None is as they are. tick: called after each.

        Raises ValueError for one that the dtype cannot hold.
        """
        cast: dict[str, dict[str, Tensor]] = {}
        for part, tensors in self.tensors.items():
            cast[part] = {}
            for name, value in tensors.items():
                other = value if dtype is None else value.to(dtype)
                if other.dtype != value.dtype and not other.isfinite().all() and value.isfinite().all():
                    raise ValueError(f"{part}: {name} does not fit into {dtype}: use bf16 or fp32")
                cast[part][name] = other
                tick()
        return cast

    def components(self, dtype: torch.dtype) -> dict[str, Any]:
        """What our pipeline for this kind takes. dtype: of the models."""
        found = {
            **self.models(dtype),
            "tokenizer": self.tokenizer,
            "scheduler": Scheduler.from_config(self.kind.scheduler),
            "defaults": None if self.defaults == options.Defaults() else self.defaults,
        }
        if self.kind.low_res_scheduler is not None:
            found["low_res_scheduler"] = Scheduler.from_config(self.kind.low_res_scheduler)
            most = self.kind.max_noise_level
            found["max_noise_level"] = MAX_NOISE_LEVEL if most is None else most
        return found

    def check_drawn(self, layouts: Collection[str] = stock.LAYOUTS) -> None:
        """Raises ValueError unless a pipeline of ours with these layouts, by name, can draw with these."""
        name, source = self.kind.pipeline, self.reports[0].source
        if name not in layouts:
            reader = stock.READERS.get(name)
            advice = f"load it by {reader}.from_single_file" if reader else "it " + NOT_DRAWN.format(name)
            raise ValueError(f"{source} is {TITLES[name]} ({self.kind.title}): {advice}")


def read_kind(folder: Path) -> Kind:
    """The configurations of a folder in diffusers' layout. Raises ValueError, naming the file, if one is not.

    Nothing that a file names is imported.
    """
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in TITLES:
        raise ValueError(
            f"{folder / 'model_index.json'}: the pipeline is {name!r}: expected one of {', '.join(TITLES)}"
        )
    configs = {}
    for part, cls in CLASSES.items():
        path = folder / part / "config.json"
        configs[part] = read_config(cls.config_class, read_json(path), path)
    low = folder / "low_res_scheduler/scheduler_config.json"
    return Kind(
        title=TITLES[name],
        pipeline=TO_IMAGE if name == "LatentDiffusionPipeline" else name,
        scheduler=read_json(folder / "scheduler/scheduler_config.json"),
        low_res_scheduler=read_json(low) if name == UPSCALE else None,
        max_noise_level=index.get("max_noise_level", MAX_NOISE_LEVEL) if name == UPSCALE else None,
        **configs,
    )


def read_folder(folder: Path, variant: str | None = None) -> Pieces:
    """The pieces of a folder in diffusers' layout. variant: such as "fp16", of the parts that have it.

    Raises ValueError, naming the file and the first names, unless every part is whole.
    """
    kind = read_kind(folder)
    configs, tensors, reports = kind.configs(), {}, []
    for part, cls in CLASSES.items():
        path = weight_file(
            folder / part, variant if variant and has_variant(folder / part, variant) else None
        )
        tensors[part] = cls.rename_keys(read_tensors(path))
        have = {name: tuple(value.shape) for name, value in tensors[part].items()}
        want = part_shapes(part, configs[part])
        reports.append(Report.compare(want, have, path, cls.__name__).check())
    parts = {*CLASSES, "tokenizer", "scheduler", "low_res_scheduler"}
    left = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in parts)
    notes = [f"{folder} holds {kind.title}"]
    notes += [f"left out, as no pipeline here has it: {name}" for name in left]
    defaults = folder / DEFAULTS
    return Pieces(
        kind,
        Tokenizer.from_folder(folder / "tokenizer"),
        tensors,
        reports,
        notes,
        read_config(options.Defaults, read_json(defaults), defaults)
        if defaults.exists()
        else options.Defaults(),
    )


def model_index(kind: Kind) -> dict[str, Any]:
    """The model_index.json of a folder of this kind, as diffusers reads it."""
    classes = {"scheduler": stock.scheduler_class(kind.scheduler)}
    if kind.low_res_scheduler is None:
        return stock.model_index(stock.SD, classes) | {"_class_name": kind.pipeline}
    classes["low_res_scheduler"] = stock.scheduler_class(kind.low_res_scheduler)
    most = MAX_NOISE_LEVEL if kind.max_noise_level is None else kind.max_noise_level
    return stock.model_index(stock.UPSCALER, classes, {"max_noise_level": most})


def write_folder(
    pieces: Pieces, folder: Path, dtype: torch.dtype | None = None, tick: Tick = lambda: None
) -> None:
    """Writes a folder that diffusers and we read, whole or not at all. dtype: None is as the tensors are.

    Raises ValueError if there is something in its place.
    """
    check_absent(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name[:40]}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    kind, configs = pieces.kind, pieces.kind.configs()
    try:
        for part, tensors in pieces.cast(dtype, tick).items():
            one = next(iter(tensors.values())).dtype
            save_model(fill_model(CLASSES[part], configs[part], tensors, part, one), beside / part)
        pieces.tokenizer.save(beside / "tokenizer")
        write_json(beside / "scheduler/scheduler_config.json", stock.scheduler_json(kind.scheduler))
        if kind.low_res_scheduler is not None:
            low = stock.scheduler_json(kind.low_res_scheduler)
            write_json(beside / "low_res_scheduler/scheduler_config.json", low)
        if pieces.defaults != options.Defaults():
            write_json(beside / DEFAULTS, asdict(pieces.defaults))
        write_json(beside / "model_index.json", model_index(kind))
        if folder.is_dir():
            folder.rmdir()  # an empty one
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_absent(target: Path) -> None:
    """Raises ValueError if something is where the target will be, but for an empty folder."""
    if target.is_dir() and not target.is_symlink():
        if any(target.iterdir()):
            raise ValueError(f"{target} is a folder that holds something: name another")
    elif target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists: name another, or remove it first")
