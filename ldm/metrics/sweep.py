"""Quality against model calls and seconds: what `python -m ldm.evaluate sweep` does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm.command.arguments import DTYPES
from ldm.command.gallery import Rank
from ldm.command.loading import find_device, load
from ldm.files.config import replacing, write_json
from ldm.metrics.arguments import drawing_options, reference_options
from ldm.metrics.collection import check_alike, collect, reference
from ldm.metrics.drawing import averaged, draw, drawn_how, recipes, requests_of, wait_for
from ldm.metrics.folders import Folder
from ldm.metrics.measurement import FEATURES, find_extractors, help_out, output_folder
from ldm.metrics.plot import logarithmic, plot, ticked
from ldm.metrics.probes import EXACT, Probe, Probes
from ldm.metrics.report import compare
from ldm.recipes.options import MAX_STEPS

SHOWN = ("FD", "FID", "CMMD", "precision", "recall")  # of the figures, in the table; all are in sweep.json

BESIDE = "diffusers"  # the columns of what is measured beside begin with it
UP = {"error": f"error to the solution of {MAX_STEPS:,} steps, |x - x*| / |x*|"}
ACROSS = {"calls": "UNet calls a picture", "seconds": "seconds a picture"}

Row = dict[str, Any]


def title(setting: Mapping[str, Any]) -> str:
    """Of a setting, in names of files: such as ddim-20-3."""
    parts = [setting.get("sampler"), setting.get("steps"), setting.get("guidance_scale")]
    return "-".join(
        f"{part:g}" if isinstance(part, float) else str(part) for part in parts if part is not None
    )


def sweep(args: argparse.Namespace, settings: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draws, measures and writes: the path of the report; None on ranks that only help.

    settings: by Recipe's names. Raises ValueError for what cannot be.
    """
    output = output_folder(args)
    lines = requests_of(args.prompts, args.count, args.seed)
    extractors = find_extractors(args) if args.reference else []
    sets = drawn_sets(args, settings, lines, output) if args.reference else []
    if Rank.of_environment().number:
        help_out(args, extractors, sets)
        return None
    rows: list[Row] = [dict(setting) for setting in settings]
    ema = args.ema or averaged(args.model)
    protocol: dict[str, Any] = {"ema": ema}
    if args.probes:
        protocol |= add_probes(args, rows, settings, lines, output)
    for extractor in extractors:
        kept = output / FEATURES
        real = reference(args.reference, extractor, **reference_options(args), kept=kept)
        for row, setting, pictures in zip(rows, settings, sets, strict=True):
            fake = collect(pictures, extractor, keep=args.keep, title=title(setting), kept=kept)
            check_alike(fake, real, "the reference")
            made = recipes(pictures)
            how = {"drawn": drawn_how(made) if made else None, "ema": ema}
            row |= {each.name: each.value for each in compare(extractor, fake, real, how)}
        protocol[extractor.name] = real.stamp
    return write_sweep(output, rows, protocol)


def drawn_sets(
    args: argparse.Namespace,
    settings: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    output: Path,
) -> list[Folder]:
    """The pictures of every setting, drawn by all ranks."""
    asked = [
        [{**line, **setting, "name": f"{title(setting)}-{line['name']}"} for line in lines]
        for setting in settings
    ]
    left = drawing_options(args)
    del left["steps"]  # a list here
    drawn = draw([line for each in asked for line in each], left, output)
    names = [[f"{line['name']}.png" for line in each] for each in asked]
    wait_for([drawn / name for each in names for name in each])
    return [Folder(drawn, names=each, side=args.size) for each in names]


def add_probes(
    args: argparse.Namespace,
    rows: Sequence[Row],
    settings: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    output: Path,
) -> dict[str, Any]:
    """Calls, seconds and errors of every setting, into its row; what they were measured with."""
    pipe, facts = load(vars(args), find_device(args.device), DTYPES.get(args.dtype), fetch=True)
    shown, options = lines[: args.probes], drawing_options(args)
    probes = Probes(pipe, facts, shown, options, output / "solutions", args.beside)
    for row, setting in zip(rows, settings, strict=True):
        row |= probes(setting)._asdict()
        if args.beside:
            row |= {f"{BESIDE} {name}": value for name, value in probes.beside(setting)._asdict().items()}
    seeds = [line["seed"] for line in shown]
    told = {"pictures": len(shown), "seeds": seeds, "exact": f"{EXACT}, {MAX_STEPS} steps", **probes.shared}
    if args.beside:
        told[BESIDE] = version(BESIDE)
    return {"probes": {**told, **facts}}


