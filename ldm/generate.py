"""The command line: `python -m ldm.generate "a red fox in snow"` draws a picture and prints where it is.

torch is imported once the arguments are known to be good, so help and errors come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.command.arguments import DTYPES, make_parser, settle
from ldm.recipes import options
from ldm.recipes.picture import check_output, free_path, grid, save_picture
from ldm.recipes.recipe import A1111, Recipe

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import LatentDiffusionPipeline
    from ldm.recipes.starts import Start
    from ldm.upscaling import LatentUpscalePipeline

log = logging.getLogger(__name__)

STRIP = 8  # pictures of an image in the strip of --show-steps


def outputs(args: argparse.Namespace, prompt: str, count: int) -> list[Path]:
    """Where the picture, or the grid and then its pictures, and last the sheets of --show-... will be.

    Raises ValueError if one of them cannot be written.
    """
    given = Path(os.path.expanduser(args.output or "./"))  # Path.expanduser raises without such a user
    folder = not args.output or args.output.endswith("/") or os.path.isdir(given)
    path = free_path(given, prompt) if folder else given
    paths = [path]
    if count > 1:
        paths += [path.with_stem(f"{path.stem}-{index + 1}") for index in range(count)]
    shown = [name for name in ("steps", "attention") if getattr(args, f"show_{name}")]
    paths += [path.with_stem(f"{path.stem}-{name}") for name in shown]
    for each in paths:
        check_output(each, overwrite=args.overwrite)
    return paths


def check_same(recipe: Recipe, source: Recipe, args: argparse.Namespace) -> None:
    """Warns of what makes a repeated picture another one.

    Raises ValueError if models are not those of the source, unless asked for by name.
    """
    for part, option, how in (
        ("model", "--model", "made"),
        ("upscaler", "--upscale", "enlarged"),
        ("worse", "--worse", "led away"),
    ):
        was, now = (getattr(each, f"{part}_hash") for each in (source, recipe))
        if was is None or was == now:
            continue
        made = f"the picture was {how} by {getattr(source, part)} of hash {was}"
        text = f"{made}; {getattr(recipe, part)} here has the hash {now}"
        if getattr(args, part) is None:
            raise ValueError(f"{text}: name the right one with {option}, or this one to go on with it")
        log.warning(text)
    for name in ("device", "dtype", "optimize", "quantize", "torch", "version"):
        was, now = getattr(source, name), getattr(recipe, name)
        if was != now:
            log.warning("%s is %s and was %s: the picture may differ in its last bits", name, now, was)


def prepare(
    args: argparse.Namespace, settled: dict[str, Any], source: Recipe | None
) -> tuple[LatentDiffusionPipeline, LatentUpscalePipeline | None, Recipe]:
    """The pipeline, the upscaler if one is asked for, and the whole recipe: the model's defaults complete it,
    and the seed is drawn.

    Raises ValueError if there is no such sampler, device, model or upscaler.
    """
    from ldm.command.loading import find_device, load
    from ldm.diffusion.solvers import SOLVERS
    from ldm.drawing.inputs import seeds_of
    from ldm.drawing.many import usual
    from ldm.recipes.starts import first_size

    if "sampler" in settled:
        options.check_choice("sampler", settled["sampler"], SOLVERS)
    device = find_device(args.device, source.device if source else None)
    dtype = DTYPES.get(args.dtype) or (source.dtype if source and args.dtype is None else None)
    # what a picture names is fetched only when the user names it too
    pipe, facts = load(settled, device, dtype, fetch=source is None or args.model is not None)
    chosen = usual(pipe)
    if "seed" not in settled:
        chosen["seed"] = seeds_of(None, settled["num_images"])[0]
    if settled.get("guidance") == "apg" or settled.get("worse") is not None:
        chosen["guidance_rescale"] = 0.0  # of classifier-free guidance alone
    if settled.get("variation_strength"):
        chosen["variation_seed"] = seeds_of(None, settled["num_images"])[0]
    upscaler: LatentUpscalePipeline | None = None
    enlarging: dict[str, Any] = {}
    if settled.get("upscaler") is not None:
        from ldm.command.enlarging import load_upscaler

        fetch = source is None or args.upscaler is not None
        upscaler, enlarging = load_upscaler(settled, device, facts["dtype"], fetch=fetch)
    recipe, factor = Recipe(**chosen | settled | facts | enlarging), pipe.vae.downsample_factor
    options.check_size(recipe.height, recipe.width, factor)
    if recipe.two_pass is not None and recipe.first_size is None:
        first = first_size(recipe.width, recipe.height, pipe.default_size, factor)
        recipe = dataclasses.replace(recipe, first_size=first)
    if upscaler is not None:
        times = upscaler.vae.downsample_factor
        options.check_size(times * recipe.height, times * recipe.width)
    if source is not None:
        check_same(recipe, source, args)
    return pipe, upscaler, recipe


class Progress:
    """How far the run is: a bar, a line of JSON for each step, or nothing."""

    def __init__(self, kind: str | None, pipe: LatentDiffusionPipeline, images: int) -> None:
        kind = kind or ("bar" if sys.stderr.isatty() else "none")
        self.kind, self.pipe, self.images = kind, pipe, images

    def begin(self, image: int) -> None:
        """image: its number, from 1."""
        description = f"image {image}/{self.images}" if self.images > 1 else None
        self.pipe.set_progress_bar_config(disable=self.kind != "bar", leave=False, desc=description)
        self.image = image

    def step(self, index: int, total: int) -> None:
        if self.kind == "json":
            state = {"image": self.image, "images": self.images, "step": index + 1, "steps": total}
            print(json.dumps(state), file=sys.stderr, flush=True)


def draw(
    pipe: LatentDiffusionPipeline, recipe: Recipe, start: Start, progress: Progress, args: argparse.Namespace
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The pictures of a recipe, and the sheets of --show-steps and --show-attention.

    Images are drawn one by one: each is, bit for bit, what its seed gives alone.
    """
    from ldm.command.guiding import guided
    from ldm.drawing.attention_maps import attention_sheet, maps_of, watched
    from ldm.drawing.outputs import to_pil
    from ldm.drawing.passes import calls_of, drawn

    *_, last = passes = calls_of(pipe, recipe)
    shown = {round(index * (last - 1) / max(min(STRIP, last) - 1, 1)) for index in range(min(STRIP, last))}
    guidance, labels = guided(pipe, recipe)
    images, frames, maps = [], [], []
    twin, watcher = watched(pipe) if args.show_attention else (pipe, None)
    for index in range(recipe.num_images):
        alone, calls = recipe.of_image(index), itertools.count()
        seen: list[Any] = []

        def watch(
            _: Any, step: int, t: int, tensors: dict[str, Any], seen: list[Any] = seen, calls: Any = calls
        ) -> None:
            done = next(calls)
            progress.step(done, sum(passes))
            if args.show_steps and done - sum(passes) + last in shown:  # of the last pass
                seen.append(tensors["x0"])

        progress.begin(index + 1)
        call = {
            **start._asdict(),
            "prompt": alone.prompt,
            "num_inference_steps": alone.steps,
            "negative_prompt": alone.negative_prompt or None,
            "guidance_scale": alone.guidance_scale,
            "guidance_rescale": None if guidance else alone.guidance_rescale,
            "guidance_interval": alone.guidance_interval,
            "guidance": guidance,
            "class_labels": labels,
            "sampler": alone.sampler,
            "seed": alone.seed,
            "variation": alone.variation,
            "clip_skip": alone.clip_skip or None,
            "prompt_weighting": alone.prompt_weighting,
            "strict": args.strict,
            "callback_on_step_end": watch,
            "callback_on_step_end_tensor_inputs": ("x0",),
        }
        images += drawn(twin, alone, call).images
        frames += [image for x0 in seen for image in to_pil(pipe.decode(x0))]
        if watcher is not None:
            maps += maps_of(watcher, pipe, [recipe.prompt], recipe.prompt_weighting)
            watcher.forget()
    sheets = [grid(frames, columns=len(frames) // len(images))] if frames else []
    return images, sheets + ([attention_sheet(images, maps)] if maps else [])


def save(
    paths: Sequence[Path],
    recipe: Recipe,
    images: Sequence[Image.Image],
    sheets: Sequence[Image.Image],
    args: Any,
) -> None:
    """Writes the pictures to the paths of `outputs`, the one that is printed last."""
    written: list[tuple[Path, Image.Image, Recipe]] = []
    if len(images) > 1:
        for index, (path, image) in enumerate(zip(paths[1:], images, strict=False)):
            written.append((path, image, recipe.of_image(index)))
    written += [(path, sheet, recipe) for path, sheet in zip(paths[-len(sheets) :], sheets, strict=False)]
    written.append((paths[0], grid(images), recipe))
    for path, image, made_by in written:
        save_picture(image, path, None if args.no_metadata else made_by, overwrite=args.overwrite)


def generate(args: argparse.Namespace) -> Path:
    """Draws and writes what is asked for. The path of the picture, or of the grid of several.

    Raises ValueError for what cannot be, before anything is written.
    """
    settled, source, start = settle(args)
    paths = outputs(args, settled.get("expanded_from") or settled["prompt"], settled["num_images"])
    pipe, upscaler, recipe = prepare(args, settled, source)
    progress = Progress(args.progress, pipe, recipe.num_images)
    images, sheets = draw(pipe, recipe, start, progress, args)
    if upscaler is not None:
        from ldm.command.enlarging import enlarge

        upscaler.set_progress_bar_config(disable=progress.kind != "bar", leave=False, desc="enlarging")
        images = enlarge(upscaler, recipe, images)
    while True:
        try:
            save(paths, recipe, images, sheets, args)
            return paths[0]
        except FileExistsError:  # another process has taken this counter meanwhile, or this very name
            typed = recipe.expanded_from or recipe.prompt
            paths, taken = outputs(args, typed, recipe.num_images), paths
            if paths == taken:
                raise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, or 1 where the machine fails, 2 where the request does, 130 on Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        args = make_parser().parse_args(argv)
        if args.list_samplers:
            from ldm.diffusion.solvers import SOLVERS

            print("\n".join(f"{name:14}{A1111.get(name, '')}".rstrip() for name in SOLVERS))
        elif args.prompts is not None:
            from ldm.command.gallery import draw_gallery

            print(draw_gallery(args))
        else:
            print(generate(args))
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted", 130  # pictures are written whole or not at all
    except ValueError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # such as a full disk
        message, status = f"error: {error.filename or ''}: {error.strerror or error}", 1
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and "memory" not in text:
            raise
        message, status = (
            "error: out of memory; a smaller --width and --height, --dtype bf16, or with --prompts a smaller "
            f"--batch-size ({text[:100]!r})",
            1,
        )
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
