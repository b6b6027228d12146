"""What `pipe.optimize()` does: native kernels on a CPU, compiled models on an accelerator."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoencoder.layers import AttentionBlock, GroupNormSiLU, to_image, to_tokens
from ldm import native
from ldm.drawing.devices import default_dtype
from ldm.model.attention import (
    GEGLU,
    CrossAttention,
    SelfAttention,
    SelfAttentionBlock,
    SpatialTransformer,
    by_native_kernel,
)
from ldm.model.quantized import quantize, why_not
from ldm.native import int8
from ldm.native.memory import keep_pages
from ldm.recipes import options

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

log = logging.getLogger(__name__)

LARGE = 100_000_000  # parameters of a UNet whose pictures take minutes


def optimize(pipe: LatentDiffusionPipeline, quantization: str | None = None) -> None:
    """Whatever is faster where this pipeline is, equal to rounding and worth some waiting: see its optimize.

    quantization: of the linear maps in the UNet's transformers, which is more than rounding.
    Raises ValueError, which says why and what to do, where nothing is or where it cannot be had.
    """
    options.check_quantization(quantization)
    if pipe.offloaded:
        raise ValueError("optimize: offloaded models move for each use; call pipe.to(device) first")
    if quantization and (reason := why_not(quantization, pipe.device)):
        raise ValueError(f"quantize={quantization}: {reason}; leave it out")
    if pipe.device.type == "cpu":
        check_type(pipe.dtype)
        if quantization and pipe.dtype != torch.float32:
            raise ValueError(
                f"quantize={quantization}: on a CPU it is for float32 and the models are {pipe.dtype}; load "
                "them with dtype=torch.float32 (--dtype fp32)"
            )
        if quantization == "int8":
            int8.check()  # before anything is changed
        keep_pages()
        for model in pipe.models:
            use_kernels(model)
        if quantization == "int8":
            use_int8(pipe.unet)
    else:
        if quantization:
            quantize_maps(pipe.unet, quantization)
        pipe.unet.compile(dynamic=False)
        pipe.vae.decoder.compile(dynamic=False)


def pays(pipe: LatentDiffusionPipeline) -> bool:
    """Whether the command line does it unasked: for pictures that take long on a CPU, where there is g++."""
    if pipe.device.type != "cpu" or pipe.dtype not in (torch.float32, default_dtype(pipe.device)):
        return False
    if sum(weight.numel() for weight in pipe.unet.parameters()) < LARGE:
        return False
    try:
        native.check()
        check_type(pipe.dtype)
    except ValueError as error:
        log.warning("drawn without native kernels, which would be faster: %s", error)
        return False
    return True


def check_type(dtype: torch.dtype) -> None:
    """Raises ValueError, which says why, unless this CPU has kernels for float32, or bfloat16 with AMX."""
    reason = ""
    if dtype == torch.bfloat16:
        try:
            native.check_tiles()
        except ValueError as error:
            reason = f" ({error})"
    if reason or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"optimize: on this CPU it is for float32 and the models are {dtype}{reason}; load them with "
            "dtype=torch.float32 (--dtype fp32)"
        )


def use_kernels(model: nn.Module) -> None:
    """Replaces the forward of layers, on these objects alone, by kernels for float32 on a CPU.

    Attention has one for bfloat16 too, where the CPU has AMX; its other layers are best as torch has them.
    Weights, names and types stay as they are, and so does what is computed in another type, on another device
    or for gradients. Raises ValueError, which says why, if there are no kernels here.
    """
    native.check()
    for module in model.modules():
        if isinstance(module, GEGLU):
            if module.proj.out_features % (2 * native.CHANNELS) == 0:
                module.forward = partial(gated, module)  # type: ignore[method-assign]
        elif isinstance(module, GroupNormSiLU) and module.num_channels % native.CHANNELS == 0:
            module.forward = partial(norm_silu, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Linear) and whole(module):
            module.forward = partial(linear, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Conv2d) and whole(module):
            kernel = KERNELS.get(f"{module.kernel_size} {module.padding}")
            if kernel and (module.stride, module.dilation, module.groups) == ((1, 1), (1, 1), 1):
                module.forward = partial(kernel, module)  # type: ignore[method-assign]
        elif isinstance(module, CrossAttention | SelfAttentionBlock):
            module.backend = "native"
        elif isinstance(module, AttentionBlock):
            module.attend = partial(attention, module)  # type: ignore[method-assign]


def try_kernels(model: nn.Module) -> bool:
    """use_kernels where this CPU can have them; whether it can. Else the model stays as it is."""
    try:
        use_kernels(model)
    except ValueError as error:
        log.info("computed without native kernels, which would be faster: %s", error)
        return False
    return True


def use_int8(unet: nn.Module) -> None:
    """Replaces, after use_kernels, what it put into `maps` by kernels in bytes."""
    for module in maps(unet):
        kernel: Any = getattr(module.forward, "func", None)  # that of use_kernels
        if kernel in IN_BYTES:
            layer: Any = module.proj if isinstance(module, GEGLU) else module
            weights = int8.Packed(layer, gated=isinstance(module, GEGLU))
            module.forward = partial(IN_BYTES[kernel], module, weights)


def quantize_maps(unet: nn.Module, kind: str) -> None:
    """On an accelerator, lets `maps` multiply in 8 bits."""
    for module in maps(unet):
        if isinstance(module, nn.Linear):
            quantize(module, kind)


def maps(unet: nn.Module) -> list[nn.Module]:
    """The parts of transformers, but for what is made of the text alone: a run does it once.

    Linear maps elsewhere stay in full precision: those of the time embedding have one row, and a shortcut's
    error would go straight into the answer.
    """
    transformers = [part for part in unet.modules() if isinstance(part, SpatialTransformer)]
    parts = [part for transformer in transformers for part in transformer.modules()]
    of_text = {
        id(each)
        for part in parts
        if isinstance(part, CrossAttention) and not isinstance(part, SelfAttention)
        for each in (part.to_k, part.to_v)
    }
    return [part for part in parts if id(part) not in of_text]


def whole(layer: nn.Linear | nn.Conv2d) -> bool:
    """Are its channels such as the kernels take?"""
    return all(size % native.CHANNELS == 0 for size in layer.weight.shape[:2])


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if native.takes(x, layer.weight):
        return native.linear(x, layer.weight, layer.bias)
    return type(layer).forward(layer, x)


def gated(layer: GEGLU, x: Tensor) -> Tensor:
    if native.takes(x, layer.proj.weight):
        return native.linear(x, layer.proj.weight, layer.proj.bias, gated=True)
    return type(layer).forward(layer, x)


def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if native.takes(x, layer.weight):
        return native.convolution(x, layer.weight, layer.bias)
    return type(layer).forward(layer, x)


def pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution is a linear map of each pixel."""
    if native.takes(x, layer.weight):
        return to_image(native.linear(to_tokens(x), layer.weight.flatten(1), layer.bias), like=x)
    return type(layer).forward(layer, x)


def in_bytes(layer: nn.Linear | GEGLU, weights: int8.Packed, x: Tensor) -> Tensor:
    if native.takes(x, weights.layer.weight):
        return int8.linear(x, weights())
    return type(layer).forward(layer, x)  # type: ignore[arg-type]


def pixels_in_bytes(layer: nn.Conv2d, weights: int8.Packed, x: Tensor) -> Tensor:
    if native.takes(x, layer.weight):
        return to_image(int8.linear(to_tokens(x), weights()), like=x)
    return type(layer).forward(layer, x)


def norm_silu(layer: GroupNormSiLU, x: Tensor, added: Tensor | None = None) -> Tensor:
    if native.takes(x, layer.weight):
        return native.norm_silu(x, layer.num_groups, layer.weight, layer.bias, layer.eps, added)
    return type(layer).forward(layer, x, added)


def attention(block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_native_kernel(q, k, v, block.heads)


KERNELS = {"(3, 3) (1, 1)": convolution, "(1, 1) (0, 0)": pointwise}  # by kernel_size and padding
IN_BYTES: dict[Any, Any] = {linear: in_bytes, gated: in_bytes, pointwise: pixels_in_bytes}  # by float32's
