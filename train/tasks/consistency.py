"""Consistency distillation as a task of `fit`: a text-to-image model in, one that needs few steps out.

The recipe of LCM (Luo et al. 2023): of two levels of a path that the guided teacher takes, the student is to
answer at the noisier one as a slow average of itself does at the other. It is told how much guidance the
teacher had (Meng et al. 2023), so it draws with one call a step. Cached latents and captions are what every
diffusion model learns from.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ldm.diffusion.consistency import consistency_loss
from ldm.diffusion.guidance import classifier_free, conditional
from ldm.diffusion.noise import step_noise
from ldm.diffusion.objective import WEIGHTS
from ldm.diffusion.sample import sample
from ldm.diffusion.schedule import Timesteps
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.solvers import consistency, ddim
from ldm.model.architecture import time_embedding
from ldm.model.context import Context
from ldm.model.unet import UNet
from ldm.recipes.options import Defaults, check_guidance
from train.batches.latents import Latents, autoencoder_folder
from train.batches.plan import Draw, fixed_draws, normal, uniform
from train.fit.checkpoint import weights_sha256
from train.fit.loop import cpu_only
from train.fit.shards import wants_shards
from train.tasks.denoising import Diffusion
from train.tasks.diffusion import LatentDiffusion
from train.tasks.tuning import FurtherRecipe, Tuned, read_scheduler, whole_recipe

STEPS = 4  # of the previews, and of a call where generation.json is asked
GUIDANCE_CHANNELS = 256  # in which the student is told its guidance: those of diffusers' script
LEVELS = 5  # of the loss of a validation
FOLLOWED = 16  # of its samples, whose way by the teacher's steps is walked once in a process


@dataclass(frozen=True, kw_only=True)
class ConsistencyRecipe(FurtherRecipe):
    """Distillation of a model that draws from text into one that needs few steps."""

    min_guidance_scale: float = 3.0  # that the student learns to answer with; 1 is none. With the next those
    max_guidance_scale: float = 15.0  # of the paper, whose omega is one less: 2 to 14
    original_inference_steps: int = (
        50  # of the teacher, from noise to data: each is one to be consistent over
    )
    target_decay: float = 0.95  # a step, of the average of the student that it is to agree with; 0: itself
    export_dtype: Literal["float32", "float16"] = "float32"  # in which the exported weights are stored

    def __post_init__(self) -> None:
        super().__post_init__()
        for scale in (self.min_guidance_scale, self.max_guidance_scale):
            check_guidance(scale)
        if not 1 <= self.min_guidance_scale <= self.max_guidance_scale:
            raise ValueError(
                f"min_guidance_scale={self.min_guidance_scale} and max_guidance_scale="
                f"{self.max_guidance_scale}: expected the first from 1 to the second"
            )
        if not 0 <= self.target_decay < 1:
            raise ValueError(
                f"target_decay={self.target_decay}: expected 0 (the student itself) or a number below 1, as "
                "0.95"
            )
        if self.weight is not None and self.weight not in WEIGHTS:
            raise ValueError(f"weight={self.weight!r} is not one of {', '.join(WEIGHTS)}")
        if wants_shards(PartialState(cpu=cpu_only()).distributed_type):
            raise ValueError(
                "teacher, student and target are not cut into shards: leave out --use_fsdp, and use "
                "accelerate launch --multi_gpu for several ranks"
            )


def tell_guidance(unet: UNet) -> None:
    """Lets the UNet be told its guidance, through weights that begin as zero: it answers as before."""
    old = unet.time_embedding
    unet.config = dataclasses.replace(unet.config, time_cond_proj_dim=GUIDANCE_CHANNELS)
    unet.time_embedding = time_embedding(unet.config)
    unet.time_embedding.linear_1, unet.time_embedding.linear_2 = old.linear_1, old.linear_2
    nn.init.zeros_(cast(nn.Linear, unet.time_embedding.cond_proj).weight)


class Distillation(Tuned):
    """The student, the average of it that it is to agree with, and the loss; `model` is the teacher.

    The average belongs to what a checkpoint holds, and does not learn.
    """

    def __init__(self, model: Diffusion, student: UNet, steps: Timesteps, weight: str, decay: float) -> None:
        """steps: the teacher's, from noise to data. weight: of the loss, a name in WEIGHTS, as of x0.

        decay: of the average, a step; 0: the student itself.
        """
        super().__init__(model, {"unet": student})
        self.unet: UNet
        self.steps, self.weight, self.decay = steps, WEIGHTS[weight], decay
        self.average = copy.deepcopy(student).requires_grad_(False) if decay else None
        self.followed = -1  # the step before which the average was moved last

    def forward(self, *, step: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """The loss (B,). step: () int64, the optimizer step; batch: as `loss` takes it."""
        self.follow(int(step))
        return self.loss(self.average or self.unet, **batch), {}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Moves the average by the student's last update, once a step, of however many parts its batch is.

        So it is where algorithm 1 has it after that update: at the first step nothing is to be moved, as
        both are the same, and after a checkpoint the last update is still to be followed.
        """
        if self.average is not None and step != self.followed:
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.unet.parameters()), 1 - self.decay
            )
        self.followed = step

    def loss(
        self,
        target: UNet,
        x0: Tensor,
        noise: Tensor,
        index: Tensor,
        tokens: Tensor,
        empty: Tensor,
        guidance_scale: Tensor,
        area_weight: Tensor | None = None,
    ) -> Tensor:
        """(B,). target: whom the student is to agree with. x0, noise: (B, C, h, w); index: (B,) int64, of the
        teacher's steps, 0 the noisiest; tokens, empty: (B, N) and (1, N) int64, or in chunks;
        guidance_scale: (B,); area_weight: (B, 1, h, w).
        """
        teacher, kind = self.model, self.model.kind
        here, there = (self.steps.at(index + after, like=x0) for after in (0, 1))
        context, uncond = Context(teacher.encode(tokens)), teacher.encode(empty)
        told = context.guided(guidance_scale)
        rows = Context(uncond.expand(len(tokens), *uncond.shape[1:]))
        loss = consistency_loss(
            conditional(self.unet, told, kind),
            conditional(target, told, kind),
            classifier_free(teacher.unet, context, rows, guidance_scale, kind),
            here.alpha * x0 + here.sigma * noise,
            here,
            there,
            area_weight,
        )
        return self.weight(here, "x0").flatten() * loss


