"""The models that are measured: random weights at the sizes of Stable Diffusion, or tiny ones for a check.

All sides of a bench read the same folder, which stock diffusers reads too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.diffusion.scheduler import Scheduler
from ldm.model.unet import UNet, UNetConfig
from ldm.pipeline import LatentDiffusionPipeline
from train.tasks.text import TextConfig, build_text_encoder

PROMPT = "a red fox in snow"


class Size(NamedTuple):
    """The three models of a pipeline. The text encoder's vocabulary is small: it costs no time."""

    unet: UNetConfig
    vae: AutoencoderKLConfig
    text: TextConfig


VAE = AutoencoderKLConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)
SD1 = Size(  # CLIP ViT-L/14
    UNetConfig(sample_size=64, cross_attention_dim=768), VAE, TextConfig(width=768, layers=12, heads=12)
)
SD2 = Size(  # OpenCLIP ViT-H/14 without its last layer
    UNetConfig(
        sample_size=64,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),  # the numbers of heads, of 64 channels each
        use_linear_projection=True,
    ),
    VAE,
    TextConfig(width=1024, layers=23, heads=16),
)


def narrower(size: Size, channels: tuple[int, ...]) -> Size:
    """The same with a UNet of these channels a level, and an autoencoder and text encoder as small."""
    levels, width = len(channels), 128
    unet = replace(
        size.unet,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=width,
        attention_head_dim=4,
    )
    vae = replace(size.vae, block_out_channels=(32, 64, 128, 128))
    return Size(unet, vae, TextConfig(width=width, layers=4, heads=4, vocab_size=1024))


def write_pipeline(size: Size, folder: Path) -> None:
    """A pipeline of this size with random weights, in float32, as a folder that both sides read."""
    torch.manual_seed(0)
    encoder, tokenizer = build_text_encoder(size.text, [[PROMPT, PROMPT]])
    pipe = LatentDiffusionPipeline(
        AutoencoderKL(size.vae).eval(),
        encoder.eval(),
        tokenizer,
        UNet(size.unet).eval(),
        Scheduler.default("eps", zero_terminal_snr=False),
    )
    pipe.save_pretrained(folder)


def unet_flop(config: UNetConfig, batch: int, pixels: int) -> int:
    """Floating-point operations of a UNet's forward for `batch` latents, two for each multiplication."""
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        shapes_only(config, batch, pixels)
    return flops.get_total_flops()


def training_flop(config: UNetConfig, batch: int, pixels: int) -> int:
    """Likewise of forward and backward."""
    with FlopCounterMode(display=False) as flops:
        shapes_only(config, batch, pixels).sum().backward()
    return flops.get_total_flops()


def shapes_only(config: UNetConfig, batch: int, pixels: int) -> torch.Tensor:
    """A UNet's answer (batch, C, h, w) without numbers, on the meta device."""
    with torch.device("meta"):
        xt = torch.empty(batch, config.in_channels, pixels // 8, pixels // 8)
        return UNet(config)(xt, torch.empty(batch), torch.empty(batch, 77, config.cross_attention_dim))
