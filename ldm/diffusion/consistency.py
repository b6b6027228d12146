"""What consistency distillation minimises: answers at two levels of one path should be the same."""

from __future__ import annotations

import torch
from torch import Tensor

from .sample import Denoiser
from .schedule import Level, to_eps


def ddim_step(x0: Tensor, xt: Tensor, here: Level, there: Level) -> Tensor:
    """xt (B, C, h, w), taken from level here to there by the answer x0: Song et al. 2021, eq. 12, eta = 0.

    By x0 and the eps that belongs to it, so it is exact from alpha = 0, too.
    """
    return there.alpha * x0 + there.sigma * to_eps(x0, xt, here)


def pseudo_huber(error: Tensor, c: float = 0.00054) -> Tensor:
    """sqrt(mean(error**2) + c**2) - c of each sample, (B,): Song & Dhariwal 2023, section 3.3.

    error: (B, C, h, w). Theirs is of the sum, with c sqrt(d) for d numbers, and so sqrt(d) times as large.
    """
    return (error.square().flatten(1).mean(1) + c**2).sqrt() - c


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    teacher: Denoiser,
    xt: Tensor,
    here: Level,
    there: Level,
    area_weight: Tensor | None = None,
    c: float = 0.00054,
) -> Tensor:
    """How far the student at xt is from the target where the teacher takes xt to, a value a sample: (B,).

    Latent consistency distillation (Luo et al. 2023, algorithm 1 and eq. 14), with DDIM as its solver and
    pseudo_huber, of this c, in x0 as its distance. Gradients reach the student alone.
    xt: (B, C, h, w). here, there: its level and the next cleaner one, of tensors (B, 1, 1, 1). At sigma = 0
    a consistency function answers with xt itself, so the target is not heard there.
    area_weight: (B, 1, h, w), what each place weighs in the mean, as of diffusion_loss.
    """
    with torch.no_grad():
        closer = ddim_step(teacher(xt, here), xt, here, there)
        wanted = torch.where(torch.as_tensor(there.sigma) == 0, closer, target(closer, there))
    error = student(xt, here) - wanted
    if area_weight is not None:
        error = error * (area_weight / area_weight.mean((1, 2, 3), keepdim=True)).sqrt()
    return pseudo_huber(error, c)
