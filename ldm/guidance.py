"""Denoisers: what is made of the model's answers. Each maker returns (xt, level) -> x0, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .context import Context
from .sample import Denoiser
from .schedule import Level, Prediction, seen, to_x0

# (xt, t, context) -> prediction: (B, C, h, w), (B,) and (k * B, N, D) to (k * B, C, h, w), as ldm.unet.UNet
UNet = Callable[[Tensor, Tensor, Context], Tensor]


def _predict(unet: UNet, xt: Tensor, level: Level, context: Context, kind: Prediction) -> Tensor:
    """The model's prediction in float32, whatever precision it computes in; (B, ...), or of k texts each."""
    t = torch.full((len(xt),), float(level.t), device=xt.device)
    return unet(seen(xt, level, kind), t, context).float()


def conditional(unet: UNet, context: Tensor | Context, kind: Prediction) -> Denoiser:
    """No guidance. context: (B, N, D) embeddings of the prompts, or all that the UNet is told."""
    text = Context.of(context)

    def denoise(xt: Tensor, level: Level) -> Tensor:
        return to_x0(_predict(unet, xt, level, text, kind), xt, level, kind)

    return denoise


def classifier_free(
    unet: UNet,
    context: Tensor | Context,
    uncond: Tensor | Context,
    scale: float,
    kind: Prediction,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6), in one batch. scale = 1 is no guidance.

    context, uncond: (B, N, D) embeddings of the prompts and of the negative prompts, or all that the UNet is
    told of them.
    rescale: phi of Lin et al. 2024, section 3.4: how far the guided prediction takes the conditional one's
    deviation.
    interval: (low, high) in log_snr = log(alpha / sigma), outside which nothing is guided, at half the cost
    (Kynkäänniemi et al. 2024, eq. 5). Their noise level is exp(-log_snr): their (0.28, 5.42] for SDXL is
    (-1.69, 1.27) here.
    Raises ValueError if rescale is not in [0, 1] or the interval is empty.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale={rescale}: expected 0 (none) to 1 (full)")
    low, high = interval or (-math.inf, math.inf)
    if not low < high:
        raise ValueError(f"guidance interval {interval} is empty: expected low < high, in log_snr")
    unguided = conditional(unet, context, kind)
    if scale == 1:
        return unguided
    both = Context.of(uncond, context)

    def denoise(xt: Tensor, level: Level) -> Tensor:
        log_snr = math.log(level.alpha / level.sigma) if level.alpha else -math.inf
        if not low <= log_snr <= high:
            return unguided(xt, level)
        without, with_text = _predict(unet, xt, level, both, kind).chunk(2)
        guided = without.lerp(with_text, scale)
        if rescale:
            ratio = with_text.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guided.lerp(guided * ratio, rescale)
        return to_x0(guided, xt, level, kind)

    return denoise
