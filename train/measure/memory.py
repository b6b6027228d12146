"""Has a model learnt training pictures by heart? What it draws against all of them, and what chance does.

Pictures are looked at as pixels and, if asked for, as an extractor sees them; ldm/metrics/copies.py tells
what is near. What a model draws is soft, as its autoencoder is, so the training pictures that set the
threshold go through that autoencoder too, before they are compared with all training pictures as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from autoencoder.vae import AutoencoderKL
from ldm.metrics.audit import AROUND
from ldm.metrics.copies import Neighbours, Verdict, judge
from ldm.metrics.extractors import Extractor
from ldm.metrics.folders import FILTERS
from ldm.metrics.scenes import through
from train.batches.buckets import Size, View, frame
from train.batches.plan import spread
from train.data.pictures import to_images, to_tensor
from train.data.source import Source

GRID = 32  # pixels a side, to which pictures are averaged before their pixels are compared
BATCH = 512  # training pictures that come by at once
PIXELS = "pixels"


class Looks(NamedTuple):
    """Some pictures, in the ways that they are looked at."""

    places: Tensor  # (B,) int64, in the source
    pixels: Tensor  # (B, 3, GRID, GRID) uint8
    seen: Tensor  # (B, 3, side, side) float32 in [0, 255], for the extractor; (B, 0) without one


class Looking(Dataset[Looks]):
    """The squares that training sees of a source, by the batch, without what cannot be decoded."""

    def __init__(self, source: Source, size: int, extractor: Extractor | None) -> None:
        self.source, self.size = source, size
        self.scaling = None if extractor is None else (extractor.filter, extractor.side)

    def __len__(self) -> int:
        return -(-len(self.source) // BATCH)

    def __getitem__(self, number: int) -> Looks:
        places = range(number * BATCH, min((number + 1) * BATCH, len(self.source)))
        return self.looks([(place, image) for place in places if (image := self.square(place)) is not None])

    def square(self, place: int) -> Image.Image | None:
        """The picture as training sees it; None if it cannot be decoded."""
        try:
            return frame(self.source[place][0], Size(self.size, self.size), View())
        except ValueError:
            return None

    def looks(self, pictures: Sequence[tuple[int, Image.Image]]) -> Looks:
        """Of pictures with their places."""
        count = len(pictures)
        pixels = torch.zeros(count, 3, GRID, GRID, dtype=torch.uint8)
        seen = torch.zeros((count, 3, self.scaling[1], self.scaling[1]) if self.scaling else (count, 0))
        for row, (_, image) in enumerate(pictures):
            small = np.array(image.resize((GRID, GRID), Image.Resampling.BOX))
            pixels[row] = torch.from_numpy(small).permute(2, 0, 1)
            if self.scaling:
                name, side = self.scaling
                seen[row] = FILTERS[name](image, side)
        return Looks(torch.tensor([place for place, _ in pictures], dtype=torch.int64), pixels, seen)


def vectors(looks: Looks, extractor: Extractor | None) -> dict[str, Tensor]:
    """What distances are taken of, (B, D) float32, by the way of looking."""
    found = {PIXELS: looks.pixels.flatten(1).float() / 127.5 - 1}
    if extractor is not None:
        parts = [extractor(part).pooled.float().cpu() for part in looks.seen.split(64)]
        found[extractor.name] = torch.cat(parts)
    return found


class Findings(NamedTuple):
    """What was found."""

    verdicts: Mapping[str, Verdict]  # by the way of looking
    trained: int  # training pictures that came by


def look_for_copies(
    drawn: Sequence[Image.Image],
    source: Source,
    vae: AutoencoderKL,
    extractor: Extractor | None = None,
    *,
    size: int,
    known: int,
    quantile: float,
    workers: int,
) -> Findings:
    """Compares pictures that a model drew with all of a source.

    drawn: squares of `size` pixels. known: training pictures that set the threshold, at `quantile` of their
    ratios. workers: processes that read or draw the training pictures; 0: this one.
    Raises ValueError for a source of which fewer than three pictures can be read, or none of the known.
    """
    every = Looking(source, size, extractor)
    squares = [(place, every.square(place)) for place in spread(len(source), known)]
    chosen = [(place, image) for place, image in squares if image is not None]
    if not chosen:
        raise ValueError(
            f"none of the {len(squares)} training pictures that set the threshold can be decoded: ask for "
            "more, by --known"
        )
    back = through(vae, torch.stack([to_tensor(image) for _, image in chosen]))
    asked = [*((-1, image) for image in drawn), *((p, i) for (p, _), i in zip(chosen, to_images(back)))]
    queries = vectors(every.looks(asked), extractor)
    near = {way: Neighbours(rows, AROUND + 1) for way, rows in queries.items()}
    for looks in passing(every, workers):
        for way, rows in vectors(looks, extractor).items():
            near[way].add(rows, looks.places)
    own = torch.tensor([place for place, _ in chosen], dtype=torch.int64)
    verdicts = {way: judge(each, own, quantile) for way, each in near.items()}
    return Findings(verdicts, near[PIXELS].seen)


def passing(every: Looking, workers: int) -> Iterator[Looks]:
    """All pictures, a batch at a time."""
    options: dict[str, Any] = {"multiprocessing_context": "spawn"} if workers else {}
    loader = DataLoader(every, batch_size=None, num_workers=workers, **options)
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(every.source), unit=" pictures", desc="looking", leave=False, disable=quiet) as bar:
        for looks in loader:
            bar.update(len(looks.places))
            if len(looks.places):
                yield Looks(*looks)
