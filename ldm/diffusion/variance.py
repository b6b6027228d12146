"""The variance of a reverse step, learned beside its mean: Nichol & Dhariwal 2021, "Improved DDPM".

A UNet with twice as many channels out as in answers with a prediction and with v in about [-1, 1], by which
the logarithm of the variance lies between those of the posterior's (v = -1) and of beta (v = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.model.context import Context, Predict

from .noise import Noise
from .schedule import NoiseSchedule, Prediction, Timesteps, to_x0


@dataclass(frozen=True)
class ReverseSteps:
    """What q(x_{t-1} | xt, x0) is, for the steps t -> t - 1 of a schedule; tables (T,) float64.

    log_posterior: of its variance, eq. 10. width: from there to log beta, so that the small differences
    between the two are exact. of_x0: what x0 weighs in its mean, eq. 11.
    """

    schedule: NoiseSchedule
    log_posterior: Tensor
    width: Tensor
    of_x0: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> ReverseSteps:
        """The posterior's variance is 0 at t = 0, and as in the paper's program counts as that at t = 1."""
        alpha, sigma = schedule.alpha, schedule.sigma
        before, sigma_before = alpha.roll(1), sigma.roll(1)
        before[0], sigma_before[0] = 1.0, 0.0  # the data
        beta = 1 - (alpha / before) ** 2
        width = 2 * (sigma / sigma_before).log()
        width[0] = (beta[0] / beta[1]).log() + width[1]
        return cls(schedule, beta.log() - width, width, before * beta / sigma**2)


class LearnedVariance:
    """A UNet of twice the channels as one of the prediction alone, (xt, t, context) -> prediction.

    It keeps what else it answered last, so it is made anew for each loss and each run.
    """

    xt: Tensor
    prediction: Tensor
    v: Tensor

    def __init__(self, unet: Predict) -> None:
        self.unet = unet

    def __call__(self, xt: Tensor, t: Tensor, context: Tensor | Context) -> Tensor:
        self.xt = xt
        self.prediction, self.v = self.unet(xt, t, context).float().chunk(2, dim=1)
        return self.prediction

    def bound(self, steps: ReverseSteps, x0: Tensor, kind: Prediction, t: Tensor) -> Tensor:
        """L_t of the variational bound for the last answer, in bits a dimension: (B,). Only v gets gradients.

        x0: (B, C, h, w). t: (B,) int64. It is the divergence of the model's step from q(x_{t-1} | xt, x0),
        both normal, and at t = 0 the density of x0. The paper's pixels are whole numbers, so that it has a
        probability there; latents are not.
        """
        log_posterior, width, of_x0 = (
            table.to(t.device)[t].to(x0).view(-1, 1, 1, 1)
            for table in (steps.log_posterior, steps.width, steps.of_x0)
        )
        more = width * (self.v + 1) / 2  # eq. 15: log of the variance over the posterior's
        log_variance = log_posterior + more
        answer = to_x0(self.prediction.detach(), self.xt, steps.schedule.at(t, like=x0), kind)
        off = (of_x0 * (x0 - answer)) ** 2 * (-log_variance).exp()
        surprise, divergence = math.log(2 * math.pi) + log_variance, more + (-more).expm1()
        nats = (torch.where(t.view(-1, 1, 1, 1) == 0, surprise, divergence) + off) / 2
        return nats.flatten(1).mean(1) / math.log(2)

    def louder(self, noise: Noise, steps: Timesteps) -> Noise:
        """The noise of DDPM's table with the deviation that the last answer gave it.

        The table's c is the root of the posterior's variance, and sigma / sigma' times that is the root of
        beta, so the learned deviation is c (sigma / sigma')^w, w = (v + 1) / 2. With guidance the answers to
        the prompts come last, and theirs count, as in diffusers. The step that ends at the data has no noise,
        whatever the model says; diffusers' adds it there unless t = 0.
        """
        ratio = (steps.sigma[:-1] / steps.sigma[1:]).tolist()

        def draw(index: int) -> Tensor:
            z = noise(index).to(self.v)
            return z * ratio[index] ** ((self.v[-len(z) :] + 1) / 2)

        return draw
