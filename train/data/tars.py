"""Tars in the layout of webdataset, local or anywhere fsspec reaches, read by index without being unpacked.

A sample is the files of one name up to its first dot: a picture and a `.txt`, `.caption` or `.json` with its
caption. Where each lies is found once, a tar at a time, and kept in the user's cache folder; the index of a
tar that has changed since is made anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec
from PIL import Image
from tqdm import tqdm

from ldm.files.config import replacing
from train.batches.buckets import Size
from train.data.captions import Captions, captions_of, clean_captions, plain, tell_kinds, text_kind
from train.data.labels import Labels
from train.data.pictures import (
    IMAGE_SUFFIXES,
    UNREADABLE,
    opacity,
    open_checked,
    printable,
    tell_rejected,
    upright,
    upright_size,
)

log = logging.getLogger(__name__)
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
FORMAT = 2  # of an index; raised when what it holds changes
ATTEMPTS = 4  # at reading from a place that is not local


class TarSample(NamedTuple):
    """Where a picture lies, and what was read of it when the index was made."""

    name: str
    offset: int  # in the tar, in bytes
    length: int
    size: Size
    captions: Captions


class TarIndex(NamedTuple):
    """What a tar holds. stamp: changes when the tar does."""

    path: str
    stamp: str
    samples: list[TarSample]
    rejected: dict[str, str]


class Tars:
    """The samples of one or many tars. `source` may hold braces, `part-{000..099}.tar`, or stars."""

    def __init__(self, source: str, kinds: Sequence[str], max_bad_fraction: float) -> None:
        paths = find_tars(source)
        many = len(paths) > 1 and sys.stderr.isatty()
        bar = tqdm(paths, unit="tar", desc="reading where samples lie", disable=not many)
        self.labels: Labels | None = None
        self.indices = [index_of(path, kinds) for path in bar]
        self.rejected = {
            f"{index.path}: {name}": why for index in self.indices for name, why in index.rejected.items()
        }
        self.entries = [(index.path, sample) for index in self.indices for sample in index.samples]
        tell_rejected(source, self.rejected, len(self.entries) + len(self.rejected), max_bad_fraction)
        tell_kinds(source, (sample.captions for _, sample in self.entries), kinds)
        self.kinds = kinds
        content = [self.content(one) for _, one in self.entries]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.description = f"{len(self.entries)} pictures in {len(paths)} tars, contents {digest[:16]}"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Image.Image, Captions]:
        return self.read(index, upright), self.entries[index][1].captions

    def mask(self, index: int) -> Image.Image:
        return self.read(index, opacity)

    def size(self, index: int) -> Size:
        return self.entries[index][1].size

    def content(self, sample: TarSample) -> tuple[Any, ...]:
        """What tells a sample from another, as far as the index of its tar knows."""
        return sample.name, sample.length, plain(sample.captions, self.kinds)

    def contents(self) -> dict[str, str]:
        told = {
            f"{path}: {one.name}": json.dumps(self.content(one), sort_keys=True) for path, one in self.entries
        }
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in told.items()}

    def read(self, index: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
        """What `convert` makes of a picture. Raises ValueError if it cannot be decoded."""
        path, sample = self.entries[index]
        content = read_part(path, sample.offset, sample.length)
        try:
            with open_checked(io.BytesIO(content)) as image:
                return convert(image)
        except UNREADABLE as error:
            raise ValueError(f"{printable(sample.name)} in {path} cannot be decoded: {error}") from error


def holds_only_tars(folder: Path) -> bool:
    """Whether a folder holds tars, and neither pictures nor captions beside them."""
    files = list(folder.iterdir())
    others = any(one.suffix.lower() in IMAGE_SUFFIXES or one.stem == "metadata" for one in files)
    return not others and any(one.suffix == ".tar" for one in files)


def find_tars(source: str) -> list[str]:
    """The paths or addresses that a source names, sorted. Raises ValueError if there are none."""
    if Path(source).is_dir():
        source = f"{source}/*.tar"
    found: list[str] = []
    for pattern in expand_braces(source):
        found += patiently(pattern, partial(glob, pattern)) if "*" in pattern else [pattern]
    if not found:
        raise ValueError(f"data.source={source!r} names no tar")
    return sorted(found)


def glob(pattern: str) -> list[str]:
    """The paths or addresses that a pattern with stars fits."""
    files, path = fsspec.core.url_to_fs(pattern)
    return [files.unstrip_protocol(one) if is_remote(pattern) else one for one in files.glob(path)]


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{08..10}` to a-08, a-09 and a-10; `{a,b}` to a and b; any number of them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        width = len(numbers[1])
        parts = [f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        parts = match[1].split(",")
    for part in parts:
        yield from expand_braces(pattern[: match.start()] + part + pattern[match.end() :])


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith(("file://", "local://"))


def patiently(path: str, read: Callable[[], Any]) -> Any:
    """What `read` gives; from a remote place it is asked up to ATTEMPTS times, with longer and longer pauses.

    Raises OSError, naming the place, if none succeeds: the run ends and can be resumed.
    """
    pauses = [0.5 * 4**k for k in range(ATTEMPTS - 1)] if is_remote(path) else []  # seconds
    for pause in [*pauses, None]:
        try:
            return read()
        except Exception as error:  # noqa: BLE001 (each protocol raises what it likes)
            reason = error
        # what no second attempt mends: a protocol that is not known, or whose package is not installed
        if pause is None or isinstance(reason, ImportError | ValueError):
            break
        log.info("%s cannot be read, asking again in %g s: %r", path, pause, reason)
        time.sleep(pause)
    again = f" after {ATTEMPTS} attempts" if pauses and pause is None else ""
    raise OSError(f"{path} cannot be read{again}: {str(reason) or repr(reason)}") from reason


def read_part(path: str, offset: int, length: int) -> bytes:
    """Some bytes of a file. Raises OSError if they cannot be had."""

    def read() -> bytes:
        with fsspec.open(path, "rb") as file:
            file.seek(offset)
            content = file.read(length)
        if len(content) < length:
            raise OSError(f"it ends at byte {offset + len(content)}, within a sample")
        return bytes(content)

    return patiently(path, read)


def stamp_of(path: str) -> str:
    """Size and time of a file, or what else its place knows of its content."""
    files, name = fsspec.core.url_to_fs(path)
    info = files.info(name)
    return str([info.get(key) for key in ("size", "mtime", "LastModified", "ETag", "etag", "updated")])


def index_of(path: str, kinds: Sequence[str]) -> TarIndex:
    """The index of a tar, from the cache folder unless stale. Raises OSError if it cannot be read."""
    stamp = patiently(path, lambda: stamp_of(path))
    absolute = path if "://" in path else str(Path(path).absolute())
    key = hashlib.sha256(repr((FORMAT, absolute, list(kinds))).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / f"tar-{key[:24]}.json"
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            samples = [
                TarSample(name, offset, length, Size(*size), captions)
                for name, offset, length, size, captions in kept["samples"]
            ]
            return TarIndex(path, stamp, samples, kept["rejected"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or one that was cut: it is made anew
    index = patiently(path, lambda: build_index(path, stamp, kinds))
    try:
        with replacing(cache) as temporary:
            content = {"stamp": stamp, "samples": index.samples, "rejected": index.rejected}
            temporary.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        log.warning("the index of %s is not kept: %s", path, error)
    return index


def build_index(path: str, stamp: str, kinds: Sequence[str]) -> TarIndex:
    """Reads every header of a tar and every picture's, and all captions."""
    pictures: dict[str, tuple[int, int, Size]] = {}
    captions: dict[str, Captions] = {}
    rejected: dict[str, str] = {}
    with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            place = PurePosixPath(member.name)
            stem, _, suffix = place.name.partition(".")
            name, suffix = str(place.parent / stem), f".{suffix.lower()}"
            if not member.isfile() or not (suffix in IMAGE_SUFFIXES or suffix in CAPTION_SUFFIXES):
                continue
            content = tar.extractfile(member)
            assert content is not None, "a file has content"
            if suffix in CAPTION_SUFFIXES:
                for kind, texts in read_caption(content, suffix, kinds).items():
                    captions.setdefault(name, {}).setdefault(kind, []).extend(texts)
                continue
            try:
                with open_checked(content) as image:
                    pictures[name] = (member.offset_data, member.size, upright_size(image))
            except UNREADABLE as error:
                rejected[name] = str(error)
    samples = []
    for name, (offset, length, size) in pictures.items():
        if captions.get(name):
            found = {kind: captions[name][kind] for kind in kinds if kind in captions[name]}
            samples.append(TarSample(name, offset, length, size, found))
        else:
            rejected[name] = f"it has no caption: no {', '.join(CAPTION_SUFFIXES)} of its name holds one"
    return TarIndex(path, stamp, samples, rejected)


def read_caption(content: BinaryIO | Any, suffix: str, kinds: Sequence[str]) -> Captions:
    """The captions in a file of a tar; none where it holds none."""
    text = content.read().decode("utf-8", errors="replace")
    if suffix != ".json":
        texts = clean_captions(text)
        return {text_kind(suffix, kinds): texts} if texts else {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return captions_of(value, kinds) if isinstance(value, dict) else {}
