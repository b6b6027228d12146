"""From noise to latents: the only loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import Noise
from .schedule import Level, to_eps
from .solvers import Tableau

Denoiser = Callable[[Tensor, Level], Tensor]  # (xt, level) -> x0, float32


class Step(NamedTuple):
    """What a model call led to: xt: (B, C, h, w) after it, x0: (B, C, h, w) its answer."""

    index: int  # type: ignore[assignment]  # of the row; hides tuple.index
    xt: Tensor
    x0: Tensor


@torch.no_grad()
def trajectory(denoise: Denoiser, xt: Tensor, tableau: Tableau, noise: Noise) -> Iterator[Step]:
    """The states of a run, one a model call; progress bars, previews and interruption are the caller's.

    xt: (B, C, h, w) float32, standard normal. noise: asked for the draw of step i where the table has noise.
    """
    memory: deque[Tensor] = deque(maxlen=tableau.b.shape[1] - 1)  # newest first
    rows = zip(tableau.steps, tableau.a.tolist(), tableau.b.tolist(), tableau.c.tolist(), strict=True)
    for index, (level, a, (b, *older), c) in enumerate(rows):
        x0 = denoise(xt, level)
        remembered = x0 if tableau.memory == "x0" else to_eps(x0, xt, level)
        xt = a * xt + b * x0
        for weight, m in zip(older, memory, strict=False):  # the first rows have little to remember
            if weight:
                xt = xt + weight * m
        if c:
            xt = xt + c * noise(index).to(xt)
        memory.appendleft(remembered)
        yield Step(index, xt, x0)


def sample(denoise: Denoiser, xt: Tensor, tableau: Tableau, noise: Noise) -> Tensor:
    """The end of the trajectory: latents (B, C, h, w)."""
    for step in trajectory(denoise, xt, tableau, noise):
        xt = step.xt
    return xt
