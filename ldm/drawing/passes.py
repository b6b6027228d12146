"""A recipe's call, or its two: the second pass redraws what the first drew, enlarged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldm.drawing.outputs import PipelineOutput

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.recipes.recipe import Recipe
    from ldm.recipes.requests import Request


def drawn(pipe: LatentDiffusionPipeline, asked: Recipe | Request, call: Mapping[str, Any]) -> PipelineOutput:
    """A call's answer; of two passes the second's, which starts from the first's picture, enlarged.

    call: the arguments, but for the size and the strength.
    """
    size: dict[str, Any] = {"height": asked.height, "width": asked.width}
    if asked.two_pass is None or asked.first_size is None:
        return pipe(**call, **size, strength=asked.strength)
    first = {"width": asked.first_size[0], "height": asked.first_size[1]}
    small = pipe(**{**call, **first, "output_type": "pt"}).images
    return pipe(**{**call, **size, "image": small, "strength": asked.two_pass})


def calls_of(pipe: LatentDiffusionPipeline, asked: Recipe | Request) -> list[int]:
    """How often each pass calls the UNet. Raises ValueError for a strength that leaves no step."""
    strengths = [asked.strength or 1.0] + ([] if asked.two_pass is None else [asked.two_pass])
    return [len(pipe.tableau(asked.steps, asked.sampler, strength)) for strength in strengths]
