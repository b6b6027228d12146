"""What training minimises: one loss for the four kinds of prediction, its weights and its timesteps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.model.context import Context

from .noise import generator
from .schedule import Level, NoiseSchedule, Prediction, seen

Weight = Callable[[Level, Prediction], Tensor]


def no_weight(level: Level, kind: Prediction) -> Tensor:
    """1 everywhere: L_simple (Ho et al. 2020, eq. 14)."""
    return torch.ones_like(torch.as_tensor(level.sigma))


def of_v(weight: Tensor, level: Level, kind: Prediction) -> Tensor:
    """The weight of v's error as one of x0's, which is sigma times as large, or of the flow's."""
    alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
    scale = {"v": torch.ones_like(sigma), "x0": sigma, "flow": alpha + sigma}[kind]
    return weight / scale**2


def min_snr(level: Level, kind: Prediction, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, section 3.4), in a form that survives SNR = 0.

    eps: min(SNR, gamma) / SNR, as published. v: min(SNR + 1, gamma) / (SNR + 1), and x0: min(SNR + 1, gamma).
    The paper's v and x0 have min(SNR, gamma) there, 0 at zero SNR, where a model of v or x0 still has an
    image to predict. Written with 1 / (SNR + 1) = sigma**2, so that nothing divides by 0.
    """
    alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
    if kind == "eps":
        return (gamma * (sigma / alpha) ** 2).clamp(max=1)
    return of_v((gamma * sigma**2).clamp(max=1), level, kind)


def soft_min_snr(level: Level, kind: Prediction, gamma: float = 4.0) -> Tensor:
    """Soft-min-SNR (Crowson et al. 2024, "Hourglass diffusion"): min-SNR without its corner.

    eps: gamma / (SNR + gamma), as published. v: gamma / (SNR + 1 + gamma), and x0: (SNR + 1) times that:
    SNR + 1 stands for the paper's SNR, as in min_snr.
    """
    alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
    noise = gamma * sigma**2
    if kind == "eps":
        return noise / (alpha**2 + noise)
    return of_v(noise / (1 + noise), level, kind)


def p2(level: Level, kind: Prediction) -> Tensor:
    """P2 with k = gamma = 1 (Choi et al. 2022): little weight where only what nobody sees is left to remove.

    eps: 1 / (SNR + 1), as published. v: 1 / (SNR + 2), and x0: (SNR + 1) times that, as in min_snr.
    """
    sigma2 = torch.as_tensor(level.sigma) ** 2
    if kind == "eps":
        return sigma2
    return of_v(sigma2 / (1 + sigma2), level, kind)


WEIGHTS: dict[str, Weight] = {"none": no_weight, "min_snr": min_snr, "soft_min_snr": soft_min_snr, "p2": p2}


def logit_normal(q: Tensor) -> Tensor:
    """The quantiles of sigmoid(N(0, 1)): most in the middle (Esser et al. 2024, eq. 19)."""
    return torch.special.ndtri(q).sigmoid()


# name -> the quantiles of a density of t in [0, 1]
DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {"uniform": lambda q: q, "logit_normal": logit_normal}


def stratified_timesteps(
    count: int, T: int, u: float, shift: float = 1.0, density: str = "uniform"
) -> Tensor:
    """(count,) int64 timesteps in [0, T) of one global batch, the quantiles (u + i / count) mod 1 of density.

    The low-discrepancy sampler of Kingma et al. 2021 (VDM), appendix I.1: one in each stratum. u: one draw
    from [0, 1). density: a name in DENSITIES.
    shift: s in t' = s t / (1 + (s - 1) t), t in [0, 1) (Esser et al. 2024, eq. 23). Large latents say much
    twice and want s > 1, more noise; small ones want s < 1.
    """
    part = DENSITIES[density]((u + torch.arange(count, dtype=torch.float64) / count) % 1)
    return (shift * part / (1 + (shift - 1) * part) * T).long().clamp(max=T - 1)


def diffusion_loss(
    unet: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x0: Tensor,
    context: Tensor | Context,
    kind: Prediction,
    noise: Tensor,
    t: Tensor,
    weight: Weight = no_weight,
    perturbation: Tensor | None = None,
    area_weight: Tensor | None = None,
) -> Tensor:
    """The weighted mean squared error of the prediction, a value a sample: (B,). Ho et al. 2020, eq. 14.

    x0, noise: (B, C, h, w) float32, scaled latents and a standard normal draw. t: (B,) int64.
    context: (B, N, D), or what else the unet takes there.
    perturbation: (B, C, h, w), added to the noise that the unet sees, not to that it is asked for (Ning et
    al. 2023, "Input perturbation reduces exposure bias").
    area_weight: (B, 1, h, w), what each place weighs in the mean over a sample. It moves no minimum, as the
    best prediction is the best at every place; it says where a model that is not yet best errs least.
    Raises ValueError if kind is eps and the schedule ends at zero SNR.
    """
    schedule.require(kind)
    level = schedule.at(t, like=x0)
    told = noise if perturbation is None else noise + perturbation
    xt = seen(level.alpha * x0 + level.sigma * told, level, kind)
    v, flow = level.alpha * noise - level.sigma * x0, noise - x0
    target = {"eps": noise, "x0": x0, "v": v, "flow": flow}[kind]
    error = F.mse_loss(unet(xt, t.to(x0.device), context).float(), target, reduction="none")
    if area_weight is not None:
        error = error * (area_weight / area_weight.mean((1, 2, 3), keepdim=True))
    return (weight(level, kind) * error).flatten(1).mean(1)


class Uncertainty(nn.Module):
    """The logarithm u(t) of the mean loss at each timestep, learned beside the model.

    Minimising loss / exp(u) + u makes exp(u) that mean (Kendall et al. 2018, eq. 7), so all levels count
    alike, whatever their loss, as in EDM2 (Karras et al. 2024). u is linear in random Fourier features of t
    (Rahimi & Recht 2007) and starts as 0.
    """

    def __init__(self, T: int, channels: int = 64) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.phases: Tensor
        rng = generator("uncertainty")
        self.T = T
        self.register_buffer("frequencies", 4 * torch.randn(channels, generator=rng))
        self.register_buffer("phases", torch.rand(channels, generator=rng))
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, t: Tensor) -> Tensor:
        """u at timesteps t (B,): (B,) float32."""
        angles = t[:, None].float() / self.T * self.frequencies + self.phases
        return ((2 * torch.pi * angles).cos() * self.weight).sum(1)  # no product that autocast would round

    def balance(self, loss: Tensor, t: Tensor) -> Tensor:
        """What to minimise instead of losses (B,) at timesteps t (B,)."""
        u = self(t)
        return loss / u.exp() + u


class LossHistory(nn.Module):
    """Timesteps by importance: t with p(t) ~ sqrt(E[L_t**2]), by the last 10 losses of each timestep.

    Nichol & Dhariwal 2021, eq. 18; as in the paper's program even until each has 10, and always a thousandth
    of it even. It learns from what it chose, so unlike the other timesteps these are a function of the run
    so far. All of that is in its buffers.
    """

    LENGTH, EVEN = 10, 0.001

    def __init__(self, T: int) -> None:
        super().__init__()
        self.losses: Tensor
        self.counts: Tensor
        # the last row takes what is too old to keep
        self.register_buffer("losses", torch.zeros(T + 1, self.LENGTH, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(T, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """p (T,) float64."""
        size = self.losses[:-1].square().mean(1).sqrt()
        T, known = len(size), (self.counts >= self.LENGTH).all() & (size.sum() > 0)
        learned = (1 - self.EVEN) * size / size.sum() + self.EVEN / T
        return torch.where(known, learned, torch.full_like(size, 1 / T))

    def choose(self, quantiles: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) int64 at these quantiles of p, (B,) float64 in [0, 1), and what their losses weigh.

        1 / (T p): with that weight the mean loss is that of even timesteps.
        """
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), quantiles, right=True).clamp(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    @torch.no_grad()
    def note(self, t: Tensor, loss: Tensor) -> None:
        """Remember losses (B,) at timesteps t (B,), in their order, but none that is not finite."""
        finite = loss.isfinite()
        same = (t[:, None] == t[None, :]) & finite
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)  # of the same timestep, in this batch
        slot = (self.counts[t] + earlier) % self.LENGTH
        row = torch.where(finite & (later < self.LENGTH), t, len(self.counts))
        self.losses[row, slot] = loss.double()
        self.losses[-1] = 0  # or it would depend on which of several writes came last
        self.counts.index_add_(0, t, finite.long())
