"""Super-resolution in latents: small pictures and prompts in, pictures with a latent for each pixel out.

The second stage of a cascade (Ho et al. 2022, "Cascaded diffusion models", CDM), in the format of Stable
Diffusion 2's x4 upscaler: the UNet sees the noisy latents of the large picture beside the small picture,
which has as many pixels. The small picture gets noise of a chosen level, which the UNet is told as a class:
so it trusts no detail that the first stage may have got wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm import pipeline
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.noise import generator as counted
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.solvers import SOLVERS
from ldm.drawing import inputs
from ldm.drawing.base import Drawing
from ldm.drawing.given import Pictures, rows_of
from ldm.drawing.outputs import FORMATS, OutputType, PipelineOutput
from ldm.drawing.texts import OneText
from ldm.formats import stock
from ldm.formats.kinds import MAX_NOISE_LEVEL
from ldm.model.context import Context
from ldm.model.unet import UNet, seeing
from ldm.recipes import options
from text_encoder.clip import CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer

STOCK_SCALE = 0.08333  # what diffusers' StableDiffusionUpscalePipeline takes for any scaling_factor


def noised(small: Tensor, noise: Tensor, noise_level: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Noise conditioning augmentation: alpha_s * small + sigma_s * noise (CDM, section 4.2).

    small, noise: (B, 3, h, w), in [-1, 1] and standard normal. noise_level: (B,) int64, s of the schedule.
    """
    level = schedule.at(noise_level, like=small)
    return level.alpha * small + level.sigma * noise


def small_pictures(image: Pictures | None) -> Tensor:
    """(B, 3, h, w) float32 in [-1, 1]. image: of one size, as ldm.drawing.given.rows_of takes them.

    Raises ValueError for what is none, and for several sizes.
    """
    rows = rows_of(image, "image", "RGB")  # type: ignore[arg-type]
    sizes = {(row.shape[2], row.shape[1]) for row in rows}
    if len(sizes) > 1:
        found = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ValueError(f"the images are {found}: those of a call are of one size")
    return torch.stack(rows) * 2 - 1


