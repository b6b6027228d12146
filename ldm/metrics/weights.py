"""Weights that the user has as files, known by their hashes. Nothing is fetched."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from torch import Tensor

from ldm.files.checkpoint import read_tensors


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


def sha256(path: Path) -> str:
    """Of a file, in 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
