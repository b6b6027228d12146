"""Adapters: small learned parts beside layers of a model, which add to what these answer. Nothing at first.

Ours and not peft's, so that a run stays exact and small: the model keeps its modules, their names and their
kernels, and the adapters are a tree of modules of their own, which is all that a checkpoint, an average or an
optimizer sees; what they start from is counted. What each kind adds to a weight is in ldm.adapters.deltas, by
which their files are read, too. Parameter names are those of peft (LoRA, DoRA) and of LyCORIS (LoHa, LoKr).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters import deltas
from ldm.diffusion.noise import generator

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of the UNet; ends of names
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv")  # of its resnets and of what changes the size
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # of the text encoder

Layer = nn.Linear | nn.Conv2d


class Adapter(nn.Module):
    """What is learnt beside a layer: x (B, ..., in) and the layer's own answer -> what is added to it."""

    kind: ClassVar[str]  # of ldm.adapters.deltas.KINDS

    def __init__(self, rank: int, scale: float, dropout: float) -> None:
        """scale: alpha / rank in the papers. dropout: of the adapter's x; the layer sees all of it."""
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, nn.Dropout(dropout)

    def factors(self) -> dict[str, Tensor]:
        """The arguments of the kind's formula."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """What is added to the layer's weight, of its shape or flattened, (out, in * places of a kernel)."""
        return self.scale * deltas.KINDS[self.kind](**self.factors())

    def learned(self) -> deltas.Layer:
        """What files say of it."""
        factors = {name: value.detach() for name, value in self.factors().items()}
        return deltas.Layer(self.kind, factors, self.scale)

    def forward(self, layer: Layer, x: Tensor, answer: Tensor) -> Tensor:
        raise NotImplementedError


class LoRA(Adapter):
    """scale * B A x (Hu et al. 2022, eq. 3). Of a convolution, A is one to `rank` channels and B is 1x1."""

    kind = "lora"

    def __init__(self, layer: Layer, rank: int, scale: float, dropout: float, rng: torch.Generator) -> None:
        super().__init__(rank, scale, dropout)
        self.lora_A: Layer
        self.lora_B: Layer
        if isinstance(layer, nn.Linear):
            self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        else:
            shape: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}
            self.lora_A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **shape)  # type: ignore[arg-type]
            self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=rng)
        nn.init.zeros_(self.lora_B.weight)

    def factors(self) -> dict[str, Tensor]:
        return {"down": self.lora_A.weight, "up": self.lora_B.weight}

    def forward(self, layer: Layer, x: Tensor, answer: Tensor) -> Tensor:
        return self.scale * self.lora_B(self.lora_A(self.dropout(x)))


class DoRA(LoRA):
    """LoRA for the directions of a weight's rows, and their lengths learned apart (Liu et al. 2024, eq. 5).

    The norm gets no gradient (section 4.3). With dropout, peft lets the layer miss the same parts of x; here
    the adapter alone does.
    """

    def __init__(self, layer: Layer, rank: int, scale: float, dropout: float, rng: torch.Generator) -> None:
        super().__init__(layer, rank, scale, dropout, rng)
        self.lora_magnitude_vector = nn.Parameter(self.norm(layer))

    @torch.no_grad()
    def norm(self, layer: Layer) -> Tensor:
        """The length of each row of the weight with what is added: (out,), or (1, out, 1, 1) of a kernel."""
        norm = (layer.weight.flatten(1) + self.delta()).float().norm(dim=1)
        return norm if layer.weight.ndim == 2 else norm.view(1, -1, 1, 1)

    def learned(self) -> deltas.Layer:
        lengths = self.lora_magnitude_vector.detach()
        shape = (-1, *[1] * (self.lora_A.weight.ndim - 1))
        return replace(super().learned(), magnitude=lengths.reshape(shape))

    def forward(self, layer: Layer, x: Tensor, answer: Tensor) -> Tensor:
        times = self.lora_magnitude_vector / self.norm(layer)
        if layer.bias is not None:
            answer = answer - layer.bias.view(times.shape)
        return (times - 1) * answer + times * super().forward(layer, x, answer)


class WeightAdapter(Adapter):
    """An adapter whose product of small matrices is a whole weight before x is met."""

    prefix: ClassVar[str]  # of its parameters' names

    def factors(self) -> dict[str, Tensor]:
        return {name.removeprefix(self.prefix): value for name, value in self.named_parameters()}

    def forward(self, layer: Layer, x: Tensor, answer: Tensor) -> Tensor:
        x, delta = self.dropout(x), self.delta()
        if isinstance(layer, nn.Linear):
            return F.linear(x, delta)
        delta = delta.view(layer.weight.shape)
        return F.conv2d(x, delta, None, layer.stride, layer.padding, layer.dilation, layer.groups)


