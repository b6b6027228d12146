"""A plot of a few lines on logarithmic axes, drawn by Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm.picture import save_picture

WIDTH, HEIGHT, EDGE, LEGEND = 720, 420, 56, 190  # pixels
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#e377c2")
Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within low to high, at most some ten: 1, 2, 5 times powers of 10, or these powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1,)):
        found = [
            d * 10.0**p
            for p in powers
            for d in digits
            if low <= d * 10.0**p * (1 + 1e-9) <= high * (1 + 2e-9)
        ]
        if len(found) <= 10:
            break
    return found or [low, high]


def plot(lines: Mapping[str, Points], across: str, up: str, path: Path) -> None:
    """Writes a plot of named lines of points (x, y), both above 0; others are left out.

    across, up: what the axes are.
    """
    shown = {name: sorted((x, y) for x, y in points if x > 0 and y > 0) for name, points in lines.items()}
    xs, ys = ([point[axis] for points in shown.values() for point in points] for axis in (0, 1))
    if not xs:
        return
    spans = [(min(values) / 1.15, max(values) * 1.15) for values in (xs, ys)]
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    right, low = WIDTH - LEGEND, HEIGHT - EDGE

    def place(x: float, y: float) -> tuple[float, float]:
        part = [math.log(v / a) / math.log(b / a) for v, (a, b) in zip((x, y), spans, strict=True)]
        return EDGE + part[0] * (right - EDGE), low - part[1] * (low - 24)

    draw.rectangle((EDGE, 24, right, low), outline="black")
    for x in ticks(*spans[0]):
        at = place(x, spans[1][0])[0]
        draw.line((at, 24, at, low), fill="#dddddd")
        draw.text((at, low + 6), f"{x:g}", "black", font, anchor="mt")
    for y in ticks(*spans[1]):
        at = place(spans[0][0], y)[1]
        draw.line((EDGE, at, right, at), fill="#dddddd")
        draw.text((EDGE - 6, at), f"{y:g}", "black", font, anchor="rm")
    draw.text(((EDGE + right) / 2, HEIGHT - 18), across, "black", font, anchor="mm")
    draw.text((EDGE, 12), up, "black", font, anchor="lm")
    for number, (name, points) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(*point) for point in points]
        draw.line(places, fill=colour, width=2)
        for x, y in places:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        row = 32 + 16 * number
        draw.line((right + 12, row, right + 30, row), fill=colour, width=3)
        draw.text((right + 36, row), name, "black", font, anchor="lm")
    save_picture(sheet, path, overwrite=True)
