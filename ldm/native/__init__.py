"""Kernels for CPUs, in C++: float32, and attention in bfloat16, for inference.

`ldm.drawing.optimize` puts them into models.

They answer as torch's do but for rounding, and the same whatever the number of threads.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.native.build import library
from ldm.native.memory import POOL

WIDEST = 256  # channels of a head that `attends` takes
CHANNELS = 32  # the channels of a layer are a multiple of it, whatever the vectors of a CPU hold


def takes(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Are these for the kernels: of this type on a CPU, and nobody wants a gradient?"""
    return (
        all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def attends(q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
    """Is `attention` to be used: for float32, or bfloat16 where the CPU has tiles for it?

    Wide heads are little but matrix products, and torch's are faster there.
    """
    if q.shape[-1] // heads > WIDEST:
        return False
    return takes(q, k, v) or (takes(q, k, v, dtype=torch.bfloat16) and tiles())


@cache
def check() -> None:
    """Raises ValueError, which says why, if there are no kernels here or they answer wrong."""
    library()
    random = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=random) for s in ((1, 32, 5, 9), (32, 32, 3, 3), (32,)))
    q, k, v = (torch.randn(1, n, 64, generator=random) for n in (31, 77, 77))
    apart = [each.unflatten(-1, (2, 32)).transpose(1, 2) for each in (q, k, v)]
    left, right = F.linear(q, w[..., 0, 0].repeat(1, 2)), F.linear(q, w[..., 1, 1].repeat(1, 2))
    both = torch.cat([w[..., 0, 0], w[..., 1, 1]]).repeat(1, 2)
    pairs = {
        "convolution": (convolution(x, w, b), F.conv2d(x, w, b, padding=1)),
        "attention": (
            attention(q, k, v, 2),
            F.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2),
        ),
        "norm": (norm_silu(x, 4, b, b, 1e-5), F.silu(F.group_norm(x, 4, b, b, 1e-5))),
        "linear": (linear(q, both, None), torch.cat([left, right], -1)),
        "gated linear": (linear(q, both, None, gated=True), left * F.gelu(right)),
    }
    for name, (ours, true) in pairs.items():
        if not torch.allclose(ours, true, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"native kernels: {name} differs from torch's by {(ours - true).abs().max():.2g}, so this "
                "compiler cannot be trusted with them on this CPU; set CXX to another g++"
            )


@cache
def tiles() -> bool:
    """Can bfloat16 be multiplied on the tiles of this CPU (AMX)?"""
    try:
        check_tiles()
    except ValueError:
        return False
    return True


def check_tiles() -> None:
    """Raises ValueError, which says why, if this CPU has no tiles or the kernel on them answers wrong."""
    if not library().tiles():
        raise ValueError(
            "native kernels: bfloat16 needs a CPU with AMX, a Linux that permits it, and GCC 11 or later"
        )
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 80, generator=random).bfloat16() for n in (45, 203, 203))
    apart = [each.float().unflatten(-1, (2, 40)).transpose(1, 2) for each in (q, k, v)]
    true = F.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(2)
    off = (attention(q, k, v, 2).float() - true).abs().max()
    if not off < 1e-2:  # of numbers below 1
        raise ValueError(
            f"native kernels: attention on AMX tiles differs from torch's by {off:.2g}, so this compiler "
            "cannot be trusted with it on this CPU; set CXX to another g++"
        )


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with padding 1 by Winograd's F(4x4, 3x3) (Lavin & Gray 2016).

    x: (B, C, H, W). weight: (K, C, 3, 3). bias: (K,). C and K are multiples of 32.
    Returns (B, K, H, W), laid out as channels_last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    out = len(weight)
    y = POOL.empty(batch, height, width, out)
    call("convolution", x, weight, bias, y, batch, height, width, channels, out)
    return y.permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in each head (Dao et al. 2022, algorithm 1).

    q: (B, N, heads * D). k, v: (B, M, heads * D). Returns (B, N, heads * D). All are float32 or all bfloat16;
    sums are float32.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, n, width = q.shape
    half = q.dtype == torch.bfloat16
    out = torch.empty(batch, n, width, dtype=q.dtype) if half else POOL.empty(batch, n, width)
    strides = (step for x in (q, k, v) for step in x.stride()[:2])
    call(
        "attention_bf16" if half else "attention",
        q,
        k,
        v,
        out,
        batch,
        n,
        k.shape[1],
        heads,
        width // heads,
        *strides,
    )
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> Tensor:
    """x W^T + b: (..., C) -> (..., K). weight: (K, C). bias: (K,). C and K are multiples of 32.

    gated: (..., K / 2), the first half of the channels times the GELU of the second (Shazeer 2020, eq. 6);
    then K is a multiple of 64.
    """
    x, weight = x.contiguous(), weight.contiguous()
    out, channels = weight.shape
    y = POOL.empty(*x.shape[:-1], out // 2 if gated else out)
    call("linear", x, weight, bias, y, x.numel() // channels, channels, out, int(gated))
    return y


def norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None = None
) -> Tensor:
    """SiLU of the group norm of x + added, laid out as channels_last.

    x: (B, C, H, W). weight, bias: (C,). added: (B, C), to every pixel. C is a multiple of 32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    y = POOL.empty(batch, height, width, channels)
    added = None if added is None else added.contiguous()
    call("norm", x, added, weight, bias, y, batch, height * width, channels, groups, eps)
    return y.permute(0, 3, 1, 2)


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """A function of the library, on as many threads as torch has."""
    library()[name](*map(value, arguments), ctypes.c_int(torch.get_num_threads()))


def value(x: Tensor | int | float | None) -> Any:
    """As C takes it."""
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return x if x is None else ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_double(x)
