"""A plot of a few lines, drawn by Pillow alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ldm.recipes.picture import save_picture

WIDTH, HEIGHT, EDGE, LEGEND = 1200, 720, 96, 300  # pixels
TOP, LINE, TEXT, MARK, THICK = (
    44,
    28,
    20,
    6,
    3,
)  # pixels: above the frame, of the legend, letters, points, lines
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#e377c2")
DASH = 9  # pixels
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


def ticked(axis: Axis, values: Sequence[float]) -> Axis:
    """The axis with the values themselves for ticks, where they are few and apart."""
    there = sorted(set(values))
    places = [axis.scale(value) for value in there]
    apart = all(b - a > (places[-1] - places[0]) / 2 / MOST for a, b in itertools.pairwise(places))
    return axis._replace(ticks=lambda low, high: there) if 1 < len(there) <= MOST and apart else axis


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
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    place = frame(draw, font, (across, across.margin(min(xs), max(xs))), (up, up.margin(min(ys), max(ys))))
    right = WIDTH - LEGEND
    for row, (name, told, points, dashes) in enumerate(shown):
        colour, places, level = colours[name], [place(*point) for point in points], TOP + LINE * (row + 0.5)
        key: list[Place] = [(right + 16, level), (right + 61, level)]
        for line in (places, key):
            for a, b in itertools.pairwise(line):
                if dashes:
                    dashed(draw, a, b, colour, THICK)
                else:
                    draw.line((a, b), fill=colour, width=THICK)
        for x, y in places:
            inside = "white" if dashes else colour
            draw.ellipse((x - MARK, y - MARK, x + MARK, y + MARK), fill=inside, outline=colour, width=2)
        draw.text((right + 72, level), told, "black", font, anchor="lm")
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
        return EDGE + part(across, x) * (right - EDGE), low - part(up, y) * (low - TOP)

    draw.rectangle((EDGE, TOP, right, low), outline="black")
    for x in across[0].ticks(*across[1]):
        at = place(x, up[1][0])[0]
        draw.line((at, TOP, at, low), fill="#dddddd")
        draw.text((at, low + 10), f"{x:g}", "black", font, anchor="mt")
    for y in up[0].ticks(*up[1]):
        at = place(across[1][0], y)[1]
        draw.line((EDGE, at, right, at), fill="#dddddd")
        draw.text((EDGE - 10, at), f"{y:g}", "black", font, anchor="rm")
    draw.text(((EDGE + right) / 2, HEIGHT - 28), across[0].name, "black", font, anchor="mm")
    draw.text((EDGE, TOP / 2), up[0].name, "black", font, anchor="lm")
    return place
