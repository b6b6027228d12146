"""A folder of pictures, one for each line of a file: what `python -m ldm.generate --prompts` does.

Every picture is written whole or not at all, as it comes, and its recipe is inside: a second run draws what
is missing. Several processes, as torchrun and accelerate start them, deal the batches out among themselves
by their number alone; they need not talk to each other, nor be as many the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ldm.command.arguments import DTYPES
from ldm.recipes import options
from ldm.recipes.picture import check_output, read_recipe, save_picture
from ldm.recipes.recipe import Recipe
from ldm.recipes.requests import Request, pack, read_requests
from ldm.recipes.starts import noted, settle_start, start_of

# What may differ in the recipe of a picture that is there: its last bits, and what the model is called.
NOTES = ("model", "variant", "device", "optimize", "version", "torch")


@dataclass(frozen=True)
class Rank:
    """Which of several processes this is."""

    number: int
    count: int
    device: int  # the GPU of this process, on its machine

    @classmethod
    def of_environment(cls) -> Rank:
        """By torchrun's variables. Raises ValueError unless they are whole numbers that fit each other."""
        texts = [os.environ.get(name, usual) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"))]
        texts.append(os.environ.get("LOCAL_RANK", texts[0]))
        rank = cls(*(int(text) if text.isdecimal() else -1 for text in texts))
        if not 0 <= rank.number < rank.count or rank.device < 0:
            raise ValueError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are {', '.join(texts)}: expected whole numbers, and "
                "RANK below WORLD_SIZE, as torchrun sets them"
            )
        return rank


