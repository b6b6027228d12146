"""The KL autoencoder of Stable Diffusion.

Config keys and parameter names are those of diffusers' AutoencoderKL: they are the field's file format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from autoencoder import tiling
from autoencoder.architecture import AutoencoderKLConfig, Decoder, Encoder
from autoencoder.layers import AttentionBlock, ResnetBlock, recompute, rename_attention


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
