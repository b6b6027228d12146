"""Pictures that a call is given to start from, and masks of what is to be repainted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.solvers import Tableau
from ldm.drawing.pixels import upright
from ldm.recipes import options

Pictures = Image.Image | Tensor | Sequence[Image.Image | Tensor]
CHANNELS = {"RGB": 3, "L": 1}


def rows_of(given: Pictures, name: str, mode: str) -> list[Tensor]:
    """Each picture as (C, H, W) float32 in [0, 1]. mode: "RGB", or "L" for masks, of one channel.

    Tensors are (C, H, W) or (B, C, H, W) in [0, 1], as output_type="pt" gives them; masks also (H, W).
    Raises ValueError for anything else.
    """
    each = [given] if isinstance(given, Image.Image | Tensor) else given
    if not isinstance(each, list | tuple) or not each:
        raise ValueError(f"{name} is {given!r:.80}: expected a PIL image, a tensor or a list of them")
    rows: list[Tensor] = []
    for one in each:
        if isinstance(one, Image.Image):
            pixels = torch.from_numpy(np.array(upright(one).convert(mode), np.float32)) / 255
            rows.append(pixels[None] if mode == "L" else pixels.permute(2, 0, 1))
            continue
        if not isinstance(one, Tensor):
            raise ValueError(f"{name} holds a {type(one).__name__}: expected PIL images or tensors")
        batch = one[(None,) * (4 - one.ndim)] if one.ndim < 4 else one
        fits = batch.ndim == 4 and batch.shape[1] == CHANNELS[mode] and batch.numel() > 0
        if not fits or not one.is_floating_point():
            raise ValueError(
                f"{name} is a tensor {tuple(one.shape)} of {one.dtype}: expected floats, "
                f"({CHANNELS[mode]}, H, W) or (B, {CHANNELS[mode]}, H, W)"
            )
        if not (batch.min() >= 0 and batch.max() <= 1):
            ends = f"{batch.min():.3g} to {batch.max():.3g}"
            raise ValueError(f'{name} has values from {ends}: expected 0 to 1, as output_type="pt" gives')
        rows += batch.float().cpu().unbind()
    return rows


def scaled(row: Tensor, size: tuple[int, int], resample: Image.Resampling) -> Tensor:
    """A picture (C, H, W) at that height and width, without rounding to whole pixel values between."""
    if tuple(row.shape[1:]) == size:
        return row
    channels = [np.asarray(Image.fromarray(channel.numpy()).resize(size[::-1], resample)) for channel in row]
    return torch.from_numpy(np.stack(channels)).clamp(0, 1)


def check_shapes(images: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Raises ValueError unless masks have the shapes of the pictures; see options.check_mask_shape.

    Where there is one of either, it goes with each of the others.
    """
    count = max(len(images), len(masks))
    rows = [list(each) * count if len(each) == 1 else each for each in (images, masks)]
    for image, mask in zip(*rows, strict=False):  # other numbers are told where they are used
        (h, w), (high, wide) = image.shape[1:], mask.shape[1:]
        options.check_mask_shape((wide, high), (w, h))


@dataclass(frozen=True)
class Given:
    """images: (3, H, W) each; none for text to image. masks: (1, H, W) each, 1 is repainted and 0 kept."""

    images: Sequence[Tensor] = ()
    masks: Sequence[Tensor] = ()
    strength: float = 1.0

    @classmethod
    def of(cls, image: Pictures | None, mask_image: Pictures | None, strength: float | None) -> Given:
        """What a call is given. strength: None is 1 with a mask and 0.8 without one, as in diffusers.

        Raises ValueError for what is no picture, and for a mask or a strength without a picture.
        """
        options.check_start(image, mask_image, strength, mask_name="mask_image")
        if image is None:
            return cls()
        images = rows_of(image, "image", "RGB")
        if mask_image is None:
            return cls(images, (), options.usual_strength(strength, masked=False))
        masks = rows_of(mask_image, "mask_image", "L")
        check_shapes(images, masks)
        return cls(images, masks, options.usual_strength(strength, masked=True))

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the pictures; None where there are none.

        Raises ValueError if they differ.
        """
        sizes = {(row.shape[1], row.shape[2]) for row in self.images}
        if len(sizes) > 1:
            found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
            raise ValueError(f"the images are {found}: give height and width, to which all are scaled")
        return next(iter(sizes), None)

    def notices(self, tableau: Tableau) -> list[str]:
        """What has no effect in a run of this table, in words."""
        if self.masks and not any(mask.any() for mask in self.masks):
            return ["the mask is black everywhere: nothing is repainted, as white is"]
        if self.images and not self.masks and tableau.steps.alpha[0] == 0:
            return ["strength=1 starts from noise alone with this model: the image has no effect"]
        return []

    def pictures(self, count: int, size: tuple[int, int]) -> Tensor:
        """(count, 3, H, W), scaled by Lanczos. Raises ValueError unless there is one, or one for each."""
        return self._batch(self.images, "image", count, size, Image.Resampling.LANCZOS)

    def repainted(self, count: int, size: tuple[int, int]) -> Tensor:
        """The masks, (count, 1, H, W), scaled by area. Raises ValueError likewise."""
        return self._batch(self.masks, "mask_image", count, size, Image.Resampling.BOX)

    def finished(self, drawn: Tensor) -> Tensor:
        """What was drawn, (B, 3, H, W) in [0, 1], laid into the pictures: what is kept is so bit for bit."""
        if not self.masks:
            return drawn
        batch = len(drawn), (drawn.shape[2], drawn.shape[3])
        return self.pictures(*batch).to(drawn).lerp(drawn, self.repainted(*batch).to(drawn))

    @staticmethod
    def _batch(
        rows: Sequence[Tensor], name: str, count: int, size: tuple[int, int], resample: Image.Resampling
    ) -> Tensor:
        if len(rows) not in (1, count):
            raise ValueError(f"{len(rows)} of {name} for {count} pictures: give one, or one for each")
        batch = torch.stack([scaled(row, size, resample) for row in rows])
        return batch.expand(count, -1, -1, -1)
