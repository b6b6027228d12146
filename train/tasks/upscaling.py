"""The upscaler of a cascade as a task of `fit`: pictures in, a pipeline out that enlarges small ones.

Everything is made as it is needed: a crop of a picture, its latents by the frozen autoencoder of a pipeline,
and the small picture, of which every pixel is the mean of those that become one latent.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL, rescaled
from ldm.diffusion.noise import generator
from ldm.diffusion.objective import WEIGHTS, diffusion_loss, stratified_timesteps
from ldm.diffusion.scheduler import Scheduler
from ldm.files.checkpoint import empty_model, load_model
from ldm.formats.kinds import KINDS, MAX_NOISE_LEVEL
from ldm.model.unet import UNet, UNetConfig, seeing
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from ldm.upscaling import STOCK_SCALE, LatentUpscalePipeline, bundled_folder, noised
from train.batches.latents import autoencoder_folder
from train.batches.plan import Draw, fixed_draws, normal, spread, uniform
from train.config import to_mapping
from train.data.captions import Captions, chances, every
from train.data.pictures import grid, to_images
from train.data.sources import DataConfig
from train.data.squares import Squares
from train.fit.checkpoint import weights_sha256
from train.fit.state import FitConfig
from train.tasks.denoising import frozen, frozen_latents
from train.tasks.models import named_folder

LEVELS = 4  # timesteps of a validation
SHOWN = 4  # pictures of a preview


@dataclass(frozen=True, kw_only=True)
class UpscalerRecipe(FitConfig):
    """Training of an upscaler, the second stage of a cascade."""

    model: str = "bundled"  # pipeline whose autoencoder and text encoder it uses: folder, hub id, bundled
    autoencoder: str | None = None  # another, whose cells are as many pixels as it enlarges; or bundled
    data: DataConfig = field(default_factory=DataConfig)
    crop: int = 128  # pixels a side of what a step sees of each picture of data.size
    max_noise_level: int = MAX_NOISE_LEVEL  # of the small pictures: levels from 0 to below this one, of 1000
    unet: UNetConfig
    prediction: Literal["v", "eps", "x0"] = "v"  # what the UNet predicts
    zero_terminal_snr: bool = True  # the noisiest latents are pure noise; not with eps
    weight: str | None = None  # of the loss, by the noise level: a name in WEIGHTS; null: min_snr
    timestep_shift: float = 1.0  # of the timesteps drawn; below 1: less noise, which small latents want
    caption_dropout: float = 0.1  # of the samples get the empty prompt, which guidance needs
    export_dtype: Literal["float32", "float16"] = "float32"  # in which the exported weights are stored
    sampling: Defaults = field(default_factory=lambda: Defaults(num_inference_steps=10, guidance_scale=1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.check_squares("an upscaler")
        if self.data.crops != 1:
            raise ValueError(
                f"data.crops={self.data.crops} has no effect: an upscaler sees another crop of a picture in "
                "every step, of `crop` pixels; leave it out"
            )
        if not 1 <= self.crop <= self.data.size:
            raise ValueError(f"crop={self.crop}: expected 1 to data.size={self.data.size} pixels")
        if not 1 <= self.max_noise_level <= 1000:
            raise ValueError(f"max_noise_level={self.max_noise_level}: expected 1 to 1000; 350 is usual")
        classes = self.unet.num_class_embeds
        if classes is None or classes < self.max_noise_level:
            raise ValueError(
                f"unet.num_class_embeds={classes}: expected max_noise_level={self.max_noise_level} or more, "
                "as the UNet is told the level as a class"
            )
        if self.prediction == "eps" and self.zero_terminal_snr:
            raise ValueError("prediction=eps with zero_terminal_snr: pure noise tells nothing, use v")
        if self.weight is not None and self.weight not in WEIGHTS:
            raise ValueError(f"weight={self.weight!r} is not one of {', '.join(WEIGHTS)}")
        if not 0.01 <= self.timestep_shift <= 100:
            raise ValueError(f"timestep_shift={self.timestep_shift}: expected 0.01 to 100; 1 is even")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout}: a fraction lies between 0 and 1")
        empty_model(UNet, self.unet)  # what does not fit is found out before anything is read


def other_autoencoder(path: str) -> AutoencoderKL:
    """The one that a recipe names, or the bundled upscaler's. Raises ValueError if there is none."""
    folder = bundled_folder() if path == "bundled" else Path(path)
    return load_model(AutoencoderKL, autoencoder_folder(folder)).float()


