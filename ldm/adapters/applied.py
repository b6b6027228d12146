"""The adapters in the weights of some models: put in, weighted, taken out again bit for bit.

A weight with adapters is weight + sum of scale * delta, computed once in float32 and put in its place; the
parameter that was there is kept. So a run costs what it costs without, by whatever kernels, compiled or not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters import names
from ldm.adapters.deltas import Layer
from ldm.adapters.files import Adapter
from ldm.model.quantized import renew

log = logging.getLogger(__name__)

Scales = Mapping[str, float]  # by part
Share = tuple[Layer, float]  # of a weight: what is added, how much of it


@dataclass(frozen=True)
class State:
    """Which adapters there are, and how much of each is in the weights."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # in the order of their loading
    active: Mapping[str, Scales] = field(default_factory=dict)
    fused: Mapping[str, Scales] = field(default_factory=dict)  # stay, whatever is active
    enabled: bool = True

    def shares(self) -> dict[str, list[Share]]:
        """Of each weight that changes, by its layer's name, what is added to it."""
        found: dict[str, list[Share]] = {}
        for name, adapter in self.adapters.items():
            active = self.active.get(name, {}) if self.enabled else {}
            for path, layer in adapter.layers.items():
                part = path.partition(".")[0]
                scale = self.fused.get(name, active).get(part, 0.0)
                if scale:
                    found.setdefault(path, []).append((layer, scale))
        return found


