"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate: linear warm-up, then constant, cosine or constant with a cool-down."""

    lr: float = 1e-4  # peak, per optimizer step
    curve: Literal["constant", "cosine", "cooldown"] = "cooldown"  # after the warm-up
    warmup_steps: int = 500  # optimizer steps, not batches
    cooldown_fraction: float = 0.2  # of all steps, at the end, falling linearly; only for curve: cooldown
    final_fraction: float = 0.05  # of the peak, where cosine and cooldown end
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two averages, a step
    eps: float = 1e-8  # added to the root of the second average
    weight_decay: float = 0.01  # of matrices and kernels; biases and norms have none
    max_grad_norm: float = 1.0  # 0: do not clip

    def __post_init__(self) -> None:
        if not 0 < self.lr < 1:
            raise ValueError(f"optim.lr={self.lr}: a learning rate lies between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={self.warmup_steps}: expected 0 or more optimizer steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas}: both lie in [0, 1)")
        for name in ("cooldown_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: a fraction lies between 0 and 1")
        for name in ("eps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)}: expected 0 or more")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of a run of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.curve == "constant":
        return config.lr
    if config.curve == "cosine":
        first = config.warmup_steps
        fall = (1 - math.cos(math.pi * min(1.0, (step - first) / max(1, steps - first)))) / 2
    else:
        first = max(config.warmup_steps, round(steps * (1 - config.cooldown_fraction)))
        fall = min(1.0, max(0, step - first) / max(1, steps - first))
    return config.lr * (1 - (1 - config.final_fraction) * fall)


def adamw(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `module`; vectors (biases, norms) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # fused on the CPU too: there, one pass over the weights in all threads is three times as fast as foreach
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: {"conv.weight/exp_avg": ..., ...}."""
    return {
        f"{name}/{key}": value
        for name, p in module.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, in the memory layout of each parameter.

    Raises ValueError for a name that is no parameter of `module`.
    """
    parameters = dict(module.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise ValueError(f"optimizer state for {name}, which the model does not have")
        p = parameters[name]
        if value.shape == p.shape:
            kept = torch.empty_like(p, dtype=value.dtype).copy_(value)
        else:  # the step counter: a scalar beside its parameter
            kept = value.clone().to(p.device)
        optimizer.state[p][key] = kept
