"""Validation loss by timestep, from what runs have logged: what `python -m ldm.evaluate losses` does."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.files.config import replacing
from ldm.metrics.plot import linear, logarithmic, plot

TIMESTEP = "timestep, 0 the cleanest"
LEVEL = re.compile(r"validation/loss_t(\d+)")

Losses = Mapping[int, float]  # by timestep, 0 the cleanest


def read_losses(run: Path) -> dict[int, Losses]:
    """The validations of a run by their step, the oldest first.

    Raises ValueError if the folder is no run's or has none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no folder of a run: expected {path}")
    found: dict[int, Losses] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        matches = ((LEVEL.fullmatch(name), value) for name, value in values.items())
        losses = {int(match[1]): float(value) for match, value in matches if match and value is not None}
        if losses:
            found[int(values["step"])] = losses
    if not found:
        raise ValueError(f"{path} holds no losses by timestep: train with --validation-samples 64 or so")
    return found


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, the first and the last among them; of one the last."""
    if count == 1:
        return [steps[-1]]
    places = (place * (len(steps) - 1) / (count - 1) for place in range(count))
    return list(dict.fromkeys(steps[round(place)] for place in places))


def show_losses(args: argparse.Namespace) -> Path:
    """Writes losses.png and report.md, which is read; its path. Raises ValueError for what is no run."""
    runs = {given: read_losses(Path(os.path.expanduser(given))) for given in args.runs}
    lines: dict[str, Losses] = {}
    short = len({Path(given).name for given in runs}) == len(runs)  # else the folders say which is which
    for given, found in runs.items():
        steps = spread(list(found), args.lines) if len(runs) == 1 else [list(found)[-1]]
        name = f"{Path(given).name if short else given}, " if len(runs) > 1 else ""
        lines |= {f"{name}step {step:,}": found[step] for step in steps}
    output = Path(os.path.expanduser(args.output))
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
    told = [
        f"# Validation loss of {', '.join(runs)}",
        "Mean squared error of what the model predicts, on pictures held out of training, by timestep.",
        "\n".join([f"| | {' | '.join(map(str, levels))} |", "|---|" + "---|" * len(levels), *rows]),
        "![loss by timestep](losses.png)",
    ]
    with replacing(output / "report.md") as temporary:
        temporary.write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return output / "report.md"
