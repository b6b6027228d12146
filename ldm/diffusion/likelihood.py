"""How likely a model finds latents, in bits a dimension: the variational bound, and the density by the ODE.

Fewer bits are better. Both look at every number of the latents (B, C, h, w) as one dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.model.context import Context, Predict

from .guidance import conditional
from .noise import Noise
from .sample import Denoiser
from .schedule import Level, NoiseSchedule, Prediction
from .variance import LearnedVariance, ReverseSteps

# (xt, level) -> x0, and the logarithm of the variance of the step from there
Reverse = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x0, mean, log variance) -> log of x0's probability


def fixed_variance(denoise: Denoiser, log_variance: Tensor) -> Reverse:
    """Steps of known variance, such as one of the two of Ho et al. 2020, section 3.2.

    log_variance: (T,). With steps = ReverseSteps.of(schedule), steps.log_posterior is the posterior's, and
    steps.log_posterior + steps.width beta.
    """
    return lambda xt, level: (denoise(xt, level), log_variance[int(level.t)].to(xt))


def learned_variance(
    unet: Predict, context: Tensor | Context, kind: Prediction, steps: ReverseSteps
) -> Reverse:
    """Steps whose variance the UNet says (Nichol & Dhariwal 2021, eq. 15)."""
    learned = LearnedVariance(unet)
    denoise = conditional(learned, context, kind)

    def reverse(xt: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        x0, t = denoise(xt, level), int(level.t)
        return x0, steps.log_posterior[t].to(xt) + steps.width[t].to(xt) * (learned.v + 1) / 2

    return reverse


def density(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The log density of a normal: of data that may be any number, as latents."""
    return -(math.log(2 * math.pi) + log_variance + (x0 - mean) ** 2 * (-log_variance).exp()) / 2


def discretised(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The log probability of 8 bit pixels, -1 to 1 in steps of 2/255 (Ho et al. 2020, eq. 13).

    What a normal has within half a step of x0; the first and the last step reach to infinity.
    """
    scale, half = (-log_variance / 2).exp(), 1 / 255
    low = torch.where(x0 < -1 + half, -torch.inf, (x0 - half - mean) * scale)
    high = torch.where(x0 > 1 - half, torch.inf, (x0 + half - mean) * scale)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)  # the tail that is exact
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log1p(-(lower - upper).exp())


@dataclass(frozen=True)
class Bound:
    """The parts of the variational bound (Ho et al. 2020, eq. 5) in bits a dimension.

    prior: (B,), L_T. steps: (B, T - 1), L_t of the steps from t = 1 to T - 1. decoder: (B,), L_0.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """(B,): at least -log2 of x0's probability, a dimension, in the mean over the noise."""
        return self.prior + self.steps.sum(1) + self.decoder


@torch.no_grad()
def variational_bound(
    reverse: Reverse, schedule: NoiseSchedule, x0: Tensor, noise: Noise, decoder: Decoder = density
) -> Bound:
    """The bound of x0 (B, C, h, w), by a model call at each of the T levels.

    noise: asked for the draw of level t, (B, C, h, w). decoder: density for latents, discretised for pixels.
    Raises ValueError for a schedule that begins at the data, as a rectified flow.
    """
    if schedule.sigma[0] == 0:
        raise ValueError("a schedule that begins at sigma = 0 has no bound: use bits_by_ode")
    table = ReverseSteps.of(schedule)
    alpha, sigma, nats = schedule.alpha.tolist(), schedule.sigma.tolist(), []
    for t in range(len(alpha)):
        xt = alpha[t] * x0 + sigma[t] * noise(t).to(x0)
        answer, log_variance = reverse(xt, Level(float(t), alpha[t], sigma[t]))
        if t == 0:
            each = -decoder(x0, answer, log_variance)
        else:
            more = log_variance - table.log_posterior[t].to(x0)  # than q(x_{t-1} | xt, x0) has
            off = (table.of_x0[t].to(x0) * (x0 - answer)) ** 2 * (-log_variance).exp()
            each = (more + (-more).expm1() + off) / 2
        nats.append(each.flatten(1).mean(1))
    prior = (alpha[-1] ** 2 * (x0**2 - 1) - 2 * math.log(sigma[-1])) / 2
    bits = torch.stack([prior.flatten(1).mean(1), *nats], dim=1) / math.log(2)
    return Bound(bits[:, 0], bits[:, 2:], bits[:, 1])


def bits_by_ode(
    denoise: Denoiser, schedule: NoiseSchedule, x: Tensor, probe: Tensor, count: int = 50
) -> Tensor:
    """-log2 of the density of x at the cleanest level, a dimension: (B,); Song et al. 2021b, section 4.3.

    x: (B, C, h, w), data with the noise of that level, next to none; it runs to the noisiest, where it is
    standard normal, along dx / dlog(sigma / alpha) = alpha sigma v, by the classical Runge-Kutta method of
    order 4, in count steps of 4 calls. The density changes by the divergence, which Hutchinson's probe
    estimates.
    probe: (B, C, h, w), each 1 or -1; exact where no number's v depends on another number.
    Of a level at the data itself, or of pure noise, the next one counts.
    """
    ratio = schedule.ratio[(schedule.ratio > 0) & schedule.ratio.isfinite()]
    nodes = torch.linspace(ratio[0].log(), ratio[-1].log(), 2 * count + 1, dtype=torch.float64)
    grid = nodes.exp().clamp(ratio[0], ratio[-1])
    levels = [
        Level(t, 1 / math.hypot(1, r), r / math.hypot(1, r))
        for t, r in zip(schedule.t_at(grid).tolist(), grid.tolist(), strict=True)
    ]
    step = (nodes[2] - nodes[0]).item()

    def slope(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            change = level.alpha * (level.alpha * x - denoise(x, level))  # alpha sigma v
            (pulled,) = torch.autograd.grad((change * probe).sum(), x)
        return change.detach(), (pulled * probe).flatten(1).sum(1)

    grown = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for start, middle, end in zip(levels[:-1:2], levels[1::2], levels[2::2], strict=True):
        first, a = slope(x, start)
        second, b = slope(x + step / 2 * first, middle)
        third, c = slope(x + step / 2 * second, middle)
        last, d = slope(x + step * third, end)
        x = x + step / 6 * (first + 2 * second + 2 * third + last)
        grown = grown + step / 6 * (a + 2 * b + 2 * c + d)
    zero = torch.zeros_like(x)
    log_density = density(x, zero, zero).flatten(1).sum(1) + grown
    return -log_density / (x[0].numel() * math.log(2))
