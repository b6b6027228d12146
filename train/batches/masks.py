"""Which part of a picture a sample has to paint anew: boxes, strokes of a brush, or all of it.

The shares are those of 512 pixels in "512train-large", by which Stable Diffusion's inpainting models learnt;
the shapes are those of Suvorov et al. 2022 ("LaMa", section 2.4), counted like every other draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from train.batches.buckets import Size
from train.batches.plan import Draw

# of the shorter side of a picture, from and to
BOX_SIDE = (75 / 512, 450 / 512)
STROKE_LENGTH = (10 / 512, 450 / 512)
STROKE_WIDTH = (5 / 512, 400 / 512)
BOXES, STROKES, LEGS = 4, 5, 5  # at most


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which part of each picture is painted anew."""

    everything: float = 0.25  # of the samples are masked all over: text to image, which must not be forgotten
    strokes: float = 0.5  # of the others are masked by strokes of a brush, the rest by boxes

    def __post_init__(self) -> None:
        for name in ("everything", "strokes"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"masks.{name}={getattr(self, name)}: a fraction lies between 0 and 1")
        if self.everything == 1:
            raise ValueError(
                "masks.everything=1: the model would never see a picture, use less; 0.25 is usual"
            )


def draw_masks(draws: list[Draw], size: Size, config: MaskConfig) -> Tensor:
    """Masks of one size, each from the sample's own counter: (B, 1, H, W), 1 what is painted anew, else 0."""
    return torch.stack([draw_mask(draw, size, config) for draw in draws])


def draw_mask(draw: Draw, size: Size, config: MaskConfig) -> Tensor:
    """The mask of one sample: (1, H, W) float32."""
    chance = Chance(draw.generator("mask"))
    everything, stroked = chance.between(0, 1) < config.everything, chance.between(0, 1) < config.strokes
    if everything:
        return torch.ones(1, size.height, size.width)
    page = Image.new("L", size)
    paint = stroke if stroked else box
    for _ in range(chance.count(STROKES if stroked else BOXES)):
        paint(ImageDraw.Draw(page), size, chance)
    return torch.from_numpy(np.array(page)).gt(0).float()[None]


class Chance:
    """Numbers from a sample's generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def count(self, most: int) -> int:
        """1 to most, each as likely."""
        return 1 + int(self.between(0, most))


def box(page: ImageDraw.ImageDraw, size: Size, chance: Chance) -> None:
    """A rectangle anywhere in the picture."""
    width, height = (max(1, round(min(size) * chance.between(*BOX_SIDE))) for _ in size)
    left = int(chance.between(0, size.width - width + 1))
    top = int(chance.between(0, size.height - height + 1))
    page.rectangle((left, top, left + width - 1, top + height - 1), fill=255)


def stroke(page: ImageDraw.ImageDraw, size: Size, chance: Chance) -> None:
    """A brush that goes a few legs within the picture, each with its own direction, length and width."""
    short, turns = min(size), (0.0, 2 * math.pi)
    x, y = (chance.between(0, side) for side in size)
    for _ in range(chance.count(LEGS)):
        angle, length = chance.between(*turns), short * chance.between(*STROKE_LENGTH)
        radius = max(1.0, short * chance.between(*STROKE_WIDTH)) / 2
        end_x = min(max(x + length * math.cos(angle), 0), size.width)
        end_y = min(max(y + length * math.sin(angle), 0), size.height)
        page.line((x, y, end_x, end_y), fill=255, width=round(2 * radius))
        for a, b in ((x, y), (end_x, end_y)):  # round ends
            page.ellipse((a - radius, b - radius, a + radius, b + radius), fill=255)
        x, y = end_x, end_y
