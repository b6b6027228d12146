"""What a configuration makes of the UNet: its keys, and the parts that each of them chooses.

The keys are those of diffusers' UNet2DConditionModel: the field's file format. They choose when the UNet is
built: the kind of resnet, the attention of each level, the way a level changes size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import nn

from autoencoder.layers import Downsample, Upsample
from ldm.model.attention import ConvSpatialTransformer, NoAttention, SelfAttentionBlock, SpatialTransformer
from ldm.model.blocks import (
    DownBlock,
    GuidedTimeEmbedding,
    MidBlock,
    NoMidBlock,
    NoPooledText,
    PooledText,
    Resample,
    ScaleShiftResnet,
    TextAndSizes,
    TimeEmbedding,
    TimeResnet,
    UpBlock,
    enlarge,
    halve,
    keep,
    timestep_embedding,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The keys of diffusers' UNet2DConditionModel that we implement, with its defaults.

    "per level" keys take one value for all levels, or one for each, largest latents first.
    """

    sample_size: int | tuple[int, int] | None = None  # latents; a note, any size works
    in_channels: int = 4
    out_channels: int = 4  # twice in_channels where the variance is learned (Nichol & Dhariwal 2021)
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)  # largest first
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3  # smallest first
    only_cross_attention: bool | tuple[bool, ...] = False  # per level; the middle never
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # largest first
    layers_per_block: int | tuple[int, ...] = 2  # per level; resnets on the way down, one more on the way up
    downsample_padding: int = 1
    dropout: float = 0.0  # in the resnets
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280  # channels of the context
    transformer_layers_per_block: int | tuple[int, ...] = 1  # per level
    attention_head_dim: int | tuple[int, ...] = 8  # per level; the *number* of heads: see cross_attention
    use_linear_projection: bool = False
    num_class_embeds: int | None = None  # classes, or noise levels of an upscaler
    addition_embed_type: str | None = (
        None  # "text": it also acts as one vector; "text_time": with sizes, SDXL
    )
    addition_embed_type_num_heads: int = 64  # of the attention that pools it, with "text"
    addition_time_embed_dim: int | None = None  # channels of each of the six sizes, with "text_time"
    projection_class_embeddings_input_dim: int | None = None  # of the vector: the pooled text and the sizes
    time_cond_proj_dim: int | None = None  # channels in which it is told the guidance it answers with
    upcast_attention: bool | None = (
        False  # no effect: our kernels sum in float32 whatever the type of q and k
    )
    resnet_time_scale_shift: str = "default"  # "scale_shift": ADM's adaptive group norm

    NEUTRAL: ClassVar[dict[str, object]] = {
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
    }
    PER_LEVEL: ClassVar[tuple[str, ...]] = (
        "only_cross_attention",
        "layers_per_block",
        "transformer_layers_per_block",
        "attention_head_dim",
    )

    def __post_init__(self) -> None:
        for key in ("down_block_types", "up_block_types", "block_out_channels", *self.PER_LEVEL):
            if isinstance(getattr(self, key), list):  # JSON has no tuples
                object.__setattr__(self, key, tuple(getattr(self, key)))
        levels = len(self.block_out_channels)
        for key in ("down_block_types", "up_block_types", *self.PER_LEVEL):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"{key}={value}: block_out_channels has {levels} levels, give a value for each"
                )
        for key, names, known in (
            ("down_block_types", self.down_block_types, DOWN_BLOCKS),
            ("mid_block_type", (self.mid_block_type,), MID_BLOCKS),
            ("up_block_types", self.up_block_types, UP_BLOCKS),
            ("resnet_time_scale_shift", (self.resnet_time_scale_shift,), RESNETS),
            ("addition_embed_type", (self.addition_embed_type,), ADDED),
            ("act_fn", (self.act_fn,), ("silu", "swish")),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{key}: {name!r} is not one of {', '.join(map(str, known))}")
        if not isinstance(self.cross_attention_dim, int):
            raise ValueError(
                f"cross_attention_dim={self.cross_attention_dim!r}: expected one number for all levels"
            )
        sizes = ("in_channels", "out_channels", "cross_attention_dim", "norm_num_groups")
        heads = "addition_embed_type_num_heads"
        for key in (*sizes, heads, "block_out_channels", *self.PER_LEVEL[1:]):  # but only_cross_attention
            value = getattr(self, key)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{key}={value}: expected at least 1")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels={self.block_out_channels}: {channels} is not a multiple of "
                    f"norm_num_groups={self.norm_num_groups}"
                )
        check_added(self)

    @property
    def learns_variance(self) -> bool:
        """Whether the UNet also says how sure it is (Nichol & Dhariwal 2021), in half of its channels."""
        return self.out_channels == 2 * self.in_channels

    @property
    def pooled_channels(self) -> int:
        """Of the whole text's vector that "text_time" takes: what six sizes leave; 0 without."""
        return (self.projection_class_embeddings_input_dim or 0) - 6 * (self.addition_time_embed_dim or 0)

    def per_level(self, key: str) -> tuple[Any, ...]:
        """The value of a "per level" key for each level, largest latents first."""
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def check_added(config: UNetConfig) -> None:
    """Raises ValueError unless the keys of what is told beside t and tokens can be, and fit each other."""
    kind, size = config.addition_embed_type, config.addition_time_embed_dim
    vector, heads = config.projection_class_embeddings_input_dim, config.addition_embed_type_num_heads
    if config.time_cond_proj_dim is not None and config.time_cond_proj_dim < 4:
        raise ValueError(f"time_cond_proj_dim={config.time_cond_proj_dim}: expected 4 or more; 256 is usual")
    if kind == "text" and config.cross_attention_dim % heads:
        raise ValueError(
            f"addition_embed_type_num_heads={heads} does not divide "
            f"cross_attention_dim={config.cross_attention_dim}"
        )
    if kind == "text_time" and ((size or 0) < 1 or config.pooled_channels < 1):
        raise ValueError(
            f"addition_time_embed_dim={size} and projection_class_embeddings_input_dim={vector}: expected a "
            "number for each size, and more than six of them together; SDXL has 256 and 2816"
        )
    for key, value in (("addition_time_embed_dim", size), ("projection_class_embeddings_input_dim", vector)):
        if kind != "text_time" and value is not None:
            raise ValueError(
                f"{key}={value!r} is not supported here, only with addition_embed_type=text_time"
            )


