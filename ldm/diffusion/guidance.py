"""Denoisers: what is made of the model's answers. Each maker returns (xt, level) -> x0, in float32.

A Guidance is what a call of the pipeline takes as `guidance`; its own options are bound by functools.partial,
and what holds for every one of them is a function from Guidance to Guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.model.context import Context, Predict

from .sample import Denoiser
from .schedule import Level, Prediction, seen, to_x0

Text = Tensor | Context  # (B, N, D) embeddings, or all that the UNet is told
# (unet, context, uncond, scale, kind) -> the Denoiser of one run; scale = 1 is no guidance
Guidance = Callable[[Predict, Text, Text, float, Prediction], Denoiser]


def _predict(unet: Predict, xt: Tensor, level: Level, context: Context, kind: Prediction) -> Tensor:
    """The model's prediction in float32, whatever precision it computes in; (B, ...), or of k texts each."""
    if isinstance(level.t, Tensor):  # each row has its own
        t = level.t.to(xt.device, torch.float32)
    else:
        t = torch.full((len(xt),), float(level.t), device=xt.device)
    return unet(seen(xt, level, kind), t, context).float()


def conditional(unet: Predict, context: Text, kind: Prediction) -> Denoiser:
    """No guidance. context: (B, N, D) embeddings of the prompts, or all that the UNet is told."""
    text = Context.of(context)

    def denoise(xt: Tensor, level: Level) -> Tensor:
        return to_x0(_predict(unet, xt, level, text, kind), xt, level, kind)

    return denoise


