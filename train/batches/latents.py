"""Latents computed once: posterior mean and std of every picture, with the captions, in shards of one bucket.

The mean and std are unscaled and in float16; a sample is drawn from them at every use. `cache.json` names the
encoder by the hash of its weights and the data by its description, so a stale cache is never trained on.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from train.batches.buckets import Size
from train.batches.plan import Draw, choose, normal, uniform
from train.data.captions import Captions, chances, every
from train.data.labels import Labels


@dataclass(frozen=True)
class CacheKey:
    """What the latents of a cache are a function of."""

    autoencoder: str  # sha256 of its encoder: the decoder may go on learning
    data: str  # description of the source
    channels: int  # of a latent
    factor: int  # pixels a latent cell, each way
    buckets: list[list[int]]  # width and height in pixels, and pictures, of each
    crops: int  # of each picture
    flip: bool  # with the mirror image of each crop
    captions: list[str] = field(default_factory=lambda: ["text"])  # the kinds that are kept with them

    @property
    def views(self) -> int:
        """Of each picture."""
        return self.crops * (1 + self.flip)

    def cells(self, size: Size) -> tuple[int, int]:
        """Height and width of the latents of pictures of that size."""
        return size.height // self.factor, size.width // self.factor


class Bucket(NamedTuple):
    """The latents of one bucket: n pictures in v views, C channels, h x w cells."""

    indices: list[int]  # in the source
    mean: Tensor  # (n, v, C, h, w) float16, unscaled
    std: Tensor  # likewise
    mask: Tensor | None = None  # (n, v, 1, h, w) uint8, 255 where a cell is of what the picture is about


class Latents:
    """The latents and captions of a source, read by index. What is asked for at once is of one bucket."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        captions: dict[int, list[str]],
        key: CacheKey,
        chances: dict[int, list[float]] | None = None,
    ) -> None:
        """captions: by index. chances: of each of them, added up to 1; None: all of a picture are alike."""
        self.buckets, self.key = buckets, key
        self.captions, self.chances = dict(sorted(captions.items())), chances
        self.classes: tuple[str, ...] = ()  # their names, where the pictures have labels
        self.labels: dict[int, int] = {}  # the number of each picture's class, in the order of the captions
        self.contents: Callable[[], dict[str, str]] = dict  # of the source: a hash of each picture, by name
        self.places = {
            index: (number, row)
            for number, one in enumerate(buckets)
            for row, index in enumerate(one.indices)
        }

    def __len__(self) -> int:
        return len(self.places)

    @property
    def sizes(self) -> list[Size]:
        """Of the pictures of each bucket, in pixels."""
        return [Size(width, height) for width, height, _ in self.key.buckets]

    def rows(self, draws: list[Draw]) -> tuple[Bucket, list[int], list[int]]:
        """The bucket of some samples, their rows there, and the view that each gets."""
        places = [self.places[draw.index] for draw in draws]
        bucket = self.buckets[places[0][0]]
        return bucket, [row for _, row in places], choose(draws, bucket.mean.shape[1], "view")

    def sample(self, draws: list[Draw]) -> Tensor:
        """z (B, C, h, w) float32, unscaled, each drawn from its posterior."""
        bucket, row, view = self.rows(draws)
        mean, std = bucket.mean[row, view].float(), bucket.std[row, view].float()
        return mean + std * normal(draws, tuple(mean.shape[1:]), "posterior")

    def mask(self, draws: list[Draw]) -> Tensor:
        """The share of each latent cell that is of what the picture is about: (B, 1, h, w) float32."""
        bucket, row, view = self.rows(draws)
        if bucket.mask is None:
            raise ValueError("these latents were read without their masks")
        return bucket.mask[row, view].float() / 255

    def means(self, indices: Sequence[int]) -> list[Tensor]:
        """The posterior's mean in the first view of some pictures: (C, h, w) float32 each."""
        places = [self.places[index] for index in indices]
        return [self.buckets[number].mean[row, 0].float() for number, row in places]

    def choose_captions(self, draws: list[Draw], dropout: float = 0.0) -> list[str]:
        """One of the captions of each sample, or, with probability `dropout`, the empty prompt."""
        choice, drop = uniform(draws, "caption").tolist(), uniform(draws, "drop").tolist()
        return [
            "" if lost < dropout else self.caption(draw.index, which)
            for draw, which, lost in zip(draws, choice, drop, strict=True)
        ]

    def classify(self, labels: Labels | None) -> None:
        """Takes over the classes of the source, where it has some."""
        if labels is not None:
            self.classes, self.labels = labels.names, {index: labels.number(index) for index in self.captions}

    def choose_labels(self, draws: list[Draw], dropout: float = 0.0) -> Tensor:
        """The class of each sample, (B,) int64; where choose_captions gives the empty prompt, none.

        That is the number after the last class. Both go together, as guidance leaves out both.
        """
        lost = uniform(draws, "drop") < dropout
        labels = torch.tensor([self.labels[draw.index] for draw in draws])
        return labels.masked_fill(lost, len(self.classes))

    def caption(self, index: int, which: float) -> str:
        """The caption of a picture that `which`, from 0 to below 1, falls on."""
        texts = self.captions[index]
        if self.chances is None:
            return texts[int(which * len(texts))]
        return texts[min(bisect(self.chances[index], which), len(texts) - 1)]


