"""A classifier of noisy latents as a task of `fit`: cached latents and labels in, a classifier's folder out.

Dhariwal & Nichol 2021, section 4 and appendix H, on latents: their cross entropy at timesteps that are drawn
evenly, with weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL
from ldm.diffusion.classifier import NoisyClassifier, noisy_logits
from ldm.diffusion.noise import generator
from ldm.diffusion.objective import stratified_timesteps
from ldm.diffusion.schedule import NoiseSchedule
from ldm.drawing.classifier_folder import TrainedClassifier
from ldm.files.checkpoint import load_model
from ldm.formats.stock import scheduler_json
from ldm.model.architecture import UNetConfig
from train.batches.cache import CachedConfig
from train.batches.latents import Latents, autoencoder_folder
from train.batches.plan import Draw, fixed_draws, normal, spread
from train.data.sources import DataConfig
from train.tasks.tuning import read_scheduler

LEVELS = 8  # timesteps of a validation
SHOWN = 256  # pictures of a preview
CELL = 12  # pixels of a class at a timestep in a preview


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(CachedConfig):
    """Training of a classifier of noisy latents, which leads the pictures of a model to a class."""

    model: str = "bundled"  # folder or hub id of the pipeline that it will lead: its latents and its noise
    data: DataConfig = field(default_factory=lambda: DataConfig(label="subject"))
    widths: tuple[int, ...] = (32, 64, 96)  # channels of each level, each half the size of the one before
    layers: int = 1  # resnets a level
    attention: int = 1  # levels, the smallest ones, that look at all places at once
    head: int = 32  # channels of a head of that attention
    groups: int = 8  # of the norms
    dropout: float = 0.1  # in the resnets

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.label is None:
            raise ValueError("data.label is null: name what is to be told apart, subject, folder or a column")
        if not 0 <= self.attention <= len(self.widths):
            raise ValueError(f"attention={self.attention}: expected 0 to all {len(self.widths)} levels")
        self.body(1)

    def body(self, channels: int) -> UNetConfig:
        """The UNet whose way down it is, for latents of so many channels. Raises ValueError for a misfit."""
        levels = len(self.widths)
        kinds = ("DownBlock2D",) * (levels - self.attention) + ("AttnDownBlock2D",) * self.attention
        for width in self.widths[levels - self.attention :]:
            if self.head < 1 or width % self.head:
                raise ValueError(f"head={self.head} does not divide the {width} channels of a level")
        return UNetConfig(
            in_channels=channels,
            down_block_types=kinds,
            mid_block_type="UNetMidBlock2D",
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=self.widths,
            layers_per_block=self.layers,
            attention_head_dim=self.head,
            norm_num_groups=self.groups,
            dropout=self.dropout,
            resnet_time_scale_shift="scale_shift",
        )


class Classification(nn.Module):
    """The classifier and its loss in one forward."""

    def __init__(self, classifier: NoisyClassifier, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.classifier, self.schedule = classifier, schedule

    def forward(
        self, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,), and whether each answer is right. x0, noise: (B, C, h, w); t, labels: (B,) int64."""
        logits = noisy_logits(self.classifier, self.schedule, x0, noise, t)
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        return loss, {"right": (logits.argmax(1) == labels).float()}


class Classifying:
    """Trains a NoisyClassifier on cached latents and their labels."""

    def __init__(self, recipe: ClassifierRecipe, folder: Path, latents: Latents) -> None:
        """folder: of the pipeline."""
        self.recipe, self.latents = recipe, latents
        self.buckets = [bucket.indices for bucket in latents.buckets]
        self.vae = load_model(AutoencoderKL, autoencoder_folder(folder)).requires_grad_(False)
        self.scheduler = read_scheduler(folder)
        self.names = latents.classes
        if len(self.names) < 2:
            raise ValueError(f"the data has the classes {list(self.names)}: there is nothing to tell apart")
        torch.manual_seed(recipe.seed)  # initial weights
        self.classifier = NoisyClassifier(recipe.body(self.vae.config.latent_channels), len(self.names))
        self.module: nn.Module = Classification(self.classifier, self.scheduler.schedule)
        self.facts: Mapping[str, Any] = {
            "data": latents.key.data,
            "autoencoder": latents.key.autoencoder,
            "buckets": latents.key.buckets,
            "views": [latents.key.crops, latents.key.flip],
            "classes": list(self.names),
            "scheduler": scheduler_json(self.scheduler.config),
            "body": [list(recipe.widths), recipe.layers, recipe.attention, recipe.head, recipe.groups],
        }

    def contents(self) -> Mapping[str, str]:
        return self.latents.contents()

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """x0, noise (B, C, h, w), t and labels (B,): each a function of the draw alone."""
        x0 = self.vae.to_latents(self.latents.sample(draws))
        u = float(torch.rand((), dtype=torch.float64, generator=generator("t", draws[0].seed, draws[0].step)))
        t = stratified_timesteps(draws[0].count, len(self.scheduler.schedule.alpha), u)
        return {
            "x0": x0,
            "noise": normal(draws, tuple(x0.shape[1:]), "noise"),
            "t": t[[draw.position for draw in draws]],
            "labels": self.latents.choose_labels(draws),
        }

    def levels(self) -> list[int]:
        """The timesteps of a validation."""
        T = len(self.scheduler.schedule.alpha)
        return [int(T * (k + 0.5) / LEVELS) for k in range(LEVELS)]

    @torch.no_grad()
    def answers(self, buckets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of n samples their labels (n,), and by timestep the loss and whether it is right, (n, LEVELS)."""
        device, labels, losses, right = next(self.classifier.parameters()).device, [], [], []
        for draws in fixed_draws(buckets):
            batch = {name: value.to(device) for name, value in self.batch(draws).items()}
            labels.append(batch["labels"])
            each = [self.module(**batch | {"t": torch.full_like(batch["t"], t)}) for t in self.levels()]
            losses.append(torch.stack([loss for loss, _ in each], dim=1))
            right.append(torch.stack([values["right"] for _, values in each], dim=1))
        return torch.cat(labels).cpu(), torch.cat(losses).cpu(), torch.cat(right).cpu()

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The loss, and how many answers are right, in all and at each of LEVELS timesteps."""
        _, losses, right = self.answers(buckets)
        by_level = zip(self.levels(), right.mean(0).tolist(), strict=True)
        return {
            "loss": losses.mean().item(),
            "right": right.mean().item(),
            **{f"right_t{t:03d}": share for t, share in by_level},
        }

    def preview(self) -> Image.Image:
        """A row a class, a column a timestep, the cleanest first: white where every answer is right."""
        members = max(self.buckets, key=len)
        labels, _, right = self.answers([[members[place] for place in spread(len(members), SHOWN)]])
        rows = [right[labels == number] for number in range(len(self.names))]
        share = torch.stack([row.mean(0) if len(row) else torch.zeros(LEVELS) for row in rows])
        page = Image.fromarray((share * 255).round().to(torch.uint8).numpy())
        return page.resize((CELL * page.width, CELL * page.height), Image.Resampling.NEAREST)

    def export(self, folder: Path) -> None:
        """What `python -m ldm.generate --classifier` reads."""
        TrainedClassifier.of(self.classifier, self.names, self.vae.config, self.scheduler).save(folder)
