"""What the autoencoder is trained on: pixels, edges, structure, features, and the KL of its latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder.similarity import WINDOW, ms_ssim
from autoencoder.vae import Posterior


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Weights of the reconstruction terms, each a mean over pixels or patches, and of the KL term."""

    l1: float = 1.0  # of |difference|; pixels in [-1, 1]
    mse: float = 1.0  # of difference**2; without it the picture is a median: sharp but greyish
    gradient: float = 1.0  # of |difference of the image gradients|: edges
    ms_ssim: float = 0.0  # of 1 - MS-SSIM: structure, where there are no perceptual features
    perceptual: float = 1.0  # of LPIPS, where vgg is given
    vgg: str | None = None  # file of VGG16's weights with torchvision's names, .safetensors or .pth
    lpips_heads: str | None = None  # file of LPIPS's heads for VGG16; null: all channels count alike
    variance: bool = False  # learn how large errors are, so that kl: 1 is the exact weight (see balanced)
    kl: float = 1e-6  # of the KL in nats, both summed over an image, as Rombach et al. 2022 weigh it
    half_size: float = 0.0  # of the pixel terms once more, with latents and image at half their size
    equivariance: float | None = (
        None  # of them, shrunk and turned at random; null: 0.5 for new weights, else 0
    )

    def __post_init__(self) -> None:
        for name in ("l1", "mse", "gradient", "ms_ssim", "perceptual", "kl", "half_size", "equivariance"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise ValueError(f"loss.{name}={getattr(self, name)}: expected 0 or more")
        if self.l1 + self.mse <= 0:
            raise ValueError("loss.l1 and loss.mse are both 0: nothing says what colour a pixel should have")
        if self.half_size and self.equivariance:
            raise ValueError(
                f"loss.half_size={self.half_size} is loss.equivariance={self.equivariance} at one size only: "
                "set one of them to 0"
            )
        if self.lpips_heads and not self.vgg:
            raise ValueError(f"loss.lpips_heads={self.lpips_heads} has no effect without loss.vgg")

    def check_size(self, size: int) -> None:
        """Raises ValueError if pictures of `size` pixels a side are too small for a term."""
        if self.ms_ssim and size < WINDOW:
            raise ValueError(f"loss.ms_ssim needs pictures of {WINDOW} pixels a side, data.size={size}")
        if self.vgg and size < 16:
            raise ValueError(f"loss.vgg needs pictures of 16 pixels a side, data.size={size}")


def image_gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences along x and along y: (B, 3, H, W-1) and (B, 3, H-1, W)."""
    return image[..., 1:] - image[..., :-1], image[..., 1:, :] - image[..., :-1, :]


def pixel_loss(
    reconstruction: Tensor, image: Tensor, config: ReconstructionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (B,) between pictures (B, 3, H, W) in [-1, 1], and its parts (B,): l1, mse, gradient."""
    difference = reconstruction.float() - image.float()
    across, down = image_gradients(difference)
    parts = {
        "l1": difference.abs().mean(dim=(1, 2, 3)),
        "mse": difference.square().mean(dim=(1, 2, 3)),
        "gradient": across.abs().mean(dim=(1, 2, 3)) + down.abs().mean(dim=(1, 2, 3)),
    }
    return config.l1 * parts["l1"] + config.mse * parts["mse"] + config.gradient * parts["gradient"], parts


def picture_loss(
    reconstruction: Tensor, image: Tensor, config: ReconstructionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pixel loss (B,) and, where it has a weight, 1 - MS-SSIM; with their parts (B,)."""
    loss, parts = pixel_loss(reconstruction, image, config)
    if config.ms_ssim:
        parts["ms_ssim"] = ms_ssim(reconstruction, image)
        loss = loss + config.ms_ssim * (1 - parts["ms_ssim"])
    return loss, parts


def balanced(error: Tensor, log_scale: Tensor) -> Tensor:
    """error / exp(log_scale) + log_scale, least where exp(log_scale) is the mean error.

    Of |difference| this is, but for log 2, what a value costs in nats under a Laplace distribution of that
    scale, and of difference**2 twice what it costs under a normal one of that variance. So with kl 1 and 2
    the loss is the ELBO exactly (Kingma & Welling 2014, eq. 3; Rybkin et al. 2021). It is the log-variance
    of Rombach et al.'s code, where no optimizer gets to see it.
    """
    return error * torch.exp(-log_scale) + log_scale


def kl_loss(posterior: Posterior, image: Tensor, config: ReconstructionConfig) -> tuple[Tensor, Tensor]:
    """The weighed KL (B,), and the KL itself in nats an image (B,).

    The weight refers to sums over the image, and the other terms are means over its pixels, so it is divided
    by the number of values.
    """
    kl = posterior.kl().float()
    return config.kl * kl / image[0].numel(), kl
