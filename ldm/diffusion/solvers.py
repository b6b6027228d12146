"""Solvers as tables: what a run does with the model's answers is data, and the data checks itself.

In variance-preserving coordinates several samplers are one: Euler is DDIM with eta = 0, and Euler ancestral
is DDPM is DDIM with eta = 1. They differ in the timesteps they visit and in where they end (scheduler.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Timesteps


@dataclass(frozen=True)
class Tableau:
    """x[i+1] = a[i] x[i] + b[i,0] x0[i] + sum_j b[i,j] m[i-j] + c[i] noise, j > 0: a row is a model call.

    x0[i] is the answer of this call; m are earlier ones, remembered as x0 or as eps (memory). As the answer
    of this call always enters as x0, no coefficient is infinite at alpha = 0, where eps is silent about x0.
    a, c: (S,), b: (S, K) float64.
    """

    steps: Timesteps
    a: Tensor
    b: Tensor
    c: Tensor
    memory: Literal["x0", "eps"] = "x0"

    def __post_init__(self) -> None:
        """Every row must be exact for a model that always answers with the same (x0, eps)."""
        alpha, sigma, older = self.steps.alpha, self.steps.sigma, self.b[:, 1:].sum(1)
        x0, eps = (older, 0 * older) if self.memory == "x0" else (0 * older, older)
        signal = self.a * alpha[:-1] + self.b[:, 0] + x0
        variance = (self.a * sigma[:-1] + eps) ** 2 + self.c**2
        assert torch.allclose(signal, alpha[1:], atol=1e-9), "a row does not arrive at its alpha"
        assert torch.allclose(variance, sigma[1:] ** 2, atol=1e-9), "a row does not arrive at its sigma"

    def __len__(self) -> int:
        return len(self.a)


class Solver(Protocol):
    """Timesteps to a table; options by name."""

    def __call__(self, steps: Timesteps) -> Tableau: ...


def ddim(steps: Timesteps, eta: float = 0.0) -> Tableau:
    """DDIM (Song et al. 2021, eq. 12 and 16), order 1. eta = 0: Euler's method. eta = 1: DDPM."""
    alpha, sigma = steps.alpha, steps.sigma
    c = eta * sigma[1:] / sigma[:-1] * (1 - (alpha[:-1] / alpha[1:]) ** 2).sqrt()
    a = (sigma[1:] ** 2 - c**2).sqrt() / sigma[:-1]
    b = alpha[1:] - a * alpha[:-1]
    return Tableau(steps, a, b[:, None], c)


def consistency(steps: Timesteps) -> Tableau:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): to x0, and back to the next level.

    For models that answer with the end of the ODE, as by latent consistency distillation (Luo et al. 2023).
    The boundary condition, x0 = xt at sigma = 0, holds by the parametrisation of v and eps. diffusers'
    LCMScheduler mixes in c_skip xt (sigma_data 0.5, timestep_scaling 10): 7e-6 of it at t = 19, where a run
    of 50 steps ends, and 1e-7 and less above t = 158.
    """
    return Tableau(steps, 0 * steps.alpha[1:], steps.alpha[1:, None], steps.sigma[1:])


def _decay(steps: Timesteps) -> Tensor:
    """exp(-h) (S,) of the steps h in log_snr: 0, without infinities, from alpha = 0 and to sigma = 0."""
    return (steps.alpha[:-1] * steps.sigma[1:]) / (steps.alpha[1:] * steps.sigma[:-1])


def _nodes(steps: Timesteps) -> Tensor:
    """log_snr (S + 1,) where answers are interpolated: -infinity, of alpha = 0, counts as 1 below the next.

    Near alpha = 0 an answer x0 is linear in alpha / sigma = exp(log_snr). So at the second level its slope in
    log_snr is all of what it has changed since the first, as on a line that begins 1 before. The papers have
    no such level, and diffusers puts alpha = 2**-12 in its place: a line some five times longer.
    """
    nodes = steps.log_snr.clone()
    if nodes[0].isneginf():
        nodes[0] = nodes[1] - 1
    return nodes


def dpmpp_2m(steps: Timesteps, eta: float = 0.0) -> Tableau:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2), order 2. eta = 1: its SDE form, SDE-DPM-Solver++(2M).

    The last step is of order 1 if it ends at sigma = 0, where h is infinite, or if there are less than 15.
    """
    sigma, h, decay = steps.sigma, _nodes(steps).diff(), _decay(steps)
    part = torch.zeros_like(h)  # 1 / (2 r): how much of the last change of x0 goes on
    part[1:] = h[1:] / h[:-1] / 2
    if sigma[-1] == 0 or len(steps) < 15:
        part[-1] = 0
    new = steps.alpha[1:] * (1 - decay ** (1 + eta))
    b = torch.stack([new * (1 + part), -new * part], dim=1)
    return Tableau(steps, sigma[1:] / sigma[:-1] * decay**eta, b, sigma[1:] * (1 - decay ** (2 * eta)).sqrt())


