"""The memory of a measurement stays flat in the number of pictures: what tensors are there while it runs."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.metrics import collection
from ldm.metrics.copies import Neighbours
from ldm.metrics.extractors import Features
from ldm.metrics.folders import Batch
from ldm.metrics.moments import Moments

SIDE, WIDTH, KEEP = 8, 300, 16  # pixels, of features, and rows that are kept


def held() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    tensors = (each for each in gc.get_objects() if type(each) is Tensor)
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


class Many:
    """So many pictures, each made when it is asked for."""

    size, formats = (SIDE, SIDE), ".png"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def marks(self, places: range) -> list[str]:
        return list(map(str, places))

    def batches(self, places: range, size: int, use: Callable[[Image.Image], Tensor]) -> Iterator[Batch]:
        for start in range(0, len(places), size):
            part = places[start : start + size]
            pictures = [Image.new("RGB", (SIDE, SIDE), (place % 256, 0, 0)) for place in part]
            yield Batch(torch.stack([use(each) for each in pictures]), [bytes(32)] * len(part))


class Wide:
    """An extractor; `leak` has it keep what it gave."""

    name, digest, side, filter = "random-conv", "0", SIDE, "bicubic"

    def __init__(self, leak: bool) -> None:
        self.leak, self.kept = leak, list[Tensor]()

    def __call__(self, pixels: Tensor) -> Features:
        pooled = torch.randn(len(pixels), WIDTH)
        if self.leak:
            self.kept.append(pooled)
        return Features(pooled, torch.randn(len(pixels), 7), torch.rand(len(pixels), 5))


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The most bytes that are held while so many pictures are collected, whenever a block is added."""
    monkeypatch.setattr("ldm.metrics.blocks.BLOCK", 32)
    noted, add = list[int](), collection.more

    def watched(moments: Moments | None, features: Tensor) -> Moments:
        noted.append(held())
        return add(moments, features)

    monkeypatch.setattr(collection, "more", watched)

    def most(count: int, kept: Path | None = None, leak: bool = False) -> int:
        noted.clear()
        collection.collect(Many(count), Wide(leak), batch_size=16, keep=KEEP, kept=kept)
        return max(noted)

    gc.collect()
    gc.freeze()  # what was there before is not asked for
    yield most
    gc.unfreeze()


def test_memory_is_flat_in_the_number_of_pictures(tmp_path, peak):
    """Also where features are kept in files, or a part of them."""
    few, many = peak(96), peak(384)
    assert few > WIDTH * WIDTH * 8, "at least the moments are there"
    assert many <= 1.05 * few
    assert peak(384, leak=True) > many + 250 * WIDTH * 4, "what is kept is seen"
    assert peak(384, tmp_path) <= 1.05 * peak(96, tmp_path)


def test_memory_of_neighbours_is_flat_in_what_comes_by():
    gc.collect()
    gc.freeze()
    bytes_held = []
    near = Neighbours(torch.randn(20, 30), 5)
    for number in range(8):
        near.add(torch.randn(64, 30), torch.arange(64) + 64 * number)
        bytes_held.append(held())
    gc.unfreeze()
    assert max(bytes_held) == bytes_held[0]
