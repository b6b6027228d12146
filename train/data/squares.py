"""The pictures of a source as squares, whatever their shape: what the autoencoder learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from train.batches.buckets import Size, View, frame
from train.data.captions import Captions
from train.data.pictures import tell_rejected, to_tensor
from train.data.source import Source
from train.data.sources import DataConfig, open_source


class Squares:
    """Pictures by index, each data.size x data.size."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.source: Source = open_source(data)
        self.unreadable: dict[int, str] = {}  # pictures, as they are met

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int, view: View = View()) -> Tensor:  # noqa: B008 (a constant)
        """One picture: (3, H, W) in [-1, 1]. The next one if it cannot be decoded.

        Raises ValueError if too many cannot.
        """
        return self.captioned(index, view)[0]

    def captioned(self, index: int, view: View = View()) -> tuple[Tensor, Captions]:  # noqa: B008
        """The same with its captions."""
        size = Size(self.data.size, self.data.size)
        while True:
            if index not in self.unreadable:
                try:
                    picture, captions = self.source[index]
                    return to_tensor(frame(picture, size, view)), captions
                except ValueError as error:
                    self.unreadable[index] = str(error)
                    named = {f"picture {one}": why for one, why in self.unreadable.items()}
                    tell_rejected(self.data.source, named, len(self), self.data.max_bad_fraction)
            index = (index + 1) % len(self)

    def stack(self, indices: Sequence[int]) -> Tensor:
        """The pictures of some indices in order: (B, 3, H, W)."""
        return torch.stack([self.image(index) for index in indices])

    def batches(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """The same in batches of about a million pixels, at most 64 pictures."""
        size = max(1, min(64, 2**20 // self.data.size**2))
        for start in range(0, len(indices), size):
            yield self.stack(indices[start : start + size])
