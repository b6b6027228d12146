"""Quality against model calls and seconds: what `python -m ldm.evaluate sweep` does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.arguments import DTYPES
from ldm.config import replacing, write_json
from ldm.gallery import Rank
from ldm.loading import find_device, load
from ldm.metrics.arguments import drawing_options, reference_options
from ldm.metrics.collection import check_alike, collect, reference
from ldm.metrics.drawing import draw, drawn_how, recipes, requests_of
from ldm.metrics.extractors import Extractor
from ldm.metrics.folders import Folder
from ldm.metrics.measurement import find_extractors, output_folder
from ldm.metrics.plot import plot
from ldm.metrics.probes import Probes
from ldm.metrics.report import compare

SHOWN = ("FD", "FID", "CMMD", "precision", "recall")  # of the figures, in the table; all are in sweep.json

Row = dict[str, Any]


def title(setting: Mapping[str, Any]) -> str:
    """Of a setting, in names of files: such as ddim-20-3."""
    parts = [setting.get("sampler"), setting.get("steps"), setting.get("guidance_scale")]
    return "-".join(
        f"{part:g}" if isinstance(part, float) else str(part) for part in parts if part is not None
    )


def sweep(args: argparse.Namespace, settings: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draws, measures and writes: the path of the report; None on ranks that only draw.

    settings: by Recipe's names. Raises ValueError for what cannot be.
    """
    output = output_folder(args)
    lines = requests_of(args.prompts, args.count, args.seed)
    drawn: Path | None = None
    extractors: list[Extractor] = []
    if args.reference:
        extractors = find_extractors(args)
        asked = [
            {**line, **setting, "name": f"{title(setting)}-{line['name']}"}
            for setting in settings
            for line in lines
        ]
        left = drawing_options(args)
        del left["steps"]  # a list here
        drawn = draw(asked, left, output)
    if Rank.of_environment().number:
        return None
    rows: list[Row] = [dict(setting) for setting in settings]
    if args.probes:
        add_probes(args, rows, settings, lines, output)
    protocol: dict[str, Any] = {"probes": args.probes, "ema": args.ema}
    for extractor in extractors if drawn else []:
        assert drawn is not None
        real = reference(args.reference, extractor, **reference_options(args))
        for row, setting in zip(rows, settings, strict=True):
            names = [f"{title(setting)}-{line['name']}.png" for line in lines]
            pictures = Folder(drawn, names=names, side=args.size)
            fake = collect(pictures, extractor, keep=args.keep, title=title(setting))
            check_alike(fake, real, "the reference")
            made = recipes(pictures)
            how = {"drawn": drawn_how(made) if made else None, "ema": args.ema}
            row |= {each.name: each.value for each in compare(extractor, fake, real, how)}
        protocol[extractor.name] = real.stamp
    return write_sweep(output, rows, protocol)


def add_probes(
    args: argparse.Namespace,
    rows: Sequence[Row],
    settings: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    output: Path,
) -> None:
    """Calls, seconds and errors of every setting, into its row."""
    pipe, facts = load(vars(args), find_device(args.device), DTYPES.get(args.dtype), fetch=True)
    probes = Probes(pipe, facts, lines[: args.probes], drawing_options(args), output / "solutions")
    for row, setting in zip(rows, settings, strict=True):
        row |= probes(setting)._asdict()


def write_sweep(output: Path, rows: Sequence[Row], protocol: Mapping[str, Any]) -> Path:
    """Writes sweep.json, plots, and report.md, which is read; its path."""
    write_json(output / "sweep.json", {"protocol": protocol, "settings": rows})
    names = list(dict.fromkeys(name for row in rows for name in row))
    told = [name for name in names if (name in rows[0] and not is_figure(name)) or name.startswith(SHOWN)]
    lines = ["# Sweep", "", f"| {' | '.join(told)} |", "|" + "---|" * len(told)]
    lines += [f"| {' | '.join(cell(row.get(name)) for name in told)} |" for row in rows]
    lines += ["", "Every figure, and what the reference is, stands in sweep.json.", ""]
    wanted = [name for name in names if name.startswith(("FD", "FID", "CMMD"))]
    pairs = [(x, y) for y in wanted for x in ("calls", "seconds")] + [("calls", "error")]
    for x, y in pairs:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.get(x) and row.get(y):
                without: Row = {name: row[name] for name in ("sampler", "guidance_scale") if name in row}
                series.setdefault(title(without) or "the model's own", []).append((row[x], row[y]))
        if series:
            path = output / f"{y}-by-{x}.png"
            plot(series, {"calls": "UNet calls a picture", "seconds": "seconds a picture"}[x], y, path)
            lines.append(f"![{y} by {x}]({path.name})")
    with replacing(output / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output / "report.md"


def is_figure(name: str) -> bool:
    return name not in ("sampler", "steps", "guidance_scale", "calls", "seconds", "error")


def cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
