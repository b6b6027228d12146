"""What is kept of a set of pictures for the figures: moments of all, features of some; also as a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import ldm
from ldm.files.checkpoint import read_tensors
from ldm.files.config import replacing
from ldm.metrics.blocks import Pictures, blocks_of, seen_by
from ldm.metrics.extractors import Extractor
from ldm.metrics.folders import Folder, fingerprint
from ldm.metrics.moments import Moments

FORMAT = "ldm-reference-1"
KEPT = 10_000  # pictures whose features are kept; as many as ADM's references hold (Dhariwal & Nichol 2021)


@dataclass(frozen=True)
class Collection:
    """Of a set of pictures, in one extractor's features."""

    pooled: Moments  # of all
    spatial: Moments | None  # of all
    features: Tensor  # (K, D) float32: of K of them, evenly spread
    probabilities: Tensor | None  # (K, classes) float32
    stamp: dict[str, Any]  # which pictures, seen how
    near: Tensor | None = None  # (2,) float64: the means of Batch.near over all; 0 where there is none


def is_kept(place: int, count: int, keep: int) -> bool:
    """Whether the picture at this place is one of `keep`, evenly spread over all."""
    return (place + 1) * keep // count > place * keep // count


def collect(
    pictures: Pictures,
    extractor: Extractor,
    *,
    batch_size: int = 32,
    keep: int = KEPT,
    title: str = "",
    kept: Path | None = None,
) -> Collection:
    """Runs the extractor over the pictures. Memory does not grow with them beyond `keep` rows of features.

    kept: a folder for the features, where other ranks put theirs; the figures do not depend on how many.
    """
    pooled: Moments | None = None
    spatial: Moments | None = None
    features, probabilities, digests = list[Tensor](), list[Tensor](), list[bytes]()
    near = torch.zeros(2, dtype=torch.float64)
    count, keep = len(pictures), min(keep, len(pictures))
    for block in blocks_of(pictures, extractor, batch_size, title, kept):
        found = block.features
        pooled = more(pooled, found.pooled)
        spatial = None if found.spatial is None else more(spatial, found.spatial)
        rows = [row for row in range(len(block.digests)) if is_kept(len(digests) + row, count, keep)]
        features.append(found.pooled[rows])
        if found.probabilities is not None:
            probabilities.append(found.probabilities[rows])
        if block.near is not None:
            near += block.near.sum(0)
        digests += block.digests
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
    return Collection(pooled, spatial, torch.cat(features), told, stamp, near / count)


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


def reference_pictures(given: str, *, count: int | None, side: int | None) -> Folder | None:
    """The folder of a reference; None where it is to be read as `save` kept it."""
    path = Path(os.path.expanduser(given))
    return Folder(path, count=count, side=side) if path.is_dir() else None


def reference(
    given: str,
    extractor: Extractor,
    *,
    count: int | None,
    side: int | None,
    keep: int,
    kept_as: str | None,
    kept: Path | None = None,
) -> Collection:
    """A folder's pictures in this extractor's features, or what was kept of such under a name.

    given: the folder, or the name. count, side: as Folder takes them. kept_as: a name to keep them under.
    kept: as collect takes it. Raises ValueError if there is neither a folder nor a file, or if the file was
    made another way.
    """
    if (pictures := reference_pictures(given, count=count, side=side)) is not None:
        title = f"reference, {extractor.name}"
        collection = collect(pictures, extractor, keep=keep, title=title, kept=kept)
        if kept_as:
            save(collection, kept_file(Path(os.path.expanduser(kept_as)), extractor))
        return collection
    path = Path(os.path.expanduser(given))
    found = path if path.is_file() else kept_file(path, extractor)
    if not found.is_file():
        raise ValueError(f"--reference {given}: neither a folder of pictures nor a file of --save-reference")
    collection = load(found)
    for name, value in seen_by(extractor).items():
        if collection.stamp[name] != value:
            raise ValueError(
                f"{found} was made with {name}={collection.stamp[name]!r}, and asked for is {value!r}: "
                "make it anew from the pictures"
            )
    return collection


def kept_file(name: Path, extractor: Extractor) -> Path:
    """Where the features of a reference are kept: a file for each extractor."""
    stem = name.name.removesuffix(".safetensors")
    return name.with_name(f"{stem}-{extractor.name}.safetensors")