class LoHa(WeightAdapter):
    """(W1a W1b) * (W2a W2b), number by number: of rank² with the numbers of two LoRAs (Hyeon-Woo et al. 2022,
    "FedPara", proposition 1). First values as LyCORIS draws them."""

    kind, prefix = "loha", "hada_"

    def __init__(self, layer: Layer, rank: int, scale: float, dropout: float, rng: torch.Generator) -> None:
        super().__init__(rank, scale, dropout)
        rows, columns = layer.weight.flatten(1).shape

        def drawn(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(shape, generator=rng))

        self.hada_w1_a, self.hada_w1_b = drawn(rows, rank, std=0.1), drawn(rank, columns, std=1.0)
        self.hada_w2_a = nn.Parameter(torch.zeros(rows, rank))
        self.hada_w2_b = drawn(rank, columns, std=1.0)


class LoKr(WeightAdapter):
    """The Kronecker product of W1 and W2a W2b, or of W1 and a whole W2 where that is as small (Yeh et al.
    2024, "LyCORIS", section 3.2). Sides are cut as near to their square roots as they divide."""

    kind, prefix = "lokr", "lokr_"

    def __init__(self, layer: Layer, rank: int, scale: float, dropout: float, rng: torch.Generator) -> None:
        super().__init__(rank, scale, dropout)
        rows, channels = layer.weight.shape[:2]
        (l, k), (m, n) = factors(rows), factors(channels)
        self.kernel = layer.weight.shape[2:]
        places = self.kernel.numel()
        self.lokr_w1 = nn.Parameter(torch.empty(l, m))
        nn.init.kaiming_uniform_(self.lokr_w1, a=math.sqrt(5), generator=rng)
        if rank >= max(k, n) / 2:
            self.lokr_w2 = nn.Parameter(torch.zeros(k, n * places))
        else:
            self.lokr_w2_a = nn.Parameter(torch.empty(k, rank))
            nn.init.kaiming_uniform_(self.lokr_w2_a, a=math.sqrt(5), generator=rng)
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, n * places))

    def factors(self) -> dict[str, Tensor]:
        """With a whole W2 of the kernel's shape, as files have it."""
        found = super().factors()
        return found | {"w2": found["w2"].unflatten(1, (-1, *self.kernel))} if "w2" in found else found


def factors(size: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, the first the largest that is at most its root: 128 is 8 * 16."""
    first = next(number for number in range(math.isqrt(size), 0, -1) if size % number == 0)
    return first, size // first


KINDS: dict[str, type[LoRA] | type[LoHa] | type[LoKr]] = {
    "lora": LoRA,
    "locon": LoRA,  # which is LoRA on convolutions, too
    "loha": LoHa,
    "lokr": LoKr,
    "dora": DoRA,
}


def find_layers(model: nn.Module, ends: Sequence[str], what: str) -> dict[str, Layer]:
    """The linear and convolution layers whose names end in one of `ends`, whole parts of them.

    Raises ValueError for an end that no layer has; `what` is the setting that it names.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    found: dict[str, Layer] = {}
    for end in ends:
        some = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{end}")}
        if not some:
            known = sorted({leaf for name in layers if not (leaf := name.split(".")[-1]).isdigit()})
            raise ValueError(f"{what}: no layer's name ends in {end!r}; they end in {', '.join(known)}")
        found |= some
    return {name: layer for name, layer in layers.items() if name in found}


def grow(
    layers: Mapping[str, Layer], kind: str, rank: int, alpha: float, dropout: float, seed: int
) -> nn.Module:
    """An adapter for each layer, in a tree of modules under the layers' own names, drawn from (seed, name).

    Raises ValueError for a kind that is none of KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"adapter={kind!r} is not one of {', '.join(KINDS)}")
    tree = nn.Module()
    for name, layer in layers.items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = cast(nn.Module, getattr(place, part))
        place.add_module(
            leaf, KINDS[kind](layer, rank, alpha / rank, dropout, generator("adapter", seed, name))
        )
    return tree


def adapters_of(tree: nn.Module) -> dict[str, Adapter]:
    """The adapters of a tree, by the name of their layer."""
    return {name: part for name, part in tree.named_modules() if isinstance(part, Adapter)}


def attach(tree: nn.Module, model: nn.Module) -> None:
    """From now on the layers of `model` answer with what their adapters add. Its weights stay as they are."""
    for name, adapter in adapters_of(tree).items():

        def add(layer: nn.Module, given: tuple[Tensor], answer: Tensor, adapter: Adapter = adapter) -> Tensor:
            return answer + adapter(layer, given[0], answer)

        model.get_submodule(name).register_forward_hook(add)