def head_dim(config: UNetConfig, channels: int, level: int) -> int:
    """attention_head_dim of a level. Raises ValueError if it does not divide the level's channels."""
    value = config.per_level("attention_head_dim")[level]
    if channels % value:
        raise ValueError(f"attention_head_dim={value}: {channels} channels of a level are no multiple of it")
    return value


def no_attention(config: UNetConfig, channels: int, level: int) -> nn.Module:
    return NoAttention()


def self_attention(config: UNetConfig, channels: int, level: int) -> nn.Module:
    """Here alone attention_head_dim is what it says: the channels of a head."""
    heads = channels // head_dim(config, channels, level)
    return SelfAttentionBlock(channels, heads=heads, groups=config.norm_num_groups, eps=config.norm_eps)


def cross_attention(config: UNetConfig, channels: int, level: int) -> nn.Module:
    """Here attention_head_dim is the *number* of heads: a misnomer that every published config depends on.

    Stable Diffusion 1 has 8 heads of 40 to 160 channels; Stable Diffusion 2 has 5, 10, 20, 20 heads of 64.
    """
    transformer = SpatialTransformer if config.use_linear_projection else ConvSpatialTransformer
    return transformer(
        channels,
        config.cross_attention_dim,
        heads=head_dim(config, channels, level),
        layers=config.per_level("transformer_layers_per_block")[level],
        groups=config.norm_num_groups,
        only_cross_attention=config.per_level("only_cross_attention")[level],
    )


RESNETS: dict[str, type[TimeResnet]] = {"default": TimeResnet, "scale_shift": ScaleShiftResnet}


def resnet(config: UNetConfig, in_channels: int, out_channels: int, resample: Resample = keep) -> TimeResnet:
    """The resnet of this configuration."""
    return RESNETS[config.resnet_time_scale_shift](
        in_channels,
        out_channels,
        temb_channels=4 * config.block_out_channels[0],
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        drop=config.dropout,
        resample=resample,
    )


class Kind(NamedTuple):
    """What a block type is made of: its attention, and how it changes the size at its end."""

    attention: Callable[[UNetConfig, int, int], nn.Module]
    resize: Callable[[UNetConfig, int], nn.Module]


def conv_down(config: UNetConfig, channels: int) -> nn.Module:
    return Downsample(channels, padding=config.downsample_padding)


def resnet_down(config: UNetConfig, channels: int) -> nn.Module:
    return resnet(config, channels, channels, resample=halve)


