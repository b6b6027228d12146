"""Pictures that are nearly the same: in a training set, or between what a model draws and what it has seen.

Two ways of looking, as neither sees all: a perceptual hash knows crops of a pixel, other sizes and other
compressions; an extractor's features know what looks alike to it. The features of all pictures are in memory.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.command.loading import find_device
from ldm.files.config import replacing, write_json
from ldm.metrics.blocks import Pictures
from ldm.metrics.collection import collect
from ldm.metrics.extractors import Extractor, RandomConv, find_extractor
from ldm.metrics.folders import Folder, Read
from ldm.metrics.kernels import ROWS
from ldm.metrics.manifolds import nearest
from ldm.metrics.measurement import output_folder
from ldm.metrics.report import page
from ldm.recipes.picture import save_picture

SIDE, LOW = 32, 8  # of the perceptual hash: pixels, and frequencies on each axis
BITS = LOW * LOW - 1
LOOSE, STRICT = 0.5, 0.1  # ratios: Carlini's, and ours for features that know colours alone
AROUND = 50  # nearest pictures whose mean distance is the measure (Carlini et al. 2023)

WHYS = ("identical", "hash", "features", "")  # a pair is told, the surest first; "" if it is not


class Named(Pictures, Protocol):
    """Pictures that can be shown."""

    title: str  # where they are

    def read(self, place: int) -> Read: ...
    def called(self, place: int) -> str: ...


class Limits(NamedTuple):
    """What counts as near."""

    bits: int  # in which perceptual hashes may differ, of BITS
    ratio: float  # see Pair
    extractor: str  # whose features they are


class Pair(NamedTuple):
    """A picture and the one that is nearest to it."""

    picture: int  # its place
    other: int
    bits: int  # in which their perceptual hashes differ, of BITS
    distance: float  # of their features
    ratio: float  # distance to the mean over the AROUND nearest: 1 is as near as others
    why: str  # it is told, of WHYS


def perceptual_hash(image: Image.Image) -> Tensor:
    """(BITS,) of -1 and 1: which of the lowest frequencies lie above their median (Zauner 2010).

    Of the grey picture of SIDE x SIDE pixels, by its cosine transform without the mean.
    """
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(SIDE, SIDE).double()
    place = torch.arange(SIDE, dtype=torch.float64)
    waves = torch.cos(math.pi / SIDE * (place + 0.5) * place[:LOW, None])  # (LOW, SIDE): DCT-II
    low = (waves @ pixels @ waves.T).flatten()[1:]
    return torch.where(low > low.median(), 1.0, -1.0).float()


def hashes(pictures: Pictures) -> Iterator[tuple[Tensor, bytes]]:
    """Of each picture (2, BITS), as it is and mirrored, and its digest."""

    def both(image: Image.Image) -> Tensor:
        return torch.stack([perceptual_hash(image), perceptual_hash(ImageOps.mirror(image))])

    for batch in pictures.batches(range(len(pictures)), 64, both):
        yield from zip(batch.pixels, batch.digests, strict=True)


def nearest_hash(a: Tensor, b: Tensor, same: bool) -> tuple[Tensor, Tensor]:
    """Of each hash of a (N, 2, BITS) the nearest of b (M, 2, BITS), mirrored or not: bits and places, (N,).

    same: a is b, and no picture is its own neighbour.
    """
    bits, places = list[Tensor](), list[Tensor]()
    for start in range(0, len(a), ROWS):
        rows = a[start : start + ROWS, 0]
        table = torch.minimum(*((BITS - rows @ b[:, turned].T) / 2 for turned in (0, 1)))
        if same:
            table[torch.arange(len(rows)), start + torch.arange(len(rows))] = BITS
        found = table.min(1)
        bits.append(found.values.round().int())
        places.append(found.indices)
    return torch.cat(bits), torch.cat(places)


def nearest_features(a: Tensor, b: Tensor, same: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a (N, D) the nearest of b (M, D): distances, the mean ones of AROUND, places, (N,)."""
    count = min(AROUND + same, len(b))
    distances, places = nearest(a, b, count)
    if same:  # itself is left out, wherever ties have put it
        own = places == torch.arange(len(a))[:, None]
        own[~own.any(1), -1] = True  # lost among more copies than are looked at
        distances, places = (x[~own].view(len(a), count - 1) for x in (distances, places))
    return distances[:, 0], distances.mean(1), places[:, 0]


