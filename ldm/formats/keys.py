"""The names of weights in a single file, beside ours: tables that read in both directions.

A folder of diffusers holds each part by itself, under the names that our modules have. A single file, as
CompVis' and AUTOMATIC1111's programs write it, holds all parts, each with a prefix, under the names of
CompVis' modules, which number blocks differently. A table pairs beginnings of names that end at a dot or at
the end of the name; what follows is the same on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoencoder.vae import AutoencoderKLConfig
from ldm.model.architecture import UNetConfig
from text_encoder.clip import CLIPTextConfig

Table = Mapping[str, str]  # beginnings of our names, to those of the single file

UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.model.",
)
PARTS = ("unet", "vae", "text_encoder")

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# q, k and v are one tensor there, see tensors.py
CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn.in_proj.weight": "attn.in_proj_weight",
    "self_attn.in_proj.bias": "attn.in_proj_bias",
}
UNET_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


def under(ours: str, theirs: str, inner: Table) -> dict[str, str]:
    """The entries of a module's table, for the module of these names."""
    return {f"{ours}.{one}": f"{theirs}.{other}" for one, other in inner.items()}


def rename(name: str, table: Table) -> str:
    """The name with its longest beginning in the table replaced. Raises KeyError if it has none there."""
    head, tail = name, ""
    while head not in table:
        head, dot, last = head.rpartition(".")
        if not dot:
            raise KeyError(name)
        tail = f".{last}{tail}"
    return table[head] + tail


def inverse(table: Table) -> dict[str, str]:
    """The table that leads back."""
    back = {other: one for one, other in table.items()}
    assert len(back) == len(table), "two names became one"
    return back


def unet_table(config: UNetConfig) -> dict[str, str]:
    """CompVis' names: each resnet with its attention is one of input_blocks or output_blocks.

    Raises ValueError for a block or a middle that their UNet does not have.
    """
    kinds = {*config.down_block_types, *config.up_block_types}
    if unknown := sorted(kinds - set(UNET_BLOCKS)):
        raise ValueError(f"a single file has no names for a {unknown[0]}: only for {', '.join(UNET_BLOCKS)}")
    if config.mid_block_type != "UNetMidBlock2DCrossAttn":
        raise ValueError(f"a single file has no names for mid_block_type={config.mid_block_type!r}")
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "add_embedding": "add_embedding",  # GLIDE's pooled text, which CompVis' programs do not have, ...
        "time_embedding.cond_proj": "time_embedding.cond_proj",  # ... nor a distilled model's guidance
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        **under("mid_block.resnets.0", "middle_block.0", UNET_RESNET),
        **under("mid_block.resnets.1", "middle_block.2", UNET_RESNET),
    }
    counts, number = config.per_level("layers_per_block"), 0
    for level, count in enumerate(counts):
        for layer in range(count):
            number += 1
            block, theirs = f"down_blocks.{level}", f"input_blocks.{number}"
            table |= under(f"{block}.resnets.{layer}", f"{theirs}.0", UNET_RESNET)
            if config.down_block_types[level].startswith("Cross"):
                table[f"{block}.attentions.{layer}"] = f"{theirs}.1"
        if level < len(counts) - 1:
            number += 1
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    number = 0
    for level, count in enumerate(reversed(counts)):
        attends = config.up_block_types[level].startswith("Cross")
        for layer in range(count + 1):
            block, theirs = f"up_blocks.{level}", f"output_blocks.{number}"
            table |= under(f"{block}.resnets.{layer}", f"{theirs}.0", UNET_RESNET)
            if attends:
                table[f"{block}.attentions.{layer}"] = f"{theirs}.1"
            number += 1
        if level < len(counts) - 1:  # behind the last resnet of the level, and its attention
            place = 2 if attends else 1
            table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return table


def vae_table(config: AutoencoderKLConfig) -> dict[str, str]:
    """CompVis' names: the levels of the decoder are numbered from the largest image."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    last = len(config.block_out_channels) - 1
    for half in ("encoder", "decoder"):
        table |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.conv_norm_out": f"{half}.norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
            **under(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", VAE_RESNET),
            **under(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", VAE_RESNET),
            **under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION),
        }
    for level in range(last + 1):
        for half, way, number, resize, count in (
            ("encoder", "down", level, "downsample", config.layers_per_block),
            ("decoder", "up", last - level, "upsample", config.layers_per_block + 1),
        ):
            block, theirs = f"{half}.{way}_blocks.{level}", f"{half}.{way}.{number}"
            for layer in range(count):
                table |= under(f"{block}.resnets.{layer}", f"{theirs}.block.{layer}", VAE_RESNET)
                table |= under(f"{block}.attentions.{layer}", f"{theirs}.attn.{layer}", VAE_ATTENTION)
            table[f"{block}.{resize}rs.0.conv"] = f"{theirs}.{resize}.conv"
    return table


def is_open_clip(config: CLIPTextConfig) -> bool:
    """Whether the text encoder is one of OpenCLIP, as in SD 2: they compute gelu itself."""
    return config.hidden_act == "gelu"


def clip_table(config: CLIPTextConfig) -> dict[str, str]:
    """The names of OpenCLIP's text transformer, or for OpenAI's those of transformers, which are ours."""
    if not is_open_clip(config):
        return {name: name for name in ("embeddings", "encoder", "final_layer_norm")}
    table = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    for layer in range(config.num_hidden_layers):
        table |= under(f"encoder.layers.{layer}", f"transformer.resblocks.{layer}", CLIP_LAYER)
    return table


def part_table(part: str, config: Any) -> tuple[str, dict[str, str]]:
    """What stands before a part's names in a single file, and its table. config: of the part's class."""
    if part == "unet":
        return UNET, unet_table(config)
    if part == "vae":
        return VAE, vae_table(config)
    return OPEN_CLIP if is_open_clip(config) else CLIP, clip_table(config)


def ema_name(name: str) -> str:
    """Where CompVis' trainer keeps the average of a weight of the UNet: its name without dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
