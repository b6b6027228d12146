"""Counted noise: every draw is a function of what it is for, never of what was drawn before.

So an image does not depend on its batch, its device or the run it is part of, and a resumed run repeats
itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Callable[[int], Tensor]  # step index -> (B, C, h, w) float32, standard normal


def key(*parts: int | str) -> int:
    """A seed of 63 bits for this sequence of parts; 1 and "1" differ, and so do ("a", "b") and ("ab",)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for this sequence of parts."""
    return torch.Generator().manual_seed(key(*parts))


def start_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The first noise of each image: (B, C, h, w) on the CPU, row i from seeds[i] alone. shape: (C, h, w).

    A seed gives the noise that diffusers draws with `torch.Generator("cpu").manual_seed(seed)`.
    """
    rows = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows)


def step_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """What stochastic solvers add: the draw of a step depends on (seed, step) alone. shape: (C, h, w)."""

    def noise(step: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=generator("step", seed, step)) for seed in seeds])

    return noise
