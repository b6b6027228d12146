"""The latents that a training reads: of its cache, which is filled first, or made-up ones for a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.files.checkpoint import load_model
from train.batches.buckets import Size
from train.batches.encoding import check_sizes, compute_latents
from train.batches.latents import Bucket, CacheKey, Latents
from train.data.captions import every
from train.data.sources import DataConfig, open_source
from train.fit.state import FitConfig

CAPTIONS = 64  # of the data, for made-up latents


@dataclass(frozen=True, kw_only=True)
class CachedConfig(FitConfig):
    """A training on latents of pictures."""

    latents: str | None = None  # folder that encode_latents.py wrote; null: computed into the run folder
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def cache(self) -> Path:
        """The folder of the latents."""
        return Path(self.latents or Path(self.output, "latents"))


def cached_latents(recipe: CachedConfig, autoencoder: Path, masks: bool = False) -> Latents:
    """Of the recipe's pictures by this autoencoder; missing ones are computed first, those of a plan made up.

    masks: as of compute_latents. Raises ValueError as that does.
    """
    if recipe.plan:
        return made_up(recipe.data, load_model(AutoencoderKL, autoencoder).config)
    new = recipe.accept_new_data and recipe.latents is None
    return compute_latents(recipe.data, autoencoder, recipe.cache, masks, new)


def made_up(data: DataConfig, model: AutoencoderKLConfig) -> Latents:
    """Square latents of the data's size, with captions of the data. Raises ValueError as compute_latents."""
    factor = 2 ** (len(model.block_out_channels) - 1)
    check_sizes([Size(data.size, data.size)], factor)
    source = open_source(data)
    count = min(CAPTIONS, len(source))
    side = data.size // factor
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 1, model.latent_channels, side, side, generator=rng).half()
    mask = torch.full((count, 1, 1, side, side), 128, dtype=torch.uint8)
    bucket = Bucket(list(range(count)), mean, torch.full_like(mean, 0.1), mask)
    captions = {}
    for index in range(count):
        try:
            captions[index] = every(source[index][1])
        except ValueError:  # a picture that cannot be decoded is for the run itself to tell of
            captions[index] = [""]
    key = CacheKey("", "made up", model.latent_channels, factor, [[data.size, data.size, count]], 1, False)
    latents = Latents([bucket], captions, key)
    latents.classify(source.labels)
    return latents