class Count:
    """How many pictures are done: a bar with speed and time left, lines of JSON, or nothing."""

    def __init__(self, kind: str | None, total: int) -> None:
        """kind: bar, json, none, or None for a bar on a terminal."""
        self.kind = kind or ("bar" if sys.stderr.isatty() else "none")
        self.done, self.total = 0, total

    def __enter__(self) -> Self:
        from tqdm import tqdm  # 40 ms

        self.started = time.monotonic()
        self.bar = tqdm(total=self.total, unit=" pictures", leave=False, disable=self.kind != "bar")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.seconds = time.monotonic() - self.started

    def one_more(self, path: Path) -> None:
        self.done += 1
        self.bar.update()
        if self.kind == "json":
            state = {"picture": self.done, "pictures": self.total, "path": str(path)}
            print(json.dumps(state), file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"drew {self.done} pictures in {self.seconds:.1f} s, {self.done / self.seconds:.2f} a second"


def draw_gallery(args: argparse.Namespace) -> Path:
    """Draws what the file asks for and is not there yet; the folder of the pictures.

    Raises ValueError for what cannot be, before anything is drawn.
    """
    rank = Rank.of_environment()
    folder = check_arguments(args, rank)
    lines = read_requests(args.prompts, asked_of_all(args))
    lines = with_starts(lines)
    from ldm.drawing.many import batch_size_for, draw_batches, settle_requests

    pipe, facts = _load(args, lines, rank)
    requests = settle_requests(pipe, lines)
    if args.strict:
        check_lines(pipe, dict(zip(lines, requests, strict=True)))
    recipes = {request: _recipe(request, facts) for request in requests}
    missing = set(find_missing(folder, recipes, args))
    batches = [
        [requests[place] for place in batch]
        for batch in pack(requests, batch_size_for(pipe, args.batch_size))
    ]
    # whole batches, also where only some of it is missing: its size decides the last bits
    mine = [batch for batch in batches[rank.number :: rank.count] if not missing.isdisjoint(batch)]
    todo = [request for batch in mine for request in batch if request in missing]
    kind = args.progress if rank.number == 0 else "none"
    with Count(kind, len(todo)) as count, contextlib.closing(draw_batches(pipe, mine)) as drawn:
        for request, image in drawn:
            if request in missing:
                path = folder / f"{request.name}.png"
                save_picture(
                    image, path, None if args.no_metadata else recipes[request], overwrite=args.overwrite
                )
                count.one_more(path)
    there = f"; {len(requests) - len(missing)} were there" if len(missing) < len(requests) else ""
    who = f"rank {rank.number} of {rank.count}: " if rank.count > 1 else ""
    print(f"{who}{count}{there}", file=sys.stderr)
    return folder


def check_arguments(args: argparse.Namespace, rank: Rank) -> Path:
    """The folder of the pictures. Raises ValueError for options that --prompts does not go with."""
    given = {"a prompt": args.prompt, "--from": args.source, "--num-images": args.num_images}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--prompts draws one picture a line: leave out {name}")
    alone = {"--expand": args.expand, "--classifier": args.classifier}
    alone |= {"--classifier-scale": args.classifier_scale, "--classifier-form": args.classifier_form}
    alone |= {"--guidance": args.guidance, "--threshold": args.threshold, "--worse": args.worse}
    alone |= {"--show-steps": args.show_steps or None, "--show-attention": args.show_attention or None}
    alone |= {"--upscale": args.upscaler, "--upscale-noise": args.upscale_noise}
    for name, value in alone.items():
        if value is not None:
            raise ValueError(f"{name} is of one prompt, and does not go with --prompts: leave it out")
    if args.prompts == "-" and rank.count > 1:
        raise ValueError("--prompts -: standard input goes to one process; give several a file")
    options.check_chunks(args.chunks)
    if args.batch_size is not None:
        options.check_batch_size(args.batch_size)
    if args.output is None or args.output.lower().endswith(".png"):
        raise ValueError(f"output={args.output!r}: give --output FOLDER for the pictures of --prompts")
    folder = Path(os.path.expanduser(args.output))
    check_output(folder / "1.png", overwrite=True)
    return folder


def asked_of_all(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks of every line that does not say otherwise, by Request's names."""
    names = {field.name for field in dataclasses.fields(Request)} - {"prompt", "name"}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    options.check_request(given)
    return given


def with_starts(lines: Mapping[str, Request]) -> dict[str, Request]:
    """The lines, with the size and strength of the pictures that they start from where they leave these open.

    Raises ValueError, naming the line, for a picture or a mask that cannot be read.
    """
    settled: dict[str, Request] = {}
    for where, request in lines.items():
        values = dict(vars(request))
        try:
            settle_start(values, start_of(values).image)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        settled[where] = Request(**values)
    return settled


def _load(args: argparse.Namespace, lines: Mapping[str, Request], rank: Rank) -> tuple[Any, dict[str, Any]]:
    """The pipeline on this rank's device and what it decides of a recipe; see loading.load."""
    from ldm.command.loading import find_device, load
    from ldm.diffusion.solvers import SOLVERS

    for where, request in lines.items():
        if request.sampler is not None:
            options.check_choice(f"{where}: sampler", request.sampler, SOLVERS)
    device = find_device(args.device)
    if args.device is None and device.type == "cuda" and rank.count > 1:
        device = find_device(f"cuda:{rank.device}")
    return load(vars(args), device, DTYPES.get(args.dtype), fetch=True)


def check_lines(pipe: Any, lines: Mapping[str, Request]) -> None:
    """Raises ValueError, naming the line, if a settled request's prompts or start have no effect."""
    from ldm.drawing.given import Given
    from ldm.drawing.prompting import check_heard

    for where, request in lines.items():
        texts = (request.prompt, request.negative_prompt or "")
        try:
            check_heard(*texts, pipe.tokenizers, request.prompt_weighting)
            start = Given.of(*start_of(vars(request)), request.strength)
            for notice in start.notices(pipe.tableau(request.steps, request.sampler, start.strength)):
                raise ValueError(notice)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _recipe(request: Request, facts: Mapping[str, Any]) -> Recipe:
    values = {name: value for name, value in vars(request).items() if name != "name"}
    for name in ("image", "mask"):
        values[name] = values[name] and noted(values[name])
    values["variation_strength"] = values["variation_strength"] or 0.0
    return Recipe(**values, **facts)


def find_missing(
    folder: Path, recipes: Mapping[Request, Recipe], args: argparse.Namespace
) -> Iterable[Request]:
    """The requests whose pictures are not there, or with --overwrite are others.

    With --no-metadata a picture is known by its name alone.
    Raises ValueError, without --overwrite, for a file that is there and was not made by the recipe.
    """
    for request, recipe in recipes.items():
        path = folder / f"{request.name}.png"
        if not os.path.lexists(path):
            yield request
        elif not args.no_metadata and (other := what_differs(path, recipe)):
            if not args.overwrite:
                raise ValueError(
                    f"{path} is there and is another picture ({other}): draw it anew with --overwrite"
                )
            yield request


def what_differs(path: Path, recipe: Recipe) -> str:
    """In which field the picture at path was made otherwise, or why that is not known; "" if in none."""
    try:
        found = read_recipe(path)
    except ValueError as error:
        return str(error)
    if not isinstance(found, Recipe):
        return "of another program"
    for field in dataclasses.fields(Recipe):
        was, now = getattr(found, field.name), getattr(recipe, field.name)
        if was != now and field.name not in NOTES:
            return f"{field.name} was {was!r:.80} and is {now!r:.80}"
    return ""
