"""Places painted by code: snow, beach, night, forest, desert, under water, meadow.

Every coordinate is a fraction of the picture's side, and no draw depends on the side: a place looks the same
at every size. Painted OVERSAMPLE times too large and averaged down, so that edges are smooth at 64 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

OVERSAMPLE = 3
RGB = tuple[int, int, int]
ACROSS = np.linspace(0.0, 1.0, 49)


class Canvas:
    """A picture under the brush. Coordinates: (x, y) in [0, 1], y downwards."""

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.side, self.rng = side, rng
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image, "RGBA")  # colours with a fourth number are mixed in

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def sky(self, *colours: RGB, bottom: float = 1.0) -> None:
        """The colours from the top edge down to `bottom`, evenly spaced."""
        self.image.paste(_gradient(self.side, 0.0, bottom, colours))

    def land(self, outline: Sequence[tuple[float, float]], *colours: RGB) -> None:
        """Everything below the outline, in a gradient from its highest point to the bottom edge."""
        highest = min(y for _, y in outline)
        top = max(0, int(highest * self.side) - 1)  # nothing to do above
        corners = [*outline, (1.0, 1.0), (0.0, 1.0)]
        mask = Image.new("L", (self.side, self.side - top))
        ImageDraw.Draw(mask).polygon([(x * self.side, y * self.side - top) for x, y in corners], fill=255)
        self.image.paste(_gradient(self.side, highest, 1.0, colours, top), (0, top), mask)

    def hills(self, height: float, swell: float, waves: float = 1.2) -> list[tuple[float, float]]:
        """An outline rolling by about `swell` around `height`."""
        y = np.full_like(ACROSS, height)
        for k in (1, 2):
            pace, start = k * waves * self.between(0.6, 1.1), self.between(0, 1)
            y += swell / k * np.sin(2 * math.pi * (pace * ACROSS + start))
        return _curve(ACROSS, y)

    def polygon(self, points: Sequence[tuple[float, float]], colour: tuple[int, ...]) -> None:
        self.pen.polygon([(x * self.side, y * self.side) for x, y in points], fill=colour)

    def disc(self, x: float, y: float, r: float, colour: tuple[int, ...], squash: float = 1.0) -> None:
        s = self.side
        self.pen.ellipse([(x - r) * s, (y - r * squash) * s, (x + r) * s, (y + r * squash) * s], fill=colour)

    def fir(self, x: float, foot: float, height: float, colour: RGB, snowy: bool = False) -> None:
        """A fir tree of three tiers."""
        width = 0.26 * height
        self.polygon([(x - 0.02, foot), (x + 0.02, foot), (x, foot - 0.3 * height)], (84, 62, 44))
        for tier in range(3):
            low, half = foot - (0.12 + 0.24 * tier) * height, width * (1 - 0.25 * tier)
            top = low - 0.4 * height
            self.polygon([(x - half, low), (x + half, low), (x, top)], colour)
            if snowy:
                cap, rim = 0.45 * half, low - 0.22 * height
                self.polygon([(x - cap, rim), (x + cap, rim), (x, top)], (244, 248, 253))

    def cloud(self, x: float, y: float, r: float, colour: tuple[int, ...]) -> None:
        puffs = ((-1.3, 0.15, 0.6), (-0.5, -0.2, 0.9), (0.45, -0.1, 0.8), (1.25, 0.2, 0.55), (0, 0.25, 0.9))
        for dx, dy, scale in puffs:
            self.disc(x + dx * r, y + dy * r, scale * r, colour, squash=0.75)


def _curve(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _gradient(side: int, top: float, bottom: float, colours: Sequence[RGB], skip: int = 0) -> Image.Image:
    """The colours evenly spaced from y = top to y = bottom; a picture of rows `skip` to `side`."""
    y = (np.arange(skip, side) + 0.5) / side
    stops = [top + (bottom - top) * k / (len(colours) - 1) for k in range(len(colours))]
    column = np.stack([np.interp(y, stops, channel) for channel in zip(*colours, strict=True)], axis=-1)
    strip = Image.fromarray(column.round().astype(np.uint8)[:, None])
    return strip.resize((side, side - skip), Image.Resampling.NEAREST)


def snow(c: Canvas) -> None:
    c.sky((142, 172, 212), (222, 232, 245), bottom=0.5)
    far = c.between(0.40, 0.46)
    c.land(c.hills(far, 0.03), (206, 220, 238), (232, 240, 250))
    for _ in range(3):
        x = c.between(0.02, 0.36) + (0.62 if c.rng.random() < 0.5 else 0.0)
        c.fir(x, far + c.between(0.06, 0.10), c.between(0.20, 0.32), (66, 98, 104), snowy=True)
    c.land(c.hills(c.between(0.52, 0.58), 0.025), (252, 253, 255), (240, 245, 252), (206, 220, 241))


def beach(c: Canvas) -> None:
    c.sky((84, 180, 240), (206, 238, 252), bottom=0.45)
    if c.rng.random() < 0.5:
        c.disc(c.between(0.1, 0.9), c.between(0.10, 0.2), 0.07, (255, 244, 190))
    else:
        c.cloud(c.between(0.1, 0.9), c.between(0.1, 0.22), c.between(0.06, 0.09), (255, 255, 255))
    horizon = c.between(0.36, 0.42)
    c.land([(0.0, horizon), (1.0, horizon)], (22, 112, 184), (58, 184, 208), (58, 184, 208))
    shore = c.hills(c.between(0.54, 0.58), 0.014, waves=1.8)
    c.land([(x, y - 0.022) for x, y in shore], (250, 253, 253), (250, 253, 253))
    c.land(shore, (205, 182, 140), (205, 182, 140))
    c.land([(x, y + 0.025) for x, y in shore], (242, 224, 180), (236, 212, 162), (226, 196, 142))
    for _ in range(8):
        c.disc(c.between(0, 1), c.between(0.66, 0.99), c.between(0.004, 0.009), (250, 240, 214), squash=0.7)


def night(c: Canvas) -> None:
    c.sky((6, 8, 34), (22, 28, 76), (58, 64, 122), bottom=0.7)
    for _ in range(34):
        x, y, glow = c.between(0, 1), c.between(0, 0.62), c.between(0.4, 1.0)
        c.disc(x, y, 0.004 + 0.006 * glow**3, (255, 250, 214, int(255 * glow)))
    x, y, r = c.between(0.12, 0.88), c.between(0.12, 0.2), 0.075
    for halo in (1.9, 1.6, 1.3):
        c.disc(x, y, halo * r, (190, 200, 255, 26))
    c.disc(x, y, r, (253, 246, 208))
    if c.rng.random() < 0.5:
        c.disc(x + 0.45 * r, y - 0.15 * r, 0.8 * r, (30, 36, 86))
    else:
        for dx, dy, scale in ((-0.35, -0.2, 0.22), (0.3, 0.3, 0.28), (0.2, -0.4, 0.14)):
            c.disc(x + dx * r, y + dy * r, scale * r, (234, 222, 176))
    c.land(c.hills(c.between(0.56, 0.62), 0.03), (32, 42, 82), (22, 30, 60))
    c.land(c.hills(c.between(0.68, 0.72), 0.03), (22, 34, 56), (10, 16, 32))


def forest(c: Canvas) -> None:
    c.sky((150, 190, 150), (206, 226, 182), bottom=0.55)
    for foot, height, colour in ((0.52, 0.36, (120, 164, 126)), (0.57, 0.44, (74, 124, 86))):
        for k in range(6):
            c.fir((k + c.between(0, 1)) / 6, foot, height * c.between(0.8, 1.15), colour)
    c.land(c.hills(0.55, 0.015), (86, 112, 58), (52, 78, 40), (40, 60, 32))
    for side in (c.between(0.03, 0.14), c.between(0.86, 0.97)):
        width, foot = c.between(0.035, 0.05), c.between(0.6, 0.68)
        trunk = [(side - width, 0), (side + width, 0), (side + 1.3 * width, foot), (side - 1.3 * width, foot)]
        c.polygon(trunk, (86, 60, 40))
        c.polygon([(side, 0), trunk[1], trunk[2], (side + 0.2 * width, foot)], (68, 46, 32))
    for k in range(9):
        x, y, r = (k + c.between(0, 1)) / 9, c.between(-0.04, 0.03), c.between(0.08, 0.12)
        c.disc(x, y, r, (34, int(c.between(82, 108)), 46))
    for _ in range(8):
        x, y, r = c.between(0, 1), c.between(0.66, 0.98), c.between(0.008, 0.018)
        c.disc(x, y, r, (112, 136, 64, 150), squash=0.6)


def desert(c: Canvas) -> None:
    c.sky((246, 176, 96), (253, 216, 148), (255, 238, 204), bottom=0.5)
    c.disc(c.between(0.12, 0.88), c.between(0.12, 0.24), 0.08, (255, 250, 222))
    c.land(c.hills(c.between(0.42, 0.46), 0.035), (222, 164, 106), (214, 152, 96))
    dunes = ((0.56, 0.09, (228, 174, 114), (190, 128, 78)), (0.68, 0.10, (224, 166, 106), (180, 116, 70)))
    for low, height, light, dark in dunes:
        peak, foot, lean = c.between(0.15, 0.85), low + c.between(-0.02, 0.02), c.between(0.04, 0.12)
        crown = foot - height * np.exp(-(((ACROSS - peak) / 0.26) ** 2))
        c.land(_curve(ACROSS, crown), light, (208, 148, 92))
        flank = np.linspace(peak, peak + 0.55, 17)  # the side away from the light
        ridge = _curve(flank, foot - height * np.exp(-(((flank - peak) / 0.26) ** 2)))
        crest = flank - lean * np.sin(np.pi * (flank - peak) / 0.55)
        shade = _curve(crest, np.linspace(foot - height, 1.0, 17))
        c.polygon([*ridge, (peak + 0.55, 1.0), *shade[::-1]], (*dark, 150))
    c.land(c.hills(c.between(0.74, 0.80), 0.02), (232, 182, 122), (222, 164, 104))


def sea(c: Canvas) -> None:
    c.sky((86, 206, 222), (28, 140, 190), (12, 84, 148), (8, 56, 112))
    for _ in range(4):
        x, width, lean = c.between(0, 1), c.between(0.03, 0.07), c.between(-0.2, 0.2)
        ray = [(x, 0), (x + width, 0), (x + lean + 2.4 * width, 0.8), (x + lean - width, 0.8)]
        c.polygon(ray, (210, 250, 250, 34))
    c.land(c.hills(c.between(0.82, 0.86), 0.025), (40, 104, 132), (24, 72, 102))
    for _ in range(5):
        root, foot = c.between(0, 1), c.between(0.9, 1.0)
        height, waves = c.between(0.16, 0.32), c.between(0.5, 1.5)
        for half in (-1, 1):  # a weed of two blades
            up = np.linspace(0.0, 1.0, 9)
            middle = root + 0.02 * half + 0.022 * np.sin(2 * math.pi * (up * waves + root))
            half_width, rise = 0.014 * (1 - up), foot - height * up
            blade = _curve(middle - half_width, rise) + _curve(middle + half_width, rise)[::-1]
            c.polygon(blade, (18, 116, 104))
    for _ in range(10):
        x, y, r = c.between(0, 1), c.between(0, 0.9), c.between(0.008, 0.022)
        c.disc(x, y, r, (214, 246, 252, 90))
        c.disc(x - 0.3 * r, y - 0.3 * r, 0.4 * r, (250, 255, 255, 220))


def meadow(c: Canvas) -> None:
    c.sky((92, 176, 246), (216, 240, 253), bottom=0.55)
    for k in range(2):
        x, y, r = 0.5 * k + c.between(0.08, 0.42), c.between(0.08, 0.26), c.between(0.05, 0.085)
        c.cloud(x, y, r, (255, 255, 255, 235))
    c.land(c.hills(c.between(0.44, 0.5), 0.03), (166, 214, 122), (140, 198, 100))
    c.land(c.hills(c.between(0.54, 0.6), 0.03), (144, 208, 96), (104, 178, 74), (84, 156, 62))
    for _ in range(16):
        x, y = c.between(0, 1), c.between(0.62, 0.99)
        petal = ((255, 255, 255), (255, 236, 120), (255, 196, 214))[int(c.rng.integers(3))]
        c.disc(x, y, 0.006 + 0.010 * (y - 0.5), petal)
        c.disc(x, y, 0.003 + 0.004 * (y - 0.5), (240, 180, 60))


PLACES: dict[str, Callable[[Canvas], None]] = {
    "snow": snow,
    "beach": beach,
    "night": night,
    "forest": forest,
    "desert": desert,
    "water": sea,
    "meadow": meadow,
}


def paint(place: str, side: int, rng: np.random.Generator) -> Image.Image:
    """The empty place, RGB, side x side."""
    canvas = Canvas(OVERSAMPLE * side, rng)
    PLACES[place](canvas)
    return canvas.image.reduce(OVERSAMPLE)


def flakes(side: int, rng: np.random.Generator) -> Image.Image:
    """Falling snow as a mask, L, side x side."""
    mask = Image.new("L", (OVERSAMPLE * side, OVERSAMPLE * side))
    pen = ImageDraw.Draw(mask)
    for x, y, r in (OVERSAMPLE * side * (rng.random((26, 3)) * (1, 1, 0.006) + (0, 0, 0.005))).tolist():
        pen.ellipse([x - r, y - r, x + r, y + r], fill=235)
    return mask.reduce(OVERSAMPLE)
