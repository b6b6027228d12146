"""The noise schedule (what happens to the data) and the timesteps (where a run looks at it).

Everything is float64 on the CPU and variance-preserving. alpha may be 0 at the noisiest level (zero SNR).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Prediction = Literal["eps", "v", "x0", "flow"]
Spacing = Literal["leading", "linspace", "trailing", "karras", "log_snr"]

NO_SIGNAL = "eps says nothing about x0 where alpha = 0 (zero terminal SNR): use a model that predicts v or x0"


class Level(NamedTuple):
    """A noise level, xt = alpha * x0 + sigma * noise: floats in a run, tensors (B, 1, 1, 1) in training."""

    t: float | Tensor
    alpha: float | Tensor
    sigma: float | Tensor


def seen(xt: Tensor, level: Level, kind: Prediction) -> Tensor:
    """What the model sees of xt: all of it, or, where it predicts a flow, (1 - s) x0 + s noise.

    That is xt / (alpha + sigma), the straight line from data to noise, with s = sigma / (alpha + sigma).
    """
    return xt / (level.alpha + level.sigma) if kind == "flow" else xt


def to_x0(prediction: Tensor, xt: Tensor, level: Level, kind: Prediction) -> Tensor:
    """x0 from a prediction of eps (Ho et al. 2020, eq. 15), of v (Salimans & Ho 2022, section 4), of x0 or of
    the flow eps - x0 (Liu et al. 2023, "Rectified flow", eq. 1).

    Raises ValueError for eps at a level whose alpha is the number 0, and for another kind.
    """
    _, alpha, sigma = level
    if kind == "v":
        return alpha * xt - sigma * prediction
    if kind == "eps":
        if not isinstance(alpha, Tensor) and alpha == 0:
            raise ValueError(NO_SIGNAL)
        return (xt - sigma * prediction) / alpha
    if kind == "x0":
        return prediction
    if kind == "flow":
        return (xt - sigma * prediction) / (alpha + sigma)
    raise ValueError(f"prediction kind {kind!r}: expected eps, v, x0 or flow")


def to_eps(x0: Tensor, xt: Tensor, level: Level) -> Tensor:
    """The eps that belongs to an answer x0, by xt = alpha * x0 + sigma * eps."""
    return (xt - level.alpha * x0) / level.sigma


def to_v(x0: Tensor, xt: Tensor, level: Level) -> Tensor:
    """The v = alpha * eps - sigma * x0 (Salimans & Ho 2022, section 4) that belongs to an answer x0."""
    return (level.alpha * xt - x0) / level.sigma


def to_flow(x0: Tensor, xt: Tensor, level: Level) -> Tensor:
    """The flow eps - x0 that belongs to an answer x0."""
    return (xt - (level.alpha + level.sigma) * x0) / level.sigma


@dataclass(frozen=True)
class Timesteps:
    """Where a run calls the model. t: (S,) float64, noisiest first; alpha, sigma: (S + 1,), with the end."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_ratio(cls, t: Tensor, ratio: Tensor, end: float = 1.0) -> Timesteps:
        """From Karras' noise levels ratio = sigma / alpha (S,), infinite at alpha = 0; end: the last alpha.

        Raises ValueError if two timesteps share a level, as where more are asked for than there are levels.
        """
        if (ratio == 0).any():
            raise ValueError("a timestep at sigma = 0, where nothing is left to do: use trailing spacing")
        if not (ratio[:-1] > ratio[1:]).all():
            raise ValueError(f"{len(t)} steps share noise levels in this spacing: ask for fewer")
        alpha = torch.cat([(1 + ratio**2).rsqrt(), torch.tensor([end], dtype=torch.float64)])
        sigma = torch.cat([(1 + ratio**-2).rsqrt(), torch.tensor([1 - end**2], dtype=torch.float64).sqrt()])
        return cls(t, alpha, sigma)

    def __len__(self) -> int:
        return len(self.t)

    def __iter__(self) -> Iterator[Level]:
        return map(Level, self.t.tolist(), self.alpha.tolist(), self.sigma.tolist())

    def at(self, index: Tensor, like: Tensor) -> Level:
        """The levels of entries index (B,) int64, 0 to S, as (B, 1, 1, 1) tensors; the end has t = 0."""
        shape = (-1, *[1] * (like.ndim - 1))
        alpha, sigma = (
            table.to(index.device)[index].to(like).view(shape) for table in (self.alpha, self.sigma)
        )
        return Level(F.pad(self.t, (0, 1)).to(index.device)[index], alpha, sigma)

    def skip(self, count: int) -> Timesteps:
        """Without the noisiest count: image-to-image starts there."""
        return Timesteps(self.t[count:], self.alpha[count:], self.sigma[count:])

    @property
    def log_snr(self) -> Tensor:
        """log(alpha / sigma), (S + 1,): lambda of DPM-Solver; -inf where alpha = 0, inf where sigma = 0."""
        return self.alpha.log() - self.sigma.log()


