"""Perceptual distance: LPIPS (Zhang et al. 2018) on the convolutions of VGG16 (Simonyan & Zisserman 2015).

Parameter names are those of the files that users have: torchvision's `features.0.weight` for VGG16, and
`lin0.model.1.weight` for the heads of LPIPS. The weights come from files; nothing here fetches any.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.similarity import full_precision

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels out
MEAN = (-0.030, -0.088, -0.188)  # of ImageNet's pixels in [-1, 1], as LPIPS has it
DEVIATION = (0.458, 0.448, 0.450)


def vgg16_layers() -> nn.Sequential:
    """VGG16's convolutions, ReLUs and poolings, in torchvision's order: the numbers in the names."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in STAGES:
        for out in stage:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])  # the last pooling leads to the classifier


class LPIPS(nn.Module):
    """How different two pictures look, 0 where they are equal: weighed distances of features."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg16_layers()
        for number, stage in enumerate(STAGES):
            self.register_buffer(f"head{number}", torch.ones(stage[-1]))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)
        ends = [sum(len(stage) * 2 + 1 for stage in STAGES[:k]) - 1 for k in range(1, 6)]
        self.slices = list(pairwise([0, *ends]))  # of the layers, each up to a stage's last ReLU

    def load(self, vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> None:
        """Takes VGG16's weights, and LPIPS's heads; without these all channels count 1.

        Raises ValueError naming the first tensor that is missing or of another shape; VGG16's classifier is
        passed over.
        """
        wanted = {f"features.{name}": value for name, value in self.features.state_dict().items()}
        files = {"vgg": (vgg, wanted)}
        if heads is not None:
            each = {f"lin{k}.model.1.weight": torch.empty(1, s[-1], 1, 1) for k, s in enumerate(STAGES)}
            files["lpips_heads"] = (heads, each)
        for file, (have, want) in files.items():
            for name, value in want.items():
                if name not in have or have[name].shape != value.shape:
                    found = tuple(have[name].shape) if name in have else "nothing"
                    raise ValueError(
                        f"{file} holds {found} as {name}: expected a tensor of {tuple(value.shape)}, as "
                        + ("torchvision's vgg16" if file == "vgg" else "LPIPS's heads for VGG16")
                    )
        state = {name: vgg[name].float() for name in wanted}
        for number in range(len(STAGES)):
            head = f"head{number}"
            state[head] = self.get_buffer(head)
            if heads is not None:
                state[head] = heads[f"lin{number}.model.1.weight"].float().flatten()
        self.load_state_dict(state)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,). a, b: (B, 3, H, W) in [-1, 1], 16 pixels or more on each side.

        Zhang et al. 2018, eq. 1: squared differences of features of length 1, weighed by channel, averaged
        over places, summed over the last ReLUs of the five stages.
        """
        x = (torch.cat([a, b]) - self.mean) / self.deviation
        distance = torch.zeros_like(x[: len(a), 0, 0, 0])
        for number, (first, end) in enumerate(self.slices):
            x = self.features[first:end](x)
            left, right = F.normalize(full_precision(x), dim=1, eps=1e-10).chunk(2)
            weights = self.get_buffer(f"head{number}").view(1, -1, 1, 1)
            distance = distance + (weights * (left - right).square()).sum(1).mean((1, 2))
        return distance
