"""What a configuration makes of the autoencoder: its keys, and the encoder and decoder that they choose.

The keys and the parameter names are those of diffusers' AutoencoderKL: they are the field's file format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from autoencoder.layers import AttentionBlock, Downsample, GroupNormSiLU, ResnetBlock, Upsample

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
