"""Attention: the one door to its kernels, and the transformers that let latents see each other and the text.

Parameter names are those of diffusers' modules (`to_out.0`, `ff.net.0.proj`): the field's file format.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.layers import AttentionBlock, GroupNorm, scaled_dot_product, to_image, to_tokens
from ldm import native
from ldm.model.context import Context, looked, of_text, repeated

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (q, k, v, heads) -> (B, N, heads * D)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v in each head (Vaswani et al. 2017, eq. 1), by the kernels of `backend`.

    q: (B, N, heads * D). k, v: (B, M, heads * D). Returns (B, N, heads * D). Every kernel keeps its sums
    and the softmax in float32, so nothing overflows in half precision.
    Raises ValueError if the backend cannot run here; `check_backend` says so beforehand.
    """
    return BACKENDS[backend](q, k, v, heads)


def memory_efficient(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """xformers' kernels (Rabe & Staats 2021; Dao et al. 2022). Shapes as in `attention`."""
    check_backend("xformers", q.device)
    from xformers.ops import memory_efficient_attention

    try:
        heads_apart = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # (B, N, heads, D), views
        return memory_efficient_attention(*heads_apart).flatten(2)
    except NotImplementedError as error:
        shape = f"{heads} heads of {q.shape[-1] // heads} channels, {q.dtype}"
        raise ValueError(
            f"attention backend 'xformers' has no kernel for {shape}; use 'sdpa' or 'auto'"
        ) from error


def automatic(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """xformers' kernels on CUDA where they can run, else torch's own.

    A rule and no stopwatch: in every process the same shapes take the same kernel, so pictures repeat.
    """
    if not q.is_cuda or torch.compiler.is_compiling() or _why_not_xformers(q.device):
        return scaled_dot_product(q, k, v, heads)
    try:
        return memory_efficient(q, k, v, heads)
    except ValueError:  # no kernel for this shape or type, such as heads of very many channels
        return scaled_dot_product(q, k, v, heads)


def by_native_kernel(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Our own kernel where it can run and is the faster one; all else goes the automatic way."""
    return (native.attention if native.attends(q, k, v, heads) else automatic)(q, k, v, heads)


BACKENDS: dict[str, Kernel] = {
    "auto": automatic,
    "sdpa": scaled_dot_product,
    "xformers": memory_efficient,
    "native": by_native_kernel,
}


def check_backend(backend: str, device: torch.device) -> None:
    """Raises ValueError, which says why, if there is no such backend or it cannot run on this device."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r}: expected {', '.join(BACKENDS)}")
    reason = WHY_NOT[backend](device) if backend in WHY_NOT else ""
    if reason:
        raise ValueError(f"attention backend {backend!r} cannot run: {reason}; use 'sdpa' or 'auto'")


@cache
def _why_not_xformers(device: torch.device) -> str:
    """Why its kernels cannot run on this device; empty if they can. Imports it only where CUDA is present."""
    if device.type != "cuda":
        return f"it needs a CUDA device and the model is on {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed (pip install xformers)"
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device=device)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, OSError, NotImplementedError, RuntimeError) as error:  # not built for this machine
        reason = str(error).partition("\n")[0]
        return f"its build does not fit this GPU or torch {torch.__version__} ({reason})"
    return ""


def _why_not_native(device: torch.device) -> str:
    if device.type != "cpu":
        return f"it is for CPUs and the model is on {device.type}"
    try:
        native.check()
    except ValueError as error:
        return str(error)
    return ""


WHY_NOT: dict[str, Callable[[torch.device], str]] = {"xformers": _why_not_xformers, "native": _why_not_native}


class CrossAttention(nn.Module):
    """x (B, N, C) looks at context (k * B, M, context_channels): (k * B, N, C).

    k is 1 but in guidance, where every x asks with k texts: (text 1 of each x, then text 2 of each).
    """

    def __init__(self, channels: int, context_channels: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys_values(self, x: Tensor, context: Tensor | Context) -> tuple[Tensor, Tensor]:
        """(k * B, M, C) each. They depend on the text alone: a run's Context has them made once."""
        return of_text(context, self, lambda text: (self.to_k(text), self.to_v(text)))

    def forward(self, x: Tensor, context: Tensor | Context) -> Tensor:
        k, v = self.keys_values(x, context)
        q = repeated(self.to_q(x), like=k)
        looked(context, self, q, k)
        return self.to_out[0](attention(q, k, v, self.heads, self.backend))


class SelfAttention(CrossAttention):
    """x (B, N, C) looks at itself; the context is not used."""

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__(channels, channels, heads=heads)

    def keys_values(self, x: Tensor, context: Tensor | Context) -> tuple[Tensor, Tensor]:
        return self.to_k(x), self.to_v(x)


class GEGLU(nn.Module):
    """(..., in) -> (..., out): a linear map, gated by the GELU of another (Shazeer 2020, eq. 6)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, C) -> (B, N, C), four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels),
            nn.Identity(),  # the place of diffusers' dropout, which no UNet turns on: it keeps the name net.2
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """(B, N, C) -> (k * B, N, C): attention among the latents, attention to the text, feed-forward."""

    def __init__(
        self, channels: int, context_channels: int, *, heads: int, only_cross_attention: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = (
            CrossAttention(channels, context_channels, heads=heads)
            if only_cross_attention
            else SelfAttention(channels, heads=heads)
        )
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, context_channels, heads=heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | Context) -> Tensor:
        for norm, attend in ((self.norm1, self.attn1), (self.norm2, self.attn2)):
            seen = attend(norm(x), context)
            x = repeated(x, like=seen) + seen
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """(B, C, h, w) and context (k * B, M, context_channels) -> (k * B, C, h, w): Rombach et al. 2022, app.
    E.2.1. See CrossAttention for k.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        heads: int,
        layers: int = 1,
        groups: int = 32,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = self.projection(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                channels, context_channels, heads=heads, only_cross_attention=only_cross_attention
            )
            for _ in range(layers)
        )
        self.proj_out = self.projection(channels)

    def projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels)

    def enter(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h * w, C)"""
        return self.proj_in(to_tokens(x))

    def leave(self, tokens: Tensor, like: Tensor) -> Tensor:
        """(B, h * w, C) -> (B, C, h, w)"""
        return to_image(self.proj_out(tokens), like)

    def forward(self, x: Tensor, context: Tensor | Context) -> Tensor:
        tokens = self.enter(self.norm(x))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return repeated(x, tokens) + self.leave(tokens, like=x)  # x first: the sum takes its memory layout


class ConvSpatialTransformer(SpatialTransformer):
    """The same with its projections stored as 1x1 convolutions, as in Stable Diffusion 1."""

    def projection(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 1)

    def enter(self, x: Tensor) -> Tensor:
        return to_tokens(self.proj_in(x))

    def leave(self, tokens: Tensor, like: Tensor) -> Tensor:
        return self.proj_out(to_image(tokens, like))


class SelfAttentionBlock(AttentionBlock):
    """(B, C, h, w) -> (B, C, h, w): ADM's attention (Dhariwal & Nichol 2021, section 3), through our door."""

    backend = "auto"

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.heads, self.backend)

    def forward(self, x: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """context: not used; the transformer that takes this layer's place needs it."""
        return super().forward(x)


class NoAttention(nn.Module):
    """x, as it is: the attention of a level that has none."""

    def forward(self, x: Tensor, context: Tensor | Context | None = None) -> Tensor:
        return x
