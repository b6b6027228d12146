"""Latents that are turned and shrunk as pictures are: EQ-VAE (Kouzelis et al. 2025).

A decoder that is asked for the shrunk or turned picture when its latents are shrunk or turned keeps these
smooth, out of the highest frequencies, which a UNet learns last (see also Skorokhodov et al. 2025,
"Improving the diffusability of autoencoders").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 0.25  # the least share of its side that latents are shrunk to, as in the paper


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Squares (B, C, S, S), each turned left by its own number of quarters. turns: (B,) int64, 0 to 3."""
    every = torch.stack([x.rot90(k, (2, 3)) for k in range(4)])  # (4, B, C, S, S)
    return every[turns, torch.arange(len(x), device=x.device)]


def shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), each value a mean over the cells it covers; at half the size, of 2x2."""
    return F.interpolate(x, size=size, mode="area")


def shrunk_sides(side: int) -> range:
    """The sides that square latents may be shrunk to."""
    return range(max(1, round(SMALLEST * side)), side + 1)
