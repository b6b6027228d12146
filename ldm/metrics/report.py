"""The figures of one set of pictures against another, each with the protocol it was measured by."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ldm.files.config import replacing, write_json
from ldm.metrics.collection import Collection
from ldm.metrics.extractors import Extractor, label
from ldm.metrics.folders import Folder
from ldm.metrics.kernels import cmmd, kid
from ldm.metrics.manifolds import K_DENSITY, K_PRECISION, cover
from ldm.metrics.moments import frechet_distance
from ldm.metrics.scores import SPLITS, inception_score
from ldm.recipes.picture import grid, save_picture

log = logging.getLogger(__name__)

SUBSETS = 100  # of KID (Binkowski et al. 2018, section 4)
SHEET = 64  # pictures of the contact sheet
CELL, LINE = 168, 13  # pixels: the width of a picture with a caption, and the height of a line
# of whom more is better; of the others less
MORE = ("precision", "recall", "density", "coverage", "IS", "CLIP score", "PSNR", "SSIM", "accuracy")


@dataclass(frozen=True)
class Figure:
    """One number, and all that decides it."""

    name: str
    value: float
    std: float | None  # over subsets, splits or pictures, where the figure is a mean over such
    protocol: Mapping[str, Any]

    def row(self) -> str:
        """A line of a table in Markdown."""
        better = "more" if self.name.startswith((*MORE, *(f"r{name}" for name in MORE))) else "less"
        spread = "" if self.std is None else f" ± {self.std:.3g}"
        return f"| {self.name} | {self.value:.5g}{spread} | {better} |"


def compare(
    extractor: Extractor, fake: Collection, real: Collection, protocol: Mapping[str, Any], prefix: str = ""
) -> Iterator[Figure]:
    """All that this extractor's features tell of fake pictures against real ones.

    prefix: r for reconstructions. What a small set cannot give is left out with a warning.
    """
    stamp = {**protocol, "pictures": fake.stamp, "reference": real.stamp}

    def figure(name: str, value: float, std: float | None = None, **options: Any) -> Figure:
        return Figure(prefix + label(name, extractor), value, std, {**stamp, **options})

    few = min(fake.pooled.count, real.pooled.count)
    for kind, ours, theirs in (("FD", fake.pooled, real.pooled), ("sFD", fake.spatial, real.spatial)):
        if ours is None or theirs is None:
            continue
        if few <= len(ours.mean):
            log.warning(
                "%s of %s pictures in %s dimensions is too high: expected more pictures than dimensions, and "
                "compare it only with figures of as many",
                prefix + label(kind, extractor),
                few,
                len(ours.mean),
            )
        yield figure(kind, frechet_distance(ours, theirs))
    if extractor.name == "clip":
        yield figure("CMMD", cmmd(fake.features, real.features))
    kept = len(fake.features), len(real.features)
    size = min(1000, *kept)
    spread = kid(fake.features, real.features, SUBSETS, size)
    if size == max(kept):
        yield figure("KD", spread.mean, subsets=1, subset_size=size)
    else:
        yield figure("KD", spread.mean, spread.std, subsets=SUBSETS, subset_size=size, seed=0)
    if min(kept) > K_DENSITY:
        for name, value in cover(real.features, fake.features)._asdict().items():
            yield figure(name, value, k=K_DENSITY if name in ("density", "coverage") else K_PRECISION)
    else:
        log.warning("precision, recall, density and coverage need %s pictures or more", K_DENSITY + 1)
    if fake.probabilities is not None and not prefix:
        if len(fake.probabilities) >= SPLITS:
            score = inception_score(fake.probabilities)
            yield figure("IS", score.mean, score.std, splits=SPLITS)
        else:
            log.warning("the Inception Score needs %s pictures or more", SPLITS)


def table(figures: Sequence[Figure]) -> str:
    """Of all figures, in Markdown."""
    return "\n".join(["| figure | value | better is |", "|---|---|---|", *(each.row() for each in figures)])


def contact_sheet(pictures: Folder, path: Path) -> None:
    """Writes up to SHEET pictures, evenly spread, on a page."""
    count = min(SHEET, len(pictures))
    shown = [pictures.read(place * len(pictures) // count).image for place in range(count)]
    save_picture(page(shown), path, overwrite=True)


def page(
    images: Sequence[Image.Image],
    columns: int | None = None,
    side: int = 128,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures in rows, large ones scaled to fit into side x side pixels, each above its caption."""
    small = []
    for image in images:
        image = image.copy()
        image.thumbnail((side, side))
        small.append(image)
    width, height = (max(image.size[axis] for image in small) for axis in (0, 1))
    texts = [[] for _ in small] if captions is None else [lines_of(text) for text in captions]
    if captions is not None:
        width = max(width, CELL)
    below = LINE * max(map(len, texts))
    framed = []
    for image, lines in zip(small, texts, strict=True):
        cell = Image.new("RGB", (width, height + below), "white")
        cell.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        ImageDraw.Draw(cell).multiline_text((0, height + 2), "\n".join(lines), "black", spacing=1)
        framed.append(cell)
    return grid(framed, columns)


def lines_of(text: str) -> list[str]:
    """A caption in lines that fit below a picture."""
    return [part for line in text.split("\n") for part in textwrap.wrap(line, CELL // 6)]


def write_report(
    folder: Path, figures: Sequence[Figure], protocol: Mapping[str, Any], told: Sequence[str]
) -> Path:
    """Writes figures.json, every figure with its whole protocol, and report.md, which is read; its path.

    told: the lines of the report above its protocol, in Markdown.
    """
    numbers = [
        {"name": each.name, "value": each.value, "std": each.std, "protocol": each.protocol}
        for each in figures
        if math.isfinite(each.value)
    ]
    write_json(folder / "figures.json", {"figures": numbers})
    lines = ["# Evaluation", "", *told, "", "## Protocol", ""]
    lines += [f"- {name}: {value}" for name, value in flat(protocol)]
    seen: list[Any] = []
    for each in figures:
        for part in ("pictures", "reference"):
            stamp = each.protocol.get(part)
            if isinstance(stamp, Mapping) and stamp not in seen:
                seen.append(stamp)
                lines.append(f"- {part}: " + ", ".join(f"{name} {value}" for name, value in stamp.items()))
    lines += ["", "Every figure with its own protocol is in figures.json.", ""]
    lines += [f"![pictures]({path.name})" for path in [folder / "sheet.png"] if path.is_file()]
    with replacing(folder / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "report.md"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested mappings, the names with dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
