"""LoRA and its kin as a task of `fit`, and DreamBooth: adapters of a frozen model in, a small file out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.adapters.files import USUAL, Adapter, write_adapter
from ldm.diffusion.noise import key
from train.batches.latents import Latents
from train.batches.plan import Draw, Plan
from train.tasks.adapters import (
    ATTENTION,
    CONVOLUTIONS,
    KINDS,
    TEXT_ATTENTION,
    adapters_of,
    attach,
    find_layers,
    grow,
)
from train.tasks.denoising import Diffusion
from train.tasks.diffusion import LatentDiffusion
from train.tasks.tuning import Tuned, Tuning, TuningRecipe

Spelling = Literal["diffusers", "kohya"]


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """DreamBooth's prior preservation: the model goes on learning what it drew itself (Ruiz et al. 2023)."""

    prompt: str | None = None  # of the class, such as "a dog"; null: no prior preservation
    pictures: int = 64  # of the class, drawn by the model before training into the run folder
    weight: float = 1.0  # of their loss beside that of the data

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise ValueError(f"prior.pictures={self.pictures}: expected 1 or more")
        if not 0 < self.weight <= 100:
            raise ValueError(
                f"prior.weight={self.weight}: expected more than 0, at most 100; without a prior leave out "
                "prior.prompt"
            )


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(TuningRecipe):
    """Training of adapters, LoRA or another kind, beside a model that stays as it is."""

    adapter: str = "lora"  # locon: on convolutions too; loha, lokr: LyCORIS' products; dora: lengths apart
    rank: int = 8  # of the matrices that each layer gets
    alpha: float | None = None  # what an adapter says counts alpha / rank; null: rank
    dropout: float = 0.0  # of what an adapter sees of its layer's input
    targets: tuple[str, ...] | None = None  # ends of names of the UNet's layers; null: its attention's
    train_text_encoder: bool = False  # adapters there, too
    text_targets: tuple[str, ...] = TEXT_ATTENTION  # ends of names of the text encoder's layers
    text_encoder_lr: float | None = None  # peak, as optim.lr, of the text encoder's adapters; null: optim.lr
    prior: PriorConfig = field(default_factory=PriorConfig)
    spelling: Spelling | None = None  # of names in the file; null: diffusers', for loha and lokr kohya's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter not in KINDS:
            raise ValueError(f"adapter={self.adapter!r} is not one of {', '.join(KINDS)}")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: expected 1 or more; 4 to 32 are usual")
        if self.alpha is not None and not 0 < self.alpha < 1e6:
            raise ValueError(f"alpha={self.alpha}: expected more than 0; the rank or half of it is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: a fraction from 0 to below 1")
        if self.text_encoder_lr is not None and not 0 < self.text_encoder_lr < 1:
            raise ValueError(f"text_encoder_lr={self.text_encoder_lr}: a learning rate lies between 0 and 1")
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError(
                f"text_encoder_lr={self.text_encoder_lr} has no effect without train_text_encoder"
            )
        if self.adapter == "loha" and self.spelling == "diffusers":
            raise ValueError("spelling=diffusers: diffusers reads no loha, use kohya or leave it out")
        if self.adapter == "lokr" and self.spelling == "diffusers" and self.train_text_encoder:
            raise ValueError(
                "spelling=diffusers: diffusers reads no lokr of a text encoder, use kohya or leave it out"
            )
        if self.prior.prompt is not None and self.data.max_aspect != 1:
            raise ValueError(
                f"data.max_aspect={self.data.max_aspect} with prior.prompt: pictures of the class, in the "
                "same batch, are squares; use 1"
            )

    @property
    def ends(self) -> dict[str, tuple[str, ...]]:
        """Of the names of the layers that get adapters, by the name of their model."""
        usual = ATTENTION + CONVOLUTIONS if self.adapter == "locon" else ATTENTION
        ends = {"unet": usual if self.targets is None else self.targets}
        return {**ends, "text_encoder": self.text_targets} if self.train_text_encoder else ends

    @property
    def spelt(self) -> Spelling:
        """How names are spelt in the exported file."""
        return self.spelling or ("kohya" if self.adapter in ("loha", "lokr") else "diffusers")


class Lora(Tuning):
    """Trains adapters of a UNet and, if the recipe says so, of a text encoder."""

    def __init__(
        self, recipe: LoraRecipe, folder: Path, latents: Latents, prior: Latents | None = None
    ) -> None:
        """prior: of pictures that the model drew of the class, for prior preservation."""
        super().__init__(recipe, folder, latents)
        self.settings, alpha = recipe, recipe.alpha or recipe.rank
        models: dict[str, nn.Module] = {"unet": self.unet, "text_encoder": self.text_encoder}
        names = {"unet": "targets", "text_encoder": "text_targets"}
        self.trees: dict[str, nn.Module] = {}
        for name, ends in recipe.ends.items():
            layers = find_layers(models[name], ends, f"{names[name]}={list(ends)}")
            self.trees[name] = grow(layers, recipe.adapter, recipe.rank, alpha, recipe.dropout, recipe.seed)
            attach(self.trees[name], models[name])
        model, own = self.loss_model(recipe.train_text_encoder), recipe.text_encoder_lr
        rates = {} if own is None else {"text_encoder": own / recipe.optim.lr}
        self.module = (
            Tuned(model, self.trees, rates)
            if prior is None
            else Preserving(model, self.trees, rates, recipe.prior.weight)
        )
        self.prior: LatentDiffusion | None = None
        self.facts = {**self.facts, "adapter": adapter_facts(recipe)}
        if prior is not None:
            self.prior = copy.copy(self)
            self.prior.latents = prior
            members = [bucket.indices for bucket in prior.buckets]
            self.prior_plan = Plan(members, recipe.batch_size, key("prior", recipe.seed))
            self.facts = {**self.facts, "prior": {"data": prior.key.data, "weight": recipe.prior.weight}}

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """As the whole model's; with a prior then as many rows of the class, by a plan of their own."""
        batch = super().batch(draws)
        if self.prior is None:
            return batch
        positions = range(draws[0].position, draws[-1].position + 1)
        other = LatentDiffusion.batch(self.prior, self.prior_plan.draws(draws[0].step, positions))
        return {name: torch.cat([value, other[name]]) for name, value in batch.items()}

    def export(self, folder: Path) -> None:
        """The adapters in one file, which load_lora_weights, ours and diffusers', finds in the folder."""
        layers = {
            f"{model}.{name}": adapter.learned()
            for model, tree in self.trees.items()
            for name, adapter in adapters_of(tree).items()
        }
        write_adapter(Adapter(layers), folder / USUAL[0], self.settings.spelt)


class Preserving(Tuned):
    """Adapters that learn the data and, in as many further rows, what the model drew of its class."""

    def __init__(
        self, model: Diffusion, parts: Mapping[str, nn.Module], rates: Mapping[str, float], weight: float
    ) -> None:
        """weight: of the class, lambda in DreamBooth's loss (Ruiz et al. 2023, eq. 2)."""
        super().__init__(model, parts, rates)
        self.weight = weight

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,) of 2 B rows: B of the data and B of the class."""
        loss, others = super().forward(**batch)
        instance, prior = loss.chunk(2)
        return instance + self.weight * prior, {**others, "instance": instance, "prior": prior}


def adapter_facts(recipe: LoraRecipe) -> dict[str, object]:
    """What a resumed run must share."""
    return {
        "kind": recipe.adapter,
        "rank": recipe.rank,
        "alpha": recipe.alpha or recipe.rank,
        "dropout": recipe.dropout,
        **{name: list(ends) for name, ends in recipe.ends.items()},
    }