def adaptable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of a model that adapters may change, by name."""
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}


def parameter_of(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def follow(original: nn.Parameter, live: Tensor) -> nn.Parameter:
    """The original, where the parameter that took its place has moved meanwhile, and of its type."""
    original.data = original.data.to(live.device, live.dtype)
    return original


class Applied:
    """The adapters of some models, by part. Not for two threads, nor while one of the models computes."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.layers = {
            f"{part}.{name}": layer
            for part, model in models.items()
            for name, layer in adaptable(model).items()
        }
        resnets = getattr(getattr(models.get("unet"), "config", None), "layers_per_block", 2)
        self.index = names.lookup(
            {part: adaptable(model) for part, model in models.items()},
            resnets if isinstance(resnets, int) else resnets[0],
        )
        self.state = State()
        self._originals: dict[str, nn.Parameter] = {}
        self._placed: dict[str, tuple[nn.Parameter, list[Share]]] = {}

    def become(self, state: State) -> None:
        """Puts the adapters of a state into the weights, and takes others out.

        Raises ValueError, with all as it was, where a weight would not be finite or is not ours any more.
        """
        for path, (weight, _) in self._placed.items():
            if self.layers[path].weight is not weight:
                raise ValueError(
                    f"{path}.weight was replaced after an adapter was put into it (by load_state_dict, or by "
                    "another pipeline of the same models): load the model anew"
                )
        wanted = state.shares()
        made = {
            path: self._made(path, shares)
            for path, shares in wanted.items()
            if path not in self._placed or self._placed[path][1] != shares
        }
        gone = self._placed.keys() - wanted.keys()
        for path in gone:
            weight, _ = self._placed.pop(path)
            self.layers[path].weight = follow(self._originals.pop(path), weight)
        for path, parameter in made.items():
            self._originals.setdefault(path, parameter_of(self.layers[path]))
            self._placed[path] = parameter, wanted[path]
            self.layers[path].weight = parameter
        for path in gone | made.keys():
            renew(self.layers[path])
        self.state = state

    @torch.no_grad()
    def _made(self, path: str, shares: Sequence[Share]) -> nn.Parameter:
        """The parameter with these shares: where the present one is, of its type and memory layout."""
        live = self.layers[path].weight
        weight = self._originals.get(path, live).to(live.device).float()
        total = weight + sum(scale * layer.delta(weight) for layer, scale in shares)
        made = torch.empty_like(live).copy_(total)
        if not made.isfinite().all():
            raise ValueError(
                f"{path}.weight with its adapters is not finite in {live.dtype}: take smaller weights"
            )
        return nn.Parameter(made, requires_grad=live.requires_grad)

    # What a pipeline does with them

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter, which then is the only active one, as in diffusers.

        Raises ValueError where its name is taken or impossible, where it does not fit, or changes nothing.
        """
        if name in self.state.adapters:
            raise ValueError(
                f"adapter_name={name!r} is taken: delete_adapters({name!r}) first, or give another"
            )
        if not name or "." in name:
            raise ValueError(f"adapter_name={name!r}: expected a name without dots")
        changes = False
        for path, layer in adapter.layers.items():
            try:
                layer.check(path, self.layers[path].weight)
            except ValueError as error:
                tensors = {
                    f"{key}.lora_A.weight": each.factors.get("down") for key, each in adapter.layers.items()
                }
                kind = names.made_for({key: value for key, value in tensors.items() if value is not None})
                hint = f"; it looks made for {kind}" if kind else ""
                raise ValueError(f"{adapter.source}: {error}{hint}") from None
            changes = changes or bool(layer.delta(self.layers[path].weight.detach()).any())
        if not changes:
            raise ValueError(f"{adapter.source} changes nothing: all that it adds is zero (was it trained?)")
        state = replace(self.state, adapters={**self.state.adapters, name: adapter})
        self.become(replace(state, active={name: dict.fromkeys(adapter.parts, 1.0)}))

    def known(self, adapter_names: str | Sequence[str]) -> list[str]:
        """A list of the names. Raises ValueError unless all of them are loaded, each once."""
        asked = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in asked:
            if name not in self.state.adapters:
                there = ", ".join(self.state.adapters) or "none"
                raise ValueError(f"no adapter {name!r}: loaded are {there}")
        if len(set(asked)) < len(asked):
            raise ValueError(f"adapters {', '.join(asked)}: one is named twice")
        return asked

    def activate(self, adapter_names: Sequence[str], weights: Sequence[float | Scales | None]) -> None:
        """Makes these active, with these weights: a number for all parts, or one by part; None is 1."""
        active: dict[str, Scales] = {}
        for name, weight in zip(adapter_names, weights, strict=True):
            parts = self.state.adapters[name].parts
            given = (
                weight
                if isinstance(weight, Mapping)
                else dict.fromkeys(parts, 1.0 if weight is None else weight)
            )
            if not given.keys() <= set(parts):
                raise ValueError(
                    f"the weights of {name} are for {', '.join(given)}; it is for {', '.join(parts)}"
                )
            for value in given.values():
                if not isinstance(value, int | float) or not abs(value) < 100:
                    raise ValueError(f"the weight of {name} is {value!r}: expected a number, 0 to 1 is usual")
            active[name] = {part: float(given.get(part, 1.0)) for part in parts}
        for name in active.keys() & self.state.fused.keys():
            log.warning("%s is fused, so its weight has no effect before unfuse_lora()", name)
        self.become(replace(self.state, active=active))

    def delete(self, adapter_names: Sequence[str]) -> None:
        gone = set(adapter_names)
        kept: dict[str, Any] = {
            which: {name: value for name, value in getattr(self.state, which).items() if name not in gone}
            for which in ("adapters", "active", "fused")
        }
        self.become(replace(self.state, **kept))

    def fuse(self, adapter_names: Sequence[str], parts: Sequence[str], scale: float) -> None:
        """Keeps these in the weights of these parts at scale times their weights, whatever is active."""
        fused = dict(self.state.fused)
        for name in adapter_names:
            weights = self.state.active.get(name) or dict.fromkeys(self.state.adapters[name].parts, 1.0)
            fused[name] = {part: weight * scale for part, weight in weights.items() if part in parts}
        self.become(replace(self.state, fused=fused))

    def unfuse(self, parts: Sequence[str]) -> None:
        """Raises ValueError if nothing is fused."""
        if not self.state.fused:
            raise ValueError(
                "unfuse_lora: no adapter is fused (what unload_lora_weights() left is the model's own)"
            )
        left = {
            name: {part: scale for part, scale in scales.items() if part not in parts}
            for name, scales in self.state.fused.items()
        }
        self.become(replace(self.state, fused={name: scales for name, scales in left.items() if scales}))

    def unload(self) -> None:
        """Forgets all adapters; those that are fused stay in the weights for good, as in diffusers."""
        self.become(replace(self.state, active={}))
        self.state = State()
        self._originals, self._placed = {}, {}
