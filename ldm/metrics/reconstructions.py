"""A folder's pictures as an autoencoder gives them back, and how near they come on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoencoder.similarity import WINDOW, ssim
from autoencoder.vae import AutoencoderKL
from ldm.drawing.outputs import to_pil
from ldm.drawing.pixels import to_tensor
from ldm.metrics.folders import Batch, Folder


class Reconstructions:
    """Through the mean of the posterior, each alone: a picture does not depend on its mates."""

    def __init__(self, vae: AutoencoderKL, folder: Folder, name: str) -> None:
        """name: of the autoencoder, such as its hash. Raises ValueError for pictures that do not fit it."""
        factor = vae.downsample_factor
        if any(side % factor for side in folder.size):
            width, height = folder.size
            raise ValueError(
                f"{folder.folder} holds pictures of {width}x{height} pixels: the autoencoder takes multiples "
                f"of {factor}; give --size PIXELS, a multiple of it"
            )
        self.vae, self.folder, self.name = vae, folder, name
        self.size, self.formats = folder.size, folder.formats

    def __len__(self) -> int:
        return len(self.folder)

    def marks(self, places: range) -> list[str]:
        return [f"{mark} through {self.name}" for mark in self.folder.marks(places)]

    @torch.no_grad()
    def back(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) in [-1, 1], on the CPU."""
        latents = self.vae.to_latents(self.vae.encode(image.to(next(self.vae.parameters()))).mean)
        return self.vae.decode(latents).float().clamp(-1, 1).cpu()

    def batches(self, places: range, size: int, use: Callable[[Image.Image], Tensor]) -> Iterator[Batch]:
        """Like Folder.batches: of the pictures that came back, with the digests of those that went in.

        The SSIM of pictures that are smaller than its window is nan.
        """
        for given, digests, _ in self.folder.batches(places, size, to_tensor):
            back = [self.back(image) for image in given.split(1)]
            fits = min(given.shape[2:]) >= WINDOW
            near = [
                ((decoded - image).square().mean().item(), ssim(decoded, image).item() if fits else math.nan)
                for decoded, image in zip(back, given.split(1), strict=True)
            ]
            pixels = torch.stack([use(to_pil(decoded / 2 + 0.5)[0]) for decoded in back])
            yield Batch(pixels, digests, torch.tensor(near, dtype=torch.float64))

    def pair(self, place: int) -> list[Image.Image]:
        """A picture and what comes back of it."""
        image = self.folder.read(place).image
        return [Image.fromarray(np.asarray(image)), to_pil(self.back(to_tensor(image)[None]) / 2 + 0.5)[0]]
