"""Linear maps by whole numbers: weights and activations in bytes, sums in 32 bits (Jacob et al. 2018).

A channel of the weights has one scale, found once. A row of activations has its least value and a step, found
in every call (dynamic quantization). The sums are exact on every CPU.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import native
from ldm.native.build import library
from ldm.native.memory import POOL

BYTE = 255  # of a row's greatest value; its least is 0
DEPTH = 32  # the channels of a row are made a multiple of it by zeros


@cache
def check() -> None:
    """Raises ValueError, which says why, if there is no such kernel here or it answers wrong."""
    native.check()
    if not library().int8_width():
        raise ValueError("int8: there is a kernel for x86 with AVX2, and this CPU has none; leave int8 out")
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 96, generator=random) for rows in (13, 64))
    x, (whole, scale) = exact_rows(x), quantized(weight, together())
    true = F.linear(x.double(), whole * scale.double()[:, None]).float()
    ours = linear(x, pack(weight, None))
    if not torch.allclose(ours, true, rtol=1e-4, atol=1e-4):
        raise ValueError(
            f"int8: the kernel differs from what it should answer by {(ours - true).abs().max():.2g}, so "
            "this compiler cannot be trusted with it on this CPU; set CXX to another g++, or leave int8 out"
        )


def together() -> int:
    """How many products this CPU adds up in 16 bits; 0 where it has instructions that add in 32 at once."""
    return library().int8_together()


def exact_rows(x: Tensor) -> Tensor:
    """Rows (B, C) like these that bytes hold without loss: whole multiples of 1/16 from -8 on."""
    x = (16 * x).round().clamp(-128, 127) / 16
    x[:, 0], x[:, 1] = -8, -8 + BYTE / 16
    return x


class Weights(NamedTuple):
    """A linear map of C channels to K, packed for this CPU."""

    bytes: Tensor  # (K / panel, C / 4, panel, 4) int8, C rounded up to DEPTH
    scale: Tensor  # (K,): of a unit of the bytes
    total: Tensor  # (K,): the sum of the weights of a channel
    bias: Tensor | None  # (K,)
    gated: bool  # a panel then has half of its channels from either half of them


def quantized(weight: Tensor, together: int) -> tuple[Tensor, Tensor]:
    """weight (K, C) as whole numbers of -127 to 127 and their scale (K,), symmetric about 0.

    Where products meet in 16 bits, the scale is such that they fit whatever the row: of the `together`
    weights that meet, those of either sign add up to at most 128, for 128 * 255 < 2^15. Rounding adds at most
    1/2 to each, so together / 2 is kept free.
    """
    scale = weight.abs().amax(1) / 127
    if together:
        meet = meeting(weight, together)
        most = torch.maximum(meet.clamp(min=0).sum(-1), -meet.clamp(max=0).sum(-1)).amax(1)
        scale = torch.maximum(scale, most / (128 - together / 2))
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def meeting(weight: Tensor, together: int) -> Tensor:
    """(K, C) as (K, groups, together): neighbours in pairs, a pair of four after the other."""
    steps = together // 2
    fours = F.pad(weight, (0, -weight.shape[1] % (4 * steps))).unflatten(1, (-1, steps, 2, 2))
    return fours.transpose(2, 3).reshape(len(weight), -1, together)


def pack(weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Weights:
    """The kernel's weights of a linear map. weight: (K, C). bias: (K,). See native.linear for their sizes."""
    width = library().int8_width()
    whole, scale = quantized(weight.detach().contiguous(), together())
    order = torch.arange(len(weight))
    if gated:
        order = order.view(2, -1, width).transpose(0, 1).flatten()
    whole, scale = F.pad(whole[order], (0, -weight.shape[1] % DEPTH)), scale[order]
    return Weights(
        whole.view(len(weight) // (2 * width), 2 * width, -1, 4).transpose(1, 2).contiguous(),
        scale,
        scale * whole.sum(1, dtype=torch.float32),
        None if bias is None else bias.detach()[order],
        gated,
    )


def linear(x: Tensor, weights: Weights) -> Tensor:
    """As native.linear: (..., C) -> (..., K), or (..., K / 2) where they are gated. C is a multiple of 32."""
    x = x.contiguous()
    channels, out, depth = x.shape[-1], len(weights.scale), 4 * weights.bytes.shape[1]
    rows = x.numel() // channels
    y = POOL.empty(*x.shape[:-1], out // 2 if weights.gated else out)
    low, step = torch.empty(2, rows)
    room = POOL.empty(rows, depth // 4)  # a float holds four bytes
    pointers = (x, *weights[:-1], room, low, step, y)
    native.call("int8_linear", *pointers, rows, channels, depth, out, int(weights.gated))
    return y


class Seen(NamedTuple):
    """A tensor as it was: which, where, and how often changed. One in its place after it is another."""

    tensor: weakref.ref[Tensor]
    place: int
    version: int

    @classmethod
    def now(cls, x: Tensor) -> Seen:
        return cls(weakref.ref(x), x.data_ptr(), 0 if x.is_inference() else x._version)

    def still(self, x: Tensor) -> bool:
        return self.tensor() is x and self[1:] == Seen.now(x)[1:]


class Packed:
    """The packed weights of a layer: made when first asked for, and again when its own have changed."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, gated: bool = False) -> None:
        """layer: linear or a 1x1 convolution."""
        self.layer, self.gated = layer, gated
        self.made: tuple[list[Seen], Weights] | None = None

    def __call__(self) -> Weights:
        layer = self.layer
        both = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        made = self.made
        if made is None or not all(map(Seen.still, made[0], both)):
            made = [Seen.now(x) for x in both], pack(layer.weight.flatten(1), layer.bias, gated=self.gated)
            self.made = made  # at once, so that threads may share it
        return made[1]
