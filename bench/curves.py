"""What a picture and a training step cost, as curves: docs/*.png, and docs/curves.md with the numbers.

  python bench/curves.py                              the bundled model, some minutes on two cores
  python bench/curves.py --model ./stable-diffusion-v1-5 --device cuda --sides 256,512,768,1024
  python bench/curves.py --tiny --output /tmp/curves  a check of a minute

Seconds against steps, pictures at once and resolution; memory against resolution, decoded whole and in tiles;
pictures that the autoencoder encodes in a second; seconds of a training step against ranks, of which 1 and 2
are measured and more are modelled. Needs matplotlib: pip install -c constraints.txt '.[bench]'
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from bench.measure import hardware, table
from bench.rows import Make, Row, Settings, Unavailable
from bench.sides import PROMPT, SCALE
from ldm.pipeline import BUNDLED, LatentDiffusionPipeline

MODELLED = (4, 8)  # ranks
ENCODED = 8  # pictures at a time


class Line(NamedTuple):
    """Of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    modelled: bool = False  # drawn dashed


@dataclass
class Plot:
    """One message: a file, its axes with their units, and a sentence on how it was measured."""

    name: str  # of the file
    title: str
    x: str
    y: str
    how: str
    lines: list[Line] = field(default_factory=list)
    log: str = ""  # the axes that are logarithmic: "", "x" or "xy"; others begin at 0


# what is measured, in processes of its own


