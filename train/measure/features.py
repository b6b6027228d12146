"""Perceptual distance from weights that the user has as files. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from autoencoder.perceptual import LPIPS
from ldm.metrics.weights import open_weights, sha256


def perceptual_distance(vgg: str, heads: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with the weights of these files, on the device of what it is asked, with gradients to pictures.

    It is a function, no module, so that no module that calls it trains, averages or saves it.
    """
    lpips = LPIPS()
    lpips.load(open_weights(vgg), open_weights(heads) if heads else None)
    lpips.eval().requires_grad_(False)
    return lambda a, b: lpips.to(a.device)(a, b)


def digest(path: str | None) -> str | None:
    """The start of a file's SHA-256, by which a resumed run knows it wherever it lies."""
    if path is None or not Path(path).is_file():
        return path
    return sha256(Path(path))[:16]
