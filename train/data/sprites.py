"""Subjects of scenes: shapes drawn by code, pictograms of the Noto Color Emoji font, and their colours."""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 109  # the only size of this bitmap font
FONT_NAMES = ("NotoColorEmoji.ttf", "NotoColorEmoji-Regular.ttf")
FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",  # Debian, Ubuntu
    "/usr/share/fonts/noto",  # Arch, Alpine
    "/usr/share/fonts/google-noto-emoji",
    "/usr/share/fonts/google-noto-color-emoji-fonts",  # Fedora
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
)

# hue (turns), saturation, value of a subject's middle tone; the seven are far apart to the eye
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.997, 0.92, 0.87),
    "orange": (0.075, 0.95, 1.0),
    "yellow": (0.145, 0.88, 1.0),
    "green": (0.375, 0.82, 0.68),
    "blue": (0.605, 0.82, 0.93),
    "purple": (0.765, 0.70, 0.74),
    "pink": (0.920, 0.48, 1.0),
}

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross", "crescent", "hexagon")

# name -> code point of the font
PICTOGRAMS: dict[str, str] = {
    "fox": "\U0001f98a",
    "cat": "\U0001f408",
    "dog": "\U0001f436",
    "horse": "\U0001f40e",
    "pig": "\U0001f437",
    "elephant": "\U0001f418",
    "bear": "\U0001f43b",
    "rabbit": "\U0001f407",
    "frog": "\U0001f438",
    "turtle": "\U0001f422",
    "fish": "\U0001f41f",
    "whale": "\U0001f433",
    "penguin": "\U0001f427",
    "owl": "\U0001f989",
    "duck": "\U0001f986",
    "butterfly": "\U0001f98b",
    "car": "\U0001f697",
    "boat": "\u26f5",
    "house": "\U0001f3e0",
    "tree": "\U0001f333",
    "mushroom": "\U0001f344",
    "apple": "\U0001f34e",
    "rocket": "\U0001f680",
    "balloon": "\U0001f388",
    "cow": "\U0001f404",
    "sheep": "\U0001f411",
    "goat": "\U0001f410",
    "camel": "\U0001f42a",
    "rhinoceros": "\U0001f98f",
    "mouse": "\U0001f401",
    "hedgehog": "\U0001f994",
    "koala": "\U0001f428",
    "tiger": "\U0001f405",
    "lion": "\U0001f981",
    "leopard": "\U0001f406",
    "zebra": "\U0001f993",
    "giraffe": "\U0001f992",
    "monkey": "\U0001f412",
    "lizard": "\U0001f98e",
    "snake": "\U0001f40d",
    "crocodile": "\U0001f40a",
    "dragon": "\U0001f409",
    "dolphin": "\U0001f42c",
    "shark": "\U0001f988",
    "octopus": "\U0001f419",
    "crab": "\U0001f980",
    "lobster": "\U0001f99e",
    "eagle": "\U0001f985",
    "chicken": "\U0001f414",
    "chick": "\U0001f425",
    "parrot": "\U0001f99c",
    "flamingo": "\U0001f9a9",
    "peacock": "\U0001f99a",
    "swan": "\U0001f9a2",
    "bee": "\U0001f41d",
    "ladybug": "\U0001f41e",
    "caterpillar": "\U0001f41b",
    "snail": "\U0001f40c",
    "kangaroo": "\U0001f998",
    "sloth": "\U0001f9a5",
    "llama": "\U0001f999",
    "unicorn": "\U0001f984",
    "deer": "\U0001f98c",
    "squirrel": "\U0001f43f",
    "bat": "\U0001f987",
    "bus": "\U0001f68c",
    "truck": "\U0001f69a",
    "tractor": "\U0001f69c",
    "bicycle": "\U0001f6b2",
    "train": "\U0001f682",
    "helicopter": "\U0001f681",
    "castle": "\U0001f3f0",
    "tent": "\u26fa",
    "palm tree": "\U0001f334",
    "cactus": "\U0001f335",
    "sunflower": "\U0001f33b",
    "rose": "\U0001f339",
    "tulip": "\U0001f337",
    "banana": "\U0001f34c",
    "strawberry": "\U0001f353",
    "cake": "\U0001f382",
    "teapot": "\U0001fad6",
    "guitar": "\U0001f3b8",
    "robot": "\U0001f916",
    "snowman": "\u26c4",
    "ghost": "\U0001f47b",
    "pumpkin": "\U0001f383",
    "umbrella": "\u2602",
    "lantern": "\U0001f3ee",
    "anchor": "\u2693",
    "crown": "\U0001f451",
    "key": "\U0001f511",
    "bell": "\U0001f514",
}
FEW = tuple(PICTOGRAMS)[:24]  # easily told apart at 64 pixels: the subjects of a small model


