"""A folder's pictures as an autoencoder gives them back, and how near they come on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoencoder.similarity import WINDOW, decibels, ssim
from autoencoder.vae import AutoencoderKL
from ldm.metrics.folders import Folder
from ldm.outputs import to_pil
from ldm.pixels import to_tensor


class Reconstructions:
    """Through the mean of the posterior; `psnr` and `ssim` are of all that were read by then."""

    def __init__(self, vae: AutoencoderKL, folder: Folder) -> None:
        """Raises ValueError for pictures that do not fit the autoencoder."""
        factor = vae.downsample_factor
        if any(side % factor for side in folder.size):
            width, height = folder.size
            raise ValueError(
                f"{folder.folder} holds pictures of {width}x{height} pixels: the autoencoder takes multiples "
                f"of {factor}; give --size PIXELS, a multiple of it"
            )
        self.vae, self.folder = vae, folder
        self.size, self.formats = folder.size, folder.formats
        self.error = self.alike = 0.0
        self.count = 0

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def psnr(self) -> float:
        """dB, of the mean squared error over all pictures."""
        return decibels(self.error / self.count)

    @property
    def ssim(self) -> float:
        """The mean over the pictures; nan where they are smaller than its window."""
        return self.alike / self.count

    @torch.no_grad()
    def batches(
        self, size: int, use: Callable[[Image.Image], Tensor]
    ) -> Iterator[tuple[Tensor, list[bytes]]]:
        """Like Folder.batches: of the pictures that came back, with the digests of those that went in."""
        self.error = self.alike = 0.0
        self.count = 0
        weights = next(self.vae.parameters())
        for given, digests in self.folder.batches(size, to_tensor):
            back = []
            for image in given.split(1):  # one by one: a picture does not depend on its mates
                latents = self.vae.to_latents(self.vae.encode(image.to(weights)).mean)
                decoded = self.vae.decode(latents).float().clamp(-1, 1).cpu()
                self.error += (decoded - image).square().mean().item()
                fits = min(image.shape[2:]) >= WINDOW
                self.alike += ssim(decoded, image).item() if fits else math.nan
                self.count += 1
                back.append(use(to_pil(decoded / 2 + 0.5)[0]))
            yield torch.stack(back), digests

    def pair(self, place: int) -> list[Image.Image]:
        """A picture and what comes back of it."""
        image = self.folder.read(place).image
        weights = next(self.vae.parameters())
        with torch.no_grad():
            latents = self.vae.encode(to_tensor(image)[None].to(weights)).mean
            back = self.vae.decode(self.vae.to_latents(latents)).float().clamp(-1, 1).cpu()
        return [Image.fromarray(np.asarray(image)), to_pil(back / 2 + 0.5)[0]]
