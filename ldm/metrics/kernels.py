"""Maximum mean discrepancies (Gretton et al. 2012) between the features of two sets, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.noise import generator

ROWS = 1024  # of a table of all pairs that are in memory at once
SIGMA, SCALE = 10.0, 1000.0  # of CMMD (Jayasumana et al. 2024)

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> (N, M)


class Estimate(NamedTuple):
    """A mean, and the standard deviation of what it is the mean of."""

    mean: float
    std: float


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / D + 1)^3 (Binkowski et al. 2018, section 4)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a - b|^2 / (2 SIGMA^2))."""
    return (-squared_distances(a, b) / (2 * SIGMA**2)).exp()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, (N, M), by one matrix product; small ones are only as exact as the lengths allow."""
    lengths = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return (lengths - 2 * a @ b.T).clamp_min(0)


def mean_of_pairs(kernel: Kernel, a: Tensor, b: Tensor) -> float:
    """The mean of the kernel over all pairs of rows of a (N, D) and b (M, D)."""
    total = sum(kernel(rows.double(), b.double()).sum().item() for rows in a.split(ROWS))
    return total / (len(a) * len(b))


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    """The squared MMD of the cubic kernel without its bias (Gretton et al. 2012, eq. 3): may be below 0."""
    a, b = a.double(), b.double()
    within = [(k := cubic(x, x)).sum() - k.trace() for x in (a, b)]
    n, m = len(a), len(b)
    return (within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * cubic(a, b).mean()).item()


def kid(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> Estimate:
    """Kernel Inception Distance (Binkowski et al. 2018) of features (N, D) and (M, D), over random subsets.

    Subset i of each set depends on (seed, i) alone. Where a set has fewer than `size`, all subsets are of
    that many. Raises ValueError of fewer than two pictures in a set.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{len(a)} and {len(b)} pictures have no KID: give 2 or more in each set")
    if size == len(a) == len(b):
        subsets = 1  # every subset would be the whole
    values = []
    for number in range(subsets):
        draw = generator("kid", seed, number)
        chosen = [torch.randperm(len(x), generator=draw)[:size] for x in (a, b)]
        values.append(unbiased_mmd(a[chosen[0]], b[chosen[1]]))
    table = torch.tensor(values, dtype=torch.float64)
    return Estimate(table.mean().item(), table.std(correction=0).item())


def cmmd(a: Tensor, b: Tensor) -> float:
    """CLIP-MMD (Jayasumana et al. 2024): SCALE times the squared MMD of Gaussians on unit vectors (N, D).

    With the pairs of a picture and itself, as the authors' program has them: of a set and itself it is 0.
    """
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a.double(), b.double()))
    within = mean_of_pairs(gaussian, a, a) + mean_of_pairs(gaussian, b, b)
    return SCALE * (within - 2 * mean_of_pairs(gaussian, a, b))
