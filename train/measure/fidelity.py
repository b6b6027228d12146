"""What an autoencoder makes of pictures: how near they come back, and what its latents are like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from autoencoder.similarity import WINDOW, decibels, ssim
from autoencoder.vae import AutoencoderKL, Posterior
from train.data.pictures import grid, to_images

Rows = tuple[tuple[float, ...], ...]


class Fidelity(NamedTuple):
    """Of reconstructions through the mean of the posterior, and of latents z, which are not scaled."""

    psnr: float  # dB, of the mean squared error over all pictures
    ssim: float  # nan where pictures are smaller than its window
    lpips: float  # nan where it was not asked for
    kl: float  # nats a picture
    mean: list[float]  # a channel: of the latents
    std: list[float]  # a channel: of the latents, sampled
    noise: list[float]  # a channel: the share of the posterior's noise in the variance of the latents
    scaling_factor: float  # 1 / standard deviation of the latents, sampled, over all channels
    rgb_factors: Rows  # (C, 3): z to the colour of its place, by least squares
    rgb_bias: tuple[float, ...]  # (3,)

    def numbers(self) -> dict[str, float]:
        """What a log takes of it: the means, and the deviation and noise of each channel."""
        named = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips}
        numbers = {name: value for name, value in named.items() if not math.isnan(value)}
        for channel, (std, noise) in enumerate(zip(self.std, self.noise, strict=True)):
            numbers |= {f"std_c{channel}": std, f"noise_c{channel}": noise}
        return numbers


def reconstruct(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Through the mean of the posterior: (B, 3, H, W), on the CPU."""
    posterior = vae.encode(image.to(device_of(vae)))
    return vae.decode(vae.to_latents(posterior.mean)).float().cpu()


def before_and_after(vae: AutoencoderKL, image: Tensor) -> Image.Image:
    """Pictures (B, 3, H, W) in a row and, below each, what the autoencoder makes of it."""
    return grid(to_images(torch.cat([image, reconstruct(vae, image)])), columns=len(image))


def device_of(vae: AutoencoderKL) -> torch.device:
    return next(vae.parameters()).device


def encoded(vae: AutoencoderKL, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Posterior]]:
    """Pictures (B, 3, H, W), on the vae's device, and the posterior of each batch."""
    for image in batches:
        there = image.to(device_of(vae))
        yield there, vae.encode(there)


@torch.no_grad()
def judge(
    vae: AutoencoderKL,
    batches: Iterable[tuple[Tensor, Posterior]],
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Fidelity:
    """The fidelity over pictures. batches: as `encoded` gives them, of pictures in [-1, 1].

    distance: LPIPS, where there is one. Raises ValueError if there is no picture.
    """
    channels = vae.config.latent_channels
    pixels = pictures = values = 0
    error = 0.0
    sums = dict.fromkeys(("ssim", "lpips", "kl"), 0.0)
    moments = torch.zeros(3, channels, dtype=torch.float64)  # of mean, mean**2 and std**2
    gram = torch.zeros(channels + 1, channels + 4, dtype=torch.float64)  # [z, 1]^T [z, 1, rgb]
    for there, posterior in batches:
        image = there.cpu()
        mean, std = posterior.mean.cpu().double(), posterior.std.cpu().double()
        moments += torch.stack([x.sum((0, 2, 3)) for x in (mean, mean.square(), std.square())])
        values += mean[:, 0].numel()
        decoded = vae.decode(vae.to_latents(posterior.mean)).float().clamp(-1, 1)
        error += (decoded.cpu() - image).square().sum().item()
        pixels += image.numel()
        pictures += len(image)
        sums["kl"] += posterior.kl().sum().item()
        fits = min(image.shape[2:]) >= WINDOW
        sums["ssim"] += ssim(decoded, there).sum().item() if fits else math.nan
        sums["lpips"] += distance(decoded, there).sum().item() if distance else math.nan
        colours = F.interpolate(image.double(), size=mean.shape[2:], mode="area")
        row = torch.cat([mean, torch.ones_like(mean[:, :1]), colours], 1).transpose(0, 1).flatten(1)
        gram += row[: channels + 1] @ row.T
    if not pictures:
        raise ValueError("no picture to judge an autoencoder by")
    mean, square, noise = moments / values
    fitted = torch.linalg.lstsq(gram[:, : channels + 1], gram[:, channels + 1 :], driver="gelsd").solution
    return Fidelity(
        psnr=decibels(error / pixels),
        **{name: total / pictures for name, total in sums.items()},
        mean=mean.tolist(),
        std=(square + noise - mean**2).sqrt().tolist(),
        noise=(noise / (square - mean**2 + noise)).tolist(),
        scaling_factor=1 / (square.mean() + noise.mean() - mean.mean() ** 2).sqrt().item(),
        rgb_factors=tuple(map(tuple, fitted[:channels].tolist())),
        rgb_bias=tuple(fitted[channels].tolist()),
    )