def low_res_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise of small pictures, (B, 3, h, w): row i is a function of seeds[i] alone. shape: (3, h, w)."""
    return torch.stack([torch.randn(*shape, generator=counted("low resolution", seed)) for seed in seeds])


def bundled_folder() -> Path:
    """Of the upscaler that comes with this package. Raises ValueError if this installation has none."""
    folder = pipeline.BUNDLED / "upscaler"
    if not folder.is_dir():
        raise ValueError(
            "this installation carries no bundled upscaler: name a folder, such as train/train_upscaler.py "
            "writes, or a hub id"
        )
    return folder


def coloured_as(large: Tensor, small: Tensor, cells: int = 8) -> Tensor:
    """The large pictures with the broad colours of the small ones, which few steps and half precision shift.

    Colours are broad as means of squares of so many of the small picture's pixels, with a smooth way between:
    finer ones stay. With wavelets it is the colour correction of StableSR (Wang et al. 2024, section 3.4).
    large: (B, 3, H, W), small: (B, 3, h, w), both in [0, 1].
    """
    coarse = [max(round(side / cells), 1) for side in small.shape[2:]]

    def broad(images: Tensor) -> Tensor:
        means = F.interpolate(images, coarse, mode="area")
        return F.interpolate(means, large.shape[2:], mode="bilinear", align_corners=False)

    return (large + broad(small.to(large)) - broad(large)).clamp(0, 1)


class LatentUpscalePipeline(Drawing):
    """Super-resolution by latent diffusion. A call changes nothing here, so threads may share a pipeline."""

    layouts = stock.UPSCALERS

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextEncoder,
        tokenizer: Tokenizer,
        unet: UNet,
        low_res_scheduler: Scheduler,
        scheduler: Scheduler,
        max_noise_level: int = MAX_NOISE_LEVEL,
        defaults: options.Defaults | None = None,
    ) -> None:
        """low_res_scheduler: its schedule is that of the small picture's noise.

        max_noise_level: the noisiest small picture that a call may ask for.
        Raises ValueError if the parts do not fit each other.
        """
        super().__init__()
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.low_res_scheduler, self.scheduler = low_res_scheduler, scheduler
        self.max_noise_level, self.defaults = max_noise_level, defaults or self.stock_defaults
        stock.check_parts(vae, self.texts, unet, shown=3)
        classes, latents = unet.config.num_class_embeds, vae.config.latent_channels
        if unet.config.out_channels != latents:
            raise ValueError(
                f"unet.out_channels={unet.config.out_channels}: expected {latents}, the latents' channels"
            )
        if classes is None:
            raise ValueError(
                "unet.num_class_embeds is null: an upscaler is told the level of noise as a class"
            )
        levels = min(classes, len(low_res_scheduler.schedule.alpha))
        if not 0 <= max_noise_level <= levels:
            raise ValueError(
                f"max_noise_level={max_noise_level}: expected 0 to {levels}, the levels that both "
                "the UNet, as classes, and low_res_scheduler know"
            )
        options.check_choice("sampler", self.defaults.sampler or scheduler.solver, SOLVERS)

    @classmethod
    def bundled(cls, *, dtype: torch.dtype | None = None) -> Self:
        """The small one that comes with this package. Raises ValueError if this installation has none."""
        return cls.from_pretrained(bundled_folder(), dtype=dtype)

    @property
    def layout(self) -> stock.Layout:
        return stock.UPSCALER

    @property
    def stock_defaults(self) -> options.Defaults:
        return options.Defaults(num_inference_steps=75, guidance_scale=9.0)

    @property
    def texts(self) -> OneText:
        return OneText(self.text_encoder, self.tokenizer)

    @property
    def noisiest(self) -> int:
        """The largest noise_level of a call: max_noise_level, as in diffusers, where there is such one."""
        classes = self.unet.config.num_class_embeds or 1
        return min(self.max_noise_level, classes - 1, len(self.low_res_scheduler.schedule.alpha) - 1)

    def to_diffusers(self) -> Any:
        """As of every pipeline. Raises ValueError where diffusers would scale the latents otherwise."""
        if (scale := self.vae.config.scaling_factor) != STOCK_SCALE:
            raise ValueError(
                f"vae.scaling_factor={scale}: diffusers' upscaler takes {STOCK_SCALE}, whatever it is given; "
                f"autoencoder.vae.rescaled(vae, {STOCK_SCALE}) is the same autoencoder with that"
            )
        return super().to_diffusers()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Pictures | None = None,
        num_inference_steps: int | None = None,
        *,
        noise_level: int = options.NOISE_LEVEL,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance: Guidance | None = None,
        negative_prompt: str | Sequence[inputs.Prompt] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: inputs.Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        prompt_weighting: str | None = None,
        strict: bool = False,
        sampler: str | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: inputs.Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput:
        """Small pictures enlarged vae.downsample_factor times, each with a prompt of its own or one for all.

        image: PIL images of one size, of any sides, or (B, 3, h, w) in [0, 1].
        noise_level: 0 keeps what is in the small picture; more repairs more of it, and invents more.
        generator: draws the noise of the small pictures and then that of the latents, as in diffusers, which
        resizes the pictures to multiples of the factor first. With seeds both are counted.
        The rest is as of LatentDiffusionPipeline. Raises ValueError, with what is valid, for what cannot be.
        """
        scale, guide = self._guide(guidance_scale, None, guidance_interval, guidance)
        options.check_choice("output_type", output_type, FORMATS)
        options.check_noise_level(noise_level, self.noisiest)
        tableau, small = self.tableau(num_inference_steps, sampler), small_pictures(image)
        given = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        told = self._heed(*given, prompt_weighting, scale, strict)
        context, uncond = self._contexts(*given, num_images_per_prompt, clip_skip, prompt_weighting)
        small, context, uncond = self._paired(small, context, uncond, num_images_per_prompt)
        shape, count = (self.vae.config.latent_channels, *small.shape[2:]), len(small)
        shown = None if generator is None else inputs.from_generator(generator, count, small.shape[1:])[0]
        xt, noise, seeds = inputs.first_noise(count, shape, seed, generator, latents)
        if shown is None:
            shown = low_res_noise(seeds or [], small.shape[1:])
        levels = torch.full((count,), noise_level)
        small = noised(small.cpu(), shown.cpu(), levels, self.low_res_scheduler.schedule)
        unet = partial(self.unet, class_labels=levels.to(self.device))
        predict = seeing(unet, small.to(self.device))
        denoise = guide(predict, context, uncond, max(scale, 1), self.scheduler.prediction)
        xt = self._run(denoise, xt, tableau, noise, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = FORMATS[output_type](xt if output_type == "latent" else self.decode(xt))
        return PipelineOutput(images, seeds, *told) if return_dict else (images, None)  # type: ignore[return-value]

    def _paired(
        self, small: Tensor, context: Context, uncond: Context, images: int
    ) -> tuple[Tensor, Context, Context]:
        """A row an image of each, where one picture or one prompt stands for all.

        context, uncond: with `images` rows a prompt. Raises ValueError unless there are as many of both.
        """
        pictures, prompts = len(small), len(context) // images
        if 1 not in (pictures, prompts) and pictures != prompts:
            raise ValueError(f"{prompts} prompts and {pictures} images: give as many, or one of either")
        options.check_count(images, max(pictures, prompts))
        height, width = (side * self.vae.downsample_factor for side in small.shape[2:])
        options.check_size(height, width)
        small = small.expand(max(pictures, prompts), *small.shape[1:]).repeat_interleave(images, dim=0)
        if prompts < pictures:
            context, uncond = (
                told.each(lambda rows: rows.repeat(pictures, *[1] * (rows.ndim - 1)))
                for told in (context, uncond)
            )
        return small, context, uncond
