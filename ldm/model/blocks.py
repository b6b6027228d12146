"""The parts of the UNet: its embeddings, its resnets and its three kinds of level.

Parameter names are those of diffusers' modules (`time_emb_proj`, `linear_1`): the field's file format. What a
configuration can choose are classes and functions here, given to a level when it is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.layers import GroupNorm, ResnetBlock, scaled_dot_product
from ldm.model.context import Context, of_text, repeated


def timestep_embedding(t: Tensor, channels: int, *, cos_first: bool, freq_shift: float) -> Tensor:
    """Sines and cosines of t at frequencies from 1 to 1/10000 (Vaswani et al. 2017, section 3.5).

    t: (B,), any number type. Returns (B, channels) float32.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    parts = (angle.cos(), angle.sin()) if cos_first else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class TimeEmbedding(nn.Module):
    """(B, in) -> temb (B, E), by two linear maps."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: Tensor, guidance_scale: Tensor | None = None) -> Tensor:
        """guidance_scale is for GuidedTimeEmbedding, and not heard here."""
        return self.linear_2(F.silu(self.linear_1(x)))


class GuidedTimeEmbedding(TimeEmbedding):
    """The same of a UNet that is told the guidance it answers with (Meng et al. 2023, section 3.1).

    Told is w = guidance_scale - 1, their w, by sines and cosines of 1000 w.
    """

    def __init__(self, in_channels: int, channels: int, guidance_channels: int) -> None:
        """guidance_channels: of those sines and cosines."""
        super().__init__(in_channels, channels)
        self.cond_proj = nn.Linear(guidance_channels, in_channels, bias=False)

    def forward(self, x: Tensor, guidance_scale: Tensor | None = None) -> Tensor:
        """guidance_scale: (B,), or a multiple; 1 is no guidance. Raises ValueError if it is missing."""
        if guidance_scale is None:
            raise ValueError(
                "this UNet was distilled with its guidance and is told how much: pass a "
                "ldm.model.context.Context with guidance_scale, (B,); 1 for none"
            )
        w = 1000 * (guidance_scale.float() - 1)
        waves = timestep_embedding(w, self.cond_proj.in_features, cos_first=False, freq_shift=1)
        return super().forward(repeated(x, like=w) + self.cond_proj(waves.to(x.dtype)))


class ClassEmbedding(nn.Embedding):
    """temb (B, E) plus a learned vector of each class of class_labels: (B,), or a multiple."""

    def forward(self, temb: Tensor, class_labels: Tensor | None) -> Tensor:  # type: ignore[override]
        if class_labels is None:
            raise ValueError(
                f"this UNet is conditioned on {self.num_embeddings} classes: pass class_labels, (B,) int64"
            )
        return repeated(temb, like=class_labels) + super().forward(class_labels)


class NoClasses(nn.Module):
    """temb, as it is: for a UNet without classes."""

    def forward(self, temb: Tensor, class_labels: Tensor | None) -> Tensor:
        if class_labels is not None:
            raise ValueError(
                "class_labels given, but this UNet has no classes (num_class_embeds is null in its config)"
            )
        return temb


class AttentionPooling(nn.Module):
    """(B, N, D) -> (B, D): the mean of the tokens looks at all of them (Radford et al. 2021, section 2.4)."""

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(1, channels))
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True) + self.positional_embedding
        x = torch.cat([mean, x], dim=1)
        return scaled_dot_product(self.q_proj(mean), self.k_proj(x), self.v_proj(x), self.heads)[:, 0]


class PooledText(nn.Module):
    """temb (B, E) plus the whole text in one vector: GLIDE's and Imagen's second way for the text to act."""

    def __init__(self, context_channels: int, channels: int, *, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(context_channels)
        self.pool = AttentionPooling(context_channels, heads=heads)
        self.proj = nn.Linear(context_channels, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, temb: Tensor, context: Tensor | Context) -> Tensor:
        pooled = of_text(context, self, lambda text: self.norm2(self.proj(self.pool(self.norm1(text)))))
        return repeated(temb, like=pooled) + pooled


class NoPooledText(nn.Module):
    """temb, as it is: the text acts through cross-attention alone."""

    def forward(self, temb: Tensor, context: Tensor | Context | None) -> Tensor:
        return temb


class TextAndSizes(TimeEmbedding):
    """temb (B, E) plus the whole text and six sizes in one vector: SDXL knows how its training pictures were
    scaled and cropped, and is told what to draw (Podell et al. 2023, section 2.2).
    """

    def __init__(
        self, pooled_channels: int, size_channels: int, channels: int, *, embed: Callable[[Tensor], Tensor]
    ) -> None:
        """embed: sizes (B,) -> (B, size_channels)."""
        super().__init__(pooled_channels + 6 * size_channels, channels)
        self.embed = embed

    def forward(self, temb: Tensor, context: Tensor | Context | None) -> Tensor:  # type: ignore[override]
        if not isinstance(context, Context) or context.pooled is None or context.sizes is None:
            raise ValueError(
                "this UNet is told the whole text and sizes beside the tokens, as SDXL is: pass a "
                "ldm.model.context.Context of all three"
            )
        pooled, sizes = context.pooled, context.sizes

        def told(_: Tensor) -> Tensor:
            vector = torch.cat([pooled.float(), self.embed(sizes.flatten()).view(len(pooled), -1)], dim=1)
            return super(TextAndSizes, self).forward(vector.to(temb.dtype))

        vector = of_text(context, self, told)
        return repeated(temb, like=vector) + vector


Resample = Callable[[Tensor, Sequence[int] | None], Tensor]  # (x, size to reach) -> x of another size


def keep(x: Tensor, size: Sequence[int] | None) -> Tensor:
    """(B, C, H, W), as it is."""
    return x


def halve(x: Tensor, size: Sequence[int] | None) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2), the mean of each 2x2; odd sizes round down."""
    return F.avg_pool2d(x, 2)


