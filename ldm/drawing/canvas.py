"""What a run draws on: where it starts, what the UNet sees beside xt, and what becomes of the answers.

Text to image draws on a blank canvas, image to image on a picture, and inpainting on a picture of which a
part is kept: by any model, whose answers for that part are known (Avrahami et al. 2023, "Blended Latent
Diffusion"), or by one that was trained to see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.sample import Denoiser
from ldm.diffusion.schedule import Level
from ldm.drawing.given import Given
from ldm.model.context import Predict
from ldm.model.unet import seeing


class Canvas:
    """A blank one: text to image."""

    def begin(self, noise: Tensor, level: Level) -> Tensor:
        """xt of the first level. noise: (B, C, h, w), standard normal."""
        return noise

    def shown(self, predict: Predict) -> Predict:
        """The UNet, seeing what else is there."""
        return predict

    def kept(self, denoise: Denoiser) -> Denoiser:
        """The denoiser, with what is known of x0 in its answers."""
        return denoise


@dataclass(frozen=True)
class Picture(Canvas):
    """Image to image (Meng et al. 2022, "SDEdit"): starts from the picture's own noised latents.

    x0: (B, C, h, w). fresh: whether no step was left out, strength = 1.
    """

    x0: Tensor
    fresh: bool

    def noised(self, noise: Tensor, level: Level) -> Tensor:
        return level.alpha * self.x0 + level.sigma * noise.to(self.x0)

    def begin(self, noise: Tensor, level: Level) -> Tensor:
        return self.noised(noise, level)


@dataclass(frozen=True)
class Blended(Picture):
    """Inpainting by any model: where mask (B, 1, h, w) is 0, every answer x0 is the picture's own.

    The first xt there is the picture's own, too, and tables follow a constant answer exactly: so xt stays
    alpha * x0 + sigma * noise of the picture at every level, and nothing is put in its place between steps.
    With strength 1 the rest begins as pure noise, and knows nothing of what was there.
    """

    mask: Tensor

    def begin(self, noise: Tensor, level: Level) -> Tensor:
        known = self.noised(noise, level)
        return known.lerp(noise.to(known), self.mask) if self.fresh else known

    def kept(self, denoise: Denoiser) -> Denoiser:
        return lambda xt, level: self.x0.lerp(denoise(xt, level), self.mask)


@dataclass(frozen=True)
class Shown(Picture):
    """Inpainting by a UNet that was trained to see, beside xt, the mask and the picture without that part.

    beside: (B, 1 + C, h, w), in diffusers' order.
    """

    beside: Tensor

    def begin(self, noise: Tensor, level: Level) -> Tensor:
        return noise if self.fresh else self.noised(noise, level)

    def shown(self, predict: Predict) -> Predict:
        return seeing(predict, self.beside)


def canvas_of(
    given: Given, count: int, size: tuple[int, int], factor: int, encode: Callable[[Tensor], Tensor]
) -> Canvas:
    """The canvas of count pictures of this height and width, for a UNet that sees latents alone.

    factor: pixels a latent. encode: images (B, 3, H, W) in [0, 1] to latents. A latent that the mask touches
    is repainted; what that is too much of is set right in pixels, by Given.finished.
    """
    if not given.images:
        return Canvas()
    x0, fresh = encode(given.pictures(count, size)), given.strength == 1
    if not given.masks:
        return Picture(x0, fresh)
    return Blended(x0, fresh, F.max_pool2d(given.repainted(count, size), factor).to(x0))


def shown_canvas_of(
    given: Given, count: int, size: tuple[int, int], factor: int, encode: Callable[[Tensor], Tensor]
) -> Canvas:
    """The same, for a UNet that sees 1 + C channels beside the latents.

    As in diffusers: its mask has no halves, latents take that of their first pixel, and the part that is
    repainted is grey in the picture that it sees.
    Raises ValueError without a picture or a mask.
    """
    if not given.images or not given.masks:
        missing = "mask_image" if given.images else "image and mask_image"
        raise ValueError(f"this model was trained for inpainting: give {missing}; white is repainted")
    images, hidden = given.pictures(count, size), given.repainted(count, size) >= 0.5
    x0, seen = encode(images), encode(torch.where(hidden, 0.5, images))
    mask = hidden[..., ::factor, ::factor].to(x0)
    return Shown(x0, given.strength == 1, torch.cat([mask, seen], dim=1))
