"""Latent diffusion, whole: `from ldm import LatentDiffusionPipeline` draws; the rest is what it is made of.

The names are handed out when they are asked for, so that `import ldm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.diffusion.guidance import classifier_free, conditional
    from ldm.diffusion.objective import diffusion_loss
    from ldm.diffusion.sample import trajectory
    from ldm.diffusion.schedule import NoiseSchedule
    from ldm.diffusion.scheduler import Scheduler
    from ldm.diffusion.solvers import SOLVERS
    from ldm.files.checkpoint import load_model, save_model
    from ldm.model.unet import UNet, UNetConfig
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.upscaling import LatentUpscalePipeline

# Not `sample`, as the module of that name stands in its place: `from ldm.diffusion.sample import sample`.
__all__ = [
    "SOLVERS",
    "LatentDiffusionPipeline",
    "LatentUpscalePipeline",
    "NoiseSchedule",
    "Scheduler",
    "UNet",
    "UNetConfig",
    "classifier_free",
    "conditional",
    "diffusion_loss",
    "load_model",
    "save_model",
    "trajectory",
]

_HOMES = {
    "LatentDiffusionPipeline": "ldm.pipeline",
    "LatentUpscalePipeline": "ldm.upscaling",
    "NoiseSchedule": "ldm.diffusion.schedule",
    "SOLVERS": "ldm.diffusion.solvers",
    "Scheduler": "ldm.diffusion.scheduler",
    "UNet": "ldm.model.unet",
    "UNetConfig": "ldm.model.unet",
    "classifier_free": "ldm.diffusion.guidance",
    "conditional": "ldm.diffusion.guidance",
    "diffusion_loss": "ldm.diffusion.objective",
    "load_model": "ldm.files.checkpoint",
    "save_model": "ldm.files.checkpoint",
    "trajectory": "ldm.diffusion.sample",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("ldm")
        except metadata.PackageNotFoundError:
            return "0+checkout"  # run from the sources without an installation
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
