"""The KL autoencoder of Stable Diffusion.

Config keys and parameter names are those of diffusers' AutoencoderKL: they are the field's file format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from autoencoder import tiling
from autoencoder.layers import (
    AttentionBlock,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    Upsample,
    recompute,
    rename_attention,
)

DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # and whether it has attention
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """The keys of diffusers' AutoencoderKL that we implement, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)  # largest image first
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)  # smallest image first
    block_out_channels: tuple[int, ...] = (64,)  # largest image first
    layers_per_block: int = 1  # resnets a level of the encoder; the decoder has one more
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32  # pixels; a note of what it was trained on, any size works
    scaling_factor: float = 0.18215  # 1/std of the first SD autoencoder's latents
    shift_factor: float | None = None  # mean of the latents
    force_upcast: bool = True  # a note: its decoder overflows in float16
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    latent_rgb_factors: tuple[tuple[float, ...], ...] | None = (
        None  # (C, 3): latents to colours, for previews
    )
    latent_rgb_bias: tuple[float, ...] | None = None  # (3,); not keys of diffusers, which keeps them unread

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"latent_rgb_factors", "latent_rgb_bias"})
    NEUTRAL: ClassVar[dict[str, object]] = {"latents_mean": None, "latents_std": None}

    def __post_init__(self) -> None:
        for key in ("down_block_types", "up_block_types", "block_out_channels"):
            object.__setattr__(self, key, tuple(getattr(self, key)))  # JSON has lists
        levels = len(self.block_out_channels)
        for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, key)
            if len(types) != levels:
                raise ValueError(
                    f"{key}={types}: block_out_channels has {levels} levels, name a type for each"
                )
            for name in types:
                if name not in known:
                    raise ValueError(f"{key} has {name!r}: this autoencoder knows {', '.join(known)}")
        for key in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: expected at least 1")
        if min(self.block_out_channels, default=0) < 1:
            raise ValueError(f"block_out_channels={self.block_out_channels}: expected at least 1 each")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels={self.block_out_channels}: {channels} is not a multiple of "
                    f"norm_num_groups={self.norm_num_groups}"
                )
        if self.act_fn not in ("silu", "swish"):
            raise ValueError(f"act_fn={self.act_fn!r}: this autoencoder knows silu")
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor={self.scaling_factor}: expected 1/std of the latents, above 0")
        factors, bias = self.latent_rgb_factors, self.latent_rgb_bias
        if factors is not None and [len(row) for row in factors] != [3] * self.latent_channels:
            raise ValueError(f"latent_rgb_factors={factors}: expected 3 numbers for each latent channel")
        if (bias is None) != (factors is None) or len(bias or (0, 0, 0)) != 3:
            raise ValueError(f"latent_rgb_bias={bias}: expected 3 numbers, with latent_rgb_factors only")


@dataclass(frozen=True)
class Posterior:
    """q(z | image), a diagonal normal distribution for each image. mean, logvar: (B, C, h, w), unscaled."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise. noise: (B, C, h, w), standard normal, drawn by the caller."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats (Kingma & Welling 2014, appendix B), *summed* over C, h and w: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class Stage(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): `count` resnets at one size, each with attention or without."""

    def __init__(self, widths: tuple[int, int], count: int, *, attention: bool, groups: int) -> None:
        """widths: channels that come in, channels that go out."""
        super().__init__()
        first, out = widths
        self.resnets = nn.ModuleList(
            ResnetBlock(first if i == 0 else out, out, groups=groups) for i in range(count)
        )
        self.attentions = nn.ModuleList(
            AttentionBlock(out, groups=groups) if attention else nn.Identity() for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        return x


class DownStage(Stage):
    """A Stage, then half the size: (B, in, H, W) -> (B, out, H / 2, W / 2). The last one keeps its size."""

    def __init__(
        self, widths: tuple[int, int], count: int, *, attention: bool, groups: int, last: bool
    ) -> None:
        super().__init__(widths, count, attention=attention, groups=groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[1], padding=0)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpStage(Stage):
    """A Stage, then twice the size: (B, in, H, W) -> (B, out, 2H, 2W). The last one keeps its size."""

    def __init__(
        self, widths: tuple[int, int], count: int, *, attention: bool, groups: int, last: bool
    ) -> None:
        super().__init__(widths, count, attention=attention, groups=groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(widths[1])])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x, size=(2 * x.shape[2], 2 * x.shape[3]))
        return x