def write_sweep(output: Path, rows: Sequence[Row], protocol: Mapping[str, Any]) -> Path:
    """Writes sweep.json, plots, and report.md, which is read; its path."""
    write_json(output / "sweep.json", {"protocol": protocol, "settings": rows})
    probed = protocol.get("probes", {})
    lines = ["# Sweep", ""]
    if probed:
        lines += [
            f"Of {probed['pictures']} pictures drawn together: UNet calls and seconds for one, and the error "
            f"|x - x*| / |x*| of the latents, x* being where {probed['exact']} end from the same noise. "
            "Seconds are of one run each, after one untimed.",
            "",
        ]
    if BESIDE in probed:
        lines += [f"{BESIDE} {probed[BESIDE]} draws with the same weights, texts and noise, to our x*.", ""]
    for name, what in (("error", "Error by UNet calls"), ("seconds", "Seconds a picture by UNet calls")):
        if any(row.get(name) is not None for row in rows):
            lines += [f"## {what}", "", *by_calls(rows, name), ""]
    lines += [*drawings(rows, output), "## Every setting", "", *whole(rows)]
    lines += ["", "Every figure, and what the reference is, stands in sweep.json.", ""]
    with replacing(output / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return output / "report.md"


def by_calls(rows: Sequence[Row], name: str) -> list[str]:
    """A column of the rows as a table in Markdown: a line a solver and guidance, ours and then theirs."""
    found = {
        (who, key): {
            row[f"{mark}calls"]: row[f"{mark}{name}"] for row in group if row.get(f"{mark}{name}") is not None
        }
        for key, group in grouped(rows).items()
        for who, mark in (("ours", ""), (BESIDE, f"{BESIDE} "))
    }
    found = {names: values for names, values in found.items() if values}
    calls = sorted({each for values in found.values() for each in values})
    lines = [f"| solver | by | {' | '.join(map(str, calls))} |", "|---|---|" + "---:|" * len(calls)]
    return lines + [
        f"| {key} | {who} | {' | '.join(figure(values.get(each)) for each in calls)} |"
        for (who, key), values in found.items()
    ]


def whole(rows: Sequence[Row]) -> list[str]:
    """All settings in a table in Markdown, with the figures that are shown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    told = [name for name in names if not is_figure(name) or name.startswith(SHOWN)]
    lines = [f"| {' | '.join(told)} |", "|" + "---|" * len(told)]
    return lines + [f"| {' | '.join(cell(row.get(name)) for name in told)} |" for row in rows]


def drawings(rows: Sequence[Row], output: Path) -> list[str]:
    """Draws each figure and the error against calls and seconds; the lines that show these plots."""
    names = dict.fromkeys(name for row in rows for name in row)
    wanted = ["error", *(name for name in names if name.startswith(("FD", "FID", "CMMD")))]
    lines = []
    for y, x in ((y, x) for y in wanted for x in ACROSS):
        ours, theirs = curves(rows, x, y), curves(rows, f"{BESIDE} {x}", f"{BESIDE} {y}")
        if ours:
            path, across = output / f"{y}-by-{x}.png", logarithmic(ACROSS[x])
            if x == "calls":
                across = ticked(across, [point[0] for points in ours.values() for point in points])
            plot(ours, across, logarithmic(UP.get(y, y)), path, theirs, BESIDE)
            lines += [f"![{y} by {x}]({path.name})", ""]
    return lines


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by all of their setting but its steps."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        without: Row = {name: row[name] for name in ("sampler", "guidance_scale") if name in row}
        found.setdefault(title(without) or "the model's own", []).append(row)
    return found


def curves(rows: Sequence[Row], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Points of the columns x and y, by all of a setting but its steps."""
    found = {
        name: [(row[x], row[y]) for row in group if row.get(x) and row.get(y)]
        for name, group in grouped(rows).items()
    }
    return {name: points for name, points in found.items() if points}


def is_figure(name: str) -> bool:
    return name.removeprefix(f"{BESIDE} ") not in (
        *("sampler", "steps", "guidance_scale"),
        *Probe._fields,
    )


def figure(value: float | None) -> str:
    """Of three digits, also where the last is 0."""
    return "–" if value is None else f"{value:#.3g}"


def cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
