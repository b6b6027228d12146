"""Pictures of a class that a model draws itself before it learns a member of it (DreamBooth)."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from accelerate import PartialState

from ldm.diffusion.noise import key
from ldm.files.checkpoint import model_hash
from ldm.files.config import read_json, write_json
from ldm.formats.stock import MODELS
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.picture import save_picture
from train.batches.encoding import compute_latents
from train.batches.latents import Latents, autoencoder_folder
from train.data.sources import DataConfig
from train.fit.loop import cpu_only
from train.tasks.lora import LoraRecipe
from train.tasks.tuning import latents_of

log = logging.getLogger(__name__)
GROUP = 8  # pictures drawn at a time: always the same, so that one which was lost comes back as it was


def prior_latents(recipe: LoraRecipe, folder: Path) -> Latents | None:
    """The latents of the class, drawn first where they are missing; None without prior preservation.

    folder: of the model. Ranks share the drawing. For a plan they are made up.
    """
    if recipe.prior.prompt is None:
        return None
    if recipe.plan:
        return latents_of(recipe, folder)
    pictures = Path(recipe.output, "prior")
    draw_prior(recipe, folder, pictures)
    data = DataConfig(source=str(pictures), size=recipe.data.size, caption=recipe.prior.prompt)
    masks = recipe.mask_weight != 1
    return compute_latents(data, autoencoder_folder(folder), Path(recipe.output, "prior-latents"), masks)


def draw_prior(recipe: LoraRecipe, folder: Path, pictures: Path) -> None:
    """Draws the pictures of the class that `pictures` lacks, each from a seed of its own.

    Raises ValueError if those that are there are another model's, or of another prompt, size or seed.
    """
    state = PartialState(cpu=cpu_only())
    paths = [pictures / f"{number:05d}.png" for number in range(recipe.prior.pictures)]
    pipe = LatentDiffusionPipeline.from_pretrained(folder).to(state.device)
    options = dataclasses.asdict(pipe.defaults)
    del options["class_names"]  # which decide nothing of a picture
    about = {
        "model": model_hash(folder / name for name in MODELS),
        "prompt": recipe.prior.prompt,
        "size": recipe.data.size,
        "seed": recipe.seed,
        "options": options,
    }
    note = pictures / "drawn.json"
    if note.exists() and read_json(note) != about:
        raise ValueError(
            f"{pictures} holds pictures of another class: {read_json(note)}, not {about}; choose another "
            "output or delete that folder, with prior-latents beside it"
        )
    state.wait_for_everyone()
    if state.is_main_process and not note.exists():
        write_json(note, about)
    groups = [range(first, min(first + GROUP, len(paths))) for first in range(0, len(paths), GROUP)]
    missing = [group for group in groups if not all(paths[number].exists() for number in group)]
    state.wait_for_everyone()  # no rank draws before all have looked
    if missing and state.is_main_process:
        log.info("drawing %d pictures of %r into %s", len(paths), recipe.prior.prompt, pictures)
    pipe.set_progress_bar_config(disable=True)
    for group in missing[state.process_index :: state.num_processes]:
        seeds = [key("prior", recipe.seed, number) % 2**32 for number in group]
        prompts, side = [str(recipe.prior.prompt)] * len(group), recipe.data.size
        for number, image in zip(group, pipe(prompts, side, side, seed=seeds).images, strict=True):
            save_picture(image, paths[number], overwrite=True)
    state.wait_for_everyone()
