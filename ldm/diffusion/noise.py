"""Counted noise: every draw is a function of what it is for, never of what was drawn before.

So an image does not depend on its batch, its device or the run it is part of, and a resumed run repeats
itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
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


def slerp(first: Tensor, last: Tensor, part: float) -> Tensor:
    """From first to last along the great circle, each row as one vector: (B, C, h, w) (Shoemake 1985, eq. 3).

    sin((1 - part) a) / sin(a) first + sin(part a) / sin(a) last, with the angle a between them; written with
    sin(x) / x, so that a may be 0. Normal draws are nearly orthogonal and equally long, and so remains what
    lies between them: standard normal, where a straight line would be quieter in its middle.
    """
    cosine = F.cosine_similarity(first.double().flatten(1), last.double().flatten(1))
    turns = cosine.clamp(-1, 1).acos().view(-1, 1, 1, 1) / math.pi
    weights = [share * (share * turns).sinc() / turns.sinc() for share in (1 - part, part)]
    return (weights[0] * first + weights[1] * last).to(first.dtype)


def step_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """What stochastic solvers add: the draw of a step depends on (seed, step) alone. shape: (C, h, w)."""

    def noise(step: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=generator("step", seed, step)) for seed in seeds])

    return noise
