"""Mean and covariance that grow batch by batch, and the Fréchet distance between two such pairs.

Memory is that of one matrix, however many pictures there are. All of it in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of samples x: their count, their mean (D,), and the sum of (x - mean)(x - mean)^T, (D, D)."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of the rows of features, (B, D)."""
        features = features.double()
        mean = features.mean(0)
        apart = features - mean
        return cls(len(features), mean, apart.T @ apart)

    def __add__(self, other: Moments) -> Moments:
        """Of both sets together (Chan, Golub & LeVeque 1979): nothing large is subtracted."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """(D, D), the unbiased one. Raises ValueError of fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} pictures have no covariance: give 2 or more")
        return self.scatter / (self.count - 1)


def root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance (D, D).

    Eigenvalues that rounding alone could have made are 0: the root of a rounding error is 1e-8, not 1e-16.
    """
    values, vectors = torch.linalg.eigh(covariance)
    least = values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    values = torch.where(values > least, values, 0.0).sqrt()
    return (vectors * values) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    The last trace is the sum of the singular values of C_a^(1/2) C_b^(1/2), as these squared are the
    eigenvalues of C_a C_b: no root of a matrix that is not symmetric, so none that is complex or fails where
    covariances have less than full rank. With fewer samples than dimensions the value is too high.
    """
    roots = root(a.covariance) @ root(b.covariance)
    cross = torch.linalg.svdvals(roots).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)
