"""What a finished pipeline can do, measured without any weights but its own: report.md in the run's folder.

The error of the autoencoder and the loss of the UNet on pictures that training did not see, pictures of the
recipe's prompts and, where the data are drawn scenes, a judge who counts what they show. The figures are kept
in evaluation/figures.json with a hash of the model, and measured again when the model or the recipe changed.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState

from ldm.files.checkpoint import model_hash
from ldm.files.config import read_json, replacing, write_json
from ldm.formats.stock import MODELS
from ldm.metrics.judges import open_judge, read_asked
from ldm.metrics.losses import TIMESTEP
from ldm.metrics.plot import linear, logarithmic, plot
from ldm.metrics.scenes import judged_itself, sit
from ldm.metrics.scenes import table as shares_table
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.picture import save_picture
from ldm.recipes.requests import Request
from train.batches.encoding import compute_latents
from train.batches.latents import Latents
from train.batches.plan import hold_out, spread
from train.config import is_recipe, read_recipe, to_mapping
from train.data.pictures import grid, to_tensor
from train.data.sources import STYLES, DataConfig, open_source
from train.data.squares import Squares
from train.fit.loop import cpu_only
from train.fit.record import loss_curve, minutes
from train.measure.fidelity import before_and_after, encoded
from train.measure.fidelity import judge as fidelity_of
from train.measure.judge import SEED_TEST, book_of, kept_judge
from train.stages import Passed, autoencoder_of
from train.tasks.autoencoding import AutoencoderRecipe
from train.tasks.diffusion import DiffusionRecipe, in_turn, validation_losses

log = logging.getLogger(__name__)
SHOWN = 8  # pictures in a row


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured of the finished pipeline."""

    pictures: int = 512  # for the autoencoder's error, the UNet's loss and the judge's own
    captions: int = 300  # of scenes that the pipeline draws for the judge; 0: no judge
    scenes: int = 40_000  # that teach the judge, some minutes' work and kept

    def __post_init__(self) -> None:
        for name, least in (("pictures", 1), ("captions", 0), ("scenes", 64)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)}: expected {least} or more")


class Figures(NamedTuple):
    """What was measured, and on what."""

    fidelity: Mapping[str, float]  # of the autoencoder: psnr in dB, ssim where pictures are large enough
    fidelity_on: str
    losses: Mapping[str, float]  # of the UNet, by the names of validation_losses
    losses_on: str
    prompts: Sequence[str]  # of prompts.png
    verdict: str = ""  # of the judge: a table in Markdown


class Sample(NamedTuple):
    """Some pictures of a source."""

    indices: list[int]
    what: str  # they are


def evaluate(
    recipe: DiffusionRecipe, config: EvaluationConfig, model: Path, stages: Sequence[Passed]
) -> Passed:
    """Measure the pipeline in `model` and write report.md, unless that was done. By the main process alone.

    recipe: of the run. stages: how it went, for the report.
    """
    state, begin = PartialState(cpu=cpu_only()), time.monotonic()
    folder, report = Path(recipe.output, "evaluation"), Path(recipe.output, "report.md")
    asked = {
        "model": model_hash(model / name for name in MODELS),
        "evaluation": to_mapping(config),
        "data": to_mapping(recipe.data),
        "prompts": list(recipe.prompts),
        "figures": list(Figures._fields),
    }
    path = folder / "figures.json"
    done = path.exists() and report.exists() and read_json(path).get("of") == asked
    state.wait_for_everyone()  # nobody writes before all have looked
    if done:
        figures = Figures(**read_json(path)["figures"])
        return Passed("evaluation", summary(figures), "done already", report)
    if state.is_main_process:
        shutil.rmtree(folder / "latents", ignore_errors=True)  # of another evaluation
    state.wait_for_everyone()
    latents, sample = unseen_latents(recipe, config, folder)  # by all ranks
    if state.is_main_process:
        pipe = LatentDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(state.device)
        pipe.set_progress_bar_config(disable=True)
        figures = measure(pipe, recipe, config, latents, sample, folder)
        with replacing(report) as temporary:
            temporary.write_text(markdown(Path(recipe.output).name, stages, figures), encoding="utf-8")
        write_json(path, {"of": asked, "figures": figures._asdict()})
    state.wait_for_everyone()
    figures = Figures(**read_json(path)["figures"])
    spent = minutes(time.monotonic() - begin)
    return Passed("evaluation", summary(figures), f"measured now in {spent}", report)


