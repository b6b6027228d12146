"""How alike two pictures are: PSNR, and SSIM, one or several scales of it, for an eye for structure."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, DEVIATION = 11, 1.5  # pixels: the Gaussian window of Wang et al. 2004
C1, C2 = 0.01**2, 0.03**2  # of the same paper, for a range of 1: what keeps the quotients finite
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of Wang et al. 2003, the finest scale first
FLOOR = 1e-3  # under which a scale's mean is cut: a power of less than 1 has no slope at 0


def decibels(error: float) -> float:
    """The PSNR in dB of a mean squared error between pictures in [-1, 1]."""
    return 10 * math.log10(4 / max(error, 1e-12))


def window(like: Tensor) -> Tensor:
    """The Gaussian (WINDOW,) that sums to 1."""
    across = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    weights = (-0.5 * (across / DEVIATION) ** 2).exp()
    return weights / weights.sum()


def local_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H - 10, W - 10): weighed by the window, where all of it lies in the picture."""
    channels, weights = x.shape[1], window(x)
    down = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    across = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x, down, groups=channels), across, groups=channels)


def similarities(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM (Wang et al. 2004, eq. 13) and its part without the luminance (eq. 9 times 10), each (B,).

    a, b: (B, C, H, W) in [0, 1]. Means over the places of the window and over the channels.
    """
    moments = torch.cat([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = local_mean(moments).chunk(5)
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    structure = (2 * covariance + C2) / (variances + C2)
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (luminance * structure).mean((1, 2, 3)), structure.mean((1, 2, 3))


def intensity(image: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]: luminances are compared by their quotient, so black has to be 0."""
    return (full_precision(image) + 1) / 2


def full_precision(image: Tensor) -> Tensor:
    """In float32 at least: a variance is a small difference of large numbers."""
    return image if image.dtype == torch.float64 else image.float()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """The structural similarity of pictures: (B,), 1 where they are equal (Wang et al. 2004).

    a, b: (B, C, H, W) in [-1, 1]. Raises ValueError if a side is shorter than the window.
    """
    check(a)
    with torch.autocast(a.device.type, enabled=False):
        return similarities(intensity(a), intensity(b))[0]


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """The same over up to five scales, each half the one before: (B,) (Wang et al. 2003, eq. 7).

    a, b: (B, C, H, W) in [-1, 1]. A picture with a side under 176 pixels has no room for the window at all
    five; then the exponents of those that there are share the whole. Raises ValueError as ssim does.
    """
    check(a)
    count = sum(min(a.shape[2:]) >> scale >= WINDOW for scale in range(len(SCALES)))
    exponents = [exponent / sum(SCALES[:count]) for exponent in SCALES[:count]]
    with torch.autocast(a.device.type, enabled=False):
        a, b = intensity(a), intensity(b)
        result = torch.ones_like(a[:, 0, 0, 0])
        for scale, exponent in enumerate(exponents):
            both, structure = similarities(a, b)
            value = both if scale == count - 1 else structure  # the luminance counts at the coarsest only
            result = result * value.clamp_min(FLOOR) ** exponent
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        return result


def check(image: Tensor) -> None:
    if min(image.shape[2:]) < WINDOW:
        height, width = image.shape[2:]
        raise ValueError(
            f"a picture of {width}x{height} pixels has no SSIM: expected {WINDOW} or more on each side"
        )
