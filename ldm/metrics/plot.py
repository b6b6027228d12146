"""A plot of a few lines, drawn by Pillow alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ldm.recipes.picture import save_picture

WIDTH, HEIGHT, EDGE, LEGEND = 720, 420, 56, 190  # pixels
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#e377c2")
DASH = 6  # pixels
MOST = 10  # ticks of an axis
Points = Sequence[tuple[float, float]]
Place = tuple[float, float]  # pixels


class Axis(NamedTuple):
    """What stands along an axis, and how."""

    name: str
    scale: Callable[[float], float]  # a value's place, up to two constants
    ticks: Callable[[float, float], list[float]]  # round numbers within the ends
    margin: Callable[[float, float], tuple[float, float]]  # the ends, a little beyond the lowest and highest
    takes: Callable[[float], bool]  # whether a value has a place


def logarithmic(name: str) -> Axis:
    """An axis of values above 0."""
    return Axis(name, math.log, ticks, lambda low, high: (low / 1.15, high * 1.15), lambda value: value > 0)


def linear(name: str) -> Axis:
    """An axis of any values."""

    def margin(low: float, high: float) -> tuple[float, float]:
        more = 0.04 * (high - low or abs(high) or 1.0)
        return low - more, high + more

    return Axis(name, float, even_ticks, margin, math.isfinite)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within low to high, at most MOST: 1, 2, 5 times powers of 10, or these powers.

    Even ones where ends so near each other have but one or two of these.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1,)):
        found = [
            d * 10.0**p
            for p in powers
            for d in digits
            if low <= d * 10.0**p * (1 + 1e-9) <= high * (1 + 2e-9)
        ]
        if len(found) <= MOST:
            break
    return found if len(found) > 2 else even_ticks(low, high)


def even_ticks(low: float, high: float) -> list[float]:
    """Multiples within low to high of 1, 2 or 5 times a power of 10, the finest of which at most MOST fit."""
    power = 10.0 ** math.floor(math.log10((high - low) / MOST))
    apart = next(power * digit for digit in (1, 2, 5, 10) if (high - low) / (power * digit) <= MOST)
    return [apart * k for k in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def dashed(draw: ImageDraw.ImageDraw, a: Place, b: Place, colour: str, width: int) -> None:
    """A line of dashes from a to b."""
    length = math.dist(a, b)
    for start in range(0, math.ceil(length), 2 * DASH):
        ends = [min(at, length) / length for at in (start, start + DASH)]
        draw.line(
            [(a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part) for part in ends], colour, width
        )


def plot(
    lines: Mapping[str, Points],
    across: Axis,
    up: Axis,
    path: Path,
    beside: Mapping[str, Points] | None = None,
    who: str = "",
) -> None:
    """Writes a plot of named lines of points (x, y); points that an axis has no place for are left out.

    beside: lines of the same names by another, `who`: dashed, in the same colours.
    """
    colours = {
        name: COLOURS[number % len(COLOURS)] for number, name in enumerate({**lines, **(beside or {})})
    }
    shown = [(name, name, points, False) for name, points in lines.items()]
    shown += [(name, f"{name}, {who}", points, True) for name, points in (beside or {}).items()]
    shown = [
        (name, told, sorted((x, y) for x, y in points if across.takes(x) and up.takes(y)), dashes)
        for name, told, points, dashes in shown
    ]
    xs, ys = ([point[axis] for _, _, points, _ in shown for point in points] for axis in (0, 1))
    if not xs:
        return
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    place = frame(draw, font, (across, across.margin(min(xs), max(xs))), (up, up.margin(min(ys), max(ys))))
    right = WIDTH - LEGEND
    for row, (name, told, points, dashes) in enumerate(shown):
        colour, places = colours[name], [place(*point) for point in points]
        key: list[Place] = [(right + 12, 32 + 16 * row), (right + 30, 32 + 16 * row)]
        for line in (places, key):
            for a, b in itertools.pairwise(line):
                if dashes:
                    dashed(draw, a, b, colour, 2)
                else:
                    draw.line((a, b), fill=colour, width=2)
        for x, y in places:
            inside = "white" if dashes else colour
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=inside, outline=colour)
        draw.text((right + 36, 32 + 16 * row), told, "black", font, anchor="lm")
    save_picture(sheet, path, overwrite=True)


def frame(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    across: tuple[Axis, tuple[float, float]],
    up: tuple[Axis, tuple[float, float]],
) -> Callable[[float, float], Place]:
    """Draws the axes, each with its ends; returns where a point (x, y) lies."""
    right, low = WIDTH - LEGEND, HEIGHT - EDGE

    def part(axis: tuple[Axis, tuple[float, float]], value: float) -> float:
        scale, (first, last) = axis[0].scale, axis[1]
        return (scale(value) - scale(first)) / (scale(last) - scale(first))

    def place(x: float, y: float) -> Place:
        return EDGE + part(across, x) * (right - EDGE), low - part(up, y) * (low - 24)

    draw.rectangle((EDGE, 24, right, low), outline="black")
    for x in across[0].ticks(*across[1]):
        at = place(x, up[1][0])[0]
        draw.line((at, 24, at, low), fill="#dddddd")
        draw.text((at, low + 6), f"{x:g}", "black", font, anchor="mt")
    for y in up[0].ticks(*up[1]):
        at = place(across[1][0], y)[1]
        draw.line((EDGE, at, right, at), fill="#dddddd")
        draw.text((EDGE - 6, at), f"{y:g}", "black", font, anchor="rm")
    draw.text(((EDGE + right) / 2, HEIGHT - 18), across[0].name, "black", font, anchor="mm")
    draw.text((EDGE, 12), up[0].name, "black", font, anchor="lm")
    return place
