"""AdamW, in 32 or 8 bits, and Muon, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from train.fit.shards import cut

STACK = 2**24  # numbers of gradients that Muon works on at once


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate: linear warm-up, then constant, cosine or constant with a cool-down."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = (
        "adamw"  # adamw8bit: bitsandbytes'; muon: inner matrices
    )
    lr: float = 1e-4  # peak, per optimizer step
    curve: Literal["constant", "cosine", "cooldown"] = "cooldown"  # after the warm-up
    warmup_steps: int = 500  # optimizer steps, not batches; at most half of the run's
    cooldown_fraction: float = 0.2  # of all steps, at the end, falling linearly; only for curve: cooldown
    final_fraction: float = 0.05  # of the peak, where cosine and cooldown end
    betas: tuple[float, float] = (0.9, 0.99)  # decay of Adam's two averages, a step
    momentum: float = 0.95  # decay of Muon's average, a step
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
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum}: lies in [0, 1)")
        for name in ("cooldown_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: a fraction lies between 0 and 1")
        for name in ("eps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)}: expected 0 or more")


def warmup_of(config: OptimConfig, steps: int) -> int:
    """The steps of the warm-up in a run of `steps`: at most half, so that the shortest run has a peak too."""
    return min(config.warmup_steps, steps // 2)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of a run of `steps`."""
    warmup = warmup_of(config, steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.curve == "constant":
        return config.lr
    if config.curve == "cosine":
        first = warmup
        fall = (1 - math.cos(math.pi * min(1.0, (step - first) / max(1, steps - first)))) / 2
    else:
        first = max(warmup, round(steps * (1 - config.cooldown_fraction)))
        fall = min(1.0, max(0, step - first) / max(1, steps - first))
    return config.lr * (1 - (1 - config.final_fraction) * fall)


def polar_factor(matrices: Tensor, steps: int = 5) -> Tensor:
    """About the orthogonal factors U Vᵀ of matrices (k, m, n) = U S Vᵀ: their singular values, 0.7 to 1.2.

    The iteration X <- (a + b A + c A²) X with A = X Xᵀ (Jordan et al. 2024, "Muon") changes X only by factors
    from the left, polynomials of the first A. Their product is made of small square matrices, and X is met
    twice only, which for a 3x3 kernel is a third of the work.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.float() if wide else matrices.float().mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    factor = gram
    for k in range(steps):
        step = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        step.diagonal(dim1=1, dim2=2).add_(3.4445)
        factor = step @ factor if k else step
        gram = step @ gram @ step if k < steps - 1 else gram
    x = (factor @ x).to(matrices.dtype)
    return x if wide else x.mT


def stacks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those that have a gradient, by shape, at most STACK numbers together: many small products are one."""
    alike: dict[torch.Size, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            alike.setdefault(p.shape, []).append(p)
    for shape, group in alike.items():
        size = max(1, STACK // shape.numel())
        yield from (group[first : first + size] for first in range(0, len(group), size))


class Muon(torch.optim.AdamW):
    """AdamW, but the parameters of groups with `momentum` move along the polar factor of their momentum.

    Every direction of a matrix then learns at the same rate, also the rare ones (Jordan et al. 2024). A step
    is as large as AdamW's, so learning rate and weight decay carry over (Liu et al. 2025, "Muon is scalable
    for LLM training").
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "momentum" not in group:
                continue
            for stack in stacks(group["params"]):
                directions = polar_factor(torch.stack([self.ahead(p, group["momentum"]) for p in stack]))
                size = 0.2 * math.sqrt(max(directions.shape[1:]))
                for p, direction in zip(stack, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(direction.view_as(p), alpha=group["lr"] * size)
                    p.grad = None  # AdamW leaves alone what has no gradient
        super().step(closure)

    def ahead(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The average of the gradients with this one, and one step ahead (Nesterov), as a matrix (m, n)."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        average = state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum).flatten(1)


def hidden(p: nn.Parameter) -> bool:
    """Whether a parameter is a kernel or matrix between hidden layers, by its channels on both sides."""
    return p.ndim > 1 and min(p.shape[:2]) >= 32


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters of `module`; vectors (biases, norms) are not decayed.

    module.RATES, where it has some: the learning rate of a part in that of the recipe, by the part's name.
    Raises ValueError for adamw8bit where bitsandbytes is not installed.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    tables = {layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)}
    muon = [p for p in trained if hidden(p) and p not in tables] if config.optimizer == "muon" else []
    others = [p for p in trained if p not in set(muon)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if muon:
        groups.append({"params": muon, "weight_decay": config.weight_decay, "momentum": config.momentum})
    groups = [part for group in groups for part in by_rate(group, module)]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "adamw8bit":
        return adamw8bit(groups, **options)
    kind = Muon if muon else torch.optim.AdamW
    # fused on the CPU too: there, one pass over the weights in all threads is three times as fast as foreach
    return kind(groups, fused=True, **options)


def by_rate(group: dict[str, Any], module: nn.Module) -> list[dict[str, Any]]:
    """The group, cut: apart is what has a learning rate of its own, so many `times` that of the recipe."""
    rates: Mapping[str, float] = getattr(module, "RATES", {})
    apart = {
        p: rates[name.split(".")[0]] for name, p in module.named_parameters() if name.split(".")[0] in rates
    }
    groups = [{**group, "params": [p for p in group["params"] if p not in apart]}]
    for times in sorted(set(apart.values())):
        params = [p for p in group["params"] if apart.get(p) == times]
        groups.append({**group, "params": params, "times": times})
    return groups


def adamw8bit(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """AdamW that keeps its averages in 8 bits, in blocks with a scale each (Dettmers et al. 2022).

    It wants weights in the order of rows, and would put them so at its first step: a run that is resumed
    would begin with another layout, and so with other last bits. Raises ValueError without bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "optim.optimizer=adamw8bit needs bitsandbytes: pip install 'ldm[8bit]', or use adamw"
        )
    from bitsandbytes.optim import AdamW8bit

    for group in groups:
        for p in group["params"]:
            p.data = p.data.contiguous()
    return cast(torch.optim.Optimizer, AdamW8bit(groups, **options))


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: {"conv.weight/exp_avg": ..., ...}; whole numbers as int64."""
    return {
        f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(int(value))
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
        kept: Tensor | int
        if value.dtype == torch.int64 and not value.ndim:  # AdamW counts its steps in float32
            kept = int(value)
        elif value.shape == p.shape:
            kept = torch.empty_like(p, dtype=value.dtype).copy_(cut(value, p))
        else:  # what is not one a weight: AdamW's count of steps, tables and scales of 8 bits
            kept = value.clone().to(p.device)
        optimizer.state[p][key] = kept
