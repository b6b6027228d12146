"""The latent diffusion model as a task of `fit`: cached latents and captions in, a pipeline out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL
from ldm.diffusion.noise import generator
from ldm.diffusion.objective import diffusion_loss, stratified_timesteps
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.variance import LearnedVariance
from ldm.files.checkpoint import empty_model, load_model
from ldm.files.config import read_config, read_json
from ldm.model.context import Context
from ldm.model.unet import UNet, UNetConfig, seeing
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from train.batches.cache import CachedConfig
from train.batches.latents import Latents
from train.batches.plan import Draw, fixed_draws, normal, spread
from train.config import to_mapping
from train.data.pictures import grid
from train.fit.loop import choose_precision, cpu_only
from train.tasks.denoising import Diffusion, ObjectiveConfig
from train.tasks.text import TextConfig, build_text_encoder, text_facts

log = logging.getLogger(__name__)
LEVELS = 8  # timesteps of a validation
WITHOUT_WEIGHTS = ("sample_size", "dropout", "upcast_attention")  # of a UNet: any weights do with any value


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe(CachedConfig):
    """Training of a latent diffusion model."""

    steps: int  # optimizer steps of the UNet; what trains before it has those of its own recipe
    autoencoder: str  # folder of a trained one, or the recipe (.yaml) that trains one on this data first
    text_encoder: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig
    start: str | None = None  # folder of a pipeline, run or UNet whose weights to go on from; null: new ones
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
        if self.unet.learns_variance and self.objective.prediction == "flow":
            raise ValueError(
                f"unet.out_channels={self.unet.out_channels} with objective.prediction=flow: its steps have "
                f"no variance to learn, use {self.unet.in_channels}"
            )
        empty_model(UNet, self.unet)  # what does not fit is found out before hours of other stages
        if (self.unet.num_class_embeds is None) != (self.data.label is None):
            raise ValueError(
                f"unet.num_class_embeds={self.unet.num_class_embeds} and data.label={self.data.label}: set "
                "both (data.label: subject, folder or a column), or neither"
            )
        if self.unet.time_cond_proj_dim is not None:
            raise ValueError(
                f"unet.time_cond_proj_dim={self.unet.time_cond_proj_dim}: a UNet that is told its guidance "
                "comes from train/train_consistency.py, which distils one that is not; use null"
            )
        if self.unet.pooled_channels:
            raise ValueError(
                "unet.addition_embed_type=text_time, SDXL's: it draws but does not train here, as it is told "
                "more than one text encoder says; use null"
            )


def build_unet(recipe: DiffusionRecipe) -> UNet:
    """New weights, or those of recipe.start. Raises ValueError if these are not of the recipe's UNet."""
    folder = start_folder(recipe)
    if folder is None:
        return UNet(recipe.unet)
    unet = empty_model(UNet, recipe.unet)
    unet.load_state_dict(load_model(UNet, folder).state_dict(), assign=True)
    return unet


def start_folder(recipe: DiffusionRecipe) -> Path | None:
    """The folder of the UNet that recipe.start names, without a look at its weights.

    Raises ValueError if there is none, if a run has not finished it, or if it is not of the recipe's UNet.
    """
    if recipe.start is None:
        return None
    start = Path(recipe.start)
    places = (start, start / "unet", start / "model" / "unet")
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        raise ValueError(
            f"start={recipe.start!r} holds no UNet: name a pipeline folder, a run or a UNet's own"
        )
    if (start / "checkpoints").is_dir() and not (start / "exported.json").is_file():
        raise ValueError(
            f"start={recipe.start!r} is a run that has not come to its end: give its command again first"
        )
    found = read_config(UNetConfig, read_json(folder / "config.json"), folder / "config.json")
    differ = [
        f"{name}={getattr(found, name)}, not {getattr(recipe.unet, name)}"
        for name in (one.name for one in dataclasses.fields(UNetConfig))
        if name not in WITHOUT_WEIGHTS and setting(found, name) != setting(recipe.unet, name)
    ]
    if differ:
        raise ValueError(f"start: the UNet in {folder} is not of the recipe's unet: {'; '.join(differ)}")
    scheduler = folder.parent / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        kind = Scheduler.from_config(read_json(scheduler)).prediction
        if kind != recipe.objective.prediction:
            log.warning(
                "start: %s predicts %s, but objective.prediction=%s: it has to learn that first",
                folder,
                kind,
                recipe.objective.prediction,
            )
    return folder