def find_font(font: str | Path | None = None) -> Path:
    """The file of the Noto Color Emoji font: `font` if given, else from the usual places.

    Raises ValueError, with the command that installs it, if there is none.
    """
    install = "apt-get install fonts-noto-color-emoji, or give the path of NotoColorEmoji.ttf as `font`"
    if font is not None:
        if not Path(font).expanduser().is_file():
            raise ValueError(f"font={str(font)!r} is not a file: {install}")
        return Path(font).expanduser()
    for folder in FONT_FOLDERS:
        for name in FONT_NAMES:
            if (path := Path(folder).expanduser() / name).is_file():
                return path
    raise ValueError(f"pictograms need the Noto Color Emoji font, found in no usual place: {install}")


@lru_cache(maxsize=2)
def _typeface(path: Path) -> ImageFont.FreeTypeFont:
    try:
        # not ImageFont.truetype: if the file is bad, that looks for another of the same name
        return ImageFont.FreeTypeFont(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(
            f"font={str(path)!r} cannot be read at size {FONT_SIZE} ({error}): "
            "expected the bitmap font of `apt-get install fonts-noto-color-emoji`"
        ) from error


def pictogram(subject: str, font: str | Path | None = None) -> Image.Image:
    """The subject's pictogram in its own colours, RGBA, cropped to what is visible; about 120 pixels wide.

    Raises ValueError if the font is missing, or has no coloured picture for the subject.
    """
    path = find_font(font)
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((8, 8), PICTOGRAMS[subject], font=_typeface(path), embedded_color=True)
    box = image.getbbox()
    if box is None or np.asarray(image)[..., :3].max() == 0:
        raise ValueError(
            f"font={str(path)!r} has no coloured picture of a {subject}: "
            "expected the bitmap font of `apt-get install fonts-noto-color-emoji`"
        )
    return image.crop(box)


def _outline(name: str) -> list[tuple[float, float]]:
    """The corners of a shape within the unit circle, y downwards."""

    def around(corners: int, turn: float = -0.25, dent: float = 1.0) -> list[tuple[float, float]]:
        turns = [2 * math.pi * (k / corners + turn) for k in range(corners)]
        radii = [dent if k % 2 else 1.0 for k in range(corners)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, turns)]

    if name in ("circle", "ring", "crescent"):
        return around(120)
    if name == "heart":  # the usual parametric heart curve
        turns = [2 * math.pi * k / 120 for k in range(120)]
        y = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in turns]
        return [(16 * math.sin(a) ** 3 / 17, -(b + 2.5) / 17) for a, b in zip(turns, y, strict=True)]
    if name == "cross":
        quarter = [(0.34, -0.95), (0.34, -0.34), (0.95, -0.34)]
        half = quarter + [(-y, x) for x, y in quarter]
        return half + [(-x, -y) for x, y in half]
    if name == "diamond":
        return [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)]
    if name == "star":
        return around(10, dent=0.45)
    return {"square": around(4, -0.125), "triangle": around(3), "hexagon": around(6, 0.0)}[name]


