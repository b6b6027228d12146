"""Pictures to latents, once: every shard that a cache lacks is encoded, whole or not at all."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from autoencoder.vae import AutoencoderKL
from ldm.drawing.optimize import try_kernels
from ldm.files.checkpoint import load_model
from ldm.files.config import read_json, replacing, write_json
from train.batches.buckets import Buckets, Size, crop_corner, frame, views
from train.batches.latents import CacheKey, Latents, Shard, read_header, read_latents
from train.batches.plan import hold_out
from train.data.captions import Captions
from train.data.pictures import tell_rejected, to_tensor
from train.data.source import Source
from train.data.sources import DataConfig, open_source, sort_source
from train.fit.checkpoint import weights_sha256
from train.fit.loop import cpu_only
from train.fit.record import minutes

log = logging.getLogger(__name__)
SHARD = 4096  # pictures a file
BATCH = 32  # views of pictures encoded at a time
TELL_EVERY = 30  # seconds between lines of progress, where there is no bar


def load_encoder(folder: Path, device: torch.device) -> AutoencoderKL:
    """An autoencoder for encoding alone, as fast as it can be here: on a CPU by our kernels."""
    vae = load_model(AutoencoderKL, folder).to(device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cpu":
        try_kernels(vae)
    return vae


def compute_latents(
    data: DataConfig,
    autoencoder: Path,
    folder: Path,
    masks: bool = False,
    accept_new_data: bool = False,
    pictures: int | None = None,
) -> Latents:
    """The latents of the data by this autoencoder, read from `folder`, where missing ones are computed first.

    masks: with the share of each latent cell that is of what the picture is about, a file of its own a shard.
    accept_new_data: latents of other data by the same autoencoder are deleted and computed anew.
    pictures: so many, those that a training with as many validation_samples holds out; None: all.
    Ranks share the shards. Raises ValueError, with both sides, if `folder` holds latents of something else.
    """
    state = PartialState(cpu=cpu_only())
    source = open_source(data)
    buckets = sort_source(source, data, folder / "sizes.safetensors")
    if pictures is not None:
        buckets = some_of(buckets, pictures)
    vae = load_encoder(autoencoder, state.device)
    square = Size(data.size, data.size)  # for the pictures of a preview
    check_sizes([*buckets.sizes, square], vae.downsample_factor)
    description = source.description + ("" if pictures is None else f", {pictures} evenly spread")
    key = key_of(vae, description, buckets, data)
    if accept_new_data and state.is_main_process:
        delete_stale(folder, key)
    state.wait_for_everyone()  # no rank checks a key that is about to go
    check_key(folder, key)
    if state.is_main_process and not (folder / "cache.json").exists():
        write_json(folder / "cache.json", asdict(key))
    shards = shards_of(buckets)
    missing = [shard for shard in shards if not shard.path(folder).exists()]
    state.wait_for_everyone()  # no rank writes a shard before all have counted
    if state.is_main_process and buckets.lost:
        log.info("%d pictures go into %d buckets\n%s", len(source), len(buckets.sizes), buckets.table())
    if missing and state.is_main_process:
        log.info("encoding %d pictures into %s", sum(len(shard.indices) for shard in missing), folder)
    mine = missing[state.process_index :: state.num_processes]
    with Progress(sum(len(shard.indices) for shard in mine), state) as progress:
        for shard in mine:
            write_shard(vae, source, data, key, shard, folder, progress)
    state.wait_for_everyone()  # the masks are those of the pictures that all ranks have encoded
    if masks and state.is_main_process:
        write_masks(source, data, key, shards, folder)
    state.wait_for_everyone()
    latents, undecodable = read_latents(folder, key, shards, masks, data.captions)
    rejected = {f"picture {index}": why for index, why in {**buckets.unreadable, **undecodable}.items()}
    if state.is_main_process:
        list_rejected(folder / "rejected.jsonl", {**source.rejected, **rejected})
    tell_rejected(data.source, rejected, len(rejected) + len(latents), data.max_bad_fraction)
    latents.contents = source.contents
    latents.classify(source.labels)
    return latents


def some_of(buckets: Buckets, count: int) -> Buckets:
    """`count` pictures of the buckets, evenly spread over all, as hold_out takes them; no bucket is empty."""
    _, chosen = hold_out(buckets.members, count)
    kept = [(size, members) for size, members in zip(buckets.sizes, chosen, strict=True) if members]
    return Buckets([size for size, _ in kept], [members for _, members in kept], buckets.dropped)


def key_of(vae: AutoencoderKL, description: str, buckets: Buckets, data: DataConfig) -> CacheKey:
    """What the latents of pictures in these buckets are a function of. description: of the pictures."""
    counts = [[*size, len(members)] for size, members in zip(buckets.sizes, buckets.members, strict=True)]
    return CacheKey(
        encoder_sha256(vae),
        description,
        vae.config.latent_channels,
        vae.downsample_factor,
        counts,
        data.crops,
        data.flip,
        sorted(data.kinds),
    )


def shards_of(buckets: Buckets) -> list[Shard]:
    """The pictures of the buckets, at most SHARD of one bucket in each."""
    pieces = [
        (size, members[first : first + SHARD])
        for size, members in zip(buckets.sizes, buckets.members, strict=True)
        for first in range(0, len(members), SHARD)
    ]
    return [Shard(number, *piece) for number, piece in enumerate(pieces)]


def check_sizes(sizes: Sequence[Size], factor: int) -> None:
    """Raises ValueError if pictures of a size give no whole number of latent cells, of `factor` pixels."""
    for size in sizes:
        if size.width % factor or size.height % factor:
            raise ValueError(
                f"pictures of {size} are not multiples of {factor} pixels, the autoencoder's "
                "factor: mend data.size or data.side_multiple"
            )


def list_rejected(path: Path, rejected: Mapping[str, str]) -> None:
    """Leave a line for each picture that cannot be used, if there is one, that says why."""
    lines = [json.dumps({"picture": name, "why": why}) + "\n" for name, why in rejected.items()]
    if lines:
        with replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


class Progress:
    """How far this rank's encoding is: a bar on a terminal, else a line now and then; then the speed."""

    def __init__(self, total: int, state: PartialState) -> None:
        """total: pictures. Only the main process tells."""
        self.total, self.done, self.quiet = total, 0, not (state.is_main_process and total)
        self.share = f" of rank 0 of {state.num_processes}" if state.num_processes > 1 else ""
        self.bar = tqdm(
            total=total, unit=" pictures", desc="encoding", disable=self.quiet or not sys.stderr.isatty()
        )
        self.began = self.told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if not self.quiet and error is None:
            seconds, speed = self.so_far()
            log.info("encoded %d pictures%s in %s, %.1f/s", self.done, self.share, minutes(seconds), speed)

    def add(self, count: int) -> None:
        """Pictures that have been read since the last call."""
        self.done += count
        self.bar.update(count)
        if self.bar.disable and not self.quiet and time.monotonic() - self.told >= TELL_EVERY:
            self.told = time.monotonic()
            _, speed = self.so_far()
            left = minutes((self.total - self.done) / speed)
            done = f"{self.done} of {self.total} pictures{self.share}"
            log.info("encoded %s, %.1f/s, %s left", done, speed, left)

    def so_far(self) -> tuple[float, float]:
        """Seconds since the beginning, and pictures in each."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        return seconds, self.done / seconds


def delete_stale(folder: Path, key: CacheKey) -> None:
    """Delete the latents in `folder` if they are of other data, and of that alone.

    The key comes last: what a kill leaves is still stale.
    """
    path = folder / "cache.json"
    have = read_json(path) if path.exists() else {}
    differ = {name for name, want in asdict(key).items() if have.get(name, want) != want}
    if "data" in differ and differ <= {"data", "buckets"}:
        log.info("deleting the latents in %s: they are of %s", folder, have["data"])
        for pattern in ("latents-*.safetensors", "masks-*.safetensors", "rejected.jsonl", path.name):
            for stale in folder.glob(pattern):
                stale.unlink()


def check_key(folder: Path, key: CacheKey) -> None:
    """Raises ValueError if `folder` holds latents of another autoencoder or of other data."""
    path = folder / "cache.json"
    if not path.exists():
        return
    have = read_json(path)
    if len(key.captions) == 1:
        have.setdefault("captions", key.captions)  # older caches hold one kind and do not say which
    for name, want in asdict(key).items():
        if have.get(name) != want:
            raise ValueError(
                f"{folder} holds the latents of another {name}:\n  there  {have.get(name)}\n  wanted {want}\n"
                "Delete the folder to compute them anew, or choose another output"
            )


def encoder_sha256(vae: AutoencoderKL) -> str:
    """Of the weights that latents are a function of: those of encoder and quant_conv, by name."""
    return weights_sha256(
        {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    )


@torch.no_grad()
def write_shard(
    vae: AutoencoderKL,
    source: Source,
    data: DataConfig,
    key: CacheKey,
    shard: Shard,
    folder: Path,
    progress: Progress,
) -> None:
    """Encode one shard's pictures into one file, captions in its header, whole or not at all.

    The header also holds what a size conditioning wants to know of each view: the width and height of the
    picture, and left and top of the crop in the picture as it was resized.
    """
    device = next(vae.parameters()).device
    nothing = torch.zeros(0, key.views, key.channels, *key.cells(shard.size), dtype=torch.float16)
    parts: list[tuple[Tensor, Tensor]] = [(nothing, nothing)]  # where no picture can be decoded
    indices: list[int] = []
    captions: list[Captions] = []
    crops: list[list[list[int]]] = []
    rejected: dict[int, str] = {}
    for batch in read_batches(source, data, shard, max(1, BATCH // key.views)):
        rejected |= batch.rejected
        progress.add(len(batch.indices) + len(batch.rejected))
        if not batch.indices:
            continue
        posterior = vae.encode(torch.stack(batch.images).flatten(0, 1).to(device))
        split = (len(batch.indices), key.views)
        mean, std = posterior.mean.unflatten(0, split), posterior.std.unflatten(0, split)
        parts.append((mean.half().cpu(), std.half().cpu()))
        indices += batch.indices
        captions += batch.captions
        crops += batch.crops
    header = {
        "indices": json.dumps(indices),
        "captions": json.dumps(captions),
        "crops": json.dumps(crops),
        "rejected": json.dumps(rejected),
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
            height, width = key.cells(shard.size)
            masks = []
            for index in read_header(shard.path(folder))[0]:
                mask = source.mask(index)
                every = [frame(mask, shard.size, view) for view in views(index, data.crops, data.flip)]
                shares = [one.resize((width, height), Image.Resampling.BOX) for one in every]
                masks.append(np.stack([np.array(one) for one in shares]))
                progress.update()
            mask_rows = np.stack(masks) if masks else np.zeros((0, key.views, height, width), np.uint8)
            with replacing(shard.path(folder, "masks")) as path:
                save_file({"mask": torch.from_numpy(mask_rows)[:, :, None]}, path)


class Read(NamedTuple):
    """Some pictures: those that can be decoded, each (views, 3, H, W), and why the others cannot."""

    indices: list[int]
    images: list[Tensor]
    captions: list[Captions]
    crops: list[list[list[int]]]  # of each view: width and height of the picture, left and top of the crop
    rejected: dict[int, str]


def read_batches(source: Source, data: DataConfig, shard: Shard, size: int) -> Iterator[Read]:
    """The pictures of a shard in order, `size` at a time, one batch read ahead."""

    def read(start: int) -> Read:
        batch = Read([], [], [], [], {})
        for index in shard.indices[start : start + size]:
            try:
                image, captions = source[index]
            except ValueError as error:
                batch.rejected[index] = str(error)
                continue
            picture, every = Size(*image.size), views(index, data.crops, data.flip)
            batch.images.append(torch.stack([to_tensor(frame(image, shard.size, view)) for view in every]))
            batch.indices.append(index)
            batch.captions.append(captions)
            batch.crops.append([[*picture, *crop_corner(picture, shard.size, view)] for view in every])
        return batch

    starts = range(0, len(shard.indices), size)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, starts[0])
        for later in [*starts[1:], None]:
            batch = ahead.result()
            if later is not None:
                ahead = pool.submit(read, later)
            yield batch
