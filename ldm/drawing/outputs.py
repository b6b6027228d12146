"""What a call of the pipeline answers with, and the forms its pictures may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

OutputType = Literal["pil", "np", "pt", "latent"]


class PipelineOutput(NamedTuple):
    """The pictures of a call, and what it decided."""

    images: Any  # PIL images; "np": (B, H, W, 3), "pt": (B, 3, H, W), both in [0, 1]; "latent": (B, C, h, w)
    seeds: list[int] | None  # of each image; None where a generator drew the noise
    cut: list[str]  # of each prompt, the end that did not fit the text encoder; "" where all did
    notices: list[str]  # all that had no effect or is odd, in words, each of which is warned of once


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of (B, 3, H, W) in [0, 1]."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


FORMATS: dict[OutputType, Callable[[Tensor], Any]] = {
    "pil": to_pil,
    "np": lambda images: images.permute(0, 2, 3, 1).cpu().numpy(),
    "pt": lambda images: images,
    "latent": lambda latents: latents,
}
