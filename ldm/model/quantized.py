"""Linear maps in 8 bits, for accelerators: integers or floats of 8 bits multiply at twice the rate of bf16.

A weight is scaled by its output channel, once; what it multiplies by its row, at each call (Dettmers et al.
2022, "LLM.int8()", section 2.1). Sums, scales and bias are wider. `ldm.drawing.optimize` puts them there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = {"int8": 127.0, "fp8": torch.finfo(FP8).max}
STEP = 16  # what sizes must be multiples of, and more rows than it there must be, for the kernels of CUDA


def quantize(layer: nn.Linear, kind: str) -> bool:
    """Lets a layer multiply in 8 bits where its sizes allow it; says whether they do.

    Its weight stays as it is, for saving, and is not looked at again: see renew.
    """
    if layer.in_features % STEP or layer.out_features % STEP:
        return False
    with torch.no_grad():
        weight, scale = SCALED[kind](layer.weight)
    layer.forward = partial(MAPS[kind], layer, weight.t(), scale.t())  # type: ignore[method-assign]
    return True


@torch.no_grad()
def renew(layer: nn.Module) -> None:
    """After a change of its weight, the same change in a layer that multiplies in 8 bits; nothing in others.

    In place, so that a compiled model is not compiled anew.
    """
    held = getattr(layer.forward, "func", None)
    for kind, function in MAPS.items():
        if held is function:
            _, weight, scale = layer.forward.args  # type: ignore[attr-defined]
            values, size = SCALED[kind](layer.weight)  # type: ignore[arg-type]
            weight.copy_(values.t())
            scale.copy_(size.t())


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) -> integers of 8 bits (R, C) and float32 scales (R, 1) whose product is x but for rounding."""
    scale = row_scale(x, LARGEST["int8"])
    return (x.float() / scale).round().to(torch.int8), scale


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with floats of 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022, E4M3)."""
    scale = row_scale(x, LARGEST["fp8"])
    return (x.float() / scale).to(FP8), scale


def row_scale(x: Tensor, largest: float) -> Tensor:
    """(R, 1): what makes the largest of each row `largest`."""
    return x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / largest


def int8_linear(layer: nn.Linear, weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """x (..., C) by weight (C, K), scale (1, K): (..., K)."""
    rows = x.flatten(0, -2)
    if len(rows) <= STEP:
        return F.linear(x, layer.weight, layer.bias)
    values, size = int8_rows(rows)
    y = torch._int_mm(values, weight) * size * scale
    if layer.bias is not None:
        y = y + layer.bias
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def fp8_linear(layer: nn.Linear, weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """x (..., C) by weight (C, K), scale (1, K): (..., K). Its kernels answer in bf16."""
    rows = x.flatten(0, -2)
    if len(rows) <= STEP:
        return F.linear(x, layer.weight, layer.bias)
    values, size = fp8_rows(rows)
    y = torch._scaled_mm(values, weight, scale_a=size, scale_b=scale, out_dtype=torch.bfloat16)
    if layer.bias is not None:
        y = y + layer.bias
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


SCALED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int8": int8_rows, "fp8": fp8_rows}
MAPS: dict[str, Callable[..., Tensor]] = {"int8": int8_linear, "fp8": fp8_linear}


def why_not(kind: str, device: torch.device) -> str:
    """Why this device does not multiply so; "" if it does. What a CPU does, its own kernels say."""
    if device.type == "cpu" and kind == "int8":
        return ""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs and the models are on {device.type}"
    needed, name = ((8, 9), "Ada or Hopper") if kind == "fp8" else ((8, 0), "Ampere")
    if torch.cuda.get_device_capability(device) < needed:
        return f"{torch.cuda.get_device_name(device)} does not multiply {kind}: {name} and later do"
    return ""
