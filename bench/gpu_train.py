"""Training on a GPU at the size of Stable Diffusion 2: our trainer's step, and diffusers' script.

  python bench/gpu_train.py                          256x256 and 512x512 pixels, all rows
  python bench/gpu_train.py --sizes 256 --batch 32 --rows "ours"
  python bench/gpu_train.py --device cpu --tiny      a check that needs no GPU

Both sides train one UNet from the same weights, with the same batch, in bf16, with a frozen text encoder,
gradients clipped at 1, fused AdamW and an average of the weights. Each row is a process of its own, one after
the other, since several states of training may not fit one GPU. The utilisation is the operations of the
UNet's forward and backward in a second, against the rate of a large product of two bf16 matrices, measured in
the same run. Memory is the most that torch reserves on the device in a step. The last table says where the
time of a step goes, by kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from torch import Tensor

from bench.kernels import GROUPS, IDLE, OTHER, Share
from bench.measure import hardware, matmul_rate, table
from bench.models import SD2, Size, narrower, training_flop, write_pipeline
from bench.rows import Make, Row, Settings, chosen
from bench.training import PICTURES, Peer, faster_layout, our_recipe, our_step, read_pictures
from train.tasks.diffusion import LatentDiffusion

NOTHING = torch.zeros(1)  # a step has no answer to compare


class OurTraining:
    """Our trainer's step: draws by counters from a cache in memory, text encoder, UNet, loss, AdamW, EMA."""

    def __init__(self, settings: Settings, *, size: Size, batch: int, compiled: bool) -> None:
        accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision="bf16")
        latents = read_pictures(settings.folder, settings.pixels, accelerator.device).latents()
        recipe = our_recipe(settings.folder, size, batch, precision="bf16", compiled=compiled)
        task = LatentDiffusion(recipe, settings.folder / "vae", latents)
        self.step = our_step(recipe, task, accelerator)

    def call(self, what: str, batch: int) -> Tensor:
        self.step()
        return NOTHING


class TheirTraining:
    """The step of examples/text_to_image/train_text_to_image.py, in the faster memory layout."""

    def __init__(
        self, settings: Settings, *, size: Size, batch: int, cached: bool, compiled: bool = False
    ) -> None:
        backend = "inductor" if compiled else "no"
        accelerator = Accelerator(
            cpu=settings.device == "cpu", mixed_precision="bf16", dynamo_backend=backend
        )
        pictures = read_pictures(settings.folder, settings.pixels, accelerator.device)
        self.peer = Peer(settings.folder, pictures, batch, accelerator)
        self.latents_of = self.peer.cached if cached else self.peer.encoded
        if compiled:
            self.peer.lay_out(torch.channels_last)
        else:
            faster_layout(self.peer)

    def call(self, what: str, batch: int) -> Tensor:
        self.peer.step(self.latents_of)
        return NOTHING


def rows(size: Size, batch: int) -> dict[str, Make]:
    ours, theirs = (
        partial(OurTraining, size=size, batch=batch),
        partial(TheirTraining, size=size, batch=batch),
    )
    return {
        "ours, latents cached": partial(ours, compiled=False),
        "ours, latents cached, compiled": partial(ours, compiled=True),
        "diffusers, latents cached": partial(theirs, cached=True),
        "diffusers, latents cached, compiled": partial(theirs, cached=True, compiled=True),
        "diffusers, encoding each batch": partial(theirs, cached=False),
    }


class Trained(NamedTuple):
    """Of one row."""

    name: str
    why: str  # there are no figures
    seconds: float = 0.0  # median of a step
    memory: int = 0  # bytes
    share: Share | None = None  # of its time


def train(name: str, make: Make, settings: Settings, steps: int) -> Trained:
    """Builds one row, measures it and ends it."""
    with Row(name, make, settings) as row:
        row.ask("warm_up", "step", 0)
        times = [row.ask("seconds", "step", 0) for _ in range(steps)]
        memory, share = row.ask("memory", "step", 0), row.ask("profile", "step", 0)
    return Trained(name, row.why) if row.why else Trained(name, "", statistics.median(times), memory, share)


def show(trained: list[Trained], pixels: int, batch: int, flop: int, rate: float) -> None:
    lines = [
        [one.name, one.why, "", "", ""]
        if one.why
        else [
            one.name,
            f"{batch / one.seconds:.1f}",
            f"{one.seconds:.3f}",
            f"{flop / one.seconds / rate:.2f}",
            f"{one.memory / 2**30:.2f}",
        ]
        for one in trained
    ]
    head = [f"{pixels}x{pixels}, batch {batch}", "images/s", "seconds a step", "utilisation", "GiB"]
    print(table(head, lines) + "\n", flush=True)


def show_shares(trained: list[Trained]) -> None:
    """Prints where the time goes, and what the largest kernels are called that are of no group."""
    seen = [(one.name, one.share) for one in trained if one.share]
    lines = [
        [group, *(f"{100 * share.groups[group]:.0f}" for _, share in seen)]
        for group in (*GROUPS, OTHER, IDLE)
    ]
    print(table(["% of a step", *(name for name, _ in seen)], lines) + "\n")
    for name, share in seen:
        print(f"- {OTHER} in {name}: {', '.join(share.others)}"[:300])
    print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cpu checks the code")
    parser.add_argument("--tiny", action="store_true", help="a small UNet, 64x64 pixels, batch 2, 2 steps")
    parser.add_argument("--sizes", default="256,512", help="sides of the pictures, multiples of 64")
    parser.add_argument("--batch", type=int, default=16, help=f"pictures a step, {PICTURES} at most")
    parser.add_argument("--steps", type=int, default=20, help="of each row that are timed")
    parser.add_argument("--rows", default="", help="parts of the names of rows, with semicolons between them")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there: --device cpu --tiny checks the code")
    if not 1 <= options.batch <= PICTURES:
        parser.error(f"--batch {options.batch}: expected 1 to {PICTURES}, the pictures in memory")
    if options.tiny:
        options.sizes, options.batch, options.steps = "64", 2, 2
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    size = narrower(SD2, (32, 64)) if options.tiny else SD2
    makes = chosen(rows(size, options.batch), options.rows)
    rate = matmul_rate(device, torch.bfloat16, 256 if options.tiny else 8192)
    print(
        f"{hardware(device)}; medians of {options.steps} steps; a product of bf16 matrices: "
        f"{rate / 1e12:.3g} TFLOP/s\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(size, Path(folder))
        for pixels in map(int, options.sizes.split(",")):
            threads, warm_up = torch.get_num_threads(), 1 if options.tiny else 3
            settings = Settings(Path(folder), options.device, pixels, 0, threads, warm_up)
            trained = [train(name, make, settings, options.steps) for name, make in makes.items()]
            flop = training_flop(size.unet, options.batch, pixels)
            show(trained, pixels, options.batch, flop, rate)
            show_shares(trained)


if __name__ == "__main__":
    main()
