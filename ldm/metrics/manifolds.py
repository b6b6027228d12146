"""How far the places of two sets of features cover each other: balls that reach to a near neighbour."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm.metrics.kernels import ROWS

K_PRECISION = 3  # neighbours (Kynkäänniemi et al. 2019)
K_DENSITY = 5  # neighbours (Naeem et al. 2020)


class Cover(NamedTuple):
    """Of fake samples by real ones, and the other way round."""

    precision: float  # share of the fake that lie in a ball of a real one
    recall: float  # share of the real that lie in a ball of a fake one
    density: float  # in how many balls of real ones a fake one lies, of K_DENSITY
    coverage: float  # share of the real whose ball has a fake one in it


def nearest(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each row of a (N, D) its nearest rows of b (M, D): distances and places, both (N, count)."""
    b = b.double()
    found = [torch.cdist(rows.double(), b).topk(count, largest=False) for rows in a.split(ROWS)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def radii(x: Tensor, k: int) -> Tensor:
    """(N,): from each row of x (N, D) to its k-th nearest other one.

    Raises ValueError where there are no k others.
    """
    if len(x) <= k:
        raise ValueError(f"{len(x)} pictures have no {k} neighbours: give {k + 1} or more")
    return nearest(x, x, k + 1)[0][:, k]  # the nearest is itself, at 0


def cover(real: Tensor, fake: Tensor) -> Cover:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 2), density and coverage (Naeem 2020).

    real: (N, D). fake: (M, D). Balls are closed, so of a set and itself all but the density are 1.
    """
    real, fake = real.double(), fake.double()
    wide, narrow, around_fake = (
        radii(real, K_DENSITY),
        radii(real, K_PRECISION),
        radii(fake, K_PRECISION),
    )
    precise, in_balls = torch.zeros(len(fake), dtype=torch.bool), 0
    recalled, covered = [], []
    for rows in torch.arange(len(real)).split(ROWS):
        apart = torch.cdist(real[rows], fake)
        precise |= (apart <= narrow[rows, None]).any(0)
        inside = apart <= wide[rows, None]
        in_balls += int(inside.sum())
        covered.append(inside.any(1))
        recalled.append((apart <= around_fake).any(1))
    return Cover(
        precision=precise.double().mean().item(),
        recall=torch.cat(recalled).double().mean().item(),
        density=in_balls / (K_DENSITY * len(fake)),
        coverage=torch.cat(covered).double().mean().item(),
    )
