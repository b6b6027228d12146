"""The pictures that a model is judged by: drawn as `python -m ldm.generate --prompts` draws, so resumable.

Several processes share them out by their number, as there; the first waits for the others'.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm import pipeline
from ldm.command.arguments import make_parser
from ldm.command.gallery import draw_gallery
from ldm.files.config import read_json, replacing
from ldm.formats.parts import TRAINED
from ldm.metrics.folders import Folder
from ldm.recipes.picture import read_recipe
from ldm.recipes.recipe import Recipe
from ldm.recipes.requests import NUMBERED, read_requests

PATIENCE = 600.0  # seconds without a new file of another rank
OWN = ("prompt", "seed")  # of a recipe, what differs from picture to picture


def requests_of(prompts: str, count: int | None, seed: int) -> list[dict[str, Any]]:
    """`count` requests, as lines of a .jsonl hold them: one a line of `prompts`, then again from its first.

    The i-th line has seed + i - 1 unless it says otherwise; where lines come again, their seeds go on by as
    many as there are lines. None asks for each line once. Raises ValueError for a file that cannot be.
    """
    asked = list(read_requests(prompts, {"seed": seed}).values())
    lines = []
    for place in range(count or len(asked)):
        round_, index = divmod(place, len(asked))
        values = {name: value for name, value in vars(asked[index]).items() if value is not None}
        values |= {"name": NUMBERED.format(place + 1), "seed": values["seed"] + round_ * len(asked)}
        lines.append(values)
    return lines


def draw(lines: Sequence[Mapping[str, Any]], options: Mapping[str, Any], output: Path) -> Path:
    """Draws this rank's share of the pictures; the folder of all, which other ranks may still be at work on.

    lines: as requests_of gives them. options: of `python -m ldm.generate`, by the names of its arguments, for
    what lines leave open; None is left open. Raises ValueError for what cannot be, before anything is drawn.
    """
    requests, folder = output / "requests.jsonl", output / "pictures"
    with replacing(requests) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    given = {name: value for name, value in options.items() if value is not None}
    usual = vars(make_parser().parse_args([]))
    draw_gallery(argparse.Namespace(**{**usual, **given, "prompts": str(requests), "output": str(folder)}))
    return folder


def wait_for(paths: Sequence[Path], patience: float = PATIENCE) -> None:
    """Until all are there. Raises ValueError after `patience` seconds in which none came."""
    lacks, since = list(paths), time.monotonic()
    while left := [path for path in lacks if not path.exists()]:
        if len(left) < len(lacks):
            since = time.monotonic()
        lacks = left
        if time.monotonic() - since > patience:
            raise ValueError(
                f"{len(lacks)} of {len(paths)} files are not there, the first {lacks[0]}: other ranks "
                "were to make them; run the command again, which makes only what lacks"
            )
        time.sleep(0.2)


def recipes(pictures: Folder) -> list[Recipe] | None:
    """The recipe of each picture; None if one has none of ours."""
    found = []
    for path in pictures.paths:
        try:
            recipe = read_recipe(path)
        except ValueError:
            return None
        if not isinstance(recipe, Recipe):
            return None
        found.append(recipe)
    return found


def drawn_how(made: Sequence[Recipe]) -> dict[str, Any]:
    """What pictures' recipes have in common, and the range of their seeds; "several" where they differ."""
    common: dict[str, Any] = {}
    for name in vars(made[0]):
        if name not in OWN:
            values = {getattr(recipe, name) for recipe in made}
            common[name] = values.pop() if len(values) == 1 else "several"
    seeds = [recipe.seed for recipe in made]
    common["seeds"] = f"{min(seeds)} to {max(seeds)}"
    common["prompts"] = len({recipe.prompt for recipe in made})
    return common


def averaged(model: str | None) -> str:
    """Which average of the weights a model's folder holds, as training noted; None: the bundled one."""
    path = Path(os.path.expanduser(model)) if model else pipeline.BUNDLED
    if not (path / TRAINED).is_file():
        return "not told"
    facts = read_json(path / TRAINED)
    return f"{facts['ema']}, step {facts['step']}, as its {TRAINED} says"
