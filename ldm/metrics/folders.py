"""Pictures to be measured: of a folder, or as an autoencoder gives them back; scaled for a network."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.drawing.pixels import IMAGE_SUFFIXES, UNREADABLE, open_checked, upright

READERS = 4  # threads that decode and scale
SHOWN = 10  # lines of what is wrong


class Batch(NamedTuple):
    """Some pictures, as a network sees them."""

    pixels: Tensor  # (B, 3, side, side) float32 in [0, 255], or what else was made of each
    digests: list[bytes]  # SHA-256 of their files
    near: Tensor | None = None  # (B, 2) float64: squared error and SSIM of what an autoencoder gives back


class Read(NamedTuple):
    """A picture of a folder."""

    image: Image.Image  # RGB
    digest: bytes  # SHA-256 of its file


def centre(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle, scaled to side x side pixels (bicubic, antialiased)."""
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    square = image.crop((left, top, left + short, top + short))
    return square if short == side else square.resize((side, side), Image.Resampling.BICUBIC)


def refuse(folder: Path | str, wrong: Mapping[str, str], count: int) -> None:
    """Raises ValueError, with the first names and why, if pictures of a folder cannot be read."""
    if wrong:
        lines = [f"\n  {name!a}: {why}" for name, why in list(wrong.items())[:SHOWN]]
        raise ValueError(
            f"{len(wrong)} of {count} pictures in {folder} cannot be read: take them out. The first are"
            + "".join(lines)
        )


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and those below it, by their names; hidden ones aside."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


class Folder:
    """The pictures in a folder and those below it, by their names, all of one size."""

    def __init__(
        self,
        folder: Path,
        *,
        count: int | None = None,
        names: Sequence[str] | None = None,
        side: int | None = None,
        mixed: bool = False,
    ) -> None:
        """count: how many, evenly spread; None takes all. names: just these. side: pixels of the
        centred square of each. mixed: whether they may be of several sizes; `size` is then the most usual.

        Raises ValueError if there is no such folder, too few pictures, one that is none, or several sizes.
        """
        if not folder.is_dir():
            raise ValueError(f"no such folder {folder}: expected one with pictures")
        found = find_pictures(folder) if names is None else [folder / name for name in names]
        if len(found) < max(count or 0, 2):
            raise ValueError(f"{folder} holds {len(found)} pictures: expected {count or '2 or more'}")
        if count is not None:
            found = [found[place * len(found) // count] for place in range(count)]
        self.folder, self.paths, self.side, self.title = folder, found, side, str(folder)
        self.formats = ", ".join(sorted({path.suffix.lower() for path in found}))
        sizes, wrong = Counter[tuple[int, int]](), dict[str, str]()
        for path in found:
            try:
                with open_checked(path) as image:
                    sizes[image.size] += 1
            except UNREADABLE as error:
                wrong[self.name(path)] = str(error)
        refuse(folder, wrong, len(found))
        if side is None and len(sizes) > 1 and not mixed:
            some = ", ".join(f"{count} of {w}x{h}" for (w, h), count in sizes.most_common(3))
            raise ValueError(
                f"{folder} holds pictures of {len(sizes)} sizes ({some}): give --size PIXELS, and all are "
                "cropped to the square in their middle and scaled to that"
            )
        self.size = (side, side) if side else sizes.most_common(1)[0][0]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def called(self, place: int) -> str:
        """The name of the picture at this place."""
        return self.name(self.paths[place])

    def read(self, place: int) -> Read:
        """The picture at this place, in order of names. Raises ValueError naming a file that is cut."""
        path = self.paths[place]
        try:
            data = path.read_bytes()
            image = upright(open_checked(io.BytesIO(data)))
        except UNREADABLE as error:
            raise ValueError(f"{path} cannot be decoded: {error}") from None
        if self.side:
            image = centre(image, self.side)
        return Read(image, hashlib.sha256(data).digest())

    def marks(self, places: range) -> list[str]:
        """Of each picture its path, bytes and time, and how it is cut: another of that name has others."""
        paths = [self.paths[place] for place in places]
        states = [path.stat() for path in paths]
        return [
            f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {self.side}"
            for path, state in zip(paths, states, strict=True)
        ]

    def batches(self, places: range, size: int, use: Callable[[Image.Image], Tensor]) -> Iterator[Batch]:
        """Batches of what `use` makes of the pictures at some places.

        Raises ValueError at the end with all of these that could not be decoded.
        """
        wrong: dict[str, str] = {}

        def one(place: int) -> tuple[Tensor, bytes] | None:
            try:
                image, digest = self.read(place)
            except ValueError as error:
                wrong[self.name(self.paths[place])] = str(error).split(" cannot be decoded: ")[-1]
                return None
            return use(image), digest

        with ThreadPoolExecutor(READERS) as threads:
            for start in range(0, len(places), size):
                rows = [row for row in threads.map(one, places[start : start + size]) if row is not None]
                if rows:
                    yield Batch(torch.stack([row for row, _ in rows]), [digest for _, digest in rows])
        refuse(self.folder, wrong, len(self))


# Scaling: pictures to (3, side, side) float32 in [0, 255]


def bicubic(image: Image.Image, side: int) -> Tensor:
    """Bicubic with antialiasing, in floats, as clean-fid has it (Parmar et al. 2022)."""
    channels = [
        Image.fromarray(np.asarray(channel, np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        for channel in image.split()
    ]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)


def tf_bilinear(image: Image.Image, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 has it, and so ADM's evaluator and torch-fidelity: pixel i is at i * scale.

    No antialiasing: of a picture that is larger than the network sees, it leaves out pixels.
    """
    pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)
    for dim in (1, 2):
        length = pixels.shape[dim]
        place = torch.arange(side) * (length / side)
        low = place.floor().long()
        high = (low + 1).clamp_max(length - 1)
        weight = (place - low).view(-1, 1) if dim == 1 else place - low
        pixels = pixels.index_select(dim, low).lerp(pixels.index_select(dim, high), weight)
    return pixels


FILTERS: dict[str, Callable[[Image.Image, int], Tensor]] = {"bicubic": bicubic, "tf-bilinear": tf_bilinear}


def fingerprint(digests: Sequence[bytes]) -> str:
    """SHA-256 of a set of pictures, by their files' in order of names: 64 hex digits."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