def enlarge(x: Tensor, size: Sequence[int] | None) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), nearest neighbour."""
    return F.interpolate(x, size=size, mode="nearest")


class TimeResnet(ResnetBlock):
    """(B, in, H, W) and temb (B, E) -> (B, out, H, W): the time shifts every channel (Ho et al. 2020)."""

    numbers = 1  # that each channel gets from temb

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int,
        resample: Resample = keep,
        groups: int = 32,
        eps: float = 1e-5,
        drop: float = 0.0,
    ) -> None:
        """resample: halve or enlarge where this resnet changes the size (ADM's BigGAN blocks)."""
        super().__init__(in_channels, out_channels, groups=groups, eps=eps, drop=drop)
        self.time_emb_proj = nn.Linear(temb_channels, self.numbers * out_channels)
        self.resample = resample

    def modulate(self, h: Tensor, time: Tensor) -> Tensor:
        """(B, out, H, W), normalised and through SiLU, with `time` (B, numbers * out) worked in."""
        return self.norm2(h, time)

    def forward(  # type: ignore[override]
        self, x: Tensor, temb: Tensor, *, size: Sequence[int] | None = None
    ) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x), size))
        h = self.modulate(h, repeated(self.time_emb_proj(F.silu(temb)), like=x))
        h = self.conv2(self.dropout(h))
        return self.conv_shortcut(self.resample(x, size)) + h


class ScaleShiftResnet(TimeResnet):
    """The time scales and shifts every normalised channel: AdaGN (Dhariwal & Nichol 2021, eq. 1)."""

    numbers = 2

    def __init__(self, in_channels: int, out_channels: int, **rest: Any) -> None:
        """rest: as TimeResnet."""
        super().__init__(in_channels, out_channels, **rest)
        self.norm2 = GroupNorm(self.norm2.num_groups, out_channels, eps=self.norm2.eps)

    def modulate(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        return F.silu(self.norm2(h) * (1 + scale) + shift)


class DownBlock(nn.Module):
    """One level on the way down: resnets, each with its attention, then half the size."""

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], downsamplers: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | Context | None) -> list[Tensor]:
        """Every intermediate result, for the way up; the last one is the level's output."""
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, temb), context)
            skips.append(x)
        return skips + [downsample(x, temb) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    """The smallest level: a resnet, then attention and a resnet where there is attention."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | Context | None) -> Tensor:
        first, *rest = self.resnets
        x = first(x, temb)
        for attention, resnet in zip(self.attentions, rest, strict=True):
            x = resnet(attention(x, context), temb)
        return x


class NoMidBlock(nn.Module):
    """x, as it is."""

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | Context | None) -> Tensor:
        return x


class UpBlock(nn.Module):
    """One level on the way up: resnets that see the skips, each with its attention, then twice the size."""

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], upsamplers: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor | Context | None
    ) -> Tensor:
        """Takes its skips off the end of the list; grows to the size of the next one, so odd sizes fit.

        Skips from before the text have B rows where x has k * B, see ldm.model.context.
        """
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = torch.cat([x, repeated(skips.pop(), like=x)], dim=1)
            x = attention(resnet(x, temb), context)
        for upsample in self.upsamplers:
            x = upsample(x, temb, size=skips[-1].shape[2:])
        return x
