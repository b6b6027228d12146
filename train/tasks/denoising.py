"""What training a diffusion model minimises: UNet, text encoder and loss in one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from autoencoder.vae import AutoencoderKL
from ldm.diffusion.objective import DENSITIES, WEIGHTS, LossHistory, Uncertainty, diffusion_loss
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.variance import LearnedVariance, ReverseSteps
from ldm.model.unet import UNet, seeing
from text_encoder.clip import CLIPTextEncoder

ToLatents = Callable[[Tensor, Tensor], Tensor]  # (image, noise) -> latents


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the UNet predicts, at which noise, and what each error weighs."""

    prediction: Literal["v", "eps", "x0", "flow"] = "v"  # flow: rectified flow, not for stock diffusers
    zero_terminal_snr: bool = True  # the noisiest level is pure noise; not with eps, always with flow
    weight: str | None = None  # of the loss, by the noise level: a name in WEIGHTS; null: what suits the rest
    timestep_density: str = "uniform"  # or logit_normal, most in the middle: a name in DENSITIES
    importance_sampling: bool = False  # draw timesteps of large losses more often; their losses weigh less
    timestep_shift: float = 1.0  # of the timesteps drawn; below 1: less noise, which small latents want
    caption_dropout: float = 0.1  # of the samples get the empty prompt and no class, which guidance needs
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


class Diffusion(nn.Module):
    """UNet, text encoder and loss in one forward, so that wrappers which watch forward see all of it.

    A frozen text encoder is called but is no part of this module, so it is not trained, averaged or saved.
    """

    def __init__(
        self,
        unet: UNet,
        text_encoder: CLIPTextEncoder,
        scheduler: Scheduler,
        objective: ObjectiveConfig,
        train_text_encoder: bool,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.schedule, self.kind = scheduler.schedule, scheduler.prediction
        self.weight = WEIGHTS[objective.loss_weight]
        self.reverse = ReverseSteps.of(self.schedule) if unet.config.learns_variance else None
        self.variance_weight = objective.variance_weight
        self.uncertainty = Uncertainty(len(self.schedule.alpha)) if objective.uncertainty else None
        self.history = LossHistory(len(self.schedule.alpha)) if objective.importance_sampling else None
        self.encode: Callable[[Tensor], Tensor]
        if train_text_encoder:
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
        labels: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,). x0, noise, perturbation: (B, C, h, w); area_weight: (B, 1, h, w); t: (B,) int64, or
        float64 quantiles where importance chooses; tokens: (B, N) int64, or (B, K, N) in chunks; labels: (B,)
        int64, of a UNet with classes; beside: (B, K, h, w), see `seeing`.
        """
        importance = None
        if self.history is not None:
            t, importance = self.history.choose(t)
        context, told = self.encode(tokens), seeing(partial(self.unet, class_labels=labels), beside)
        unet = LearnedVariance(told) if self.reverse else told
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
    """The forward of an encoder that does not learn, on the device of the tokens."""
    text_encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(tokens: Tensor) -> Tensor:
        return text_encoder.to(tokens.device)(tokens)

    return encode


def frozen_latents(vae: AutoencoderKL) -> ToLatents:
    """What draws latents by an autoencoder that does not learn, on the device of the picture."""
    vae.eval().requires_grad_(False)

    @torch.no_grad()
    def to_latents(image: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):  # as the cache is filled
            return vae.to_latents(vae.to(image.device).encode(image).sample(noise))

    return to_latents
