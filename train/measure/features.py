"""Perceptual distance from weights that the user has as files. Nothing is fetched."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autoencoder.perceptual import LPIPS
from ldm.checkpoint import read_tensors


def open_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, or of a .pth that holds nothing but tensors.

    Raises ValueError naming the file if it is missing, of another kind or broken.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no such file {path}: expected weights as .safetensors or .pth")
    if file.suffix == ".safetensors":
        return read_tensors(file)
    if file.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: expected weights as .safetensors or .pth")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)  # runs no code of the file
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole file of tensors alone: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds more or less than named tensors: expected a state dict")
    return tensors


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
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