class SuperResolution(nn.Module):
    """UNet and loss in one forward. What makes latents and contexts is called, and is no part of it."""

    def __init__(self, pipe: LatentUpscalePipeline, weight: str) -> None:
        super().__init__()
        self.unet, self.weight = pipe.unet, WEIGHTS[weight]
        self.low_res, self.schedule = pipe.low_res_scheduler.schedule, pipe.scheduler.schedule
        self.kind, self.factor = pipe.scheduler.prediction, pipe.vae.downsample_factor
        self.to_latents, self.encode = frozen_latents(pipe.vae), frozen(pipe.text_encoder)

    def forward(
        self,
        image: Tensor,
        posterior: Tensor,
        noise: Tensor,
        t: Tensor,
        low_res_noise: Tensor,
        noise_level: Tensor,
        tokens: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,). image: (B, 3, H, W) in [-1, 1]; posterior, noise: (B, C, h, w), low_res_noise:
        (B, 3, h, w), standard normal; t, noise_level: (B,) int64; tokens: (B, N) or in chunks (B, K, N)."""
        x0 = self.to_latents(image, posterior)
        small = shrunk(image, self.factor)
        seen = noised(small, low_res_noise, noise_level, self.low_res)
        unet = seeing(partial(self.unet, class_labels=noise_level), seen)
        context = self.encode(tokens)
        return diffusion_loss(unet, self.schedule, x0, context, self.kind, noise, t, self.weight), {}


def shrunk(image: Tensor, factor: int) -> Tensor:
    """Pictures (B, 3, H, W) with a pixel for each latent: the mean of those that it stands for."""
    return F.avg_pool2d(image, factor)


class Upscaling:
    """Trains a UNet to enlarge pictures, beside the autoencoder and text encoder of a pipeline."""

    def __init__(self, recipe: UpscalerRecipe) -> None:
        self.recipe, self.squares = recipe, Squares(recipe.data)
        self.buckets = [range(len(self.squares))]
        model = LatentDiffusionPipeline.from_pretrained(named_folder(recipe.model), dtype=torch.float32)
        vae = model.vae if recipe.autoencoder is None else other_autoencoder(recipe.autoencoder)
        torch.manual_seed(recipe.seed)  # initial weights
        self.pipe = LatentUpscalePipeline(
            vae=rescaled(vae, STOCK_SCALE),  # what stock diffusers takes it for
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=UNet(recipe.unet),
            low_res_scheduler=Scheduler.from_config(KINDS["sd2-x4"].low_res_scheduler or {}),
            scheduler=Scheduler.default(recipe.prediction, recipe.zero_terminal_snr),
            max_noise_level=recipe.max_noise_level,
            defaults=recipe.sampling,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.factor = self.pipe.vae.downsample_factor
        for name, side in (("crop", recipe.crop), ("data.size", recipe.data.size)):
            if side % self.factor:
                raise ValueError(
                    f"{name}={side} is not a multiple of {self.factor}, the model's downsampling"
                )
        self.module: nn.Module = SuperResolution(self.pipe, recipe.weight or "min_snr")
        self.facts: Mapping[str, Any] = {
            "data": self.squares.source.description,
            "crop": recipe.crop,
            "flip": recipe.data.flip,
            "model": {
                "vae": weights_sha256(vae.state_dict()),
                "text_encoder": weights_sha256(model.text_encoder.state_dict()),
            },
            "unet": to_mapping(recipe.unet),
            "objective": [
                *(recipe.prediction, recipe.zero_terminal_snr, recipe.weight, recipe.timestep_shift),
                *(recipe.caption_dropout, recipe.max_noise_level),
            ],
        }

    def contents(self) -> Mapping[str, str]:
        return self.squares.source.contents()

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """What SuperResolution takes in this step: each a function of the draws alone."""
        u = float(torch.rand((), dtype=torch.float64, generator=generator("t", draws[0].seed, draws[0].step)))
        count, T = draws[0].count, len(self.pipe.scheduler.schedule.alpha)
        t = stratified_timesteps(count, T, u, self.recipe.timestep_shift)
        return {**self.seen(draws), "t": t[[draw.position for draw in draws]]}

    def seen(self, draws: list[Draw], dropout: float | None = None) -> dict[str, Tensor]:
        """The same without the timesteps. dropout: of captions; None: the recipe's."""
        crops, texts = zip(*(self.crop(draw) for draw in draws), strict=True)
        lost = (
            uniform(draws, "drop") < (self.recipe.caption_dropout if dropout is None else dropout)
        ).tolist()
        image = torch.stack(crops)
        cells = (image.shape[2] // self.factor, image.shape[3] // self.factor)
        shape = (self.pipe.vae.config.latent_channels, *cells)
        return {
            "image": image,
            "posterior": normal(draws, shape, "posterior"),
            "noise": normal(draws, shape, "noise"),
            "low_res_noise": normal(draws, (3, *cells), "low resolution"),
            "noise_level": (uniform(draws, "noise level") * self.recipe.max_noise_level).long(),
            "tokens": self.pipe.tokenizer(
                ["" if gone else text for text, gone in zip(texts, lost, strict=True)]
            ),
        }

    def crop(self, draw: Draw) -> tuple[Tensor, str]:
        """A square of a picture, (3, H, W), whose corner lies on the grid of latents, and a caption."""
        image, captions = self.squares.captioned(draw.index)
        x, y, which, mirrored = torch.rand(4, dtype=torch.float64, generator=draw.generator("crop")).tolist()
        side, places = self.recipe.crop, (image.shape[1] - self.recipe.crop) // self.factor + 1
        left, top = (int(part * places) * self.factor for part in (x, y))
        image = image[:, top : top + side, left : left + side]
        image = image.flip(2) if self.recipe.data.flip and mirrored < 0.5 else image
        return image, chosen(captions, self.recipe.data, which)

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The loss at each of LEVELS timesteps, on crops that are always the same, and their mean."""
        device, T = next(self.pipe.unet.parameters()).device, len(self.pipe.scheduler.schedule.alpha)
        timesteps = [int(T * (k + 0.5) / LEVELS) for k in range(LEVELS)]
        totals, count = dict.fromkeys(timesteps, 0.0), sum(map(len, buckets))
        for draws in fixed_draws(buckets):
            seen = {name: value.to(device) for name, value in self.seen(draws, dropout=0.0).items()}
            for t in timesteps:
                loss, _ = self.module(**seen, t=torch.full((len(draws),), t, device=device))
                totals[t] += loss.sum().item() / count
        named = {f"loss_t{t:03d}": loss for t, loss in totals.items()}
        return {"loss": sum(named.values()) / LEVELS, **named}

    def pipeline(self) -> LatentUpscalePipeline:
        """The pipeline around the weights as they are now."""
        return self.pipe.to(next(self.pipe.unet.parameters()).device)

    def preview(self) -> Image.Image:
        """Small pictures, below each what the upscaler makes of it, and below that the picture it was."""
        chosen_ones = [self.squares.captioned(index) for index in spread(len(self.squares), SHOWN)]
        truth = torch.stack([image for image, _ in chosen_ones])
        small = shrunk(truth, self.factor)
        prompts = [every(captions)[0] for _, captions in chosen_ones]
        enlarged = self.pipeline()(prompts, small / 2 + 0.5, seed=0, output_type="pt").images
        plain = F.interpolate(small, truth.shape[2:], mode="nearest")
        rows = torch.cat([plain, enlarged.cpu() * 2 - 1, truth])
        return grid(to_images(rows), columns=len(truth))

    def export(self, folder: Path) -> None:
        """The whole pipeline, in the layout that stock diffusers reads."""
        self.pipeline().save_pretrained(folder)
        if self.recipe.export_dtype != "float32":
            # read again, so that the weights in training stay as they are
            dtype = getattr(torch, self.recipe.export_dtype)
            LatentUpscalePipeline.from_pretrained(folder, dtype=dtype).save_pretrained(folder)


def chosen(captions: Captions, data: DataConfig, which: float) -> str:
    """The caption that `which`, from 0 to below 1, falls on, by the weights of data.captions."""
    texts, weights = every(captions), data.captions or dict.fromkeys(captions, 1.0)
    return texts[min(bisect(chances(captions, weights), which), len(texts) - 1)]