def shape(name: str) -> Image.Image:
    """A stone-grey shape with a dark rim, lit from above: RGBA, cropped, about 120 pixels wide."""
    side, over = 124, 4
    centre, radius = side * over / 2, side * over / 2 - over
    mask = Image.new("L", (side * over, side * over))
    pen = ImageDraw.Draw(mask)
    pen.polygon([(centre + radius * x, centre + radius * y) for x, y in _outline(name)], fill=255)
    if name in ("ring", "crescent"):
        r, shift = (0.5 * radius, 0.0) if name == "ring" else (0.78 * radius, 0.45 * radius)
        pen.ellipse([centre + shift - r, centre - r, centre + shift + r, centre + r], fill=0)
    body = mask.reduce(over)
    y, x = np.mgrid[0:side, 0:side] / side
    shine = np.exp(-(((x - 0.36) / 0.16) ** 2 + ((y - 0.3) / 0.13) ** 2))
    light = 0.78 - 0.34 * y - 0.10 * x + 0.16 * shine
    inner = _shrink(np.asarray(body), 5) / 255.0
    grey = light * inner + 0.24 * (1 - inner)
    rgb = grey[..., None] * (1.0, 0.985, 0.95)
    picture = Image.fromarray((255 * rgb).clip(0, 255).round().astype(np.uint8))
    picture.putalpha(body)
    return picture.crop(body.getbbox())


def _shrink(mask: np.ndarray, reach: int) -> np.ndarray:
    """The mask (H, W) without the outermost `reach` pixels: its least value within that distance."""
    height, width = mask.shape
    padded = np.pad(mask, reach)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    near = np.argwhere(x**2 + y**2 <= reach**2).tolist()
    return np.min([padded[dy : dy + height, dx : dx + width] for dy, dx in near], axis=0)


def tint(image: Image.Image, colour: str) -> Image.Image:
    """The picture in shades of one colour: its middle tones become the colour, darks stay dark, lights pale.

    A pixel's tone is half its brightness and half its rank among all pixels, so that black and white animals
    take the colour too. Black to colour to white are straight lines in RGB: the hue is the same everywhere.
    """
    pixels = np.asarray(image).astype(np.float32) / 255
    luma = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    visible = pixels[..., 3] > 0.5
    counts = np.histogram(luma[visible], bins=64, range=(0, 1))[0].astype(np.float64)
    counts = np.convolve(np.pad(counts, 4, mode="edge"), np.hanning(11)[1:-1], mode="valid")
    rank = np.interp(luma, (np.arange(64) + 0.5) / 64, (counts.cumsum() - counts / 2) / counts.sum())
    middle = float(np.clip(np.median(luma[visible]), 0.3, 0.93))
    level = np.where(luma < middle, 0.5 * luma / middle, 0.5 + 0.5 * (luma - middle) / (1 - middle))
    tone = (0.5 * rank + 0.5 * level)[..., None]
    base = np.array(colorsys.hsv_to_rgb(*COLOURS[colour]))
    dark = base * (0.1 + 0.9 * np.clip(tone / 0.42, 0, 1))
    pale = np.clip((tone - 0.58) / 0.32, 0, 1) ** 1.3 * 0.93
    area = float((pale[visible] > 0.25).mean())
    pale *= np.clip(1 - (area - 0.38) / 0.15, 0.25, 1)  # of a white animal the white is coloured as well
    rgb = dark + (1 - dark) * pale
    out = np.concatenate([rgb, pixels[..., 3:]], axis=-1)
    return Image.fromarray((255 * out).round().astype(np.uint8))


@lru_cache(maxsize=1024)
def sprite(subject: str, colour: str | None = None, font: str | Path | None = None) -> Image.Image:
    """The subject alone, RGBA; colour None is its own. Kept in memory: never draw on it."""
    image = shape(subject) if subject in SHAPES else pictogram(subject, font)
    return image if colour is None else tint(image, colour)
