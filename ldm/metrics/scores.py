"""Figures of one set of pictures, without another to compare it with."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.metrics.kernels import Estimate

SPLITS = 10  # of the Inception Score (Salimans et al. 2016, section 4)


def inception_score(probabilities: Tensor, splits: int = SPLITS) -> Estimate:
    """exp of the mean KL(p(y|x) | p(y)) over the pictures of a split (Salimans et al. 2016, section 4).

    probabilities: (N, K) of K classes, a row a picture. Mean and deviation over the splits.
    Raises ValueError where a split would be empty.
    """
    if len(probabilities) < splits:
        raise ValueError(f"{len(probabilities)} pictures do not make {splits} splits of an Inception Score")
    scores = []
    for part in probabilities.double().tensor_split(splits):
        mean = part.mean(0)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, mean)).sum(1)
        scores.append(divergence.mean().exp())
    table = torch.stack(scores)
    return Estimate(table.mean().item(), table.std(correction=0).item())


def clip_score(pictures: Tensor, texts: Tensor) -> Estimate:
    """100 max(cos, 0) of a picture and its text in CLIP's space (Hessel et al. 2021, eq. 1 with w = 100).

    pictures, texts: (N, D), row by row. Mean and deviation over the pictures. Hessel's own w is 2.5.
    """
    cosine = torch.cosine_similarity(pictures.double(), texts.double())
    scores = 100 * cosine.clamp_min(0)
    return Estimate(scores.mean().item(), scores.std(correction=0).item())
