"""Latent diffusion, whole: `from ldm import LatentDiffusionPipeline` draws; the rest is what it is made of.

The names are handed out when they are asked for, so that `import ldm` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.checkpoint import load_model, save_model
    from ldm.guidance import classifier_free, conditional
    from ldm.objective import diffusion_loss
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.sample import trajectory
    from ldm.schedule import NoiseSchedule
    from ldm.scheduler import Scheduler
    from ldm.solvers import SOLVERS
    from ldm.unet import UNet, UNetConfig

# Not `sample`, as the module of that name stands in its place: `from ldm.sample import sample`.
__all__ = [
    "SOLVERS",
    "LatentDiffusionPipeline",
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
    "NoiseSchedule": "ldm.schedule",
    "SOLVERS": "ldm.solvers",
    "Scheduler": "ldm.scheduler",
    "UNet": "ldm.unet",
    "UNetConfig": "ldm.unet",
    "classifier_free": "ldm.guidance",
    "conditional": "ldm.guidance",
    "diffusion_loss": "ldm.objective",
    "load_model": "ldm.checkpoint",
    "save_model": "ldm.checkpoint",
    "trajectory": "ldm.sample",
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
