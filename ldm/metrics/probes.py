"""How dear a setting of the sampler is, and how far it ends from the solution that it approximates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.diffusion.noise import key
from ldm.files.checkpoint import read_tensors
from ldm.files.config import replacing
from ldm.metrics.beside import Diffusers
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import MAX_STEPS

EXACT = "dpmpp_2m"  # whose MAX_STEPS steps stand for the solution: of second order, so nearer than ddim's
SHARED = ("height", "width", "guidance_rescale", "clip_skip")  # of requests, beside what is swept


class Probe(NamedTuple):
    """Of one setting; all None where diffusers has no such scheduler for this model."""

    calls: int | None  # of the UNet for a picture, both halves of guidance counted
    seconds: float | None  # for the latents of a picture, text encoder included
    error: float | None  # |x - x*| / |x*| of the latents, mean over the pictures; None with noisy solvers


class Probes:
    """A few pictures by a model that is loaded once; solutions are kept in a folder."""

    def __init__(
        self,
        pipe: LatentDiffusionPipeline,
        facts: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        folder: Path,
        beside: str | None = None,
    ) -> None:
        """facts: of loading.load. lines: requests. options: for what these leave open, by their names.

        beside: "diffusers", to have `beside` draw as well.
        """
        self.pipe, self.facts, self.lines, self.folder = pipe, dict(facts), lines, folder
        first = {**{name: value for name, value in options.items() if value is not None}, **lines[0]}
        self.shared = {name: first[name] for name in SHARED if name in first}
        negatives = [line.get("negative_prompt") or options.get("negative_prompt") or "" for line in lines]
        self.negatives = negatives if any(negatives) else None
        pipe.set_progress_bar_config(disable=True)
        self.latents({"steps": 1})  # what is done once is done now, untimed
        self.other = Diffusers(pipe) if beside else None
        if self.other and self.other.choose(None):
            self.by_other({"steps": 1})

    def latents(self, setting: Mapping[str, Any]) -> Tensor:
        """(P, C, h, w) of the pictures with this setting."""
        images = self.pipe(
            [line["prompt"] for line in self.lines],
            num_inference_steps=setting.get("steps"),
            guidance_scale=setting.get("guidance_scale"),
            sampler=setting.get("sampler"),
            negative_prompt=self.negatives,
            seed=[line["seed"] for line in self.lines],
            output_type="latent",
            **self.shared,
        ).images
        return images.double().cpu()

    def by_other(self, setting: Mapping[str, Any]) -> Tensor:
        """The same by diffusers, with the scheduler that was chosen there."""
        assert self.other is not None
        prompts, seeds = ([line[name] for line in self.lines] for name in ("prompt", "seed"))
        given = {} if self.negatives is None else {"negative_prompt": self.negatives}
        return self.other.latents(prompts, seeds, setting, {**self.shared, **given})

    def solution(self, setting: Mapping[str, Any]) -> Tensor:
        """(P, C, h, w): where EXACT ends in MAX_STEPS steps with this guidance; read where it was kept."""
        exact = {**setting, "sampler": EXACT, "steps": MAX_STEPS}
        asked = [(line["prompt"], line["seed"]) for line in self.lines]
        weights = self.pipe.tableau(MAX_STEPS, EXACT).b.tolist()  # another solver keeps another solution
        decides = repr((exact, asked, self.shared, self.negatives, sorted(self.facts.items()), weights))
        path = self.folder / f"{key(decides):016x}.safetensors"
        if not path.is_file():
            with replacing(path) as temporary:
                save_file({"latents": self.latents(exact)}, temporary)
        return read_tensors(path)["latents"]

    def __call__(self, setting: Mapping[str, Any]) -> Probe:
        scale = setting.get("guidance_scale", self.pipe.defaults.guidance_scale)
        tableau = self.pipe.tableau(setting.get("steps"), setting.get("sampler"))
        found, seconds = timed(self.latents, setting)
        return Probe(
            len(tableau.steps) * (2 if scale > 1 else 1),
            seconds / len(self.lines),
            self.error(found, setting),
        )

    def beside(self, setting: Mapping[str, Any]) -> Probe:
        """The same by diffusers, against our solution."""
        assert self.other is not None
        if not self.other.choose(setting.get("sampler")):
            return Probe(None, None, None)
        self.other.rows = 0
        found, seconds = timed(self.by_other, setting)
        count = len(self.lines)
        return Probe(self.other.rows // count, seconds / count, self.error(found, setting))

    def error(self, found: Tensor, setting: Mapping[str, Any]) -> float | None:
        """How far latents end from the solution; None of a solver that adds noise."""
        tableau = self.pipe.tableau(setting.get("steps"), setting.get("sampler"))
        return None if tableau.c.any() else relative_error(found, self.solution(setting))


def timed(draw: Callable[[Mapping[str, Any]], Tensor], setting: Mapping[str, Any]) -> tuple[Tensor, float]:
    """What is drawn, and the seconds that it took."""
    started = time.perf_counter()
    found = draw(setting)
    return found, time.perf_counter() - started


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|x - x*| / |x*| in L2, the mean over the rows of (P, C, h, w)."""
    apart, length = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (found - exact, exact))
    return (apart / length).mean().item()
