"""Latents computed once: posterior mean and std of every picture, with the captions, in shards of one bucket.

The mean and std are unscaled and in float16; a sample is drawn from them at every use. `cache.json` names the
encoder by the hash of its weights and the data by its description, so a stale cache is never trained on.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from autoencoder.vae import AutoencoderKL
from ldm.checkpoint import load_model
from ldm.config import read_json, replacing, write_json
from train.buckets import Size, crop_corner, frame, views
from train.checkpoint import weights_sha256
from train.data import DataConfig, Source, open_source, sort_source
from train.loop import cpu_only
from train.pictures import to_tensor
from train.plan import Draw, choose, normal, uniform

log = logging.getLogger(__name__)
SHARD = 4096  # pictures a file
BATCH = 32  # pictures encoded at a time


@dataclass(frozen=True)
class CacheKey:
    """What the latents of a cache are a function of."""

    autoencoder: str  # sha256 of its encoder: the decoder may go on learning
    data: str  # description of the source
    channels: int  # of a latent
    factor: int  # pixels a latent cell, each way
    buckets: list[list[int]]  # width and height in pixels, and pictures, of each
    views: int  # of each picture: its crops, and their mirror images


class Bucket(NamedTuple):
    """The latents of one bucket: n pictures in v views, C channels, h x w cells."""

    indices: list[int]  # in the source
    mean: Tensor  # (n, v, C, h, w) float16, unscaled
    std: Tensor  # likewise
    mask: Tensor | None = None  # (n, v, 1, h, w) uint8, 255 where a cell is of what the picture is about


class Latents:
    """The latents and captions of a source, read by index. What is asked for at once is of one bucket."""

    def __init__(self, buckets: Sequence[Bucket], captions: dict[int, list[str]], key: CacheKey) -> None:
        """captions: by index."""
        self.buckets, self.key = buckets, key
        self.captions = dict(sorted(captions.items()))
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
        captions = [self.captions[draw.index] for draw in draws]
        return [
            "" if lost < dropout else texts[int(which * len(texts))]
            for texts, which, lost in zip(captions, choice, drop, strict=True)
        ]


def autoencoder_folder(path: str | Path) -> Path:
    """The folder of the autoencoder itself: `path`, its model/ (of a run) or its vae/ (of a pipeline).

    Raises ValueError if there is none.
    """
    for folder in (Path(path), Path(path, "model"), Path(path, "vae"), Path(path, "model", "vae")):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"autoencoder={str(path)!r} holds none: name a folder that train_autoencoder.py wrote, a pipeline "
        "folder, or a recipe (.yaml) that trains one first"
    )


def encoder_sha256(vae: AutoencoderKL) -> str:
    """Of the weights that latents are a function of: those of encoder and quant_conv, by name."""
    return weights_sha256(
        {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    )


class Shard(NamedTuple):
    """Some pictures of one bucket, which share a file."""

    number: int
    size: Size
    indices: Sequence[int]

    def path(self, folder: Path, kind: Literal["latents", "masks"] = "latents") -> Path:
        return folder / f"{kind}-{self.number:05d}.safetensors"


def compute_latents(data: DataConfig, autoencoder: Path, folder: Path, masks: bool = False) -> Latents:
    """The latents of the data by this autoencoder, read from `folder`, where missing ones are computed first.

    masks: with the share of each latent cell that is of what the picture is about, a file of its own a shard.
    Ranks share the shards. Raises ValueError, with both sides, if `folder` holds latents of something else.
    """
    state = PartialState(cpu=cpu_only())
    source = open_source(data)
    buckets = sort_source(source, data)
    vae = load_model(AutoencoderKL, autoencoder).to(state.device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for size in buckets.sizes:
        if size.width % vae.downsample_factor or size.height % vae.downsample_factor:
            raise ValueError(
                f"pictures of {size} are not multiples of {vae.downsample_factor} pixels, the autoencoder's "
                "factor: mend data.size or data.side_multiple"
            )
    counts = [[*size, len(members)] for size, members in zip(buckets.sizes, buckets.members, strict=True)]
    key = CacheKey(
        encoder_sha256(vae),
        source.description,
        vae.config.latent_channels,
        vae.downsample_factor,
        counts,
        len(views(0, data.crops, data.flip)),
    )
    check_key(folder, key)
    if state.is_main_process and not (folder / "cache.json").exists():
        write_json(folder / "cache.json", asdict(key))
    pieces = [
        (size, members[first : first + SHARD])
        for size, members in zip(buckets.sizes, buckets.members, strict=True)
        for first in range(0, len(members), SHARD)
    ]
    shards = [Shard(number, *piece) for number, piece in enumerate(pieces)]
    missing = [shard for shard in shards if not shard.path(folder).exists()]
    state.wait_for_everyone()  # no rank writes a shard before all have counted
    if state.is_main_process and len(buckets.sizes) + len(buckets.dropped) > 1:
        log.info("%d pictures in %d buckets\n%s", len(source), len(buckets.sizes), buckets.table())
    if missing and state.is_main_process:
        log.info("encoding %d pictures into %s", sum(len(shard.indices) for shard in missing), folder)
    for shard in missing[state.process_index :: state.num_processes]:
        write_shard(vae, source, data, shard, folder, state.device)
    if masks and state.is_main_process:
        write_masks(source, data, key, shards, folder)
    state.wait_for_everyone()
    return read_latents(folder, key, shards, masks)


def check_key(folder: Path, key: CacheKey) -> None:
    """Raises ValueError if `folder` holds latents of another autoencoder or of other data."""
    path = folder / "cache.json"
    if not path.exists():
        return
    have = read_json(path)
    for name, want in asdict(key).items():
        if have.get(name) != want:
            raise ValueError(
                f"{folder} holds the latents of another {name}:\n  there  {have.get(name)}\n  wanted {want}\n"
                "Delete the folder to compute them anew, or choose another output"
            )


@torch.no_grad()
def write_shard(
    vae: AutoencoderKL, source: Source, data: DataConfig, shard: Shard, folder: Path, device: torch.device
) -> None:
    """Encode one shard's pictures into one file, captions in its header, whole or not at all.

    The header also holds what a size conditioning wants to know of each view: the width and height of the
    picture, and left and top of the crop in the picture as it was resized.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    captions: list[list[str]] = []
    corners = []
    progress = tqdm(
        total=len(shard.indices),
        unit="picture",
        disable=not sys.stderr.isatty(),
        desc=f"shard {shard.number}, {shard.size}",
    )
    with progress:
        for image, texts in read_batches(source, data, shard):
            posterior = vae.encode(image.flatten(0, 1).to(device))
            split = (len(texts), -1)
            mean, std = posterior.mean.unflatten(0, split), posterior.std.unflatten(0, split)
            parts.append((mean.half().cpu(), std.half().cpu()))
            captions += texts
            progress.update(len(texts))
    for index in shard.indices:
        picture = source.size(index)
        every = views(index, data.crops, data.flip)
        corners.append([[*picture, *crop_corner(picture, shard.size, view)] for view in every])
    header = {
        "captions": json.dumps(captions),
        "indices": json.dumps(list(shard.indices)),
        "crops": json.dumps(corners),
    }
    mean, std = (torch.cat(tensors).contiguous() for tensors in zip(*parts, strict=True))
    with replacing(shard.path(folder)) as path:
        save_file({"mean": mean, "std": std}, path, metadata=header)