class MidBlock(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): resnet, attention, resnet at the smallest size."""

    def __init__(self, channels: int, *, attention: bool, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups) for _ in range(2))
        self.attentions = nn.ModuleList(
            [AttentionBlock(channels, groups=groups) if attention else nn.Identity()]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """image (B, 3, H, W) -> (B, 2 * latent_channels, h, w): the means and log variances before quant_conv."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownStage(
                (widths[max(i - 1, 0)], width),
                config.layers_per_block,
                attention=DOWN_BLOCKS[name],
                groups=groups,
                last=i == len(widths) - 1,
            )
            for i, (width, name) in enumerate(zip(widths, config.down_block_types, strict=True))
        )
        self.mid_block = MidBlock(widths[-1], attention=config.mid_block_add_attention, groups=groups)
        self.conv_norm_out = GroupNormSiLU(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """z (B, latent_channels, h, w) -> image (B, 3, H, W)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], attention=config.mid_block_add_attention, groups=groups)
        self.up_blocks = nn.ModuleList(
            UpStage(
                (widths[max(i - 1, 0)], width),
                config.layers_per_block + 1,
                attention=UP_BLOCKS[name],
                groups=groups,
                last=i == len(widths) - 1,
            )
            for i, (width, name) in enumerate(zip(widths, config.up_block_types, strict=True))
        )
        self.conv_norm_out = GroupNormSiLU(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


def multiples_of(factor: int, sizes: Sequence[int]) -> str:
    """The nearest sizes that a factor divides, for an error message: "504 or 512"."""
    near = ((size // factor * factor, -(-size // factor) * factor) for size in sizes if size % factor)
    return " and ".join(f"{low} or {high}" if low else f"{high}" for low, high in near)


class AutoencoderKL(nn.Module):
    """Pixels to latents and back: the KL-regularised autoencoder of Rombach et al. 2022, section 3.1.

    Latents are z scaled, (z - shift_factor) * scaling_factor; z is what the convolutions see.
    It computes in the type of its weights and answers in the type of what it was given.
    """

    config_class = AutoencoderKLConfig
    stock_class = "AutoencoderKL"
    largest_whole: float = (
        2**20
    )  # pixels of a picture, SDXL's; larger ones go through in strips, see tiling.py

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def downsample_factor(self) -> int:
        """Pixels a latent, along each side: 8 in Stable Diffusion."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def encode(self, image: Tensor) -> Posterior:
        """The distribution of z, *unscaled*: see to_latents.

        image: (B, 3, H, W) in [-1, 1]. Returns a Posterior of (B, latent_channels, H / factor, W / factor).
        Raises ValueError if H or W is not a multiple of downsample_factor.
        """
        height, width = image.shape[2:]
        factor = self.downsample_factor
        if height % factor or width % factor:
            raise ValueError(
                f"an image of {width}x{height} pixels does not fit the autoencoder: its sides must be "
                f"multiples of {factor}, take {multiples_of(factor, (width, height))}"
            )
        strips = self.in_strips(height * width)
        encoder = partial(tiling.encode, self.encoder) if strips else self.encoder
        moments = self.quant_conv(encoder(image.to(self.dtype))).to(image.dtype)
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))  # the bounds of Rombach et al.'s code

    def to_latents(self, z: Tensor) -> Tensor:
        """z to latents of about unit variance. z: a sample or the mean of a Posterior, (B, C, h, w)."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels.

        latents: (B, latent_channels, h, w), scaled. Returns (B, 3, factor * h, factor * w), not clamped.
        Raises ValueError if latents does not have latent_channels channels.
        """
        if latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected (B, C, h, w) with "
                f"C = {self.config.latent_channels} channels"
            )
        z = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        strips = self.in_strips(math.prod(latents.shape[2:]) * self.downsample_factor**2)
        decoder = partial(tiling.decode, self.decoder) if strips else self.decoder
        return decoder(self.post_quant_conv(z.to(self.dtype))).to(latents.dtype)

    def in_strips(self, pixels: int) -> bool:
        """Whether a picture of so many pixels goes through in strips: the same but for rounding, less memory.

        Never where gradients are kept: they would hold what strips give away.
        """
        return pixels > self.largest_whole and not torch.is_grad_enabled()

    def enable_tiling(self) -> None:
        """Pictures of every size in strips; by itself, those of more than 1024x1024 pixels."""
        self.largest_whole = 0

    def disable_tiling(self) -> None:
        """No picture in strips, whatever its size."""
        self.largest_whole = math.inf

    def to_colours(self, latents: Tensor) -> Tensor:
        """A quick look at latents: (B, C, h, w) to (B, 3, h, w) in about [-1, 1], a linear map of each place.

        Raises ValueError if the config has no latent_rgb_factors, which train_autoencoder.py measures.
        """
        if self.config.latent_rgb_factors is None:
            raise ValueError("this autoencoder has no latent_rgb_factors: decode instead")
        factors = latents.new_tensor(self.config.latent_rgb_factors)  # (C, 3)
        bias = latents.new_tensor(self.config.latent_rgb_bias)
        return torch.einsum("bchw,cr->brhw", latents, factors) + bias.view(3, 1, 1)

    def enable_gradient_checkpointing(self) -> None:
        """Trade a third more compute in training for activations of one resnet at a time."""
        for module in self.modules():
            if isinstance(module, ResnetBlock | AttentionBlock):
                recompute(module)

    @staticmethod
    def rename_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old names of the attention layers to today's."""
        return rename_attention(state_dict)


def rescaled(vae: AutoencoderKL, scaling_factor: float) -> AutoencoderKL:
    """The same autoencoder, to rounding, with another scaling_factor: z is as many times as large.

    Latents and pictures stay, so that a program that assumes a factor reads them. The first and last maps of
    z change; all other weights are shared. Raises ValueError if there are no such maps, or with a shift.
    """
    config = vae.config
    if not (config.use_quant_conv and config.use_post_quant_conv) or config.shift_factor:
        raise ValueError(
            "rescaled: an autoencoder without quant_conv and post_quant_conv, or with a shift_factor, has no "
            "map that could take the scale"
        )
    ratio = config.scaling_factor / scaling_factor
    with torch.device("meta"):
        twin = AutoencoderKL(replace(config, scaling_factor=scaling_factor))
    tensors = dict(vae.state_dict())
    means = config.latent_channels  # the first half of the moments; the second is log variances
    weight, bias = tensors["quant_conv.weight"].clone(), tensors["quant_conv.bias"].clone()
    weight[:means] *= ratio
    bias[:means] *= ratio
    bias[means:] += 2 * math.log(ratio)
    tensors |= {"quant_conv.weight": weight, "quant_conv.bias": bias}
    tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"] / ratio
    twin.load_state_dict(tensors, assign=True)
    return twin.train(vae.training)
