"""The pictures of a source as what measures them takes: the pictures that a model sees in training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor

from ldm.metrics.folders import Batch, Read, refuse
from train.data.source import Source
from train.data.sources import DataConfig, open_source


class SourcePictures:
    """Whole pictures of a source, by their places there; what ldm.metrics calls Pictures, with names."""

    def __init__(self, data: DataConfig) -> None:
        """Raises ValueError if there is no such source, or fewer than two pictures."""
        self.source: Source = open_source(data)
        if len(self.source) < 2:
            raise ValueError(f"{data.source} holds {len(self.source)} pictures: expected 2 or more")
        self.title, self.formats = data.source, "of the source"
        names = list(self.source.contents())  # in the order of the source
        self.names = names if len(names) == len(self.source) else []  # rows of a table have none
        self.size = self.read(0).image.size

    def __len__(self) -> int:
        return len(self.source)

    def called(self, place: int) -> str:
        """The name of the picture at this place, or the place."""
        return self.names[place] if self.names else f"picture {place}"

    def read(self, place: int) -> Read:
        """The picture at this place, and the digest of its pixels. Raises ValueError if it is broken."""
        image, _ = self.source[place]
        return Read(image, hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest())

    def marks(self, places: range) -> list[str]:
        return [f"{self.source.description} {place}" for place in places]

    def batches(self, places: range, size: int, use: Callable[[Image.Image], Tensor]) -> Iterator[Batch]:
        """Like Folder.batches, in one thread."""
        wrong: dict[str, str] = {}
        for start in range(0, len(places), size):
            rows: list[tuple[Tensor, bytes]] = []
            for place in places[start : start + size]:
                try:
                    read = self.read(place)
                    rows.append((use(read.image), read.digest))
                except ValueError as error:
                    wrong[self.called(place)] = str(error).split(" cannot be decoded: ")[-1]
            if rows:
                yield Batch(torch.stack([row for row, _ in rows]), [digest for _, digest in rows])
        refuse(self.title, wrong, len(self))