class Consistency(LatentDiffusion):
    """Distils a UNet, beside a frozen text encoder, into one of few steps."""

    def __init__(self, recipe: ConsistencyRecipe, folder: Path, latents: Latents) -> None:
        whole, scheduler = whole_recipe(recipe, folder), read_scheduler(folder)
        check_teacher(recipe, whole.unet.learns_variance, latents, scheduler)
        known = whole.sampling
        scale = min(max(known.guidance_scale, recipe.min_guidance_scale), recipe.max_guidance_scale)
        defaults = Defaults(
            num_inference_steps=min(STEPS, recipe.original_inference_steps),
            guidance_scale=scale,
            sampler="lcm",
            height=known.height,
            width=known.width,
        )
        whole = dataclasses.replace(
            whole, sampling=defaults, export_dtype=recipe.export_dtype, gradient_checkpointing=False
        )
        super().__init__(whole, autoencoder_folder(folder), latents, scheduler)
        teacher = cast(Diffusion, self.module)
        self.scheduler = scheduler.distilled(recipe.original_inference_steps)
        self.steps = self.scheduler.timesteps(recipe.original_inference_steps)
        self.unet = copy.deepcopy(teacher.unet)
        tell_guidance(self.unet)
        weight, decay = recipe.weight or "none", recipe.target_decay
        self.module = self.distillation = Distillation(teacher, self.unet, self.steps, weight, decay)
        if recipe.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.scales = recipe.min_guidance_scale, recipe.max_guidance_scale
        self.ends: list[Tensor] = []  # of the teacher's way, see `errors`
        self.facts = {
            **self.facts,
            "model": weights_sha256(teacher.unet.state_dict()),
            "guidance_scales": list(self.scales),
            "original_inference_steps": recipe.original_inference_steps,
            "target_decay": decay,
            "weight": weight,
        }

    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        """As of every diffusion model, but for the noise level, which is one of the teacher's steps."""
        batch, (low, high) = super().batch(draws), self.scales
        every = len(self.scheduler.schedule.alpha) // len(self.steps)  # timesteps between two of them
        return batch | {
            "index": len(self.steps) - 1 - batch.pop("t") // every,
            "guidance_scale": low + (high - low) * uniform(draws, "guidance").float(),
            "empty": self.tokenizer([""]),
            "step": torch.tensor(draws[0].step),
        }

    @torch.no_grad()
    def validate(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The loss, with the averaged weights as their own target, and the `errors` of a few steps.

        Of each sample the loss is that at LEVELS of the teacher's steps, with the guidance of a call.
        """
        device, count, total = self.unet.conv_in.weight.device, len(self.steps), 0.0
        for draws in fixed_draws(buckets):
            x0 = self.vae.to_latents(self.latents.sample(draws))
            batch = {
                "x0": x0,
                "noise": normal(draws, tuple(x0.shape[1:]), "noise"),
                "tokens": self.tokenizer(self.latents.choose_captions(draws)),
                "empty": self.tokenizer([""]),
                "guidance_scale": torch.full((len(draws),), self.recipe.sampling.guidance_scale),
            }
            batch = {name: value.to(device) for name, value in batch.items()}
            for level in range(LEVELS):
                index = torch.full((len(draws),), int(count * (level + 0.5) / LEVELS), device=device)
                total += self.distillation.loss(self.unet, index=index, **batch).sum().item()
        return {"loss": total / (LEVELS * sum(map(len, buckets))), **self.errors(buckets)}

    def errors(self, buckets: Sequence[Sequence[int]]) -> dict[str, float]:
        """The root mean square by which latents drawn in a step, and in STEPS, miss the teacher's.

        The teacher's are drawn from the same noise by its own steps, of the first FOLLOWED of these samples.
        """
        draws = next(iter(fixed_draws(buckets, size=FOLLOWED)))
        device, kind, scale = (
            self.unet.conv_in.weight.device,
            self.scheduler.prediction,
            self.recipe.sampling.guidance_scale,
        )
        shape = tuple(self.latents.sample(draws[:1]).shape[1:])
        noise, after = normal(draws, shape, "noise").to(device), step_noise(list(range(len(draws))), shape)
        context, uncond = (
            self.text_encoder.to(device)(self.tokenizer(texts).to(device))
            for texts in (self.latents.choose_captions(draws), [""] * len(draws))
        )
        if not self.ends:
            teacher = classifier_free(self.distillation.model.unet, context, uncond, scale, kind)
            self.ends = [sample(teacher, noise, ddim(self.steps), after)]
        found, student = {}, conditional(self.unet, Context(context).guided(scale), kind)
        for count in sorted({1, self.recipe.sampling.num_inference_steps}):
            steps = consistency(self.scheduler.timesteps(count))
            missed = sample(student, noise, steps, after) - self.ends[0]
            found[f"error_in_{count}"] = missed.square().mean().sqrt().item()
        return found


def check_teacher(
    recipe: ConsistencyRecipe, learns_variance: bool, latents: Latents, scheduler: Scheduler
) -> None:
    """Raises ValueError for a model that is not distilled here, or that has no so many even steps."""
    model, T, count = recipe.model, len(scheduler.schedule.alpha), recipe.original_inference_steps
    if scheduler.prediction == "flow":
        raise ValueError(f"model={model!r} predicts a flow: only models of v, eps or x0 are distilled here")
    if learns_variance:
        raise ValueError(f"model={model!r} learned its variance: only models that answer alone are distilled")
    if latents.classes:
        raise ValueError(f"data.label={recipe.data.label}: models of classes are not distilled here")
    if not 1 <= count <= T or T % count:
        raise ValueError(
            f"original_inference_steps={count}: expected a divisor of the model's {T} noise levels, as 50"
        )
