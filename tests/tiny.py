"""A whole pipeline with random weights, small enough to draw in a fraction of a second."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.diffusion.scheduler import Scheduler
from ldm.model.unet import UNet, UNetConfig
from ldm.pipeline import LatentDiffusionPipeline
from text_encoder.clip import CLIPTextConfig, CLIPTextEncoder, ProjectedTextEncoder
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


def tiny_xl_pipeline(seed: int = 0, **changes: Any) -> LatentDiffusionPipeline:
    """The same as an SDXL: two text encoders of different widths and padding, a UNet of three levels.

    changes: arguments of the pipeline that differ.
    """
    small = tiny_pipeline(seed)
    tokens = small.tokenizer
    padded = Tokenizer(tokens.vocab, tokens.merges, pad="!", max_length=tokens.max_length)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        text_encoder_2 = ProjectedTextEncoder(
            replace(
                small.text_encoder.config,
                hidden_size=32,
                num_hidden_layers=3,
                hidden_act="gelu",
                projection_dim=20,
            )
        )
        unet = UNet(
            UNetConfig(
                sample_size=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(16, 32, 64),
                layers_per_block=1,
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(1, 2, 4),
                cross_attention_dim=24 + 32,
                norm_num_groups=8,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 20,
            )
        )
    parts = small.components | {
        "text_encoder_2": text_encoder_2.eval(),
        "tokenizer_2": padded,
        "unet": unet.eval(),
        "scheduler": Scheduler.from_config(
            SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
        ),
    }
    return LatentDiffusionPipeline(**parts | changes)