class Drawing:
    """A pipeline that draws. what: side in pixels and steps, with a space between."""

    def __init__(self, settings: Settings) -> None:
        self.pipe = LatentDiffusionPipeline.from_pretrained(settings.folder).to(settings.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.disable_vae_tiling()

    @torch.no_grad()
    def call(self, what: str, batch: int) -> Tensor:
        side, steps = map(int, what.split())
        latents = self.pipe(
            PROMPT,
            side,
            side,
            steps,
            guidance_scale=SCALE,
            num_images_per_prompt=batch,
            seed=0,
            sampler="ddim",
            output_type="latent",
        ).images
        return self.pipe.decode(latents)


class DrawingInTiles(Drawing):
    """The same with latents decoded in strips, whatever their size."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.pipe.enable_vae_tiling()


class Encoding:
    """The autoencoder, as it fills a cache of latents. what: side in pixels."""

    def __init__(self, settings: Settings) -> None:
        pipe = LatentDiffusionPipeline.from_pretrained(settings.folder).to(settings.device)
        self.vae, self.device = pipe.vae, settings.device

    @torch.no_grad()
    def call(self, what: str, batch: int) -> Tensor:
        image = torch.zeros(batch, 3, int(what), int(what), device=self.device)
        return self.vae.encode(image.contiguous(memory_format=torch.channels_last)).mean


DECODINGS: tuple[Make, Make] = (Drawing, DrawingInTiles)


class Bench(NamedTuple):
    """The options, the model, and the processes that are timed."""

    options: argparse.Namespace
    settings: Settings
    side: int  # of the model's own pictures, in pixels
    drawing: Row
    encoding: Row

    def seconds(self, row: Row, what: str, batch: int) -> float:
        """The median of some calls. Raises Unavailable, with the reason, if there are none."""
        row.ask("warm_up", what, batch)
        times = [row.ask("seconds", what, batch) for _ in range(self.options.rounds)]
        return statistics.median(answered(row, times, what, batch))

    def draw_seconds(self, side: int, steps: int, batch: int) -> float:
        return self.seconds(self.drawing, f"{side} {steps}", batch)

    def draw_bytes(self, make: Make, side: int) -> float:
        """Of a new process, which holds nothing of other sizes."""
        with Row("", make, self.settings) as row:
            row.ask("warm_up", f"{side} 1", 1)
            row.ask("seconds", f"{side} 1", 1)
            return answered(row, [row.ask("memory", f"{side} 1", 1)], f"{side} 1", 1)[0]


def answered(row: Row, figures: list[float], what: str, batch: int) -> list[float]:
    if row.why:
        raise Unavailable(f"{what}, batch {batch}: {row.why}")
    return figures


# the curves


def over_steps(bench: Bench) -> Plot:
    steps = bench.options.steps
    spent = [bench.draw_seconds(bench.side, count, 1) for count in steps]
    return Plot(
        "time-steps",
        "Time against steps",
        "steps",
        "seconds a picture",
        f"One picture of {bench.side}x{bench.side} pixels, DDIM with guidance, from prompt to pixels.",
        [Line("measured", steps, spent)],
    )


def over_batches(bench: Bench) -> Plot:
    batches, steps = bench.options.batches, bench.options.steps[0]
    spent = [bench.draw_seconds(bench.side, steps, batch) / batch for batch in batches]
    return Plot(
        "time-batch",
        "Time of a picture beside others",
        "pictures at once",
        "seconds a picture",
        f"{bench.side}x{bench.side} pixels, {steps} steps of DDIM with guidance.",
        [Line("measured", batches, spent)],
    )


def over_sides(bench: Bench) -> Plot:
    sides, steps = bench.options.sides, bench.options.steps[0]
    spent = [bench.draw_seconds(side, steps, 1) for side in sides]
    pixels = [spent[0] * (side / sides[0]) ** 2 for side in sides]
    return Plot(
        "time-resolution",
        "Time against resolution",
        "side of the picture, pixels",
        "seconds a picture",
        f"One square picture, {steps} steps of DDIM with guidance. Dashed: as the number of pixels.",
        [Line("measured", sides, spent), Line("as the pixels", sides, pixels, modelled=True)],
        "xy",
    )


def memory(bench: Bench) -> Plot:
    sides = bench.options.memory_sides
    whole, tiles = ([bench.draw_bytes(make, side) / 2**20 for side in sides] for make in DECODINGS)
    return Plot(
        "memory-resolution",
        "Memory against resolution, decoded whole and in tiles",
        "side of the picture, pixels",
        "peak memory, MiB",
        "The process (CPU) or the device (CUDA) while one picture is drawn in one step, weights included.",
        [Line("decoded whole", sides, whole), Line("decoded in tiles", sides, tiles)],
        "x",
    )


def encoding(bench: Bench) -> Plot:
    sides = bench.options.sides
    speed = [ENCODED / bench.seconds(bench.encoding, str(side), ENCODED) for side in sides]
    return Plot(
        "encoding",
        "Speed of encoding against resolution",
        "side of the picture, pixels",
        "pictures a second",
        f"The autoencoder's encoder alone, {ENCODED} pictures at a time; reading files comes on top.",
        [Line("measured", sides, speed)],
        "xy",
    )


def over_ranks(bench: Bench) -> Plot:
    """A step of n ranks: the step of one rank with its share of the batch, and the exchange of gradients.

    The exchange of two is what they take beyond that. A ring moves 2 (n - 1) / n of the gradients through
    each rank (Patarasuk & Yuan 2009), so n ranks take 2 (n - 1) / n times as long as two.
    """
    batch, everyone = bench.options.train_batch, (1, 2, *MODELLED)
    alone = {ranks: train_seconds(bench, 1, batch // ranks) for ranks in everyone}
    together = train_seconds(bench, 2, batch)
    exchange = max(together - alone[2], 0.0)
    modelled = [alone[ranks] + exchange * 2 * (ranks - 1) / ranks for ranks in MODELLED]
    return Plot(
        "time-ranks",
        "Training step against ranks",
        "ranks",
        "seconds a step",
        f"One step of {batch} samples of {bench.side}x{bench.side} pixels over all ranks, in fp32; a rank on "
        "the CPU has one thread. 1 and 2 ranks are measured, on one machine. More are modelled: the measured "
        "step of one rank with its share of the batch, and 2 (n - 1) / n times what two ranks take beyond "
        "theirs to exchange gradients.",
        [
            Line("measured", [1, 2], [alone[1], together]),
            Line("modelled", [2, *MODELLED], [together, *modelled], modelled=True),
            Line("ideal", everyone, [alone[1] / ranks for ranks in everyone], modelled=True),
        ],
        "xy",
    )


def train_seconds(bench: Bench, ranks: int, batch: int) -> float:
    """Of one step. Raises Unavailable if the ranks cannot be had."""
    if bench.options.device == "cuda" and torch.cuda.device_count() < ranks:
        raise Unavailable(f"{ranks} ranks need as many GPUs")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    probe = [str(ROOT / "bench" / "ranks.py"), str(bench.settings.folder), "--batch", str(batch)]
    size = ["--pixels", str(bench.side), "--steps", str(2 * bench.options.rounds)]
    hidden = {} if bench.options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **hidden, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *launcher, *probe, *size], env=environment, capture_output=True, text=True
    )
    if run.returncode:
        raise Unavailable(f"training on {ranks} ranks: {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])["seconds"]


CURVES: dict[str, Callable[[Bench], Plot]] = {
    "steps": over_steps,
    "batches": over_batches,
    "sides": over_sides,
    "memory": memory,
    "encoding": encoding,
    "ranks": over_ranks,
}


# the page


def draw(plot: Plot, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for line in plot.lines:
        axes.plot(line.x, line.y, "--" if line.modelled else "-o", label=line.name)
    if "x" in plot.log:
        axes.set_xscale("log")
    if "y" in plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({x for line in plot.lines for x in line.x}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(alpha=0.3)
    if len(plot.lines) > 1:
        axes.legend()
    figure.savefig(path, dpi=150)


def page(plot: Plot) -> str:
    """Its part of curves.md: the plot, how it was measured and the numbers."""
    rows = [
        [f"{x:g}", f"{y:.3g}", line.name] for line in plot.lines for x, y in zip(line.x, line.y, strict=True)
    ]
    picture, figures = f"![{plot.title}]({plot.name}.png)", table([plot.x, plot.y, ""], rows)
    return f"## {plot.title}\n\n{picture}\n\n{plot.how}\n\n{figures}\n"


def measure_all(bench: Bench, output: Path) -> Iterator[str]:
    for name in bench.options.curves:
        try:
            plot = CURVES[name](bench)
        except Unavailable as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        draw(plot, output / f"{plot.name}.png")
        part = page(plot)
        print(part, flush=True)
        yield part


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=BUNDLED, help="pipeline folder; default the bundled model"
    )
    parser.add_argument("--curves", nargs="*", choices=CURVES, default=list(CURVES), help="default all")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder for pictures and page")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--steps", type=numbers, default="10,20,30,40,50", help="the first for other curves")
    parser.add_argument("--batches", type=numbers, default="1,2,4,8,16", help="pictures at once")
    parser.add_argument("--sides", type=numbers, default="128,256,512,768", help="of pictures, in pixels")
    parser.add_argument(
        "--memory-sides", type=numbers, default="64,128,256,512,1024", help="for memory alone"
    )
    parser.add_argument("--train-batch", type=int, default=32, help="samples a step, over all ranks")
    parser.add_argument("--rounds", type=int, default=5, help="calls of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="few and small points, to check the code")
    options = parser.parse_args()
    if options.train_batch % max(MODELLED):
        parser.error(f"--train-batch {options.train_batch}: expected a multiple of {max(MODELLED)}")
    if options.tiny:
        options.steps, options.batches, options.sides = [1, 2], [1, 2], [32, 64]
        options.memory_sides, options.train_batch, options.rounds = [32, 64], 8, 1
    return options


def main() -> None:
    options = parse()
    pipe = LatentDiffusionPipeline.from_pretrained(options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    name = "the bundled model" if options.model == BUNDLED else options.model.name
    head = (
        f"# What it costs\n\nMeasured by `python bench/curves.py` with {name}, {pipe.dtype}, on "
        f"{hardware(torch.device(options.device))}; medians of {options.rounds} calls after one that is not "
        "counted.\n"
    )
    side, settings = pipe.default_size[0], Settings(options.model, options.device, 0, 0, options.threads, 1)
    del pipe
    with Row("", Drawing, settings) as drawing, Row("", Encoding, settings) as encoding:
        bench = Bench(options, settings, side, drawing, encoding)
        parts = list(measure_all(bench, options.output))
    (options.output / "curves.md").write_text("\n".join([head, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