def check_compile(recipe: DiffusionRecipe) -> None:
    """Raises ValueError where a compiled step computes other gradients: on the CPU under bf16 autocast."""
    if recipe.compile and cpu_only() and choose_precision(recipe.precision) == "bf16":
        raise ValueError(
            f"compile=true with precision={recipe.precision}, bf16 on this CPU: torch's compiler "
            "changes the gradients there, without a word. Use --precision fp32, or --compile false"
        )


def setting(config: UNetConfig, name: str) -> Any:
    """A value of the configuration; of each level where it may be."""
    return config.per_level(name) if name in config.PER_LEVEL else getattr(config, name)


class LatentDiffusion:
    """Trains a UNet, and with it a text encoder if the recipe says so, on cached latents."""

    def __init__(
        self,
        recipe: DiffusionRecipe,
        autoencoder: Path,
        latents: Latents,
        scheduler: Scheduler | None = None,
    ) -> None:
        """scheduler: of a model that was there before; None: the one of new models for the recipe."""
        self.recipe, self.latents = recipe, latents
        self.buckets = [bucket.indices for bucket in latents.buckets]
        self.vae = load_model(AutoencoderKL, autoencoder).requires_grad_(False)
        objective = recipe.objective
        self.scheduler = scheduler or Scheduler.default(objective.prediction, objective.zero_terminal_snr)
        torch.manual_seed(recipe.seed)  # initial weights
        self.text_encoder, self.tokenizer = build_text_encoder(
            recipe.text_encoder, list(latents.captions.values())
        )
        self.unet = build_unet(recipe)
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
        check_classes(recipe, latents.classes)
        if recipe.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        check_compile(recipe)
        if recipe.compile:
            self.unet.compile_blocks(shapes=len(self.buckets))
        self.module: nn.Module = Diffusion(
            self.unet, self.text_encoder, self.scheduler, recipe.objective, recipe.text_encoder.train
        )
        self.facts: Mapping[str, Any] = {
            "data": latents.key.data,
            "autoencoder": latents.key.autoencoder,
            "buckets": latents.key.buckets,
            "views": [latents.key.crops, latents.key.flip],
            "unet": to_mapping(recipe.unet),
            "text_encoder": text_facts(recipe.text_encoder, self.text_encoder, self.tokenizer),
            "objective": {**to_mapping(recipe.objective), "weight": recipe.objective.loss_weight},
            **({"classes": list(latents.classes)} if latents.classes else {}),
        }

    def contents(self) -> Mapping[str, str]:
        return self.latents.contents()

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """x0, noise, perturbation (B, C, h, w), t (B,), tokens (B, N) or (B, K, N) in chunks: each a function
        of the draw alone, so a caption has all K chunks whatever the others of its batch fill."""
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
        if self.latents.classes:
            batch["labels"] = self.latents.choose_labels(draws, dropout=objective.caption_dropout)
        if objective.offset_noise:
            batch["noise"] += objective.offset_noise * normal(draws, (shape[0], 1, 1), "offset noise")
        if objective.input_perturbation:
            batch["perturbation"] = objective.input_perturbation * normal(draws, shape, "perturbation")
        if objective.mask_weight != 1:
            batch["area_weight"] = 1 + (objective.mask_weight - 1) * self.latents.mask(draws)
        return batch

    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        return validation_losses(self.pipeline(), self.latents, buckets)

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
            defaults=dataclasses.replace(self.recipe.sampling, class_names=self.latents.classes),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def preview(self) -> Image.Image:
        """One picture a prompt, always from the same noise; of classes in turn, where there are some."""
        captions, pipe, size = list(self.latents.captions.values()), self.pipeline(), self.recipe.data.size
        prompts = list(self.recipe.prompts) or [captions[i][0] for i in spread(len(captions), 8)]
        labels = in_turn(pipe, len(prompts))
        if labels and not self.recipe.prompts:  # those of the pictures that the captions are of
            known = list(self.latents.labels.values())
            labels = [known[i] for i in spread(len(known), 8)]
        images = pipe(prompts, height=size, width=size, seed=0, class_labels=labels, return_dict=False)[0]
        return grid(images, columns=min(len(images), 8))

    def export(self, folder: Path) -> None:
        """The whole pipeline, in the layout that stock diffusers reads."""
        self.pipeline().save_pretrained(folder)
        if self.recipe.export_dtype != "float32":
            # read again, so that the weights in training stay as they are
            dtype = getattr(torch, self.recipe.export_dtype)
            LatentDiffusionPipeline.from_pretrained(folder, dtype=dtype).save_pretrained(folder)


