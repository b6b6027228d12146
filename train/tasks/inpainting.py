"""Inpainting as a task of `fit`: a text-to-image model in, one that also sees a picture with a hole out.

The recipe of GLIDE (Nichol et al. 2022, section 2.5) in latents, as of Stable Diffusion's inpainting models:
the UNet is given further channels, whose weights begin as zero, for the mask and for the latents of the
picture without what is masked, and all of it goes on learning. What it has to paint is cached as for every
diffusion model; what it sees of a picture is encoded in each step, as each has a mask of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.model.unet import UNet
from train.batches.buckets import frame, views
from train.batches.latents import Latents, autoencoder_folder
from train.batches.masks import MaskConfig, draw_masks
from train.batches.plan import Draw, fixed_draws, normal, spread
from train.config import to_mapping
from train.data.pictures import grid, to_images, to_tensor
from train.data.sources import open_source
from train.fit.checkpoint import weights_sha256
from train.tasks.denoising import Diffusion, ToLatents, frozen_latents
from train.tasks.diffusion import LatentDiffusion, validation_losses
from train.tasks.tuning import FurtherRecipe, read_scheduler, whole_recipe

SHOWN = 8  # pictures of a preview


@dataclass(frozen=True, kw_only=True)
class InpaintingRecipe(FurtherRecipe):
    """Training of an inpainting model from one that draws from text."""

    masks: MaskConfig = field(default_factory=MaskConfig)
    caption_dropout: float = 0.1  # of the samples get the empty prompt, which guidance compares with


class Repainting(Diffusion):
    """Diffusion whose UNet sees what it has to paint anew, and the rest of the picture.

    The autoencoder is called but is no part of this module, so it is not trained, averaged or saved.
    """

    to_latents: ToLatents

    def forward(  # type: ignore[override]
        self, picture: Tensor, mask: Tensor, posterior: Tensor, **batch: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,). picture, mask, posterior: see `shown`; batch: as Diffusion takes it."""
        return super().forward(**batch, beside=shown(self.to_latents, picture, mask, posterior))


def shown(to_latents: ToLatents, picture: Tensor, mask: Tensor, posterior: Tensor) -> Tensor:
    """What the UNet sees beside xt, in diffusers' order: the mask and the rest's latents, (B, 1 + C, h, w).

    picture: (B, 3, H, W) in [-1, 1]. mask: (B, 1, H, W), 1 what is painted anew, which is grey in the
    picture that is encoded. posterior: (B, C, h, w), standard normal.
    """
    latents = to_latents(picture * (1 - mask), posterior)
    cells = F.interpolate(mask, latents.shape[2:])  # that of a cell's first pixel, as in diffusers
    return torch.cat([cells, latents], dim=1)


def widen(unet: UNet, more: int) -> None:
    """Lets the first convolution see `more` further channels, which at first count nothing."""
    old = unet.conv_in
    conv = nn.Conv2d(old.in_channels + more, old.out_channels, 3, padding=1)
    with torch.no_grad():
        conv.weight.zero_()[:, : old.in_channels] = old.weight
    conv.bias = old.bias
    unet.conv_in, unet.config = conv, dataclasses.replace(unet.config, in_channels=conv.in_channels)


class Inpainting(LatentDiffusion):
    """Trains a UNet, beside a frozen text encoder, to paint anew what is masked."""

    def __init__(self, recipe: InpaintingRecipe, folder: Path, latents: Latents) -> None:
        super().__init__(
            whole_recipe(recipe, folder), autoencoder_folder(folder), latents, read_scheduler(folder)
        )
        if self.unet.config.learns_variance:
            raise ValueError(
                f"model={recipe.model!r} learned its variance: only models that answer with a prediction "
                "alone learn to inpaint here"
            )
        self.masks, self.source = recipe.masks, open_source(recipe.data)
        before = weights_sha256(self.unet.state_dict())
        widen(self.unet, 1 + self.vae.config.latent_channels)
        self.module = Repainting(
            self.unet, self.text_encoder, self.scheduler, self.recipe.objective, train_text_encoder=False
        )
        self.module.to_latents = frozen_latents(self.vae)
        self.facts = {**self.facts, "model": before, "masks": to_mapping(recipe.masks)}

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """As of every diffusion model, with what is seen of the pictures: functions of the draws alone."""
        return {**super().batch(draws), **self.seen(draws, self.masks)}

    def seen(self, draws: list[Draw], masks: MaskConfig) -> dict[str, Tensor]:
        """The pictures in the views of their latents, a mask for each, and noise for what is encoded."""
        bucket, _, chosen = self.latents.rows(draws)
        size = self.latents.sizes[self.latents.places[draws[0].index][0]]
        data, pictures = self.recipe.data, []
        for draw, which in zip(draws, chosen, strict=True):
            view = views(draw.index, data.crops, data.flip)[which]
            pictures.append(to_tensor(frame(self.source[draw.index][0], size, view)))
        return {
            "picture": torch.stack(pictures),
            "mask": draw_masks(draws, size, masks),
            "posterior": normal(draws, tuple(bucket.mean.shape[2:]), "masked posterior"),
        }

    def beside(self, draws: list[Draw]) -> Tensor:
        """What the UNet sees of some samples beside their latents: (B, 1 + C, h, w), on its device."""
        seen = {name: value.to(self.device) for name, value in self.seen(draws, self.masks).items()}
        return shown(frozen_latents(self.vae), **seen)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        return validation_losses(self.pipeline(), self.latents, buckets, self.beside)

    def preview(self) -> Image.Image:
        """Pictures in rows of two times three: masked, repainted by the model, as they were."""
        prompts, bucket = (
            list(self.recipe.prompts),
            max(self.latents.buckets, key=lambda one: len(one.indices)),
        )
        places = spread(len(bucket.indices), len(prompts) or SHOWN)
        (draws,) = fixed_draws([[bucket.indices[place] for place in places]], size=len(places))
        masks = dataclasses.replace(self.masks, everything=0.0)  # else there is nothing to compare
        seen = {name: value.to(self.device) for name, value in self.seen(draws, masks).items()}
        prompts = prompts[: len(draws)] or self.latents.choose_captions(draws)
        picture, mask = seen["picture"], seen["mask"]
        drawn = self.pipeline()(
            prompts, image=picture / 2 + 0.5, mask_image=mask, seed=0, output_type="pt"
        ).images
        parts = (picture * (1 - mask), drawn.to(picture) * 2 - 1, picture)
        rows = zip(*(to_images(part) for part in parts), strict=True)
        return grid([one for row in rows for one in row], columns=6)
