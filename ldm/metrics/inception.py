"""InceptionV3 as the FID knows it: the TensorFlow graph of 2015-12-05 in the names of its PyTorch port.

The names of layers are those of the file `pt_inception-2015-12-05-6726825d.pth` (the same bytes as
`weights-inception-2015-12-05-6726825d.pth`). It differs from the usual InceptionV3 (Szegedy et al. 2016) in
averages that leave out the border, in a maximum in the last block, and in 1008 classes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, channels out, size of the kernel
Branch = tuple[Layer, ...]
Pool = Literal["mean", "max", "halve"]

CLASSES = 1008
SIDE = 299  # pixels
SPATIAL = 7  # channels of sFID (Nash et al. 2021)


class Convolution(nn.Module):
    """A convolution, a norm, a ReLU."""

    def __init__(self, inside: int, outside: int, kernel: Kernel, stride: int = 1, padding: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        border = (height // 2, width // 2) if padding else (0, 0)
        self.conv = nn.Conv2d(inside, outside, (height, width), stride, border, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side: what they give, and a pooled branch last, channel after channel.

    Branches that begin with the same layer share it. Where pool is "halve", the last layer of each branch
    steps by 2 without a border, and the pooled branch has no layer.
    """

    def __init__(self, inside: int, branches: tuple[Branch, ...], pool: Pool, pooled: int = 0) -> None:
        super().__init__()
        self.chains = [[name for name, *_ in branch] for branch in branches]
        self.pool: Pool = pool
        for branch in branches:
            channels = inside
            for name, outside, kernel in branch:
                halves = pool == "halve" and name == branch[-1][0]
                if not hasattr(self, name):
                    self.add_module(name, Convolution(channels, outside, kernel, 1 + halves, not halves))
                channels = outside
        if pooled:
            self.branch_pool = Convolution(inside, pooled, 1)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """Of each layer, by its name."""
        made: dict[str, Tensor] = {}
        for chain in self.chains:
            h = x
            for name in chain:
                if name not in made:
                    made[name] = getattr(self, name)(h)
                h = made[name]
        return made

    def join(self, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        """The answer of the block to x, whose layers gave what is made."""
        if self.pool == "halve":
            last = F.max_pool2d(x, 3, 2)
        elif self.pool == "max":
            last = self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        else:
            last = self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        return torch.cat([*(made[chain[-1]] for chain in self.chains), last], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.outputs(x))


def wide(inside: int, pooled: int) -> Mixed:
    """A block of 35x35."""
    three = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    five = (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5))
    return Mixed(inside, ((("branch1x1", 64, 1),), five, three), "mean", pooled)


def middle(c: int) -> Mixed:
    """A block of 17x17, with c channels inside: kernels of 7x7 as 1x7 and 7x1."""
    seven = (("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1)))
    twice: Branch = (
        ("branch7x7dbl_1", c, 1),
        ("branch7x7dbl_2", c, (7, 1)),
        ("branch7x7dbl_3", c, (1, 7)),
        ("branch7x7dbl_4", c, (7, 1)),
        ("branch7x7dbl_5", 192, (1, 7)),
    )
    return Mixed(768, ((("branch1x1", 192, 1),), seven, twice), "mean", 192)


def narrow(inside: int, pool: Pool) -> Mixed:
    """A block of 8x8: branches that fork at their end."""
    one: Branch = (("branch3x3_1", 384, 1),)
    two: Branch = (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
    forks: tuple[Branch, ...] = (
        (("branch1x1", 320, 1),),
        (*one, ("branch3x3_2a", 384, (1, 3))),
        (*one, ("branch3x3_2b", 384, (3, 1))),
        (*two, ("branch3x3dbl_3a", 384, (1, 3))),
        (*two, ("branch3x3dbl_3b", 384, (3, 1))),
    )
    return Mixed(inside, forks, pool, 192)


class Answer(NamedTuple):
    """Of InceptionV3."""

    pooled: Tensor  # (B, 2048): of the FID
    spatial: Tensor  # (B, 7 * 17 * 17): of sFID
    probabilities: Tensor  # (B, 1008): of the Inception Score


class InceptionV3(nn.Module):
    """Pictures to features. Takes the whole file, no key more or less."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, padding=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = wide(192, 32), wide(256, 64), wide(288, 64)
        three: Branch = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
        self.Mixed_6a = Mixed(288, ((("branch3x3", 384, 3),), three), "halve")
        self.Mixed_6b, self.Mixed_6c = middle(128), middle(160)
        self.Mixed_6d, self.Mixed_6e = middle(160), middle(192)
        seven: Branch = (
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3),
        )
        self.Mixed_7a = Mixed(768, ((("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)), seven), "halve")
        self.Mixed_7b, self.Mixed_7c = narrow(1280, "mean"), narrow(2048, "max")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, pixels: Tensor) -> Answer:
        """pixels: (B, 3, 299, 299) in [0, 255].

        The spatial features are the graph's `mixed_6/conv`, its first 7 channels (Dhariwal & Nichol 2021);
        the probabilities are without the bias, as there.
        """
        x = (pixels - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        made = self.Mixed_6d.outputs(x)
        x = self.Mixed_6e(self.Mixed_6d.join(x, made))
        pooled = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        spatial = made["branch1x1"][:, :SPATIAL].flatten(1)
        return Answer(pooled, spatial, (pooled @ self.fc.weight.T).softmax(1))
