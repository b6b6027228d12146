"""The same pictures by stock diffusers, from the same weights, texts and first noise, for comparison."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.scheduler import CLASSES
from ldm.pipeline import LatentDiffusionPipeline

log = logging.getLogger(__name__)

# of a scheduler that stands for a solver, whatever the model's own file says
SETTINGS: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++"},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "plms": {"skip_prk_steps": True},
}
NOISE = 1e-4  # by which alpha_bar may differ: Euler's zero is 2**-24


class Diffusers:
    """diffusers' pipeline around the weights of ours."""

    def __init__(self, pipe: LatentDiffusionPipeline) -> None:
        """Raises ValueError for a model that diffusers' pipeline cannot draw with."""
        self.ours, self.stock = pipe, pipe.to_diffusers()
        self.stock.set_progress_bar_config(disable=True)
        self.rows = 0
        self.stock.unet.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _: Any, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
        """Counts what the UNet is called with, row by row: both halves of guidance."""
        self.rows += len(args[0] if args else kwargs["sample"])

    def choose(self, sampler: str | None) -> bool:
        """Takes diffusers' scheduler for a solver; whether it has the noise levels of the model."""
        import diffusers

        name = sampler or self.ours.defaults.sampler or self.ours.scheduler.solver
        config = {**self.ours.scheduler.config, "clip_sample": False, **SETTINGS.get(name, {})}
        scheduler = getattr(diffusers, CLASSES[name]).from_config(config)
        wanted = self.ours.scheduler.schedule.alpha**2
        if not torch.allclose(scheduler.alphas_cumprod.double(), wanted, rtol=0, atol=NOISE):
            log.warning("diffusers' %s has other noise levels than this model: left out", CLASSES[name])
            return False
        self.stock.scheduler = scheduler
        return True

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        setting: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Tensor:
        """(P, C, h, w) of prompts, with the noise of seeds. setting: by Recipe's names, as Probes has it.

        options: of a call of the pipeline. The scheduler is the one that was chosen.
        """
        defaults = self.ours.defaults
        height, width = self.ours.default_size
        return (
            self.stock(
                list(prompts),
                num_inference_steps=setting.get("steps") or defaults.num_inference_steps,
                guidance_scale=setting.get("guidance_scale", defaults.guidance_scale),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
                **{
                    "height": height,
                    "width": width,
                    "guidance_rescale": defaults.guidance_rescale,
                    **options,
                },
            )
            .images.double()
            .cpu()
        )
