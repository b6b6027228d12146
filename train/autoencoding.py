"""The autoencoder as a task of `fit`: pictures in, pictures out, and a latent scale measured at the end."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from autoencoder.loss import ReconstructionConfig, reconstruction_loss
from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.checkpoint import empty_model, load_model, save_model
from train.buckets import Size, View, frame, views
from train.config import to_mapping
from train.data import DataConfig, Source, open_source
from train.latents import autoencoder_folder
from train.pictures import grid, tell_rejected, to_images, to_tensor
from train.plan import Draw, choose, fixed_draws, normal, spread, uniform
from train.state import FitConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(FitConfig):
    """Training of an autoencoder."""

    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderKLConfig
    gradient_checkpointing: bool = False  # much less memory for a third more time
    loss: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    start: str | None = None  # folder of a trained one to go on from; null: new weights
    train_encoder: bool = True  # false: only the decoder learns, and latents computed before stay valid
    latent_noise: float = 0.0  # of a decoder that learns alone: deviation, at most, of noise on its latents
    measured: int = 2048  # pictures over which the scale of the latents and the error are measured at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = 2 ** (len(self.model.block_out_channels) - 1)
        if self.data.size % factor:
            raise ValueError(
                f"data.size={self.data.size} is not a multiple of {factor}, the model's downsampling"
            )
        if self.loss.half_size and self.data.size % (2 * factor):
            raise ValueError(
                f"data.size={self.data.size} with loss.half_size: expected a multiple of {2 * factor}, "
                "so that half of it fits too"
            )
        if not self.train_encoder and self.start is None:
            raise ValueError("train_encoder=false needs start: the encoder of new weights knows nothing")
        if self.latent_noise < 0 or (self.latent_noise and self.train_encoder):
            raise ValueError(
                f"latent_noise={self.latent_noise}: expected 0, or more with train_encoder=false"
            )
        if self.measured < 1:
            raise ValueError(f"measured={self.measured}: expected 1 or more pictures")


class Measured(NamedTuple):
    """What is known of a trained autoencoder."""

    scaling_factor: float  # 1 / standard deviation of the latents, sampled
    psnr: float  # of the reconstruction, in dB
    noise: list[float]  # a channel: the share of the posterior's noise in the variance of the latents


class Autoencoding:
    """Trains an AutoencoderKL to give back the pictures of a source."""

    def __init__(self, recipe: AutoencoderRecipe) -> None:
        self.recipe = recipe
        self.source: Source = open_source(recipe.data)
        self.length = len(self.source)
        self.buckets = [range(self.length)]
        self.unreadable: dict[int, str] = {}  # pictures, as they are met
        torch.manual_seed(recipe.seed)  # initial weights
        self.vae = self.build()
        self.vae.encoder.requires_grad_(recipe.train_encoder)
        self.vae.quant_conv.requires_grad_(recipe.train_encoder)
        if recipe.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.module: nn.Module = Reconstruction(self.vae, recipe.loss)
        factor, size = self.vae.downsample_factor, recipe.data.size
        self.latent_shape = (recipe.model.latent_channels, size // factor, size // factor)
        self.facts: Mapping[str, Any] = {
            "data": self.source.description,
            "views": [recipe.data.crops, recipe.data.flip],
            "model": to_mapping(recipe.model),
            "loss": to_mapping(recipe.loss),
            "train_encoder": recipe.train_encoder,
            "latent_noise": recipe.latent_noise,
        }

    def build(self) -> AutoencoderKL:
        """New weights, or those of recipe.start. Raises ValueError if these are not of the recipe's model."""
        if self.recipe.start is None:
            return AutoencoderKL(self.recipe.model)
        folder = autoencoder_folder(self.recipe.start)
        vae = load_model(AutoencoderKL, folder)
        if dataclasses.replace(self.recipe.model, scaling_factor=vae.config.scaling_factor) != vae.config:
            raise ValueError(f"start: the autoencoder in {folder} is not of the recipe's model: {vae.config}")
        return vae

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        data = self.recipe.data
        every = [views(draw.index, data.crops, data.flip) for draw in draws]
        chosen = choose(draws, len(every[0]), "view")
        image = torch.stack([self.image(d.index, e[k]) for d, e, k in zip(draws, every, chosen, strict=True)])
        batch = {"image": image, "noise": normal(draws, self.latent_shape, "posterior")}
        if self.recipe.latent_noise:
            level = self.recipe.latent_noise * uniform(draws, "latent noise level").float()
            batch["added"] = level.view(-1, 1, 1, 1) * normal(draws, self.latent_shape, "latent noise")
        return batch

    def image(self, index: int, view: View = View()) -> Tensor:  # noqa: B008 (a constant)
        """One picture, a square whatever its bucket: (3, H, W). The next one if it cannot be decoded.

        Raises ValueError if too many cannot.
        """
        size, limit = self.recipe.data.size, self.recipe.data.max_bad_fraction
        while True:
            if index not in self.unreadable:
                try:
                    return to_tensor(frame(self.source[index][0], Size(size, size), view))
                except ValueError as error:
                    self.unreadable[index] = str(error)
                    named = {f"picture {one}": why for one, why in self.unreadable.items()}
                    tell_rejected(self.recipe.data.source, named, self.length, limit)
            index = (index + 1) % self.length

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The parts of the loss, and the PSNR in dB of the reconstruction through the mean."""
        totals: dict[str, float] = {}
        error = 0.0
        count = sum(map(len, buckets))
        for draws in fixed_draws(buckets):
            image = torch.stack([self.image(draw.index) for draw in draws])
            noise = normal(draws, self.latent_shape, "posterior")
            loss, parts = self.module(image.to(self.device), noise.to(self.device))
            for name, value in {"loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0.0) + value.sum().item() / count
            decoded = self.reconstruct(image).clamp(-1, 1)
            error += (decoded - image).square().mean((1, 2, 3)).sum().item() / count
        return {**totals, "psnr": decibels(error)}

    def preview(self) -> Image.Image:
        """Eight pictures and, below each, what the autoencoder makes of it."""
        image = torch.stack([self.image(index) for index in spread(self.length, 8)])
        return grid(to_images(torch.cat([image, self.reconstruct(image)])), columns=len(image))

    def reconstruct(self, image: Tensor) -> Tensor:
        """Through the mean of the posterior: (B, 3, H, W), on the CPU."""
        posterior = self.vae.encode(image.to(self.device))
        return self.vae.decode(self.vae.to_latents(posterior.mean)).float().cpu()

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def export(self, folder: Path) -> None:
        """The autoencoder with its measured scaling_factor, as a folder that stock diffusers reads."""
        measured = self.measure()
        config = dataclasses.replace(
            self.recipe.model, scaling_factor=measured.scaling_factor, shift_factor=None
        )
        if not self.recipe.train_encoder:
            config = self.vae.config  # the latents are those of before, and so is their scale
        vae = empty_model(AutoencoderKL, config)
        vae.load_state_dict(self.vae.state_dict(), assign=True)
        save_model(vae, folder)
        log.info("autoencoder: PSNR %.2f dB, scaling_factor %.4f", measured.psnr, measured.scaling_factor)
        empty = [channel for channel, share in enumerate(measured.noise) if share > 0.5]
        if empty:
            log.warning(
                "latent channels %s of %d hold next to nothing: a UNet spends its training on their noise. "
                "Lower model.latent_channels by as many, or loss.kl",
                empty,
                len(measured.noise),
            )

    def measure(self) -> Measured:
        """Over `measured` pictures. No shift: stock StableDiffusionPipeline does not know it."""
        error = pixels = values = 0.0
        totals = torch.zeros(3, self.recipe.model.latent_channels, dtype=torch.float64)
        for image in self.measured_batches():
            posterior = self.vae.encode(image.to(self.device))
            mean, std = posterior.mean.cpu().double(), posterior.std.cpu().double()
            totals += torch.stack([x.sum((0, 2, 3)) for x in (mean, mean.square(), std.square())])
            values += mean[:, 0].numel()
            decoded = self.vae.decode(self.vae.to_latents(posterior.mean)).float().cpu()
            error += (decoded.clamp(-1, 1) - image).square().sum().item()
            pixels += image.numel()
        mean, square, noise = totals / values
        std = (square.mean() + noise.mean() - mean.mean() ** 2).sqrt().item()
        return Measured(
            scaling_factor=1 / std,
            psnr=decibels(error / pixels),
            noise=(noise / (square - mean**2 + noise)).tolist(),
        )

    def measured_batches(self, size: int = 64) -> Iterator[Tensor]:
        indices = spread(self.length, self.recipe.measured)
        for start in range(0, len(indices), size):
            yield torch.stack([self.image(index) for index in indices[start : start + size]])


def decibels(error: float) -> float:
    """The PSNR in dB of a mean squared error between pictures in [-1, 1]."""
    return 10 * math.log10(4 / max(error, 1e-12))


class Reconstruction(nn.Module):
    """An autoencoder with its loss, so that wrappers which watch forward see all of it."""

    def __init__(self, vae: AutoencoderKL, config: ReconstructionConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config

    def forward(
        self, image: Tensor, noise: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,) and its parts. image: (B, 3, H, W); noise: (B, C, h, w) for the posterior.

        added: (B, C, h, w), to the scaled latents. A decoder that has seen noise draws clean pictures from
        latents that are not quite right, as a UNet's are.
        """
        posterior = self.vae.encode(image)
        latents = self.vae.to_latents(posterior.sample(noise))
        reconstruction = self.vae.decode(latents if added is None else latents + added)
        half_size = self.vae.decode(F.avg_pool2d(latents, 2)) if self.config.half_size else None
        return reconstruction_loss(reconstruction, image, posterior, self.config, half_size)