def _interpolate(nodes: Tensor, h: Tensor) -> Tensor:
    """UniPC's weights of the answers at 0 and at nodes (K,), in units of the step h: (1 + K,), of sum 1.

    Zhao et al. 2023, eq. 5 and 9, with B(h) = 1 - exp(-h), and for a single node the 1/2 of section 3.3.
    """
    moments, phi = [], torch.expm1(-h)
    for n in range(1, len(nodes) + 1):  # n! h phi_{n+1}(-h) / B(h), by the recurrence of the phi
        phi = phi / -h - 1 / math.factorial(n)
        moments.append(phi * math.factorial(n) / torch.expm1(-h))
    rho = torch.full_like(nodes, 0.5)
    if len(nodes) > 1:
        rho = torch.linalg.solve(torch.vander(nodes, increasing=True).T, torch.stack(moments))
    weights = rho / nodes
    return torch.cat([1 - weights.sum(0, keepdim=True), weights])


def unipc(steps: Timesteps, order: int = 2) -> Tableau:
    """UniPC (Zhao et al. 2023, algorithm 1, data prediction): a multistep predictor and its corrector.

    A step is corrected when the model answers at its end, in the next row, by corrector - predictor. Steps
    near the end are of lower order.
    """
    log_snr, nodes, decay = steps.log_snr, _nodes(steps), _decay(steps)
    a = steps.sigma[1:] / steps.sigma[:-1]
    b = torch.zeros(len(steps), order + 1, dtype=torch.float64)
    correction = torch.zeros_like(b[0])  # of the step before; weights are for the newest answer first
    for i in range(len(steps)):
        p = min(order, i + 1, len(steps) - i)
        h, new = log_snr[i + 1] - log_snr[i], steps.alpha[i + 1] * (1 - decay[i])
        older = (nodes[i + 1 - p : i].flip(0) - log_snr[i]) / h  # (p - 1,), negative
        predictor = F.pad(new * _interpolate(older, h), (0, order + 1 - p))
        b[i] = a[i] * correction + predictor
        start, end, *before = new * _interpolate(torch.cat([torch.ones_like(h[None]), older]), h)
        correction = F.pad(torch.stack([end, start, *before]), (0, order - p)) - predictor.roll(1)
    return Tableau(steps, a, b, torch.zeros_like(a))


def _redo(steps: Timesteps, levels: range) -> Tableau:
    """DDIM that calls the model again where it arrives at these levels, and then redoes the step.

    A step is x' = r x + s eps with r = alpha' / alpha and s = sigma' - r sigma. With the mean of eps before
    and after it (the trapezoidal rule), x' becomes x' + s / 2 (eps' - eps). From alpha = 0 that has no limit:
    the step stays as it is.
    """
    once, alpha, sigma = ddim(steps), steps.alpha.tolist(), steps.sigma.tolist()
    level, a, b = [], [], []  # of each row
    for i, (keep, new) in enumerate(zip(once.a.tolist(), once.b[:, 0].tolist(), strict=True)):
        if i in levels and alpha[i - 1] > 0:
            half = (sigma[i] - alpha[i] / alpha[i - 1] * sigma[i - 1]) / 2
            level.append(i)
            a.append(1 + half / sigma[i])
            b.append([-half * alpha[i] / sigma[i], -half])
        level.append(i)
        a.append(keep)
        b.append([new, 0.0])
    ends = [*level, len(steps)]
    calls = Timesteps(steps.t[level], steps.alpha[ends], steps.sigma[ends])
    weights = torch.tensor(b, dtype=torch.float64)
    return Tableau(calls, torch.tensor(a, dtype=torch.float64), weights, 0 * weights[:, 0], memory="eps")


def heun(steps: Timesteps) -> Tableau:
    """Heun's second order method (Karras et al. 2022, algorithm 1): two calls a step, one in the last.

    Not to be confused with Heun's method of third order.
    """
    return _redo(steps, range(1, len(steps)))


ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(steps: Timesteps) -> Tableau:
    """Pseudo linear multistep (Liu et al. 2022, eq. 9 and 12), order 2; the first step is done twice.

    The weights are those for even timesteps and for eps, whatever the model predicts.
    """
    table = _redo(steps, range(1, 2))
    twice = len(table) - len(steps)  # 1, or 0 where the first step is not redone
    r = table.steps.alpha[1:] / table.steps.alpha[:-1]
    s = table.steps.sigma[1:] - r * table.steps.sigma[:-1]
    a, b = table.a.clone(), F.pad(table.b, (0, 3))
    for row in range(1 + twice, len(table)):
        now, *older = ADAMS_BASHFORTH[min(row - twice, 3)]
        a[row] = now * table.a[row] + (1 - now) * r[row]
        b[row, 0] = now * table.b[row, 0]
        for j, weight in enumerate(older, 1):
            back = j if row - j > twice else row  # level 0 is remembered by row 0, level 1 by its second row
            b[row, back] = weight * s[row]
    return Tableau(table.steps, a, b, table.c, memory="eps")


SOLVERS: dict[str, Solver] = {
    "ddim": ddim,
    "ddpm": partial(ddim, eta=1.0),
    "euler": ddim,
    "euler_a": partial(ddim, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
    "unipc": unipc,
    "plms": plms,
    "lcm": consistency,
}
