"""What is kept of a set of pictures for the figures: moments of all, features of some; also as a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import ldm
from ldm.checkpoint import read_tensors
from ldm.config import replacing
from ldm.metrics.extractors import Extractor
from ldm.metrics.folders import FILTERS, Folder, fingerprint
from ldm.metrics.moments import Moments

FORMAT = "ldm-reference-1"
KEPT = 10_000  # pictures whose features are kept; as many as ADM's references hold (Dhariwal & Nichol 2021)


class Pictures(Protocol):
    """What is measured."""

    size: tuple[int, int]
    formats: str

    def __len__(self) -> int: ...

    def batches(
        self, size: int, use: Callable[[Image.Image], Tensor]
    ) -> Iterator[tuple[Tensor, list[bytes]]]: ...


@dataclass(frozen=True)
class Collection:
    """Of a set of pictures, in one extractor's features."""

    pooled: Moments  # of all
    spatial: Moments | None  # of all
    features: Tensor  # (K, D) float32: of K of them, evenly spread
    probabilities: Tensor | None  # (K, classes) float32
    stamp: dict[str, Any]  # which pictures, seen how


def is_kept(place: int, count: int, keep: int) -> bool:
    """Whether the picture at this place is one of `keep`, evenly spread over all."""
    return (place + 1) * keep // count > place * keep // count


def collect(
    pictures: Pictures, extractor: Extractor, *, batch_size: int = 32, keep: int = KEPT, title: str = ""
) -> Collection:
    """Runs the extractor over the pictures. Memory does not grow with them beyond `keep` rows of features."""
    from tqdm import tqdm  # 40 ms

    scale = FILTERS[extractor.filter]
    pooled: Moments | None = None
    spatial: Moments | None = None
    features, probabilities, digests = list[Tensor](), list[Tensor](), list[bytes]()
    count, keep = len(pictures), min(keep, len(pictures))
    with tqdm(total=count, desc=title, unit=" pictures", leave=False, disable=not sys.stderr.isatty()) as bar:
        for pixels, names in pictures.batches(batch_size, lambda image: scale(image, extractor.side)):
            found = extractor(pixels)
            if not found.pooled.isfinite().all():
                raise ValueError(f"the features of {extractor.name} are not finite: are its weights whole?")
            pooled = more(pooled, found.pooled)
            spatial = None if found.spatial is None else more(spatial, found.spatial)
            rows = [row for row in range(len(names)) if is_kept(len(digests) + row, count, keep)]
            features.append(found.pooled[rows].float().cpu())
            if found.probabilities is not None:
                probabilities.append(found.probabilities[rows].float().cpu())
            digests += names
            bar.update(len(names))
    assert pooled is not None
    stamp = {
        "pictures": count,
        "kept": keep,
        "width": pictures.size[0],
        "height": pictures.size[1],
        "formats": pictures.formats,
        "pictures_sha256": fingerprint(digests),
        **seen_by(extractor),
        "version": ldm.__version__,
        "torch": str(torch.__version__),
    }
    told = torch.cat(probabilities) if probabilities else None
    return Collection(pooled, spatial, torch.cat(features), told, stamp)


def seen_by(extractor: Extractor) -> dict[str, Any]:
    """What of a stamp the extractor decides: two collections compare if they have it in common."""
    return {
        "extractor": extractor.name,
        "weights_sha256": extractor.digest,
        "side": extractor.side,
        "filter": extractor.filter,
    }


def more(moments: Moments | None, features: Tensor) -> Moments:
    """The moments with a batch of features added."""
    new = Moments.of(features.cpu())
    return new if moments is None else moments + new


def save(collection: Collection, path: Path) -> None:
    """Writes a collection, whole or not at all."""
    tensors = {"features": collection.features}
    for name in ("pooled", "spatial"):
        moments: Moments | None = getattr(collection, name)
        if moments is not None:
            tensors |= {f"{name}.mean": moments.mean, f"{name}.scatter": moments.scatter}
    if collection.probabilities is not None:
        tensors["probabilities"] = collection.probabilities
    header = {"format": FORMAT, "stamp": json.dumps(collection.stamp)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load(path: Path) -> Collection:
    """What `save` wrote. Raises ValueError naming the file if it is missing, broken or another kind."""
    from safetensors import safe_open

    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no reference of --save-reference: expected the format {FORMAT}")
    stamp = json.loads(header["stamp"])
    count = stamp["pictures"]
    pooled, spatial = (
        Moments(count, tensors[f"{name}.mean"], tensors[f"{name}.scatter"])
        if f"{name}.mean" in tensors
        else None
        for name in ("pooled", "spatial")
    )
    assert pooled is not None
    return Collection(pooled, spatial, tensors["features"], tensors.get("probabilities"), stamp)


def check_alike(a: Collection, b: Collection, what: str) -> None:
    """Raises ValueError unless both were seen the same way; what: how the second is called."""
    for name in ("extractor", "weights_sha256", "side", "filter", "width", "height"):
        if a.stamp[name] != b.stamp[name]:
            advice = "; give --size PIXELS for both" if name in ("width", "height") else ""
            raise ValueError(
                f"{what} has {name}={b.stamp[name]!r}, the pictures {a.stamp[name]!r}: figures compare only "
                f"what was seen alike{advice}"
            )


def reference(
    given: str, extractor: Extractor, *, count: int | None, side: int | None, keep: int, kept_as: str | None
) -> Collection:
    """A folder's pictures in this extractor's features, or what was kept of such under a name.

    given: the folder, or the name. count, side: as Folder takes them. kept_as: a name to keep them under.
    Raises ValueError if there is neither a folder nor a file, or if the file was made another way.
    """
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        title = f"reference, {extractor.name}"
        collection = collect(Folder(path, count=count, side=side), extractor, keep=keep, title=title)
        if kept_as:
            save(collection, kept_file(Path(os.path.expanduser(kept_as)), extractor))
        return collection
    kept = path if path.is_file() else kept_file(path, extractor)
    if not kept.is_file():
        raise ValueError(f"--reference {given}: neither a folder of pictures nor a file of --save-reference")
    collection = load(kept)
    for name, value in seen_by(extractor).items():
        if collection.stamp[name] != value:
            raise ValueError(
                f"{kept} was made with {name}={collection.stamp[name]!r}, and asked for is {value!r}: "
                "make it anew from the pictures"
            )
    return collection


def kept_file(name: Path, extractor: Extractor) -> Path:
    """Where the features of a reference are kept: a file for each extractor."""
    stem = name.name.removesuffix(".safetensors")
    return name.with_name(f"{stem}-{extractor.name}.safetensors")
