"""Averages of the weights over a run, in float32 and by name, and one rebuilt afterwards from snapshots.

A classic average forgets at a fixed rate. A power-function average of relative width w looks back over a
fixed share of the run so far; from snapshots of two of them any other can be rebuilt when the run is over,
which is when it is known how long an average the model wants (Karras et al. 2024, "Analyzing and improving
the training dynamics of diffusion models", section 3 and appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from train.fit.shards import cut, local

Decay = Callable[[int], float]  # what an update keeps of the average, by the number of updates before it


def classic(decay: float) -> Decay:
    """min(decay, (1 + t) / (10 + t)): a warm-up, then `decay`; 0 keeps the last weights."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay={decay}: expected 0 (no averaging) or a number below 1, as 0.999")
    return lambda t: min(decay, (1 + t) / (10 + t))


def power(width: float) -> Decay:
    """(1 - 1/t)^(gamma + 1) for update number t, from 1: weights in proportion to time^gamma."""
    gamma = exponent(width)
    return lambda t: (1 - 1 / (t + 1)) ** (gamma + 1)


def exponent(width: float) -> float:
    """gamma of the relative width, the standard deviation of time^gamma in shares of the run: 16.97 for 0.05.

    width² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), a cubic in gamma. Raises ValueError outside (0, 0.28].
    """
    if not 0 < width <= 0.28:  # 0.289 is an even average
        raise ValueError(f"width={width}: expected more than 0, at most 0.28; 0.05 and 0.1 are usual")
    w = width**-2
    roots = np.roots([1, 7, 16 - w, 12 - w])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def rebuild(snapshots: Sequence[tuple[int, float]], width: float, t: int) -> list[float]:
    """How much of each snapshot (updates, width) gives the average of `width` after t updates.

    The least-squares fit of the weights over time, each a density gamma + 1 over t^(gamma + 1) of time^gamma.
    """

    def inner(a: tuple[int, float], b: tuple[int, float]) -> float:
        """The integral of two densities' product up to the earlier end: in logarithms, as t^18 is large."""
        (t_a, p), (t_b, q) = (a[0], exponent(a[1])), (b[0], exponent(b[1]))
        power_of_t = (p + q + 1) * math.log(min(t_a, t_b)) - (p + 1) * math.log(t_a) - (q + 1) * math.log(t_b)
        return (p + 1) * (q + 1) / (p + q + 1) * math.exp(power_of_t)

    # Scaled to ones on the diagonal: densities of early snapshots are high and narrow.
    size = np.sqrt([inner(one, one) for one in snapshots])
    products = np.array([[inner(one, other) for other in snapshots] for one in snapshots])
    wanted = np.array([inner(one, (t, width)) for one in snapshots])
    shares = np.linalg.lstsq(products / np.outer(size, size), wanted / size, rcond=1e-12)[0] / size
    return (shares / shares.sum()).tolist()  # a weight that never moved is rebuilt as it is


class EMA:
    """Average of the trained parameters of `module`, less those under the names in module.NOT_AVERAGED."""

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        self.decay = decay
        left_out = getattr(module, "NOT_AVERAGED", ())  # what only helps to train, such as an adversary
        self.parameters = {
            name: p
            for name, p in module.named_parameters()
            if p.requires_grad and name.split(".")[0] not in left_out
        }
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Move the average towards the weights; `t` updates were made before this one."""
        now = [local(p).float() for p in self.parameters.values()]  # the parameter itself where it is float32
        torch._foreach_lerp_([local(value) for value in self.average.values()], now, 1 - self.decay(t))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the average; afterwards its own weights again, untouched."""
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.average[name].to(p.dtype)
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take an average as `state_dict` gave it. Raises ValueError if names or shapes differ."""
        want = {name: tuple(value.shape) for name, value in self.average.items()}
        have = {name: tuple(value.shape) for name, value in state.items()}
        differ = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
        if differ:
            raise ValueError(
                f"the averaged weights do not fit the model: {len(differ)} tensors differ, the first is "
                f"{differ[0]} (file {have.get(differ[0], '-')}, model {want.get(differ[0], '-')})"
            )
        for name, value in state.items():
            self.average[name].copy_(cut(value, self.average[name]))
