"""The second stage of a cascade on the command line: the upscaler that is asked for, and what it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ldm.command.loading import BUNDLED
from ldm.drawing.given import rows_of
from ldm.drawing.outputs import to_pil
from ldm.files.checkpoint import model_hash
from ldm.files.hub import find_folder
from ldm.formats.stock import UPSCALER
from ldm.recipes import options
from ldm.recipes.recipe import Recipe
from ldm.upscaling import LatentUpscalePipeline, bundled_folder, coloured_as


def load_upscaler(
    settled: Mapping[str, Any], device: torch.device, dtype: str, *, fetch: bool
) -> tuple[LatentUpscalePipeline, dict[str, Any]]:
    """The upscaler, and the fields of Recipe that it decides.

    settled: names it and the level of noise, by Recipe's names. dtype: such as "float32".
    fetch: whether it may come from the hub. Raises ValueError if there is no such upscaler or level.
    """
    name = settled["upscaler"]
    folder = bundled_folder() if name == BUNDLED else find_folder(name, fetch=fetch, option="--upscale")
    pipe = LatentUpscalePipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    options.check_noise_level(settled["upscale_noise"], pipe.noisiest)
    digest = model_hash([folder / part for part in UPSCALER.models])
    return pipe, {"upscaler": name, "upscaler_hash": digest}


def enlarge(
    upscaler: LatentUpscalePipeline, recipe: Recipe, images: Sequence[Image.Image]
) -> list[Image.Image]:
    """The pictures of a recipe, enlarged one by one: each is, bit for bit, what its seed gives alone.

    They keep the broad colours of the small ones.
    """
    level = options.NOISE_LEVEL if recipe.upscale_noise is None else recipe.upscale_noise
    enlarged = []
    for index, image in enumerate(images):
        alone = recipe.of_image(index)
        small = torch.stack(rows_of(image, "image", "RGB"))
        large = upscaler(
            alone.prompt,
            small,
            noise_level=level,
            seed=alone.seed,
            prompt_weighting=alone.prompt_weighting,
            output_type="pt",
        ).images
        enlarged += to_pil(coloured_as(large, small))
    return enlarged