def classifier_free(
    unet: Predict,
    context: Text,
    uncond: Text,
    scale: float | Tensor,
    kind: Prediction,
    rescale: float = 0.0,
) -> Denoiser:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6), in one batch. scale = 1 is no guidance.

    context, uncond: (B, N, D) embeddings of the prompts and of the negative prompts, or all that the UNet is
    told of them.
    scale: of all rows, or (B,).
    rescale: phi of Lin et al. 2024, section 3.4: how far the guided prediction takes the conditional one's
    deviation.
    Raises ValueError if rescale is not in [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale={rescale}: expected 0 (none) to 1 (full)")
    if isinstance(scale, Tensor):
        scale = scale.view(-1, 1, 1, 1)
    elif scale == 1:
        return conditional(unet, context, kind)
    both = Context.of(uncond, context)

    def denoise(xt: Tensor, level: Level) -> Tensor:
        without, with_text = _predict(unet, xt, level, both, kind).chunk(2)
        guided = without.lerp(with_text, scale)
        if rescale:
            ratio = with_text.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guided.lerp(guided * ratio, rescale)
        return to_x0(guided, xt, level, kind)

    return denoise


def apg(
    unet: Predict,
    context: Text,
    uncond: Text,
    scale: float,
    kind: Prediction,
    eta: float = 0.0,
    momentum: float = -0.5,
    norm: float = 15.0,
) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, section 4): strong guidance that does not oversaturate.

    On x0, whatever the model predicts. eta: what is kept of the change along the conditional x0, which
    saturates. momentum: of the earlier changes; below 0 a change turns away from them. norm: the largest
    length of the change, over a whole image; 15 is diffusers'. With (1, 0, inf) it is classifier-free
    guidance. It remembers the run so far, so it is made anew for each.
    """
    if scale == 1:
        return conditional(unet, context, kind)
    both, change = Context.of(uncond, context), torch.zeros(())

    def denoise(xt: Tensor, level: Level) -> Tensor:
        nonlocal change
        answers = _predict(unet, xt, level, both, kind).chunk(2)
        without, with_text = (to_x0(each, xt, level, kind).flatten(1) for each in answers)
        change = with_text - without + momentum * change.to(xt.device)
        bounded = change * (norm / change.norm(dim=1, keepdim=True)).clamp(max=1)
        direction = F.normalize(with_text, dim=1)
        along = (bounded * direction).sum(1, keepdim=True) * direction
        return (with_text + (scale - 1) * (bounded + (eta - 1) * along)).view_as(xt)

    return denoise


def autoguidance(
    unet: Predict, context: Text, uncond: Text, scale: float, kind: Prediction, *, worse: Predict
) -> Denoiser:
    """worse + scale * (unet - worse), both of the prompts (Karras et al. 2024b, eq. 3); uncond is not heard.

    worse: a smaller or less trained UNet of the same latents, schedule and prediction, such as that of an
    earlier checkpoint.
    """
    good, bad = conditional(unet, context, kind), conditional(worse, context, kind)
    return good if scale == 1 else lambda xt, level: bad(xt, level).lerp(good(xt, level), scale)


def within(guidance: Guidance, low: float, high: float) -> Guidance:
    """Guidance at levels of log_snr = log(alpha / sigma) from low to high, and none at the others.

    Kynkäänniemi et al. 2024, eq. 5. Their noise level is exp(-log_snr): their (0.28, 5.42] for SDXL is
    (-1.69, 1.27) here. Outside a step costs half as much.
    Raises ValueError if the interval is empty.
    """
    if not low < high:
        raise ValueError(f"guidance interval {(low, high)} is empty: expected low < high, in log_snr")

    def make(unet: Predict, context: Text, uncond: Text, scale: float, kind: Prediction) -> Denoiser:
        guided, unguided = guidance(unet, context, uncond, scale, kind), conditional(unet, context, kind)

        def denoise(xt: Tensor, level: Level) -> Tensor:
            log_snr = math.log(level.alpha / level.sigma) if level.alpha else -math.inf
            return (guided if low <= log_snr <= high else unguided)(xt, level)

        return denoise

    return make


def thresholded(
    guidance: Guidance,
    limit: float,
    quantile: float = 0.995,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
) -> Guidance:
    """Guidance whose x0 are brought back to limit: dynamic thresholding (Saharia et al. 2022, section 2.3).

    In the paper pixels end at 1. Latents have no such end, so x0 counts in deviations of its channel, and
    each channel is clamped at this quantile of its size, and divided by as much as that exceeds limit; 3 to 4
    suits latents like normal ones. Where the quantile is below limit, it clamps at limit.
    mean, std: (C,), what a channel of the latents has in the data; 0 and 1 if they are scaled to that.
    Raises ValueError unless limit is positive and quantile within (0, 1].
    """
    if not (limit > 0 and 0 < quantile <= 1):
        raise ValueError(f"limit={limit}, quantile={quantile}: expected above 0, and above 0 to 1")

    def make(unet: Predict, context: Text, uncond: Text, scale: float, kind: Prediction) -> Denoiser:
        guided = guidance(unet, context, uncond, scale, kind)

        def denoise(xt: Tensor, level: Level) -> Tensor:
            center, spread = (torch.as_tensor(each).to(xt).view(-1, 1, 1) for each in (mean, std))
            white = (guided(xt, level) - center) / spread
            size = white.abs().flatten(2).quantile(quantile, dim=2).clamp(min=limit)[..., None, None]
            return white.clamp(-size, size) * (limit / size) * spread + center

        return denoise

    return make


def embedded(guidance: Guidance) -> Guidance:
    """Guidance of a UNet that is told its scale and answers guided (Meng et al. 2023, section 3.1).

    So nothing is left to guide, as with scale = 1: a step is one call, and uncond is not heard.
    """

    def make(unet: Predict, context: Text, uncond: Text, scale: float, kind: Prediction) -> Denoiser:
        told, other = (Context.of(text).guided(scale) for text in (context, uncond))
        return guidance(unet, told, other, 1.0, kind)

    return make


def choose(
    guidance: Guidance | None,
    rescale: float | None,
    usual: float,
    interval: tuple[float, float] | None,
) -> Guidance:
    """The guidance that a call asks for: its own, or classifier-free; within an interval, where it says one.

    rescale, usual: of classifier_free, as asked for, and for None. Raises ValueError where it is asked for
    beside a guidance of one's own.
    """
    if guidance is not None and rescale:
        raise ValueError(
            f"guidance_rescale={rescale} beside guidance: it is an option of the usual one, say "
            f"guidance=functools.partial(classifier_free, rescale={rescale})"
        )
    chosen = guidance or partial(classifier_free, rescale=usual if rescale is None else rescale)
    return within(chosen, *interval) if interval else chosen
