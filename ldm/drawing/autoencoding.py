"""Pixels to latents and back as a pipeline does it: each picture alone, so that none sees its mates."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm.drawing.devices import Movable

log = logging.getLogger(__name__)


class Autoencoding(Movable):
    """What a pipeline does with its autoencoder. What overflows in half precision runs again in float32."""

    vae: AutoencoderKL

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents (B, C, h, w) float32: the mean of the posterior.

        Stock pipelines draw a sample of it; it is so narrow that no eye sees the difference.
        Raises ValueError if H or W is not a multiple of the autoencoder's factor.
        """
        rows = (images.to(self.device).float() * 2 - 1).split(1)
        return torch.cat(self._each(lambda vae, row: vae.to_latents(vae.encode(row).mean), rows))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) float32 in [0, 1].

        Raises ValueError if what comes out is not finite.
        """
        if not latents.isfinite().all():
            advice = "; use dtype=torch.float32" if self.dtype != torch.float32 else ""
            raise ValueError(f"the UNet's answer in {self.dtype} is not finite{advice}")
        images = self._each(lambda vae, row: vae.decode(row), latents.float().split(1))
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def _each(self, run: Callable[[AutoencoderKL, Tensor], Tensor], rows: tuple[Tensor, ...]) -> list[Tensor]:
        """run(autoencoder, row) of each row. Raises ValueError if that is not finite in float32 either."""
        with self._present(self.vae):
            answers = [run(self.vae, row) for row in rows]
            wrong = [index for index, answer in enumerate(answers) if not answer.isfinite().all()]
            if wrong and self.vae.dtype != torch.float32:
                log.warning("the autoencoder overflows in %s: it runs again in float32", self.vae.dtype)
                exact = copy.deepcopy(self.vae).float()
                for index in wrong:  # the others keep what they get alone
                    answers[index] = run(exact, rows[index])
        if not all(answer.isfinite().all() for answer in answers):
            raise ValueError("the autoencoder's answer is not finite: are its weights whole?")
        return answers
