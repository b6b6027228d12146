"""Latents computed once: posterior mean and std of every picture, with the captions, in shards.

The mean and std are unscaled and in float16; a sample is drawn from them at every use. `cache.json` names the
encoder by the hash of its weights and the data by its description, so a stale cache is never trained on.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
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
from train.checkpoint import weights_sha256
from train.data import DataConfig, Source, fit_square, open_source, to_tensor
from train.loop import cpu_only
from train.plan import Draw, normal, uniform

log = logging.getLogger(__name__)
SHARD = 4096  # pictures a file
BATCH = 32  # pictures encoded at a time


@dataclass(frozen=True)
class CacheKey:
    """What the latents of a cache are a function of."""

    autoencoder: str  # sha256 of its encoder: the decoder may go on learning
    data: str  # description of the source
    samples: int
    shape: tuple[int, ...]  # (C, h, w)


class Latents(NamedTuple):
    """mean, std: (L, C, h, w) float16, unscaled. captions: L lists. masks: (L, 1, h, w) uint8, if wanted."""

    mean: Tensor
    std: Tensor
    captions: list[list[str]]
    key: CacheKey
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, draws: list[Draw]) -> Tensor:
        """z (B, C, h, w) float32, unscaled, each drawn from its posterior."""
        index = [draw.index for draw in draws]
        mean, std = self.mean[index].float(), self.std[index].float()
        return mean + std * normal(draws, tuple(mean.shape[1:]), "posterior")

    def mask(self, draws: list[Draw]) -> Tensor:
        """The share of each latent cell that is of what the picture is about: (B, 1, h, w) float32."""
        if self.masks is None:
            raise ValueError("these latents were read without their masks")
        return self.masks[[draw.index for draw in draws]].float() / 255

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


def compute_latents(data: DataConfig, autoencoder: Path, folder: Path, masks: bool = False) -> Latents:
    """The latents of the data by this autoencoder, read from `folder`, where missing ones are computed first.

    masks: with the share of each latent cell that is of what the picture is about, a file of its own a shard.
    Ranks share the shards. Raises ValueError, with both sides, if `folder` holds latents of something else.
    """
    state = PartialState(cpu=cpu_only())
    source = open_source(data)
    vae = load_model(AutoencoderKL, autoencoder).to(state.device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side, rest = divmod(data.size, vae.downsample_factor)
    if rest:
        raise ValueError(
            f"data.size={data.size} is not a multiple of {vae.downsample_factor}, the autoencoder's factor"
        )
    key = CacheKey(
        encoder_sha256(vae),
        source.description,
        len(source),
        (vae.config.latent_channels, side, side),
    )
    check_key(folder, key)
    if state.is_main_process and not (folder / "cache.json").exists():
        write_json(folder / "cache.json", {**asdict(key), "shape": list(key.shape)})
    missing = [number for number in range(shard_count(key)) if not shard_path(folder, number).exists()]
    state.wait_for_everyone()  # no rank writes a shard before all have counted
    if missing and state.is_main_process:
        log.info("encoding %d pictures into %s", min(len(source), len(missing) * SHARD), folder)
    for number in missing[state.process_index :: state.num_processes]:
        write_shard(vae, source, data.size, number, folder, state.device)
    if masks and state.is_main_process:
        write_masks(source, data.size, key, folder)
    state.wait_for_everyone()
    return read_latents(folder, key, masks)


def check_key(folder: Path, key: CacheKey) -> None:
    """Raises ValueError if `folder` holds latents of another autoencoder or of other data."""
    path = folder / "cache.json"
    if not path.exists():
        return
    have = read_json(path)
    for name, want in {**asdict(key), "shape": list(key.shape)}.items():
        if have.get(name) != want:
            raise ValueError(
                f"{folder} holds the latents of another {name}:\n  there  {have.get(name)}\n  wanted {want}\n"
                "Delete the folder to compute them anew, or choose another output"
            )


def shard_count(key: CacheKey) -> int:
    return -(-key.samples // SHARD)


def shard_path(folder: Path, number: int, kind: Literal["latents", "masks"] = "latents") -> Path:
    return folder / f"{kind}-{number:05d}.safetensors"


def shard_indices(samples: int, number: int) -> range:
    return range(number * SHARD, min(samples, (number + 1) * SHARD))


@torch.no_grad()
def write_shard(
    vae: AutoencoderKL, source: Source, size: int, number: int, folder: Path, device: torch.device
) -> None:
    """Encode pictures from number * SHARD on into one file, captions in its header, whole or not at all."""
    indices = shard_indices(len(source), number)
    parts: list[tuple[Tensor, Tensor]] = []
    captions: list[list[str]] = []
    progress = tqdm(
        total=len(indices), unit="picture", disable=not sys.stderr.isatty(), desc=f"shard {number}"
    )
    with progress:
        for image, texts in read_batches(source, size, indices):
            posterior = vae.encode(image.to(device))
            parts.append((posterior.mean.half().cpu(), posterior.std.half().cpu()))
            captions += texts
            progress.update(len(texts))
    mean, std = (torch.cat(tensors).contiguous() for tensors in zip(*parts, strict=True))
    with replacing(shard_path(folder, number)) as path:
        save_file({"mean": mean, "std": std}, path, metadata={"captions": json.dumps(captions)})


def write_masks(source: Source, size: int, key: CacheKey, folder: Path) -> None:
    """The masks of every shard that has none yet, averaged over the pixels of each latent cell."""
    missing = [n for n in range(shard_count(key)) if not shard_path(folder, n, "masks").exists()]
    todo = sum(len(shard_indices(key.samples, number)) for number in missing)
    _, height, width = key.shape
    with tqdm(total=todo, unit="mask", disable=not sys.stderr.isatty(), desc="masks") as progress:
        for number in missing:
            cells = []
            for index in shard_indices(key.samples, number):
                mask = fit_square(source.mask(index), size).resize((width, height), Image.Resampling.BOX)
                cells.append(torch.from_numpy(np.array(mask)))
                progress.update()
            with replacing(shard_path(folder, number, "masks")) as path:
                save_file({"mask": torch.stack(cells)[:, None]}, path)


def read_batches(source: Source, size: int, indices: range) -> Iterator[tuple[Tensor, list[list[str]]]]:
    """(image (B, 3, H, W), captions) in order, one batch read ahead."""

    def read(start: int) -> tuple[Tensor, list[list[str]]]:
        samples = [source[index] for index in indices[start : start + BATCH]]
        return torch.stack([to_tensor(fit_square(image, size)) for image, _ in samples]), [
            c for _, c in samples
        ]

    starts = range(0, len(indices), BATCH)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, starts[0])
        for later in [*starts[1:], None]:
            batch = ahead.result()
            if later is not None:
                ahead = pool.submit(read, later)
            yield batch


def read_latents(folder: Path, key: CacheKey, masks: bool = False) -> Latents:
    """All shards as one. Raises ValueError naming a shard that is cut or of another shape."""
    captions: list[list[str]] = []
    tensors: dict[str, list[Tensor]] = {"mean": [], "std": []}
    for number in range(shard_count(key)):
        shard, metadata = read_shard(shard_path(folder, number), {"mean": key.shape, "std": key.shape})
        try:
            captions += json.loads(metadata["captions"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise damaged(shard_path(folder, number), error) from error
        for name, values in tensors.items():
            values.append(shard[name])
    mean, std = torch.cat(tensors["mean"]), torch.cat(tensors["std"])
    if not len(captions) == len(mean) == len(std) == key.samples:
        raise ValueError(f"{folder} holds {len(mean)} latents, not {key.samples}: delete it")
    if not masks:
        return Latents(mean, std, captions, key)
    paths = [shard_path(folder, number, "masks") for number in range(shard_count(key))]
    mask = torch.cat([read_shard(path, {"mask": (1, *key.shape[1:])})[0]["mask"] for path in paths])
    if len(mask) != key.samples:
        raise ValueError(f"{folder} holds {len(mask)} masks, not {key.samples}: delete masks-*.safetensors")
    return Latents(mean, std, captions, key, mask)


def read_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file. Raises ValueError if it is cut, or a tensor's rows have another shape."""
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        found = {name: tuple(tensors[name].shape[1:]) for name in shapes}
    except (SafetensorError, OSError, KeyError) as error:
        raise damaged(path, error) from error
    for name, shape in shapes.items():
        if found[name] != shape:
            raise ValueError(f"{path} holds a {name} of shape {found[name]}, not {shape}")
    return tensors, metadata


def damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error!r}): delete it, it is computed again")
