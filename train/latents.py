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
from typing import NamedTuple

import torch
from accelerate import PartialState
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
    """mean, std: (L, C, h, w) float16, unscaled. captions: L lists."""

    mean: Tensor
    std: Tensor
    captions: list[list[str]]
    key: CacheKey

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, draws: list[Draw]) -> Tensor:
        """z (B, C, h, w) float32, unscaled, each drawn from its posterior."""
        index = [draw.index for draw in draws]
        mean, std = self.mean[index].float(), self.std[index].float()
        return mean + std * normal(draws, tuple(mean.shape[1:]), "posterior")

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


def compute_latents(data: DataConfig, autoencoder: Path, folder: Path) -> Latents:
    """The latents of the data by this autoencoder, read from `folder`, where missing ones are computed first.

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
    state.wait_for_everyone()
    return read_latents(folder, key)


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


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


@torch.no_grad()
def write_shard(
    vae: AutoencoderKL, source: Source, size: int, number: int, folder: Path, device: torch.device
) -> None:
    """Encode pictures from number * SHARD on into one file, captions in its header, whole or not at all."""
    indices = range(number * SHARD, min(len(source), (number + 1) * SHARD))
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


def read_latents(folder: Path, key: CacheKey) -> Latents:
    """All shards as one. Raises ValueError naming a shard that is cut or of another shape."""
    means, stds, captions = [], [], []
    for number in range(shard_count(key)):
        path = shard_path(folder, number)
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                captions += json.loads(file.metadata()["captions"])
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it, it is computed again") from error
        if tuple(tensors["mean"].shape[1:]) != key.shape:
            raise ValueError(
                f"{path} holds latents of shape {tuple(tensors['mean'].shape[1:])}, not {key.shape}"
            )
        means.append(tensors["mean"])
        stds.append(tensors["std"])
    latents = Latents(torch.cat(means), torch.cat(stds), captions, key)
    if not len(latents) == len(latents.mean) == len(latents.std) == key.samples:
        raise ValueError(f"{folder} holds {len(latents.mean)} latents, not {key.samples}: delete it")
    return latents
