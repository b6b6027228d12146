"""A whole pipeline with random weights, small enough to draw in a fraction of a second."""

from __future__ import annotations

from typing import Any

import torch

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.pipeline import LatentDiffusionPipeline
from ldm.scheduler import Scheduler
from ldm.unet import UNet, UNetConfig
from text_encoder.clip import CLIPTextConfig, CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer

CAPTIONS = ["a red fox in snow", "two blue cats at night", "a small green boat on a beach"] * 2
FACTOR = 2  # pixels a latent
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def tiny_pipeline(seed: int = 0, **scheduler: Any) -> LatentDiffusionPipeline:
    """A pipeline of two levels, its weights drawn from seed; 16x16 latents of 32x32 pixels by default.

    scheduler: keys of scheduler_config.json that differ from SCHEDULER.
    """
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=600, max_length=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextEncoder(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=tokenizer.start_id,
                eos_token_id=tokenizer.end_id,
            )
        )
        unet = UNet(
            UNetConfig(
                sample_size=16,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(32, 64),
                layers_per_block=1,
                cross_attention_dim=24,
                attention_head_dim=2,
                norm_num_groups=8,
            )
        )
        vae = AutoencoderKL(
            AutoencoderKLConfig(
                sample_size=32,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(32, 64),
                norm_num_groups=8,
            )
        )
    for model in (text_encoder, unet, vae):
        model.eval()
    return LatentDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, Scheduler.from_config(SCHEDULER | scheduler)
    )