def autoencoder_folder(path: str | Path, option: str = "autoencoder") -> Path:
    """The folder of the autoencoder itself: `path`, its model/ (of a run) or its vae/ (of a pipeline).

    option: that names it. Raises ValueError if there is none.
    """
    for folder in (Path(path), Path(path, "model"), Path(path, "vae"), Path(path, "model", "vae")):
        if (folder / "config.json").is_file():
            return folder
    also = "" if option == "start" else ", or a recipe (.yaml) that trains one first"
    raise ValueError(
        f"{option}={str(path)!r} holds no autoencoder: name a folder that train_autoencoder.py wrote, or a "
        f"pipeline folder{also}"
    )


class Shard(NamedTuple):
    """Some pictures of one bucket, which share a file."""

    number: int
    size: Size
    indices: Sequence[int]

    def path(self, folder: Path, kind: Literal["latents", "masks"] = "latents") -> Path:
        return folder / f"{kind}-{self.number:05d}.safetensors"


def read_latents(
    folder: Path, key: CacheKey, shards: list[Shard], masks: bool, weights: Mapping[str, float] | None = None
) -> tuple[Latents, dict[int, str]]:
    """All shards, put together by bucket; and the pictures that could not be decoded, and why.

    weights: of the kinds of captions, where there are several.
    Raises ValueError naming a shard that is cut or of another shape.
    """
    rejected: dict[int, str] = {}
    captions: dict[int, Captions] = {}
    parts: dict[Size, list[Bucket]] = {}
    for shard in shards:
        path = shard.path(folder)
        indices, texts, wrong = read_header(path)
        rows = (len(indices), key.views)
        cells = key.cells(shard.size)
        shape = (*rows, key.channels, *cells)
        tensors = read_shard(path, {"mean": shape, "std": shape})
        rejected |= wrong
        if sorted([*indices, *wrong]) != sorted(shard.indices) or len(texts) != len(indices):
            raise ValueError(
                f"{path} holds other pictures than {folder} should: delete it, it is computed again"
            )
        captions.update(zip(indices, texts, strict=True))
        mask = None
        if masks:
            mask = read_shard(shard.path(folder, "masks"), {"mask": (*rows, 1, *cells)})["mask"]
        parts.setdefault(shard.size, []).append(Bucket(indices, tensors["mean"], tensors["std"], mask))
    chance = None if weights is None else {index: chances(one, weights) for index, one in captions.items()}
    every_text = {index: every(one) for index, one in captions.items()}
    return Latents([joined(bucket) for bucket in parts.values()], every_text, key, chance), rejected


def joined(parts: list[Bucket]) -> Bucket:
    """The shards of one bucket as one."""
    indices = [index for part in parts for index in part.indices]
    masks = [part.mask for part in parts if part.mask is not None]
    mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
    return Bucket(indices, mean, std, torch.cat(masks) if masks else None)


def read_header(path: Path) -> tuple[list[int], list[Captions], dict[int, str]]:
    """Of a shard of latents: indices and captions of its pictures, and what was left out, by index."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        indices, captions = json.loads(header["indices"]), json.loads(header["captions"])
        rejected = {int(index): why for index, why in json.loads(header["rejected"]).items()}
        captions = [{"": each} if isinstance(each, list) else each for each in captions]  # in older shards
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise damaged(path, error) from error
    return indices, captions, rejected


def read_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of a file. Raises ValueError if it is cut, or a tensor has another shape."""
    try:
        tensors = load_file(path)
        found = {name: tuple(tensors[name].shape) for name in shapes}
    except (SafetensorError, OSError, KeyError) as error:
        raise damaged(path, error) from error
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ValueError(f"{path} holds a {name} of shape {found[name]}, not {shape}")
    return tensors


def damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error!r}): delete it, it is computed again")
