"""The latent diffusion model as a task of `fit`: cached latents and captions in, a pipeline out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, distributed, nn

from autoencoder.vae import AutoencoderKL
from ldm.checkpoint import empty_model, load_model
from ldm.noise import generator
from ldm.objective import (
    DENSITIES,
    WEIGHTS,
    LossHistory,
    Uncertainty,
    diffusion_loss,
    stratified_timesteps,
)
from ldm.options import Defaults
from ldm.pipeline import LatentDiffusionPipeline
from ldm.scheduler import Scheduler
from ldm.unet import UNet, UNetConfig
from ldm.variance import LearnedVariance, ReverseSteps
from text_encoder.clip import CLIPTextEncoder
from train.config import to_mapping
from train.data import DataConfig
from train.latents import Latents
from train.pictures import grid
from train.plan import Draw, fixed_draws, normal, spread
from train.state import FitConfig
from train.text import TextConfig, build_text_encoder, text_facts

LEVELS = 8  # timesteps of a validation


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the UNet predicts, at which noise, and what each error weighs."""

    prediction: Literal["v", "eps", "x0", "flow"] = "v"  # flow: rectified flow, not for stock diffusers
    zero_terminal_snr: bool = True  # the noisiest level is pure noise; not with eps, always with flow
    weight: str | None = None  # of the loss, by the noise level: a name in WEIGHTS; null: what suits the rest
    timestep_density: str = "uniform"  # or logit_normal, most in the middle: a name in DENSITIES
    importance_sampling: bool = False  # draw timesteps of large losses more often; their losses weigh less
    timestep_shift: float = 1.0  # of the timesteps drawn; below 1: less noise, which small latents want
    caption_dropout: float = 0.1  # of the samples get the empty prompt, which guidance needs
    offset_noise: float = 0.0  # deviation of noise that is the same all over a channel; zero SNR does better
    uncertainty: bool = False  # learn the mean loss of each noise level, so that all count alike (EDM2)
    mask_weight: float = 1.0  # of an error within a figure or an opaque pixel; around them it weighs 1
    variance_weight: float = 0.001  # of the bound that teaches the variance, with twice the unet.out_channels
    input_perturbation: float = 0.0  # of more noise that the UNet sees and is not asked for; 0.1 in the paper

    def __post_init__(self) -> None:
        if self.prediction == "eps" and self.zero_terminal_snr:
            raise ValueError(
                "objective.prediction=eps with zero_terminal_snr: pure noise tells nothing, use v"
            )
        if self.weight is not None and self.weight not in WEIGHTS:
            raise ValueError(f"objective.weight={self.weight!r} is not one of {', '.join(WEIGHTS)}")
        if self.uncertainty and self.weight not in (None, "none"):
            raise ValueError(
                f"objective.uncertainty takes back what objective.weight={self.weight!r} does: leave it out"
            )
        if self.importance_sampling and (
            self.uncertainty or self.timestep_shift != 1 or self.timestep_density != "uniform"
        ):
            raise ValueError(
                "objective.importance_sampling chooses the timesteps: leave out uncertainty, timestep_shift "
                "and timestep_density"
            )
        if not 0.01 <= self.timestep_shift <= 100:
            raise ValueError(
                f"objective.timestep_shift={self.timestep_shift}: expected 0.01 to 100; 1 is even"
            )
        for name in ("offset_noise", "input_perturbation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name}={getattr(self, name)}: expected 0, or up to 1")
        if not 0 < self.variance_weight <= 1:
            raise ValueError(
                f"objective.variance_weight={self.variance_weight}: expected up to 1; 0.001 is usual"
            )
        if not 1 <= self.mask_weight <= 1000:
            raise ValueError(f"objective.mask_weight={self.mask_weight}: expected 1 to 1000; 1 is even")
        if self.timestep_density not in DENSITIES:
            known = ", ".join(DENSITIES)
            raise ValueError(f"objective.timestep_density={self.timestep_density!r} is not one of {known}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"objective.caption_dropout={self.caption_dropout}: a fraction lies between 0 and 1"
            )

    @property
    def loss_weight(self) -> str:
        """The weight, or what suits the rest: flow and uncertainty are published without one."""
        return self.weight or ("none" if self.prediction == "flow" or self.uncertainty else "min_snr")


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(FitConfig):
    """Training of a latent diffusion model."""

    autoencoder: str  # folder of a trained one, or the recipe (.yaml) that trains one on this data first
    latents: str | None = None  # folder that encode_latents.py wrote; null: computed into the run folder
    data: DataConfig = field(default_factory=DataConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig
    gradient_checkpointing: bool = False  # of the UNet: much less memory for a third more time
    compile: bool = False  # the UNet's blocks, by torch.compile; for CUDA: the first steps take minutes
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    prompts: tuple[str, ...] = ()  # of the pictures drawn while training; none: captions of the data
    export_dtype: Literal["float32", "float16"] = "float32"  # in which the exported weights are stored
    sampling: Defaults = field(default_factory=lambda: Defaults(num_inference_steps=25, guidance_scale=4.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoder.path is None and self.unet.cross_attention_dim != self.text_encoder.width:
            raise ValueError(
                f"unet.cross_attention_dim={self.unet.cross_attention_dim} and "
                f"text_encoder.width={self.text_encoder.width} differ"
            )
        if self.unet.out_channels not in (self.unet.in_channels, 2 * self.unet.in_channels):
            raise ValueError(
                f"unet.out_channels={self.unet.out_channels}: expected unet.in_channels="
                f"{self.unet.in_channels}, or twice as many to learn the variance"
            )
        if self.learns_variance and self.objective.prediction == "flow":
            raise ValueError(
                f"unet.out_channels={self.unet.out_channels} with objective.prediction=flow: its steps have "
                f"no variance to learn, use {self.unet.in_channels}"
            )
        empty_model(UNet, self.unet)  # what does not fit is found out before hours of other stages
        if self.unet.num_class_embeds is not None:
            raise ValueError(
                f"unet.num_class_embeds={self.unet.num_class_embeds}: the data has no classes, use null"
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the UNet says how sure it is: Nichol & Dhariwal 2021."""
        return self.unet.out_channels == 2 * self.unet.in_channels


class LatentDiffusion:
    """Trains a UNet, and with it a text encoder if the recipe says so, on cached latents."""

    def __init__(self, recipe: DiffusionRecipe, autoencoder: Path, latents: Latents) -> None:
        self.recipe, self.latents = recipe, latents
        self.buckets = [bucket.indices for bucket in latents.buckets]
        self.vae = load_model(AutoencoderKL, autoencoder).requires_grad_(False)
        self.scheduler = Scheduler.default(recipe.objective.prediction, recipe.objective.zero_terminal_snr)
        torch.manual_seed(recipe.seed)  # initial weights
        self.text_encoder, self.tokenizer = build_text_encoder(
            recipe.text_encoder, list(latents.captions.values())
        )
        self.unet = UNet(recipe.unet)
        if recipe.unet.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"unet.in_channels={recipe.unet.in_channels}, but the autoencoder has "
                f"{self.vae.config.latent_channels} latent channels"
            )
        if recipe.unet.cross_attention_dim != self.text_encoder.config.hidden_size:
            raise ValueError(
                f"unet.cross_attention_dim={recipe.unet.cross_attention_dim}, but the text encoder has "
                f"{self.text_encoder.config.hidden_size} channels"
            )
        if recipe.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if recipe.compile:
            self.unet.compile_blocks(shapes=len(self.buckets))
        self.module: nn.Module = Diffusion(self.unet, self.text_encoder, self.scheduler, recipe)
        self.facts: Mapping[str, Any] = {
            "data": latents.key.data,
            "autoencoder": latents.key.autoencoder,
            "buckets": latents.key.buckets,
            "views": [latents.key.crops, latents.key.flip],
            "unet": to_mapping(recipe.unet),
            "text_encoder": text_facts(recipe.text_encoder, self.text_encoder, self.tokenizer),
            "objective": {**to_mapping(recipe.objective), "weight": recipe.objective.loss_weight},
        }

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """x0, noise, perturbation (B, C, h, w), t (B,), tokens (B, N): each a function of the draw alone."""
        z = self.latents.sample(draws)
        u = float(torch.rand((), dtype=torch.float64, generator=generator("t", draws[0].seed, draws[0].step)))
        shape, objective, count = tuple(z.shape[1:]), self.recipe.objective, draws[0].count
        T, shift = len(self.scheduler.schedule.alpha), objective.timestep_shift
        if objective.importance_sampling:
            t = (u + torch.arange(count, dtype=torch.float64) / count) % 1  # quantiles, as stratified as t
        else:
            t = stratified_timesteps(count, T, u, shift, objective.timestep_density)
        batch = {
            "x0": self.vae.to_latents(z),
            "noise": normal(draws, shape, "noise"),
            "t": t[[draw.position for draw in draws]],
            "tokens": self.tokenizer(self.latents.choose_captions(draws, dropout=objective.caption_dropout)),
        }
        if objective.offset_noise:
            batch["noise"] += objective.offset_noise * normal(draws, (shape[0], 1, 1), "offset noise")
        if objective.input_perturbation:
            batch["perturbation"] = objective.input_perturbation * normal(draws, shape, "perturbation")
        if objective.mask_weight != 1:
            batch["area_weight"] = 1 + (objective.mask_weight - 1) * self.latents.mask(draws)
        return batch

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The plain loss, that at each of LEVELS timesteps and that of each bucket, one noise a sample."""
        device, T = next(self.unet.parameters()).device, len(self.scheduler.schedule.alpha)
        unet = LearnedVariance(self.unet) if self.recipe.learns_variance else self.unet
        timesteps = [int(T * (k + 0.5) / LEVELS) for k in range(LEVELS)]
        totals = torch.zeros(len(buckets), LEVELS)  # sums over the samples
        parts = [(number, draws) for number, one in enumerate(buckets) for draws in fixed_draws([one])]
        for number, draws in parts:
            x0 = self.vae.to_latents(self.latents.sample(draws)).to(device)
            noise = normal(draws, tuple(x0.shape[1:]), "noise").to(device)
            context = self.text_encoder.to(device)(
                self.tokenizer(self.latents.choose_captions(draws)).to(device)
            )
            for k, t in enumerate(timesteps):
                at = torch.full((len(draws),), t, device=device)
                loss = diffusion_loss(
                    unet, self.scheduler.schedule, x0, context, self.scheduler.prediction, noise, at
                )
                totals[number, k] += loss.sum().cpu()
        losses = (totals.sum(0) / sum(map(len, buckets))).tolist()
        named = {f"loss_t{t:03d}": loss for t, loss in zip(timesteps, losses, strict=True)}
        if len(buckets) > 1:
            for size, one, total in zip(self.latents.sizes, buckets, totals, strict=True):
                if one:
                    named[f"loss_{size}"] = total.mean().item() / len(one)
        return {"loss": sum(losses) / LEVELS, **named}

    def pipeline(self) -> LatentDiffusionPipeline:
        """The pipeline around the weights as they are now."""
        device = next(self.unet.parameters()).device
        self.vae.to(device)
        self.text_encoder.to(device)
        pipe = LatentDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            defaults=self.recipe.sampling,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def preview(self) -> Image.Image:
        """One picture a prompt, always from the same noise."""
        captions = list(self.latents.captions.values())
        prompts = list(self.recipe.prompts) or [captions[i][0] for i in spread(len(captions), 8)]
        size = self.recipe.data.size
        images = self.pipeline()(prompts, height=size, width=size, seed=0, return_dict=False)[0]
        return grid(images, columns=min(len(images), 8))

    def export(self, folder: Path) -> None:
        """The whole pipeline, in the layout that stock diffusers reads."""
        self.pipeline().save_pretrained(folder)
        if self.recipe.export_dtype != "float32":
            # read again, so that the weights in training stay as they are
            dtype = getattr(torch, self.recipe.export_dtype)
            LatentDiffusionPipeline.from_pretrained(folder, dtype=dtype).save_pretrained(folder)


class Diffusion(nn.Module):
    """UNet, text encoder and loss in one forward, so that wrappers which watch forward see all of it.

    A frozen text encoder is called but is no part of this module, so it is not trained, averaged or saved.
    """

    def __init__(
        self, unet: UNet, text_encoder: CLIPTextEncoder, scheduler: Scheduler, recipe: DiffusionRecipe
    ) -> None:
        super().__init__()
        self.unet = unet
        self.schedule, self.kind = scheduler.schedule, scheduler.prediction
        self.weight = WEIGHTS[recipe.objective.loss_weight]
        self.reverse = ReverseSteps.of(self.schedule) if recipe.learns_variance else None
        self.variance_weight = recipe.objective.variance_weight
        self.uncertainty = Uncertainty(len(self.schedule.alpha)) if recipe.objective.uncertainty else None
        self.history = LossHistory(len(self.schedule.alpha)) if recipe.objective.importance_sampling else None
        self.encode: Callable[[Tensor], Tensor]
        if recipe.text_encoder.train:
            self.text_encoder = text_encoder
            self.encode = text_encoder.__call__
        else:
            self.encode = frozen(text_encoder)

    def forward(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        tokens: Tensor,
        perturbation: Tensor | None = None,
        area_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,). x0, noise, perturbation: (B, C, h, w); area_weight: (B, 1, h, w); t: (B,) int64, or
        float64 quantiles where importance chooses; tokens: (B, N) int64."""
        importance = None
        if self.history is not None:
            t, importance = self.history.choose(t)
        context, unet = self.encode(tokens), LearnedVariance(self.unet) if self.reverse else self.unet
        loss = diffusion_loss(
            unet, self.schedule, x0, context, self.kind, noise, t, self.weight, perturbation, area_weight
        )
        others = {}
        if self.uncertainty is not None:
            loss, others["error"] = self.uncertainty.balance(loss, t), loss
        if self.reverse and isinstance(unet, LearnedVariance):
            # L_hybrid (Nichol & Dhariwal 2021, eq. 16): the bound is a sum over T, of which this is a draw
            others["bound"] = len(self.schedule.alpha) * unet.bound(self.reverse, x0, self.kind, t)
            loss = loss + self.variance_weight * others["bound"]
        if self.history is not None and importance is not None:
            self.history.note(of_all_ranks(t), of_all_ranks(loss.detach()))
            loss = importance * loss
        return loss, others


def of_all_ranks(values: Tensor) -> Tensor:
    """(B,) of this rank to (ranks * B,), the same on all of them, so that all go on alike."""
    if not distributed.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, values)
    return torch.cat(parts)


def frozen(text_encoder: CLIPTextEncoder) -> Callable[[Tensor], Tensor]:
    """tokens (B, N) -> context (B, N, D) by an encoder that does not learn, on the device of the tokens."""
    text_encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(tokens: Tensor) -> Tensor:
        return text_encoder.to(tokens.device)(tokens)

    return encode
