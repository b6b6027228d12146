"""Endless captioned scenes, a function of (seed, index): a subject, its colour and size, how many, and where.

`python -m train.data.scenes --out sheet.png` writes a sheet of scenes with their captions.
"""

from __future__ import annotations

import argparse
import hashlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from train.data.painting import PLACES, flakes, paint
from train.data.sprites import COLOURS, FEW, PICTOGRAMS, SHAPES, find_font, sprite

Style = Literal["shapes", "pictograms"]
Split = Literal["train", "held_out", "all"]
SUBJECTS: dict[str, tuple[str, ...]] = {"shapes": SHAPES, "pictograms": tuple(PICTOGRAMS)}

# longer side of each subject in fractions of the picture, for 1, 2 and 3 of them
SIDES: dict[str | None, tuple[float, float, float]] = {
    "small": (0.38, 0.34, 0.28),
    None: (0.57, 0.41, 0.305),
    "big": (0.80, 0.48, 0.33),
}
CAPTIONS = 5  # captions a scene
DRAWING = 3  # to be raised when the pixels or captions of a scene change: what was made of them is stale

SHADE = ((30, 36, 40), [round(0.6 * v) for v in range(256)])  # colour and strength of a figure's soft edge
LIGHT = ((170, 200, 255), [v // 2 for v in range(256)])  # the same where it is dark

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge")}
PLURALS = {
    "cactus": "cacti",
    "deer": "deer",
    "fish": "fish",
    "mouse": "mice",
    "sheep": "sheep",
    "snowman": "snowmen",
}
# no colour words here: a colour in a caption is the subject's
WHERE: dict[str, tuple[str, ...]] = {
    "snow": ("in snow", "in the snow", "on a snowy day", "in a snowy field"),
    "beach": ("on a beach", "on the beach", "by the sea", "at the seaside"),
    "night": ("at night", "at night", "under the stars", "in the moonlight", "on a starry night"),
    "forest": ("in a forest", "in the forest", "in the woods", "among the trees"),
    "desert": ("in the desert", "in a desert", "among sand dunes", "in the hot desert"),
    "water": ("under water", "underwater", "under the sea", "deep in the sea"),
    "meadow": ("in a meadow", "in the meadow", "on the grass", "in a grassy field"),
}
SETTING: dict[str, tuple[str, str]] = {  # the place, and the way from it to the subject
    "snow": ("snow all around", "and in it"),
    "beach": ("a sandy beach", "and on it"),
    "night": ("a starry night", "and under the stars"),
    "forest": ("a deep forest", "and in it"),
    "desert": ("a hot desert", "and in it"),
    "water": ("the deep sea", "and in it"),
    "meadow": ("a wide meadow", "and in it"),
}
# {thing}: "a big red fox"; {plain}: "a big fox"; {where}: "in the snow"; {is}: "is" or "are"
TEMPLATES = (
    "{thing} {where}",
    "{thing} {where}",
    "{where}, {thing}",
    "a picture of {thing} {where}",
    "a drawing of {thing} {where}",
    "a photo of {thing} {where}",
    "an image of {thing} {where}",
    "a painting of {thing} {where}",
    "there {is} {thing} {where}",
    "{plain}, {colour}, {where}",
    "{plain} {where}, {colour}",
    "{setting}, {way} {thing}",
    "{setting}, {way} {plain}, {colour}",
    "{thing}, {where}",
    "{thing}",
)


@dataclass(frozen=True)
class Scene:
    """What is in picture `index` of the endless book `seed`."""

    seed: int
    index: int
    subject: str  # of SHAPES or PICTOGRAMS
    colour: str | None  # of COLOURS; None: as the subject is by nature
    size: str | None  # small, None or big
    count: int  # 1 to 3
    place: str  # of PLACES

    @property
    def caption(self) -> str:
        """The plainest caption."""
        return captions(self, 1)[0]


def rng_of(*parts: int | str) -> np.random.Generator:
    """Random numbers that depend on the parts alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(np.frombuffer(digest[:16], "<u4")))


@cache
def held_out(subject: str, colour: str | None, place: str) -> bool:
    """Whether training never sees it: a fixed twentieth of all, the red fox in snow among them."""
    if (subject, colour, place) == ("fox", "red", "snow"):
        return True
    digest = hashlib.sha256(f"held out/{subject}/{colour}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % 20 == 0


@lru_cache(maxsize=64)
def combinations(subjects: tuple[str, ...], split: Split) -> tuple[tuple[str, str | None, str], ...]:
    """Every (subject, colour, place) of the split."""
    colours = (None, *COLOURS)
    every = ((subject, colour, place) for subject in subjects for colour in colours for place in PLACES)
    return tuple(one for one in every if split == "all" or held_out(*one) == (split == "held_out"))


@lru_cache(maxsize=64)
def figures(subjects: tuple[str, ...]) -> tuple[tuple[tuple[str, str | None, str], ...], ...]:
    """The combinations of training, those of one subject in one colour together: its places."""
    return tuple(tuple(group) for _, group in groupby(combinations(subjects, "train"), lambda one: one[:2]))


def describe(seed: int, index: int, subjects: tuple[str, ...], split: Split = "train") -> Scene:
    """What scene `index` shows; one in eight has no colour.

    Training sees each subject in each colour equally often, also one that has few places left: what is held
    out shall be a place that it never stood in, and no rarer figure. In other splits all combinations are
    equally likely.

    Raises ValueError if no combination of the subjects is in the split.
    """
    choices = combinations(subjects, split)
    if not choices:
        raise ValueError(f"no combination of subjects={list(subjects)} is in split={split!r}: name more")
    rng = rng_of(seed, index, "scene")
    if split == "train":
        alike = figures(subjects)
        choices = alike[int(rng.integers(len(alike)))]
    subject, colour, place = choices[int(rng.integers(len(choices)))]
    size = (None, "small", "big")[int(np.searchsorted((0.5, 0.72), rng.random(), side="right"))]
    count = 1 + int(np.searchsorted((0.70, 0.88), rng.random(), side="right"))
    return Scene(seed, index, subject, colour, size, count, place)


# ---- in words


def plural(noun: str) -> str:
    """The English plural of a subject's name."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(words: str) -> str:
    """Either "a" or "an", by the sound that follows."""
    return "an" if words[0] in "aeiou" and not words.startswith(("uni", "eu")) else "a"


def noun_phrase(subject: str, count: int, *adjectives: str | None) -> str:
    """Such as "an orange fox", "two small mice". Adjectives that are None are left out."""
    noun = subject if count == 1 else plural(subject)
    words = " ".join([word for word in adjectives if word] + [noun])
    return f"{article(words) if count == 1 else ('two', 'three')[count - 2]} {words}"


def captions(scene: Scene, count: int = CAPTIONS) -> list[str]:
    """Captions that are true of the scene, the plainest first."""
    rng = rng_of(scene.seed, scene.index, "captions")

    def pick(values: Sequence[str]) -> str:
        return values[int(rng.random() * len(values))]

    result = []
    for k in range(count):
        template = TEMPLATES[0] if k == 0 else pick(TEMPLATES)
        if scene.colour is None and "{colour}" in template:
            template = TEMPLATES[0]
        size = None if scene.size is None else scene.size if k == 0 else pick(SIZE_WORDS[scene.size])
        setting, way = SETTING[scene.place]
        both = "" if scene.count == 1 else "both " if scene.count == 2 else "all "
        words = {
            "thing": noun_phrase(scene.subject, scene.count, size, scene.colour),
            "plain": noun_phrase(scene.subject, scene.count, size),
            "colour": f"{both}{scene.colour}",
            "where": pick(WHERE[scene.place]),
            "is": "is" if scene.count == 1 else "are",
            "setting": setting,
            "way": way,
        }
        result.append(template.format_map(words))
    return result


# ---- in pixels


class Box(NamedTuple):
    """Where a subject stands, in fractions of the side."""

    left: float
    top: float
    width: float
    height: float


def layout(scene: Scene, aspect: float, rng: np.random.Generator) -> list[Box]:
    """A box for each subject, the farthest first: side by side, each in its own column of the picture.

    aspect: width / height of the subject.
    """
    margin, column = 0.02, 1 / scene.count
    side = SIDES[scene.size][scene.count - 1] * (0.95 + 0.05 * rng.random(scene.count))
    width, height = side * min(1.0, aspect), side / max(1.0, aspect)
    middle = column * (np.arange(scene.count) + 0.5)
    left = middle - width / 2 + 0.5 * (column - width) * (rng.random(scene.count) - 0.5)
    ground = 0.6 if scene.place == "water" else 0.8  # feet are no higher: they stand, unless they swim
    highest = np.maximum(ground, height + margin)
    bottom = highest + rng.random(scene.count) * (1 - margin - highest)
    boxes = np.stack([left, bottom - height, width, height], axis=-1)  # (count, 4)
    return [Box(*boxes[k].tolist()) for k in np.argsort(bottom)]


def draw(scene: Scene, side: int, font: str | Path | None = None) -> Image.Image:
    """The picture: RGB, side x side. The same composition at every side."""
    rng = rng_of(scene.seed, scene.index, "picture")
    figures = place(scene, side, font, rng)
    image = paint(scene.place, side, rng)
    for figure, x, y in figures:
        _halo(image, figure, x, y, scene.place)
        image.paste(figure, (x, y), figure)
    if scene.place == "snow":
        image.paste((255, 255, 255), mask=flakes(side, rng))
    return image


def draw_mask(scene: Scene, side: int, font: str | Path | None = None) -> Image.Image:
    """Where the figures of `draw`'s picture are: greys, side x side, 255 within a figure and 0 outside."""
    mask = Image.new("L", (side, side))
    for figure, x, y in place(scene, side, font, rng_of(scene.seed, scene.index, "picture")):
        mask.paste(255, (x, y), figure.getchannel("A"))
    return mask


def place(
    scene: Scene, side: int, font: str | Path | None, rng: np.random.Generator
) -> list[tuple[Image.Image, int, int]]:
    """Each figure as it stands in a picture of `side` pixels, with its left and top, the farthest first."""
    figure = sprite(scene.subject, scene.colour, font)
    placed = []
    for box in layout(scene, figure.width / figure.height, rng):
        x, y = round(box.left * side), round(box.top * side)
        right, bottom = round((box.left + box.width) * side), round((box.top + box.height) * side)
        size = (max(1, right - x), max(1, bottom - y))
        # Pillow averages RGBA premultiplied: no fringes
        placed.append((figure.resize(size, Image.Resampling.LANCZOS), x, y))
    return placed


def _halo(image: Image.Image, figure: Image.Image, x: int, y: int, place: str) -> None:
    """A soft edge of shade, or of light where it is dark, that sets the figure off from the place."""
    reach = max(2, image.width // 24)
    alpha = Image.new("L", (figure.width + 2 * reach, figure.height + 2 * reach))
    alpha.paste(figure.getchannel("A"), (reach, reach))
    colour, strength = LIGHT if place in ("night", "water") else SHADE
    soft = alpha.filter(ImageFilter.BoxBlur(reach / 3)).filter(ImageFilter.BoxBlur(reach / 3))
    image.paste(colour, (x - reach, y - reach), soft.point(strength))


# ---- for training


class SceneSource:
    """An endless source of (picture, captions). Read it by index; it has no length and no state."""

    def __init__(
        self,
        seed: int = 0,
        size: int = 64,
        style: Style = "shapes",
        subjects: str | Sequence[str] = "all",
        font: str | Path | None = None,
        split: Split = "train",
    ) -> None:
        """subjects: "all" of the style, "few" (24 pictograms easily told apart when small), or names.

        Raises ValueError for an unknown style, subject or split, a size below 16, a missing font.
        """
        if style not in SUBJECTS:
            raise ValueError(f"style={style!r} is unknown: use one of {', '.join(SUBJECTS)}")
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} is unknown: use one of {', '.join(get_args(Split))}")
        if size < 16:
            raise ValueError(f"size={size} pixels is too small to show anything: use 16 or more")
        if isinstance(subjects, str):
            sets = {"all": SUBJECTS[style], "few": FEW if style == "pictograms" else SHAPES}
            if subjects not in sets:
                raise ValueError(f"subjects={subjects!r} is unknown: use all, few, or a list of names")
            subjects = sets[subjects]
        if not subjects:
            raise ValueError("subjects is empty: use all, few, or a list of names")
        for name in subjects:
            if name not in SUBJECTS[style]:
                known = ", ".join(SUBJECTS[style])
                raise ValueError(f"subjects: {name!r} is none of the {style}: use some of {known}")
        self.font = str(find_font(font)) if style == "pictograms" else None
        sprite(subjects[0], None, self.font)  # a font that cannot be used is found out now
        self.style, self.seed, self.size = style, seed, size
        self.subjects, self.split = tuple(subjects), split
        self.describe(0)  # so is a split that these subjects leave empty

    def describe(self, index: int) -> Scene:
        """What picture `index` shows."""
        return describe(self.seed, index, self.subjects, self.split)

    @property
    def drawing(self) -> str:
        """What the pixels are a function of beside seed and index: this code, and the font."""
        digest = "" if self.font is None else hashlib.sha256(Path(self.font).read_bytes()).hexdigest()
        return f"drawing {DRAWING}" + (f", font {digest[:12]}" if digest else "")

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        scene = self.describe(index)
        return draw(scene, self.size, self.font), captions(scene)

    def mask(self, index: int) -> Image.Image:
        """Where the figures of picture `index` are."""
        return draw_mask(self.describe(index), self.size, self.font)


def sheet(path: str | Path, source: SceneSource, count: int = 40) -> None:
    """Writes `count` scenes with their captions below as one PNG. Small scenes are shown enlarged."""
    columns, zoom = 8, max(1, 192 // source.size)
    tile, text = source.size * zoom, 44
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * (tile + 8) + 8, rows * (tile + text) + 8), "white")
    pen = ImageDraw.Draw(page)
    for k in range(count):
        image, lines = source[k]
        x, y = 8 + k % columns * (tile + 8), 8 + k // columns * (tile + text)
        page.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        caption = textwrap.wrap(lines[k % len(lines)], max(12, tile // 6))
        pen.multiline_text((x, y + tile + 2), "\n".join(caption[:3]), fill="black", spacing=1)
    page.save(path, format="PNG")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m train.data.scenes", description="A sheet of captioned scenes."
    )
    parser.add_argument("--out", default="sheet.png", help="the PNG to write")
    parser.add_argument("--style", default="pictograms", choices=list(SUBJECTS))
    parser.add_argument("--subjects", default="all", help="all, few, or names with commas")
    parser.add_argument("--split", default="train", choices=get_args(Split))
    parser.add_argument("--size", type=int, default=64, help="side of a picture, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--font", help="path of NotoColorEmoji.ttf, if it is in no usual place")
    args = parser.parse_args(arguments)
    subjects = args.subjects if args.subjects in ("all", "few") else args.subjects.split(",")
    try:
        source = SceneSource(args.seed, args.size, args.style, subjects, args.font, args.split)
        sheet(args.out, source, args.count)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
