"""The UNet of Stable Diffusion 1, 2 and XL and of ADM, with the config keys and parameter names of diffusers'
UNet2DConditionModel: they are the field's file format.

A configuration chooses parts when the UNet is built, in ldm/model/architecture.py. The forward pass is then
the same few lines for all of them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from autoencoder.layers import AttentionBlock, GroupNormSiLU, ResnetBlock, recompute, rename_attention
from ldm.model.architecture import ADDED, MID_BLOCKS, UNetConfig, down_blocks, time_embedding, up_blocks
from ldm.model.attention import CrossAttention, SelfAttentionBlock, SpatialTransformer, check_backend
from ldm.model.blocks import ClassEmbedding, NoClasses, timestep_embedding
from ldm.model.compiled import compile_in_training
from ldm.model.context import Context, Predict, repeated


def check_rows(xt: Tensor, **others: Tensor | Context | None) -> None:
    """Raises ValueError, naming which, unless each of the others has one row or a multiple of xt's rows."""
    for name, other in others.items():
        if other is not None and len(other) > 1 and len(other) % len(xt):
            raise ValueError(
                f"{name} has {len(other)} rows and xt has {len(xt)}: expected as many, or a multiple of them"
            )


def seeing(unet: Predict, beside: Tensor | None) -> Predict:
    """The UNet as it sees further channels beside xt, if any (Rombach et al. 2022, section 3.3).

    beside: (B, K, h, w).
    """
    if beside is None:
        return unet

    def predict(xt: Tensor, t: Tensor, context: Tensor | Context) -> Tensor:
        return unet(torch.cat([xt, beside.to(xt)], dim=1), t, context)

    return predict


class UNet(nn.Module):
    """The denoiser of latent diffusion, (xt, t, context) -> prediction (Rombach et al. 2022, section 3.3).

    It computes in the type of its weights and answers in the type of xt.
    """

    config_class = UNetConfig
    stock_class = "UNet2DConditionModel"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, classes = config.block_out_channels[0], config.num_class_embeds
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.time_embedding = time_embedding(config)
        self.class_embedding = NoClasses() if classes is None else ClassEmbedding(classes, 4 * width)
        self.add_embedding = ADDED[config.addition_embed_type](config)
        down, skips = down_blocks(config)
        self.down_blocks = nn.ModuleList(down)
        self.mid_block = MID_BLOCKS[config.mid_block_type](config)
        self.up_blocks = nn.ModuleList(up_blocks(config, skips))
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        self.embed_time = partial(
            timestep_embedding, channels=width, cos_first=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(
        self,
        xt: Tensor,
        t: Tensor,
        context: Tensor | Context | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The model's prediction, in whatever kind it was trained on: (B, out_channels, h, w).

        xt: (B, in_channels, h, w), any h and w. t: (B,), or (1,) for all; 0 is the cleanest.
        context: (B, N, cross_attention_dim), or a Context, which tells SDXL more, may hold the labels, and
        tells a UNet with time_cond_proj_dim its guidance.
        class_labels: (B,) int64, for a UNet with num_class_embeds.
        Of k texts for every xt, (k * B, N, D) as cat([texts 1, texts 2]), come as many answers, and what does
        not depend on the text is computed once. So it is with k * B class_labels.
        Raises ValueError if class_labels is missing, or given to a UNet without classes, if SDXL or a UNet
        with time_cond_proj_dim is told too little, and if the rows of these are no multiple of xt's.
        """
        scale = context.guidance_scale if isinstance(context, Context) else None
        if class_labels is None and isinstance(context, Context):
            class_labels = context.labels
        check_rows(xt, t=t, context=context, class_labels=class_labels, guidance_scale=scale)
        context = context if context is None else context.to(self.dtype)
        temb = self.time_embedding(self.embed_time(t).to(self.dtype), scale)
        temb = self.class_embedding(temb, class_labels)
        temb = self.add_embedding(temb, context)
        skips = [repeated(self.conv_in(xt.to(self.dtype)), like=temb)]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, context)
        x = self.mid_block(skips[-1], temb, context)
        for block in self.up_blocks:
            x = block(x, skips, temb, context)
        prediction = self.conv_out(self.conv_norm_out(x)).to(xt.dtype)
        return prediction if context is None else repeated(prediction, like=context)  # where none looks at it

    def set_attention_backend(self, backend: str) -> None:
        """The backend of every attention. Raises ValueError, which says why, if it cannot run here."""
        check_backend(backend, self.conv_in.weight.device)
        for module in self.modules():
            if isinstance(module, CrossAttention | SelfAttentionBlock):
                module.backend = backend

    def enable_gradient_checkpointing(self) -> None:
        """Train with a third more compute and the activations of one resnet or transformer at a time."""
        for module in self.modules():
            if isinstance(module, ResnetBlock | AttentionBlock | SpatialTransformer):
                recompute(module)

    def compile_blocks(self, shapes: int = 1, backend: str = "inductor") -> None:
        """Train with every resnet and transformer compiled, anew for each of so many shapes of latents.

        Names and parameters stay as they are, and so does drawing, whose sizes change with every call. After
        enable_gradient_checkpointing, where both are wanted.
        """
        kinds = ResnetBlock | AttentionBlock | SpatialTransformer
        compile_in_training([part for part in self.modules() if isinstance(part, kinds)], shapes, backend)

    @staticmethod
    def rename_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old names of the attention layers to today's."""
        return rename_attention(state_dict)