@torch.no_grad()
def measure(
    pipe: LatentDiffusionPipeline,
    recipe: DiffusionRecipe,
    config: EvaluationConfig,
    latents: Latents,
    sample: Sample,
    folder: Path,
) -> Figures:
    """The figures, and the pictures of the report in `folder`. sample: of the latents, for the UNet."""
    squares, seen = autoencoder_sample(recipe, config)
    fidelity = fidelity_of(pipe.vae, encoded(pipe.vae, squares.batches(seen.indices)))
    shown = squares.stack(seen.indices[:SHOWN])
    save_picture(before_and_after(pipe.vae, shown), folder / "reconstruction.png", overwrite=True)
    chosen = set(sample.indices)
    buckets = [[index for index in bucket.indices if index in chosen] for bucket in latents.buckets]
    losses = validation_losses(pipe, latents, buckets)
    levels = [(float(level), loss) for level, loss in by_level(losses).items()]
    plot({"loss": levels}, linear(TIMESTEP), logarithmic("loss"), folder / "losses.png")
    if curve := loss_curve(Path(recipe.output)):
        plot({"loss": curve}, linear("step"), logarithmic("weighted loss"), folder / "training.png")
    captions = [latents.captions[index][0] for index in sample.indices]
    prompts = list(recipe.prompts) or [captions[place] for place in spread(len(captions), SHOWN)]
    size = recipe.data.size
    labels = in_turn(pipe, len(prompts))
    images = pipe(prompts, height=size, width=size, seed=0, class_labels=labels, return_dict=False)[0]
    save_picture(grid(images, columns=min(len(images), SHOWN)), folder / "prompts.png", overwrite=True)
    verdict = ""
    scenes = recipe.data.source in STYLES and unseen_data(recipe.data, 1).split == "held_out"
    if scenes and config.captions:
        verdict = judge(pipe, recipe.data, config, folder)
    near = {name: value for name, value in fidelity.numbers().items() if name in ("psnr", "ssim")}
    return Figures(near, seen.what, losses, sample.what, prompts, verdict)


def unseen_data(data: DataConfig, count: int) -> DataConfig:
    """Scenes of combinations that training does not show, where the subjects leave some out."""
    split: Literal["train", "held_out"] = "held_out" if data.split == "train" else "train"
    other = dataclasses.replace(data, split=split, scene_seed=SEED_TEST, length=count)
    try:
        open_source(other)
    except ValueError:  # few subjects may leave none: then scenes of another book, of what training shows
        return dataclasses.replace(other, split=data.split)
    return other


def unseen_latents(recipe: DiffusionRecipe, config: EvaluationConfig, folder: Path) -> tuple[Latents, Sample]:
    """The latents on which the UNet's loss is measured, and which of them."""
    autoencoder = autoencoder_of(recipe)
    if recipe.data.source in STYLES:
        other = unseen_data(recipe.data, config.pictures)
        latents = compute_latents(other, autoencoder, folder / "latents")
        return latents, Sample(list(latents.captions), describe(recipe.data, other))
    latents = compute_latents(recipe.data, autoencoder, recipe.cache)
    return latents, choose(sorted(latents.captions), recipe.validation_samples, config.pictures)


def autoencoder_sample(recipe: DiffusionRecipe, config: EvaluationConfig) -> tuple[Squares, Sample]:
    """The pictures on which the autoencoder's error is measured."""
    if recipe.data.source in STYLES:
        other = unseen_data(recipe.data, config.pictures)
        return Squares(other), Sample(list(range(config.pictures)), describe(recipe.data, other))
    squares = Squares(recipe.data)
    if not is_recipe(recipe.autoencoder):
        indices = spread(len(squares), config.pictures)
        return squares, Sample(indices, f"{len(indices)} pictures of the data; it was trained before")
    held_out = read_recipe(AutoencoderRecipe, recipe.autoencoder).validation_samples
    return squares, choose(range(len(squares)), held_out, config.pictures)