def in_turn(pipe: LatentDiffusionPipeline, count: int) -> list[int] | None:
    """So many classes of a model, one after the other; None if it has none."""
    embeds = pipe.unet.config.num_class_embeds
    return None if embeds is None else [number % (embeds - 1) for number in range(count)]


def check_classes(recipe: DiffusionRecipe, names: Sequence[str]) -> None:
    """Raises ValueError unless the UNet has an embedding for each class and one that says nothing."""
    if recipe.data.label is not None and recipe.unet.num_class_embeds != len(names) + 1:
        raise ValueError(
            f"unet.num_class_embeds={recipe.unet.num_class_embeds}: the data has {len(names)} classes by "
            f"data.label={recipe.data.label}, {', '.join(names[:8])}{' ...' if names[8:] else ''}; set "
            f"{len(names) + 1}, one more for none of them"
        )
    if recipe.sampling.class_names and recipe.sampling.class_names != tuple(names):
        raise ValueError(
            f"sampling.class_names={list(recipe.sampling.class_names)}: the data has {list(names)}; leave it "
            "out"
        )


def nothing(draws: list[Draw]) -> None:
    """What a UNet sees beside the latents of some samples."""


def validation_losses(
    pipe: LatentDiffusionPipeline,
    latents: Latents,
    buckets: Sequence[Sequence[int]],
    beside: Callable[[list[Draw]], Tensor | None] = nothing,
) -> dict[str, float]:
    """The plain loss, that at each of LEVELS timesteps and that of each bucket, one noise a sample.

    beside: what the UNet sees beside the latents of some samples, (B, K, h, w).
    """
    device, T = next(pipe.unet.parameters()).device, len(pipe.scheduler.schedule.alpha)
    timesteps = [int(T * (k + 0.5) / LEVELS) for k in range(LEVELS)]
    totals = torch.zeros(len(buckets), LEVELS)  # sums over the samples
    parts = [(number, draws) for number, one in enumerate(buckets) for draws in fixed_draws([one])]
    for number, draws in parts:
        x0 = pipe.vae.to_latents(latents.sample(draws)).to(device)
        noise = normal(draws, tuple(x0.shape[1:]), "noise").to(device)
        text = pipe.text_encoder(pipe.tokenizer(latents.choose_captions(draws)).to(device))
        labels = latents.choose_labels(draws).to(device) if latents.classes else None
        context = Context(text, labels=labels)
        unet = seeing(pipe.unet, beside(draws))
        unet = LearnedVariance(unet) if pipe.unet.config.learns_variance else unet
        for k, t in enumerate(timesteps):
            at = torch.full((len(draws),), t, device=device)
            loss = diffusion_loss(
                unet, pipe.scheduler.schedule, x0, context, pipe.scheduler.prediction, noise, at
            )
            totals[number, k] += loss.sum().cpu()
    losses = (totals.sum(0) / sum(map(len, buckets))).tolist()
    named = {f"loss_t{t:03d}": loss for t, loss in zip(timesteps, losses, strict=True)}
    if len(buckets) > 1:
        for size, one, total in zip(latents.sizes, buckets, totals, strict=True):
            if one:
                named[f"loss_{size}"] = total.mean().item() / len(one)
    return {"loss": sum(losses) / LEVELS, **named}