def lay_out(
    T: int, count: int, spacing: str, *, offset: int = 0, points: int | None = None, whole: bool = True
) -> Tensor:
    """(count,) of the T training timesteps, noisiest first: Lin et al. 2024, table 2.

    offset: added to "leading" ones. points: lay out so many, keep the first count. whole: round "linspace".
    Raises ValueError if count is not between 1 and T, or spacing unknown.
    """
    if not 1 <= count <= T:
        raise ValueError(f"{count} steps: ask for 1 to {T}, the model has no more noise levels")
    points = points or count
    index = torch.arange(points, dtype=torch.float64)
    if spacing == "leading":
        return (index * (T // points) + offset).flip(0)[:count]
    if spacing == "linspace":
        t = index * ((T - 1) / max(points - 1, 1))
        return (t.round() if whole else t).clamp(max=T - 1).flip(0)[:count]
    if spacing == "trailing":
        return (T - index[:count] * (T / count)).round() - 1
    raise ValueError(f"timestep spacing {spacing!r}: expected leading, linspace or trailing")


def skipped(T: int, count: int, original: int) -> Tensor:
    """(count,) of the T training timesteps, noisiest first: what a consistency model learnt, evenly by place.

    It learnt original ones, from k - 1 on in steps of k = T // original (Luo et al. 2023, section 4.3).
    Raises ValueError if original is not between 1 and T, or count not between 1 and original.
    """
    if not 1 <= original <= T:
        raise ValueError(f"original_inference_steps={original}: expected 1 to {T}, the model's noise levels")
    if not 1 <= count <= original:
        raise ValueError(
            f"{count} steps: consistency models take 1 to original_inference_steps={original}; 2 to 8 are "
            "usual"
        )
    learnt = torch.arange(original, 0, -1, dtype=torch.float64) * (T // original) - 1
    return learnt[torch.arange(count) * original // count]


def sections(T: int, counts: str) -> Tensor:
    """(S,) of the T training timesteps, noisiest first: "10,10,5" takes so many of equal sections of them.

    Nichol & Dhariwal 2021, section 4, and ADM: evenly from the first to the last of each section, the
    cleanest section first. "ddim25" takes 25 at an equal stride from 0 on, as in DDIM.
    Raises ValueError for another text, and for more of a section than it has, or no such stride.
    """
    if counts.removeprefix("ddim").isdecimal() and counts.startswith("ddim"):
        wanted = int(counts.removeprefix("ddim"))
        strides = [stride for stride in range(1, T + 1) if len(range(0, T, stride)) == wanted]
        if not strides:
            raise ValueError(f"{counts!r}: no whole stride takes {wanted} of {T} timesteps")
        return torch.arange(0, T, strides[0], dtype=torch.float64).flip(0)
    each = counts.split(",")
    if not all(count.strip().isdecimal() for count in each):
        raise ValueError(f"timestep sections {counts!r}: expected numbers such as 10,10,5, or ddim25")
    taken, start = [], 0
    for index, count in enumerate(map(int, each)):
        size = T // len(each) + (index < T % len(each))  # the first ones take what is over
        if not 1 <= count <= size:
            raise ValueError(f"timestep sections {counts!r}: expected 1 to {size} of section {index + 1}")
        taken.append(torch.linspace(start, start + size - 1, count, dtype=torch.float64).round())
        start += size
    return torch.cat(taken).flip(0)


def curve(first: Tensor, last: Tensor, count: int, spacing: str) -> Tensor:
    """(count,) noise levels sigma / alpha from first to last: Karras et al. 2022, eq. 5, or even in log_snr.

    Raises ValueError if first is infinite, as no curve starts at zero SNR, or if count is less than 1.
    """
    if count < 1:
        raise ValueError(f"{count} steps: ask for 1 or more")
    if first.isinf():
        raise ValueError(f"{spacing} spacing cannot start at zero SNR: use trailing spacing")
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    if spacing == "log_snr":
        return first.log().lerp(last.log(), ramp).exp()
    rho = 7  # the paper's choice, section 3
    return (first ** (1 / rho)).lerp(last ** (1 / rho), ramp) ** rho


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process. alpha, sigma: (T,) float64, alpha**2 + sigma**2 = 1; t = 0 is the cleanest.

    A rectified flow has T + 1 levels, the data among them.
    """

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """alpha_bar = prod(1 - beta): Ho et al. 2020, eq. 4."""
        alpha_bar = (1 - betas.double()).cumprod(0)
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @classmethod
    def linear(cls, beta_start: float = 0.0001, beta_end: float = 0.02, T: int = 1000) -> NoiseSchedule:
        """beta linear in t: Ho et al. 2020, section 4."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, T: int = 1000
    ) -> NoiseSchedule:
        """sqrt(beta) linear in t: the schedule of Stable Diffusion 1 and 2 (Rombach et al. 2022)."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, T: int = 1000) -> NoiseSchedule:
        """Nichol & Dhariwal 2021, eq. 17, with beta at most 0.999: "squaredcos_cap_v2" in diffusers."""
        t = torch.arange(T + 1, dtype=torch.float64) / T
        alpha_bar = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))

    @classmethod
    def rectified_flow(cls, T: int = 1000) -> NoiseSchedule:
        """(1 - s) x0 + s noise with s = t / T (Liu et al. 2023, eq. 1), scaled to preserve variance.

        It has T + 1 levels: t = 0 is the data itself and t = T pure noise.
        """
        s = torch.arange(T + 1, dtype=torch.float64) / T
        norm = ((1 - s) ** 2 + s**2).sqrt()
        return cls((1 - s) / norm, s / norm)

    def zero_terminal_snr(self) -> NoiseSchedule:
        """alpha shifted and scaled: the last is exactly 0, the first stays. Lin et al. 2024, algorithm 1."""
        first, last = self.alpha[0], self.alpha[-1]
        alpha = (self.alpha - last) * (first / (first - last))
        return NoiseSchedule(alpha, (1 - alpha**2).sqrt())

    def require(self, kind: Prediction) -> None:
        """Raises ValueError if kind is eps and the schedule ends at zero SNR."""
        if kind == "eps" and self.alpha[-1] == 0:
            raise ValueError(NO_SIGNAL)

    @property
    def ratio(self) -> Tensor:
        """Karras' noise level sigma / alpha, (T,), growing; infinite where alpha = 0."""
        return self.sigma / self.alpha

    def at(self, t: Tensor, like: Tensor) -> Level:
        """The levels of timesteps t (B,) int64, as (B, 1, 1, 1) tensors of the dtype and device of like."""
        shape = (-1, *[1] * (like.ndim - 1))
        alpha, sigma = (table.to(t.device)[t].to(like).view(shape) for table in (self.alpha, self.sigma))
        return Level(t, alpha, sigma)

    def ratio_at(self, t: Tensor) -> Tensor:
        """sigma / alpha at timesteps t (S,), linear between whole ones as in k-diffusion."""
        low, high = self.ratio[t.floor().long()], self.ratio[t.ceil().long()]
        return torch.where(low == high, low, low.lerp(high, t.frac()))

    def t_at(self, ratio: Tensor) -> Tensor:
        """The timesteps (S,), not whole, of ratio = sigma / alpha: linear in its log, as in k-diffusion."""
        table, log_ratio = self.ratio.log(), ratio.log()
        low = (torch.searchsorted(table, log_ratio, right=True) - 1).clamp(0, len(table) - 2)
        part = (log_ratio - table[low]) / (table[low + 1] - table[low])
        return low + part.clamp(0, 1)

    def respaced(self, counts: str) -> Timesteps:
        """The timesteps of sections, "10,10,5" or "ddim25", that end at the data."""
        t = sections(len(self.alpha), counts)
        return Timesteps.from_ratio(t, self.ratio_at(t))

    def timesteps(self, count: int, spacing: Spacing = "trailing") -> Timesteps:
        """count timesteps that end at the data, alpha = 1; what diffusers' classes do is in scheduler.py."""
        if spacing in ("karras", "log_snr"):
            ratio = curve(self.ratio[-1], self.ratio[0], count, spacing)
            return Timesteps.from_ratio(self.t_at(ratio), ratio)
        t = lay_out(len(self.alpha), count, spacing)
        return Timesteps.from_ratio(t, self.ratio_at(t))
