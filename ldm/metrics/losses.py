"""Validation loss by timestep: what `python -m ldm.evaluate losses` does.

It is read from what runs have logged, and from what `python -m train.evaluate_losses` measured of a model on
any data: the pictures and what reads them are training's, so that they are seen as training sees them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files.config import read_json, replacing, write_json
from ldm.metrics.plot import linear, logarithmic, plot

TIMESTEP = "timestep, 0 the cleanest"
LEVEL = re.compile(r"(?:validation/)?loss_t(\d+)")
MEASURED = "losses.json"  # of python -m train.evaluate_losses, in its output
FORMAT = "ldm-losses-1"

Losses = Mapping[int, float]  # by timestep, 0 the cleanest


def by_timestep(values: Mapping[str, Any]) -> Losses:
    """Of named values the losses at a timestep."""
    matches = ((LEVEL.fullmatch(name), value) for name, value in values.items())
    return {int(match[1]): float(value) for match, value in matches if match and value is not None}


def read_losses(run: Path) -> dict[int, Losses]:
    """The validations of a run by their step, the oldest first.

    Raises ValueError if the folder is no run's or has none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{run} is neither a run nor of train.evaluate_losses: expected {path} or {run / MEASURED}"
        )
    found: dict[int, Losses] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if losses := by_timestep(values):
            found[int(values["step"])] = losses
    if not found:
        raise ValueError(f"{path} holds no losses by timestep: train with --validation-samples 64 or so")
    return found


def save_measured(folder: Path, values: Mapping[str, float], protocol: Mapping[str, Any]) -> None:
    """Writes the named losses of a model on some pictures, and all that decides them."""
    write_json(folder / MEASURED, {"format": FORMAT, "protocol": protocol, "losses": values})


def read_measured(folder: Path) -> Losses:
    """What save_measured wrote. Raises ValueError for a file of another format."""
    facts = read_json(folder / MEASURED)
    if facts.get("format") != FORMAT:
        raise ValueError(f"{folder / MEASURED} has the format {facts.get('format')!r}: expected {FORMAT}")
    return by_timestep(facts["losses"])


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, the first and the last among them; of one the last."""
    if count == 1:
        return [steps[-1]]
    places = (place * (len(steps) - 1) / (count - 1) for place in range(count))
    return list(dict.fromkeys(steps[round(place)] for place in places))


def show_losses(args: argparse.Namespace) -> Path:
    """Writes losses.png and report.md, which is read; its path. Raises ValueError for what has no losses."""
    given = {name: Path(os.path.expanduser(name)) for name in args.runs}
    short = len({path.name for path in given.values()}) == len(given)  # else the folders say which is which
    lines: dict[str, Losses] = {}
    for name, folder in given.items():
        shown = folder.name if short else name
        if (folder / MEASURED).is_file():
            lines[shown] = read_measured(folder)
            continue
        found = read_losses(folder)
        steps = spread(list(found), args.lines) if len(given) == 1 else [list(found)[-1]]
        who = f"{shown}, " if len(given) > 1 else ""
        lines |= {f"{who}step {step:,}": found[step] for step in steps}
    told = "Mean squared error of what the model predicts, on pictures held out of training, by timestep."
    return write_losses(Path(os.path.expanduser(args.output)), ", ".join(given), lines, told)


def write_losses(output: Path, title: str, lines: Mapping[str, Losses], told: str) -> Path:
    """Writes losses.png and report.md, which is read; its path. told: what the losses are of."""
    plot(
        {name: list(losses.items()) for name, losses in lines.items()},
        linear(TIMESTEP),
        logarithmic("validation loss"),
        output / "losses.png",
    )
    levels = sorted({t for losses in lines.values() for t in losses})
    rows = [
        f"| {name} | " + " | ".join(f"{losses[t]:.4f}" if t in losses else "–" for t in levels) + " |"
        for name, losses in lines.items()
    ]
    parts = [
        f"# Validation loss of {title}",
        told,
        "\n".join([f"| | {' | '.join(map(str, levels))} |", "|---|" + "---|" * len(levels), *rows]),
        "![loss by timestep](losses.png)",
    ]
    with replacing(output / "report.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return output / "report.md"