def write_masks(source: Source, data: DataConfig, key: CacheKey, shards: list[Shard], folder: Path) -> None:
    """The masks of every shard that has none yet, averaged over the pixels of each latent cell."""
    missing = [shard for shard in shards if not shard.path(folder, "masks").exists()]
    todo = sum(len(shard.indices) for shard in missing)
    with tqdm(total=todo, unit="mask", disable=not sys.stderr.isatty(), desc="masks") as progress:
        for shard in missing:
            cells = (shard.size.width // key.factor, shard.size.height // key.factor)
            masks = []
            for index in shard.indices:
                mask = source.mask(index)
                every = [frame(mask, shard.size, view) for view in views(index, data.crops, data.flip)]
                masks.append(np.stack([np.array(one.resize(cells, Image.Resampling.BOX)) for one in every]))
                progress.update()
            with replacing(shard.path(folder, "masks")) as path:
                save_file({"mask": torch.from_numpy(np.stack(masks))[:, :, None]}, path)


def read_batches(source: Source, data: DataConfig, shard: Shard) -> Iterator[tuple[Tensor, list[list[str]]]]:
    """(images (B, views, 3, H, W), captions) in order, one batch read ahead."""

    def read(start: int) -> tuple[Tensor, list[list[str]]]:
        samples = [(index, *source[index]) for index in shard.indices[start : start + BATCH]]
        images = [
            torch.stack(
                [to_tensor(frame(image, shard.size, view)) for view in views(index, data.crops, data.flip)]
            )
            for index, image, _ in samples
        ]
        return torch.stack(images), [captions for _, _, captions in samples]

    starts = range(0, len(shard.indices), BATCH)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, starts[0])
        for later in [*starts[1:], None]:
            batch = ahead.result()
            if later is not None:
                ahead = pool.submit(read, later)
            yield batch


def read_latents(folder: Path, key: CacheKey, shards: list[Shard], masks: bool = False) -> Latents:
    """All shards, put together by bucket. Raises ValueError naming one that is cut or of another shape."""
    captions: dict[int, list[str]] = {}
    parts: dict[Size, list[Bucket]] = {}
    for shard in shards:
        path = shard.path(folder)
        rows = (len(shard.indices), key.views)
        cells = (shard.size.height // key.factor, shard.size.width // key.factor)
        shape = (*rows, key.channels, *cells)
        tensors, header = read_shard(path, {"mean": shape, "std": shape})
        try:
            texts, indices = json.loads(header["captions"]), json.loads(header["indices"])
        except (KeyError, json.JSONDecodeError) as error:
            raise damaged(path, error) from error
        if indices != list(shard.indices) or len(texts) != len(indices):
            raise ValueError(
                f"{path} holds other pictures than {folder} should: delete it, it is computed again"
            )
        captions.update(zip(indices, texts, strict=True))
        mask = None
        if masks:
            mask = read_shard(shard.path(folder, "masks"), {"mask": (*rows, 1, *cells)})[0]["mask"]
        parts.setdefault(shard.size, []).append(Bucket(indices, tensors["mean"], tensors["std"], mask))
    return Latents([joined(bucket) for bucket in parts.values()], captions, key)


def joined(parts: list[Bucket]) -> Bucket:
    """The shards of one bucket as one."""
    indices = [index for part in parts for index in part.indices]
    masks = [part.mask for part in parts if part.mask is not None]
    mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
    return Bucket(indices, mean, std, torch.cat(masks) if masks else None)


def read_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file. Raises ValueError if it is cut, or a tensor has another shape."""
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        found = {name: tuple(tensors[name].shape) for name in shapes}
    except (SafetensorError, OSError, KeyError) as error:
        raise damaged(path, error) from error
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ValueError(f"{path} holds a {name} of shape {found[name]}, not {shape}")
    return tensors, metadata


def damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error!r}): delete it, it is computed again")