def conv_up(config: UNetConfig, channels: int) -> nn.Module:
    return Upsample(channels)


def resnet_up(config: UNetConfig, channels: int) -> nn.Module:
    return resnet(config, channels, channels, resample=enlarge)


DOWN_BLOCKS = {
    "DownBlock2D": Kind(no_attention, conv_down),
    "AttnDownBlock2D": Kind(self_attention, conv_down),
    "CrossAttnDownBlock2D": Kind(cross_attention, conv_down),
    "ResnetDownsampleBlock2D": Kind(no_attention, resnet_down),
}
UP_BLOCKS = {
    "UpBlock2D": Kind(no_attention, conv_up),
    "AttnUpBlock2D": Kind(self_attention, conv_up),
    "CrossAttnUpBlock2D": Kind(cross_attention, conv_up),
    "ResnetUpsampleBlock2D": Kind(no_attention, resnet_up),
}


def cross_attention_mid(config: UNetConfig) -> nn.Module:
    channels = config.block_out_channels[-1]
    transformer = cross_attention(replace(config, only_cross_attention=False), channels, level=-1)
    return MidBlock([resnet(config, channels, channels) for _ in range(2)], [transformer])


def resnet_mid(config: UNetConfig) -> nn.Module:
    channels = config.block_out_channels[-1]
    return MidBlock([resnet(config, channels, channels)], [])


def no_mid(config: UNetConfig) -> nn.Module:
    return NoMidBlock()


MID_BLOCKS = {"UNetMidBlock2DCrossAttn": cross_attention_mid, "UNetMidBlock2D": resnet_mid, None: no_mid}


def time_embedding(config: UNetConfig) -> TimeEmbedding:
    width, told = config.block_out_channels[0], config.time_cond_proj_dim
    return TimeEmbedding(width, 4 * width) if told is None else GuidedTimeEmbedding(width, 4 * width, told)


def no_pooled_text(config: UNetConfig) -> nn.Module:
    return NoPooledText()


def pooled_text(config: UNetConfig) -> nn.Module:
    width, heads = config.cross_attention_dim, config.addition_embed_type_num_heads
    return PooledText(width, 4 * config.block_out_channels[0], heads=heads)


def text_and_sizes(config: UNetConfig) -> nn.Module:
    size = config.addition_time_embed_dim or 0
    embed = partial(
        timestep_embedding, channels=size, cos_first=config.flip_sin_to_cos, freq_shift=config.freq_shift
    )
    return TextAndSizes(config.pooled_channels, size, 4 * config.block_out_channels[0], embed=embed)


ADDED = {None: no_pooled_text, "text": pooled_text, "text_time": text_and_sizes}  # to the time's embedding


def down_blocks(config: UNetConfig) -> tuple[list[DownBlock], list[int]]:
    """The levels on the way down, and the channels of every result they keep for the way up."""
    x, last = config.block_out_channels[0], len(config.block_out_channels) - 1
    blocks, skips = [], [x]  # the first skip is conv_in's
    for level, out in enumerate(config.block_out_channels):
        kind, count = DOWN_BLOCKS[config.down_block_types[level]], config.per_level("layers_per_block")[level]
        resnets = [resnet(config, x if i == 0 else out, out) for i in range(count)]
        attentions = [kind.attention(config, out, level) for _ in range(count)]
        resize = [kind.resize(config, out)] if level < last else []
        blocks.append(DownBlock(resnets, attentions, resize))
        skips += [out] * (count + len(resize))
        x = out
    return blocks, skips


def up_blocks(config: UNetConfig, skips: list[int]) -> list[UpBlock]:
    """The levels on the way up. skips: what down_blocks kept; emptied from its end, as in UpBlock.forward."""
    x, blocks = config.block_out_channels[-1], []
    for index, level in enumerate(reversed(range(len(config.block_out_channels)))):
        kind, out = UP_BLOCKS[config.up_block_types[index]], config.block_out_channels[level]
        count = config.per_level("layers_per_block")[level] + 1
        # the reference reverses the number of heads on the way up, but not the channels of a head
        attention_level = index if kind.attention is self_attention else level
        resnets = [resnet(config, (x if i == 0 else out) + skips.pop(), out) for i in range(count)]
        attentions = [kind.attention(config, out, attention_level) for _ in range(count)]
        blocks.append(UpBlock(resnets, attentions, [kind.resize(config, out)] if level > 0 else []))
        x = out
    return blocks