def describe(data: DataConfig, other: DataConfig) -> str:
    shown = "training never showed" if data.split != other.split else "training shows, in another book"
    return f"{other.length} scenes of combinations that {shown}"


def choose(members: Sequence[int], held_out: int, count: int) -> Sample:
    """At most `count` of the members: of those that training holds out, else of all."""
    _, (kept,) = hold_out([members], held_out)
    pool = kept or members
    indices = [pool[place] for place in spread(len(pool), count)]
    seen = "held out of training" if kept else "that training saw, as validation_samples=0 holds none out"
    return Sample(indices, f"{len(indices)} pictures {seen}")


def judge(pipe: LatentDiffusionPipeline, data: DataConfig, config: EvaluationConfig, folder: Path) -> str:
    """What a judge of scenes says of pictures of held-out combinations: a table. Draws judged.png."""
    home = kept_judge(
        folder / "judge", book_of(data), scenes=config.scenes, asked=config.captions, tested=config.pictures
    )
    said, asked = open_judge(home), read_asked(home, "held_out")
    requests = [
        Request(prompt=each.prompt, seed=seed, width=data.size, height=data.size)
        for seed, each in enumerate(asked)
    ]
    images = [image for _, image in pipe.each(requests)]
    save_picture(grid(images[:64], columns=16), folder / "judged.png", overwrite=True)
    sitting = sit(said, torch.stack([to_tensor(image) for image in images]), asked)
    rows = judged_itself(home, said, pipe.vae)
    return shares_table({**rows, f"model, on {len(asked):,} captions": sitting.shares})


def summary(figures: Figures) -> str:
    return f"PSNR {figures.fidelity['psnr']:.2f} dB, loss {figures.losses['loss']:.4f}"


def by_level(losses: Mapping[str, float]) -> dict[str, float]:
    """Of the losses those at a timestep, by it."""
    return {key.removeprefix("loss_t"): loss for key, loss in losses.items() if key.startswith("loss_t")}


def markdown(name: str, stages: Sequence[Passed], figures: Figures) -> str:
    """The report."""
    rows = (
        f"| {stage.name} | {stage.what} | {'' if stage.seconds is None else minutes(stage.seconds)} |"
        for stage in stages
    )
    levels = by_level(figures.losses)
    by_size = {
        key.removeprefix("loss_"): loss
        for key, loss in figures.losses.items()
        if key not in ("loss", *(f"loss_t{level}" for level in levels))
    }
    names = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}"}
    near = ", ".join(names[name].format(value) for name, value in figures.fidelity.items())
    prompts = "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(figures.prompts, 1))
    parts = [
        f"# {name}",
        "| stage | made | time in all |\n|---|---|---|\n" + "\n".join(rows),
        "## Figures",
        f"Autoencoder, on {figures.fidelity_on}: {near}.",
        "![pictures, and below what the autoencoder makes of them](evaluation/reconstruction.png)",
        f"UNet, on {figures.losses_on}: mean squared error {figures.losses['loss']:.4f} of what it predicts, "
        "without weights, with one fixed noise a picture; by timestep, 0 being the cleanest:",
        table(levels),
        "![loss by timestep](evaluation/losses.png)",
        *([table(by_size)] if by_size else []),
        "Its training, the mean of each hundredth of the steps:",
        "![loss by step](evaluation/training.png)",
        *(
            ["Does it draw what it is asked? On held-out combinations:", figures.verdict]
            if figures.verdict
            else []
        ),
        "## Pictures",
        "![pictures of the prompts below](evaluation/prompts.png)",
        prompts,
    ]
    return "\n\n".join(parts) + "\n"


def table(values: Mapping[str, Any]) -> str:
    """A row of numbers below their names, in Markdown."""
    head, cells = " | ".join(values), " | ".join(f"{value:.4f}" for value in values.values())
    return f"| {head} |\n|{'---|' * len(values)}\n| {cells} |"
