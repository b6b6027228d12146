"""The stages of a diffusion recipe, each from where it stopped: autoencoder, latents, text encoder, UNet.

train_ldm.py and train.run both go through them; a stage that is done costs a look at its folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

from accelerate import PartialState

from train.batches.cache import cached_latents
from train.batches.latents import Latents, autoencoder_folder
from train.batches.plan import split_batch
from train.config import is_recipe, read_recipe
from train.data.sources import open_source
from train.fit.loop import cpu_only, fit
from train.fit.record import minutes, training_seconds
from train.fit.state import FitConfig, Task
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding, lineage, stage_name
from train.tasks.contrastive import Contrastive, ContrastiveRecipe
from train.tasks.diffusion import (
    DiffusionRecipe,
    LatentDiffusion,
    check_classes,
    check_compile,
    start_folder,
)
from train.tasks.text import build_text_encoder, tell_lengths

RecipeT = TypeVar("RecipeT", AutoencoderRecipe, ContrastiveRecipe)


class Passed(NamedTuple):
    """How a stage went."""

    name: str
    what: str  # was made, such as 7,000 steps
    how: str  # done already, or what was done now
    folder: Path  # of what it made
    seconds: float | None = None  # that it took in all, over every time that it was started
    exit_code: int = 0  # 75: it stopped early, and so does the run

    def __str__(self) -> str:
        return f"{self.name:<13} {self.what}: {self.how}; {self.folder}"


def train_stages(recipe: DiffusionRecipe) -> Iterator[Passed]:
    """Train what the recipe names and is not trained yet, a result each; the last is that of the pipeline.

    Ends after a stage that stopped early. Raises ValueError for what the recipe got wrong.
    """
    words = recipe.text_encoder.path
    check_batches([recipe, *([text_encoder_stage(recipe)] if is_recipe(words) else [])])
    if words and not is_recipe(words):
        build_text_encoder(recipe.text_encoder, [])  # a folder that holds none is found out now
    start_folder(recipe)  # likewise
    if recipe.data.label is not None and (labels := open_source(recipe.data).labels):
        check_classes(recipe, labels.names)
    check_compile(recipe)
    if is_recipe(recipe.autoencoder):
        for passed in autoencoder_stages(autoencoder_stage(recipe)):
            yield passed
            if passed.exit_code:
                return
    autoencoder, cache = autoencoder_of(recipe), recipe.cache
    begin, before = time.monotonic(), shards_in(cache)
    latents = cached_latents(recipe, autoencoder, recipe.objective.mask_weight != 1)
    shards = shards_in(cache)
    computed = len(shards - before)
    spent = time.monotonic() - begin
    how = "done already"
    if computed:
        how = f"{computed} of {len(shards)} shards computed now in {minutes(spent)}"
    yield Passed("latents", describe(latents), how, cache, spent if computed == len(shards) else None)
    if is_recipe(words):
        second = text_encoder_stage(recipe)
        yield (passed := trained("text encoder", Contrastive(second, autoencoder, latents), second))
        if passed.exit_code:
            return
        text_encoder = dataclasses.replace(recipe.text_encoder, path=str(passed.folder))
        recipe = dataclasses.replace(recipe, text_encoder=text_encoder)
    task = LatentDiffusion(recipe, autoencoder, latents)
    tell_lengths(task.tokenizer, latents.captions.values())
    yield trained("UNet", task, recipe)


def autoencoder_stages(recipe: AutoencoderRecipe) -> Iterator[Passed]:
    """Train an autoencoder, and first those from which it grows, where recipes are named for them."""
    recipes = lineage(recipe)
    check_batches(recipes)
    grow = recipes[0].grow
    for number, one in enumerate(recipes):
        one = dataclasses.replace(one, grow=grow)
        yield (passed := trained(stage_name(number, len(recipes)), Autoencoding(one), one))
        if passed.exit_code:
            return
        grow = str(passed.folder)


def check_batches(stages: Sequence[FitConfig]) -> None:
    """Raises ValueError if the ranks cannot share the batches of a stage: not after days of another stage."""
    for stage in stages:
        split_batch(stage.batch_size, PartialState(cpu=cpu_only()).num_processes, stage.micro_batch)


def trained(name: str, task: Task, config: FitConfig) -> Passed:
    """How `fit` went with one stage."""
    begin = time.monotonic()
    outcome = fit(task, config)
    spent = minutes(time.monotonic() - begin)
    seconds = training_seconds(Path(config.output), config.batch_size)
    in_all = "" if seconds is None else f", {minutes(seconds)} in all"
    if not outcome.finished:
        how = f"stopped by {outcome.reason} after step {outcome.step:,}, the same command goes on"
    elif outcome.first == outcome.step:
        how = f"done already{in_all}"
    elif outcome.first:
        how = f"trained now from step {outcome.first:,} on in {spent}{in_all}"
    else:
        how = f"trained now in {spent}"
    folder = outcome.model if outcome.finished else Path(config.output)
    return Passed(name, f"{config.steps:,} steps", how, folder, seconds, outcome.exit_code)


def show_stages(recipe: DiffusionRecipe) -> None:
    """Prints what every stage of the recipe will take; trains nothing."""
    from train.fit.planning import show_plan, stages_of

    with TemporaryDirectory() as folder:
        first = autoencoder_stage(recipe) if is_recipe(recipe.autoencoder) else None
        second = text_encoder_stage(recipe) if is_recipe(recipe.text_encoder.path) else None
        show_plan(stages_of(recipe, first, second, Path(folder)), recipe.price)


def autoencoder_of(recipe: DiffusionRecipe) -> Path:
    """The folder of the autoencoder, which its stage wrote or the recipe names."""
    if is_recipe(recipe.autoencoder):
        return autoencoder_folder(Path(recipe.output, "autoencoder"))
    return autoencoder_folder(recipe.autoencoder)


def shards_in(cache: Path) -> set[tuple[str, int]]:
    """Name and time of each shard, in nanoseconds: one that is computed anew is another."""
    return {(path.name, path.stat().st_mtime_ns) for path in cache.glob("latents-*.safetensors")}


def describe(latents: Latents) -> str:
    """How many latents there are, and of which shapes."""
    shapes = ", ".join("x".join(map(str, bucket.mean.shape[2:])) for bucket in latents.buckets[:3])
    more = f" and {len(latents.buckets) - 3} other shapes" if len(latents.buckets) > 3 else ""
    return f"{len(latents):,} pictures as {shapes}{more}"


def autoencoder_stage(recipe: DiffusionRecipe) -> AutoencoderRecipe:
    """The autoencoder's recipe on this run's data."""
    squares = dataclasses.replace(recipe, data=recipe.data.squares)
    return stage_of(squares, read_recipe(AutoencoderRecipe, recipe.autoencoder), "autoencoder")


def text_encoder_stage(recipe: DiffusionRecipe) -> ContrastiveRecipe:
    """The text encoder's recipe, likewise."""
    path = str(recipe.text_encoder.path)
    return stage_of(recipe, read_recipe(ContrastiveRecipe, path), "text_encoder")


def stage_of(recipe: DiffusionRecipe, stage: RecipeT, name: str) -> RecipeT:
    """The recipe of an earlier stage on this run's data, in a folder of this run."""
    return dataclasses.replace(
        stage,
        data=recipe.data,
        output=str(Path(recipe.output, name)),
        precision=recipe.precision,
        max_minutes=recipe.max_minutes,
        accept_new_data=recipe.accept_new_data,
    )
