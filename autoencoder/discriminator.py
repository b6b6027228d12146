"""The adversary of the autoencoder: a discriminator of patches, its losses, and how much it may say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ADAPTIVE_WEIGHT = 1e4  # and SMALL: of Rombach et al.'s code; there the losses are sums, here means
SMALL = 1e-4


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """A discriminator that learns beside the autoencoder, by the same optimizer; Rombach et al.'s is 0.5."""

    weight: float = 0.0  # of its verdict, times the adaptive weight that balances gradients; 0: none
    start: float = 0.5  # share of the run's steps after which it begins; a late one does less harm
    width: int = 64  # channels of its first layer
    layers: int = 3  # that halve the picture; with 3, a patch is of 70x70 pixels

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"adversary.weight={self.weight}: expected 0 (none) or more, as 0.5")
        if not 0 <= self.start <= 1:
            raise ValueError(f"adversary.start={self.start}: a share of the run lies between 0 and 1")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"adversary.width={self.width}: expected a multiple of 8 channels")
        if not 1 <= self.layers <= 6:
            raise ValueError(f"adversary.layers={self.layers}: expected 1 to 6; 3 is usual")

    @property
    def smallest(self) -> int:
        """Pixels that a side must have for one verdict."""
        return 3 * 2**self.layers


class PatchDiscriminator(nn.Module):
    """A picture (B, 3, H, W) to a verdict for each of its patches (B, 1, h, w): above 0 where it seems real.

    The discriminator of Isola et al. 2017, appendix 6.1.2; h = H / 2**layers - 2. Its norms are over groups
    of channels within a picture, not over the batch: what it says of a picture depends on no other.
    """

    def __init__(self, config: AdversaryConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**k, 8) for k in range(config.layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for k in range(1, len(widths)):
            stride = 2 if k < config.layers else 1
            blocks += [
                nn.Conv2d(widths[k - 1], widths[k], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, widths[k]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)  # as Radford et al. 2016

    def forward(self, image: Tensor) -> Tensor:
        """In float32 also where the rest is not: its losses are differences of near numbers."""
        with torch.autocast(image.device.type, enabled=False):
            return self.layers(image.to(self.layers[0].weight.dtype))  # type: ignore[arg-type]


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """The hinge loss of the discriminator, (B,): half of each side (Lim & Ye 2017, Miyato et al. 2018).

    real, drawn: (B, 1, h, w) verdicts, of pictures and of reconstructions; means over the patches.
    """
    return 0.5 * (F.relu(1 - real).mean((1, 2, 3)) + F.relu(1 + drawn).mean((1, 2, 3)))


def generator_loss(drawn: Tensor) -> Tensor:
    """What the autoencoder lowers, (B,): minus the verdict on reconstructions, a mean over patches."""
    return -drawn.mean((1, 2, 3))


def adaptive_weight(error: Tensor, verdict: Tensor, last_layer: Tensor) -> Tensor:
    """How large |gradient of error| is in |gradient of verdict|, at the decoder's last layer: a scalar.

    Esser et al. 2021, eq. 7: with it both pull the decoder equally. error, verdict: scalars, means over the
    batch; last_layer: the weight of the convolution that draws the picture. No gradient flows through it.
    """
    of_error, of_verdict = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (error, verdict)
    )
    return (of_error / (of_verdict + SMALL)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()
