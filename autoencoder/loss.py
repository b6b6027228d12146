"""What the autoencoder is trained on: pixels, edges and a little KL; no perceptual or adversarial term."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from autoencoder.vae import Posterior


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Weights of the reconstruction terms, each a mean over pixels, and of the KL term."""

    l1: float = 1.0  # of |difference|; pixels in [-1, 1]
    mse: float = 1.0  # of difference**2; without it the picture is a median: sharp but greyish
    gradient: float = 1.0  # of |difference of the image gradients|: edges
    kl: float = 1e-6  # of the KL in nats, both summed over an image, as Rombach et al. 2022 weigh it
    half_size: float = 0.0  # of the pixel terms once more, with latents and image at half their size

    def __post_init__(self) -> None:
        for name in ("l1", "mse", "gradient", "kl", "half_size"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"loss.{name}={getattr(self, name)}: expected 0 or more")
        if self.l1 + self.mse <= 0:
            raise ValueError("loss.l1 and loss.mse are both 0: nothing says what colour a pixel should have")


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


def reconstruction_loss(
    reconstruction: Tensor,
    image: Tensor,
    posterior: Posterior,
    config: ReconstructionConfig,
    half_size: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (B,) and its parts (B,): l1, mse, gradient, kl (nats an image), half_size.

    reconstruction, image: (B, 3, H, W) in [-1, 1]. The KL weight refers to sums over the image, and the other
    terms are means over its pixels, so it is divided by the number of values.

    half_size: (B, 3, H/2, W/2), what the decoder makes of latents at half their size. Asking for the image
    at half its size there keeps the latents out of their highest frequencies, which a UNet learns last
    (Skorokhodov et al. 2025, "Improving the diffusability of autoencoders"; Kouzelis et al. 2025, "EQ-VAE").
    """
    loss, parts = pixel_loss(reconstruction, image, config)
    parts["kl"] = posterior.kl().float()
    loss = loss + config.kl * parts["kl"] / image[0].numel()
    if half_size is not None:
        parts["half_size"], _ = pixel_loss(half_size, F.avg_pool2d(image.float(), 2), config)
        loss = loss + config.half_size * parts["half_size"]
    return loss, parts