def audit(args: argparse.Namespace) -> Path:
    """Looks for pairs and writes them down: the path of the report. Raises ValueError for what cannot be."""
    output = output_folder(args)
    extractor = find_extractor(args.extractor or RandomConv.name, find_device(args.device))
    sets = [Folder(Path(os.path.expanduser(args.folder)), mixed=True)]
    if args.against:
        sets.append(Folder(Path(os.path.expanduser(args.against)), mixed=True))
    return audit_sets(sets, extractor, output, bits=args.bits, ratio=args.ratio, show=args.pairs)


def audit_sets(
    sets: Sequence[Named],
    extractor: Extractor,
    output: Path,
    *,
    bits: int = 6,
    ratio: float | None = None,
    show: int = 32,
) -> Path:
    """Writes the pairs within one set, or of one with another: the path of the report.

    bits, ratio: see Limits; None: what suits the extractor. show: pairs on the sheet.
    """
    usual = STRICT if extractor.name == RandomConv.name else LOOSE
    limits = Limits(bits, usual if ratio is None else ratio, extractor.name)
    ours, same = sets[0], len(sets) == 1
    marks = [list(hashes(each)) for each in sets]
    codes = [torch.stack([code for code, _ in each]) for each in marks]
    features = [collect(each, extractor, keep=len(each), title=each.title).features for each in sets]
    apart, by_hash = nearest_hash(codes[0], codes[-1], same)
    distances, means, by_features = nearest_features(features[0], features[-1], same)
    digests = [[digest for _, digest in each] for each in marks]
    pairs = []
    for place in range(len(ours)):
        hashed = int(apart[place]) <= limits.bits
        other = int(by_hash[place] if hashed else by_features[place])
        differ = torch.minimum(*((codes[0][place, 0] != codes[-1][other, turned]).sum() for turned in (0, 1)))
        equal = digests[0][place] == digests[-1][other]
        near = bool(distances[place] <= limits.ratio * means[place])
        why = "identical" if equal else "hash" if hashed else "features" if near else ""
        distance = float((features[0][place] - features[-1][other]).double().norm())
        part = distance / float(means[place]) if means[place] > 0 else 0.0
        pairs.append(Pair(place, other, int(differ), distance, part, why))
    return write_audit(output, pairs, sets, limits, show)


def nearness(pair: Pair) -> tuple[int, int, float]:
    """By which pairs are sorted, the nearest first."""
    return WHYS.index(pair.why), pair.bits if pair.why == "hash" else 0, pair.ratio


def once(pairs: list[Pair]) -> list[Pair]:
    """Of pairs within one set each but once, the first, whichever way round."""
    first: dict[frozenset[int], Pair] = {}
    for pair in pairs:
        first.setdefault(frozenset((pair.picture, pair.other)), pair)
    return list(first.values())


def write_audit(output: Path, pairs: list[Pair], sets: Sequence[Named], limits: Limits, show: int) -> Path:
    """Writes pairs.json, sheet.png and report.md, which is read; its path."""
    pairs = sorted(pairs, key=nearness)
    if len(sets) == 1:
        pairs = once(pairs)
    ours, theirs = sets[0], sets[-1]
    name = lambda pair: {"picture": ours.called(pair.picture), "other": theirs.called(pair.other)}
    told = [pair for pair in pairs if pair.why]
    write_json(
        output / "pairs.json",
        {"limits": limits._asdict(), "pairs": [pair._asdict() | name(pair) for pair in told]},
    )
    shown = pairs[:show]
    images = [
        each.read(place).image
        for pair in shown
        for each, place in ((ours, pair.picture), (theirs, pair.other))
    ]
    save_picture(page(images, 8), output / "sheet.png", overwrite=True)
    counts = {why: sum(pair.why == why for pair in told) for why in WHYS[:3]}
    what = f"{len(theirs)} of {theirs.title}" if len(sets) > 1 else "each other"
    how = ", ".join(f"{count} by {why}" for why, count in counts.items()).replace("by identical", "identical")
    rows = (
        f"| {' | '.join(name(p).values())} | {p.bits} | {p.distance:.4g} | {p.ratio:.3f} | {p.why or '–'} |"
        for p in shown
    )
    lines = [
        "# Audit",
        "",
        f"{len(ours)} pictures of {ours.title} against {what}: {len(told)} near pairs ({how}).",
        "",
        f"Near: perceptual hashes, mirrored or not, that differ in at most {limits.bits} of {BITS} bits, or "
        f"a distance in the features of {limits.extractor} of at most {limits.ratio} times the mean of the "
        f"{AROUND} nearest.",
        "",
        "| picture | nearest | bits | distance | ratio | told by |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "The sheet has these pairs side by side, the nearest first.",
        "",
        "![nearest pairs](sheet.png)",
    ]
    with replacing(output / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output / "report.md"
