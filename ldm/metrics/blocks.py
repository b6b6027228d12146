"""Features of pictures in blocks, each a file: ranks share them out, and what is there is not computed again.

Ranks deal the blocks out among themselves by their number alone, as they do pictures. A block's file is named
by all that it is a function of: its pictures' files, what they went through, and the extractor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm.command.gallery import Rank
from ldm.files.checkpoint import read_tensors
from ldm.files.config import replacing
from ldm.metrics.drawing import wait_for
from ldm.metrics.extractors import Extractor, Features
from ldm.metrics.folders import FILTERS, Batch

BLOCK = 256  # pictures; in Inception's features 5 MB
DIGEST = 32  # bytes of a SHA-256


class Pictures(Protocol):
    """What is measured."""

    size: tuple[int, int]
    formats: str

    def __len__(self) -> int: ...
    def marks(self, places: range) -> list[str]: ...  # of each picture what tells it from its earlier self

    def batches(self, places: range, size: int, use: Callable[[Image.Image], Tensor]) -> Iterator[Batch]: ...


class Block(NamedTuple):
    """Some pictures that follow each other."""

    features: Features
    near: Tensor | None  # (B, 2) float64: see Batch
    digests: list[bytes]  # SHA-256 of their files


def seen_by(extractor: Extractor) -> dict[str, Any]:
    """What of a stamp the extractor decides: two collections compare if they have it in common."""
    return {
        "extractor": extractor.name,
        "weights_sha256": extractor.digest,
        "side": extractor.side,
        "filter": extractor.filter,
    }


def compute(pictures: Pictures, places: range, extractor: Extractor, batch_size: int) -> Block:
    """The features of the pictures at some places. Raises ValueError for features that are not finite."""
    scale = FILTERS[extractor.filter]
    found, batches = list[Features](), list[Batch]()
    for batch in pictures.batches(places, batch_size, lambda image: scale(image, extractor.side)):
        features = extractor(batch.pixels)
        if not features.pooled.isfinite().all():
            raise ValueError(f"the features of {extractor.name} are not finite: are its weights whole?")
        found.append(Features(*(None if each is None else each.float().cpu() for each in features)))  # type: ignore[arg-type]
        batches.append(batch._replace(pixels=torch.empty(0)))
    columns = (joined([getattr(each, name) for each in found]) for name in Features._fields)
    digests = [digest for batch in batches for digest in batch.digests]
    return Block(Features(*columns), joined([batch.near for batch in batches]), digests)  # type: ignore[arg-type]


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """All rows; None where there are none."""
    rows = [part for part in parts if part is not None]
    return torch.cat(rows) if rows else None


def save_block(block: Block, path: Path) -> None:
    """Writes a block, whole or not at all."""
    tensors = {name: value for name, value in block.features._asdict().items() if value is not None}
    if block.near is not None:
        tensors["near"] = block.near
    tensors["digests"] = torch.frombuffer(bytearray(b"".join(block.digests)), dtype=torch.uint8)
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)


def load_block(path: Path) -> Block:
    """What save_block wrote."""
    tensors = read_tensors(path)
    raw, near = bytes(tensors.pop("digests").tolist()), tensors.pop("near", None)
    return Block(Features(**tensors), near, [raw[at : at + DIGEST] for at in range(0, len(raw), DIGEST)])


def block_file(folder: Path, pictures: Pictures, places: range, extractor: Extractor) -> Path:
    """Where a block is kept."""
    decides = json.dumps([seen_by(extractor), pictures.size, pictures.marks(places)])
    return folder / f"{extractor.name}-{hashlib.sha256(decides.encode()).hexdigest()[:20]}.safetensors"


def blocks_of(
    pictures: Pictures, extractor: Extractor, batch_size: int, title: str, folder: Path | None
) -> Iterator[Block]:
    """All blocks in their order. folder: where they are kept, and where other ranks put theirs; or None."""
    from tqdm import tqdm  # 40 ms

    count = len(pictures)
    parts = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    with tqdm(total=count, desc=title, unit=" pictures", leave=False, disable=not sys.stderr.isatty()) as bar:
        paths = (
            share_out(pictures, extractor, folder, batch_size, lambda places: bar.update(len(places)))
            if folder
            else [None] * len(parts)
        )
        for places, path in zip(parts, paths, strict=True):
            if path is None:
                yield compute(pictures, places, extractor, batch_size)
                bar.update(len(places))
            else:
                wait_for([path])
                yield load_block(path)


def share_out(
    pictures: Pictures,
    extractor: Extractor,
    folder: Path,
    batch_size: int = 32,
    tell: Callable[[range], object] = len,
) -> list[Path]:
    """Computes what lacks of this rank's share of the blocks; the files of all. tell: hears of each."""
    rank, count = Rank.of_environment(), len(pictures)
    parts = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    paths = [block_file(folder, pictures, places, extractor) for places in parts]
    for number, (places, path) in enumerate(zip(parts, paths, strict=True)):
        if number % rank.count == rank.number and not path.is_file():
            save_block(compute(pictures, places, extractor, batch_size), path)
            tell(places)
    return paths
