"""CLIP as a task of `fit`: captions and latents that belong together get the same direction.

A text encoder that learns from a UNet's loss alone learns first, and for long only, what changes most pixels:
the place. Told apart from other captions of the same batch, it has to know every word that matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from autoencoder.layers import Downsample, ResnetBlock
from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import load_model, save_model
from text_encoder.clip import CLIPTextEncoder
from train.batches.cache import CachedConfig
from train.batches.latents import Latents
from train.batches.plan import Draw, fixed_draws, spread
from train.data.pictures import grid, to_images
from train.tasks.text import TextConfig, build_text_encoder, text_facts


@dataclass(frozen=True, kw_only=True)
class ContrastiveRecipe(CachedConfig):
    """Training of a text encoder beside a small encoder of latents, which is not kept."""

    autoencoder: str  # folder of a trained one
    text_encoder: TextConfig = field(default_factory=TextConfig)
    tower: tuple[int, ...] = (64, 128, 192)  # channels of the encoder of latents, each level half the size
    groups: int = 16  # of its norms

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tower or any(width < 1 or width % self.groups for width in self.tower):
            raise ValueError(f"tower={self.tower}: expected multiples of groups={self.groups}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size={self.batch_size}: there is nothing to tell a single caption from")


class Tower(nn.Module):
    """Latents (B, C, h, w) -> (B, out): what is everywhere in them, and what is somewhere."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], out_channels: int, groups: int) -> None:
        super().__init__()
        levels: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        for before, width in zip((widths[0], *widths), widths, strict=False):
            levels += [ResnetBlock(before, width, groups=groups), Downsample(width, padding=1)]
        self.levels = nn.Sequential(*levels[:-1])
        self.norm = nn.GroupNorm(groups, widths[-1])
        self.projection = nn.Linear(2 * widths[-1], out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.levels(x)))
        return self.projection(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1))


class Contrast(nn.Module):
    """Both encoders and CLIP's loss in one forward (Radford et al. 2021, figure 3)."""

    def __init__(self, text_encoder: CLIPTextEncoder, tower: Tower) -> None:
        super().__init__()
        width = text_encoder.config.hidden_size
        self.text_encoder, self.tower = text_encoder, tower
        self.text_projection = nn.Linear(width, tower.projection.out_features, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # learned, at most log(100)

    def similarity(self, x0: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosines (B, N) of latents (B, C, h, w) and tokens (N, L)."""
        text = self.text_projection(self.text_encoder.pool(self.text_encoder(tokens), tokens))
        scale = self.logit_scale.exp().clamp(max=100.0)
        return scale * F.normalize(self.tower(x0), dim=1) @ F.normalize(text, dim=1).T

    def forward(self, x0: Tensor, tokens: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,), and whether each caption is nearest to its own picture. Every rank has its batch.

        index: (B,), of the picture: one that comes more than once is not told from itself.
        """
        logits = self.similarity(x0, tokens)
        own = torch.arange(len(logits), device=logits.device)
        same = (index[:, None] == index[None]) & (own[:, None] != own[None])
        logits = logits.masked_fill(same, -torch.inf)
        rows, columns = (F.cross_entropy(each, own, reduction="none") for each in (logits, logits.T))
        return (rows + columns) / 2, {"found": (logits.argmax(0) == own).float()}


class Contrastive:
    """Trains a text encoder to tell the captions of a batch apart by their latents."""

    def __init__(self, recipe: ContrastiveRecipe, autoencoder: Path, latents: Latents) -> None:
        self.recipe, self.latents = recipe, latents
        self.buckets = [bucket.indices for bucket in latents.buckets]
        self.vae = load_model(AutoencoderKL, autoencoder).requires_grad_(False)
        torch.manual_seed(recipe.seed)  # initial weights
        learned = Path(recipe.output, "model", "tokenizer")  # by this run, where it is at its end
        encoder, self.tokenizer = build_text_encoder(
            recipe.text_encoder,
            list(latents.captions.values()),
            learned if recipe.accept_new_data and learned.is_dir() else None,
        )
        if self.tokenizer.chunks > 1:
            raise ValueError(
                f"text_encoder.chunks={self.tokenizer.chunks}: captions are compared by one chunk; "
                "set 1 here, and more in the recipe of the UNet"
            )
        channels, width = self.vae.config.latent_channels, encoder.config.hidden_size
        self.contrast = Contrast(encoder, Tower(channels, recipe.tower, width, recipe.groups))
        self.module: nn.Module = self.contrast
        self.facts: Mapping[str, Any] = {
            "data": latents.key.data,
            "autoencoder": latents.key.autoencoder,
            "buckets": latents.key.buckets,
            "views": [latents.key.crops, latents.key.flip],
            "text_encoder": text_facts(recipe.text_encoder, encoder, self.tokenizer),
            "tower": list(recipe.tower),
        }

    def contents(self) -> Mapping[str, str]:
        return self.latents.contents()

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """x0 (B, C, h, w), tokens (B, L) and index (B,), of the same scenes."""
        return {
            "x0": self.vae.to_latents(self.latents.sample(draws)),
            "tokens": self.tokenizer(self.latents.choose_captions(draws)),
            "index": torch.tensor([draw.index for draw in draws]),
        }

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The loss over batches of the recipe's size, and how many captions find their own picture.

        candidates: among how many pictures, on average. A bucket that fills no batch has fewer, which is
        easier: only values with the same number of candidates compare.
        """
        device, total, found, candidates = self.contrast.logit_scale.device, 0.0, 0.0, 0.0
        count = sum(map(len, buckets))
        for draws in fixed_draws(buckets, self.recipe.batch_size):
            batch = {name: value.to(device) for name, value in self.batch(draws).items()}
            loss, values = self.contrast(**batch)
            total += loss.sum().item() / count
            found += values["found"].sum().item() / count
            candidates += len(draws) ** 2 / count
        return {"loss": total, "found": found, "candidates": candidates}

    def preview(self) -> Image.Image:
        """A row for each of eight captions: its own picture, then the seven of 256 that fit it best."""
        members = max(self.buckets, key=len)
        index = [members[place] for place in spread(len(members), 256)]
        asked = [members[place] for place in spread(len(members), 8)]
        shown = min(7, len(index))
        x0 = self.vae.to_latents(torch.stack(self.latents.means(index)))
        tokens = self.tokenizer([self.latents.captions[i][0] for i in asked])
        device = self.contrast.logit_scale.device
        best = self.contrast.similarity(x0.to(device), tokens.to(device)).T.cpu().topk(shown).indices
        own = self.vae.to_latents(torch.stack(self.latents.means(asked)))
        rows = torch.cat([torch.cat([own[k : k + 1], x0[best[k]]]) for k in range(len(asked))])
        return grid(to_images(self.vae.decode(rows)), columns=1 + shown)

    def export(self, folder: Path) -> None:
        """text_encoder/ and tokenizer/, for `text_encoder.path` of a diffusion recipe."""
        save_model(self.contrast.text_encoder, folder / "text_encoder")
        self.tokenizer.save(folder / "tokenizer")
