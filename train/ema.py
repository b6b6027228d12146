"""Exponential moving average of the weights, in float32 and by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Average of the trained parameters of `module`; decay min(decay, (1 + t) / (10 + t)) after t updates."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay}: expected 0 (no averaging) or a number below 1, as 0.999")
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Move the average towards the weights; `t` updates were made before this one."""
        decay = min(self.decay, (1 + t) / (10 + t))
        now = [p.float() for p in self.parameters.values()]  # the parameter itself where it is float32
        torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

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
            self.average[name].copy_(value)
