"""Classifier guidance: a run goes where a classifier of noisy latents, or what else, finds a wish fulfilled.

Dhariwal & Nichol 2021, section 4. All that is asked of the other model is log p(wish | xt), with a gradient;
a classifier of classes is one, the likeness to a text (Nichol et al. 2022, "GLIDE", section 2.3) another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.layers import GroupNormSiLU
from ldm.model.architecture import DOWN_BLOCKS, MID_BLOCKS, UNetConfig, cross_attention, down_blocks
from ldm.model.blocks import AttentionPooling, TimeEmbedding, timestep_embedding
from ldm.model.context import Predict

from .guidance import Guidance, Text
from .sample import Denoiser
from .schedule import Level, NoiseSchedule, Prediction
from .solvers import Tableau

LogProbability = Callable[[Tensor, Level], Tensor]  # (xt, level) -> (B,), log p(wish | xt) and a constant
Gain = Callable[[Level], float]  # what the gradient weighs in x0


def by_score(level: Level) -> float:
    """sigma**2 / alpha: eps becomes eps - sigma * scale * gradient (algorithm 2), for every solver.

    0 at alpha = 0, where xt tells nothing and a true gradient is 0.
    """
    return float(level.sigma**2 / level.alpha) if level.alpha else 0.0


def by_mean(tableau: Tableau) -> Gain:
    """c**2 / b of a table with noise: a step's mean moves by its variance * scale * gradient (algorithm 1).

    So Sohl-Dickstein et al. 2015, section 2.5, perturb a run of ddpm or euler_a. The variance is the table's,
    also where the UNet says another. The last step has no noise and does not move.
    Raises ValueError for a table without noise.
    """
    if not tableau.c.any():
        raise ValueError("this solver adds no noise, by which guidance of the mean weighs: use by_score")
    gains = dict(zip(tableau.steps.t.tolist(), (tableau.c**2 / tableau.b[:, 0]).tolist(), strict=True))
    return lambda level: gains[float(level.t)]


# name -> the gain of a run by this table; options.FORMS has the names
GAINS: dict[str, Callable[[Tableau], Gain]] = {"score": lambda tableau: by_score, "mean": by_mean}


def classifier_guided(
    denoise: Denoiser, log_probability: LogProbability, scale: float, gain: Gain = by_score
) -> Denoiser:
    """denoise, and scale times the gradient of log p(wish | xt); 0 is no guidance, 1 Bayes' rule.

    denoise: of any kind, as one of classifier-free guidance. gain: by_score, or by_mean of the run's table.
    """

    def guided(xt: Tensor, level: Level) -> Tensor:
        with torch.enable_grad():
            x = xt.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_probability(x, level).sum(), x)
        return denoise(xt, level) + scale * gain(level) * gradient

    return guided


def led(guidance: Guidance, log_probability: LogProbability, scale: float, gain: Gain = by_score) -> Guidance:
    """Guidance, and around it that of a classifier: what a call takes as `guidance`.

    scale, gain: as of classifier_guided. The scale of the call is that of guidance.
    """

    def make(unet: Predict, context: Text, uncond: Text, free: float, kind: Prediction) -> Denoiser:
        return classifier_guided(guidance(unet, context, uncond, free, kind), log_probability, scale, gain)

    return make


class NoisyClassifier(nn.Module):
    """(xt, t) -> (B, classes) logits: the UNet's way down, and attention that pools it.

    Section 4 of the paper, but for its attention at the end, which knows no places here: any size works.
    """

    def __init__(self, config: UNetConfig, classes: int) -> None:
        """config: the UNet's; only what is on the way down counts.

        Raises ValueError for one that looks at a text.
        """
        super().__init__()
        looks = [name for name in config.down_block_types if DOWN_BLOCKS[name].attention is cross_attention]
        if looks or config.mid_block_type == "UNetMidBlock2DCrossAttn":
            raise ValueError(
                f"down_block_types={config.down_block_types}, mid_block_type={config.mid_block_type!r}: a "
                "classifier has no text, use AttnDownBlock2D and UNetMidBlock2D"
            )
        first, *_, last = config.block_out_channels
        self.config = config
        self.first, self.cos_first, self.freq_shift = first, config.flip_sin_to_cos, config.freq_shift
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, 4 * first)
        self.down_blocks = nn.ModuleList(down_blocks(config)[0])
        self.mid_block = MID_BLOCKS[config.mid_block_type](config)
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, last, eps=config.norm_eps)
        self.pool = AttentionPooling(last, heads=max(last // 64, 1))
        self.classify = nn.Linear(last, classes)

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """xt: (B, in_channels, h, w). t: (B,)."""
        time = timestep_embedding(t, self.first, cos_first=self.cos_first, freq_shift=self.freq_shift)
        temb = self.time_embedding(time.to(xt.dtype))
        x = self.conv_in(xt)
        for block in self.down_blocks:
            x = block(x, temb, None)[-1]
        x = self.conv_norm_out(self.mid_block(x, temb, None))
        return self.classify(self.pool(x.flatten(2).mT))  # (B, D, h', w') to (B, h' * w', D)

    def log_probability(self, labels: Tensor) -> LogProbability:
        """Of these labels (B,) int64, one for each row, or (1,) for all.

        Raises ValueError, when it is asked, unless there are as many rows.
        """

        def log_probability(xt: Tensor, level: Level) -> Tensor:
            if len(labels) not in (1, len(xt)):
                raise ValueError(
                    f"{len(labels)} class labels for {len(xt)} images: give one, or one for each"
                )
            t = torch.full((len(xt),), float(level.t), device=xt.device)
            return -F.cross_entropy(self(xt, t), labels.to(xt.device).expand(len(xt)), reduction="none")

        return log_probability


def noisy_logits(
    classifier: NoisyClassifier, schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """(B, classes) at xt. x0, noise: (B, C, h, w). t: (B,) int64."""
    level = schedule.at(t, like=x0)
    return classifier(level.alpha * x0 + level.sigma * noise, t)
