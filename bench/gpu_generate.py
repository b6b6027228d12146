"""Generation on a GPU at the size of Stable Diffusion 1.5: our pipeline's ways, and diffusers'.

  python bench/gpu_generate.py                          512x512, batches of 1, 4 and 16, all rows
  python bench/gpu_generate.py --batches 1 --steps 0    UNet calls only
  python bench/gpu_generate.py --device cpu --tiny      a check that needs no GPU

Random weights, the same for all, with guidance, by DDIM. Each row is a process of its own and they take
turns. Memory is the most that torch reserves on the device in a call, weights included. The relative error is
to our pipeline in float32 without TF32. A share of 1 is the rate of a large product of two bf16 matrices,
measured in the same run. bench/attention.py times each kernel of attention at each shape of the UNet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.measure import hardware, matmul_rate, table
from bench.models import SD1, narrower, unet_flop, write_pipeline
from bench.rows import Make, Result, Row, Settings, chosen, race, start
from bench.sides import Ours, OursCompiled, OursGraphed, OursOptimized, Theirs, TheirsFastest
from ldm.model.unet import UNetConfig

HALF = torch.bfloat16


class OursExact(Ours):
    """In float32 that is float32: no TF32 in products and convolutions."""

    def __init__(self, settings: Settings) -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        super().__init__(settings, dtype=torch.float32)


# The first is what the others are compared with.
ROWS: dict[str, Make] = {
    "ours, fp32": OursExact,
    "ours, as it comes": Ours,
    "ours, xformers": partial(Ours, backend="xformers"),
    "ours, sdpa": partial(Ours, backend="sdpa"),
    "ours, optimized": OursOptimized,
    "ours, optimized, int8": partial(OursOptimized, quantize="int8"),
    "ours, optimized, fp8": partial(OursOptimized, quantize="fp8"),
    "ours, compiled": partial(OursCompiled, mode="default"),
    "ours, compiled, reduce-overhead": partial(OursCompiled, mode="reduce-overhead"),
    "ours, compiled, max-autotune": partial(OursCompiled, mode="max-autotune"),
    "ours, CUDA graph of a step": OursGraphed,
    "ours, CUDA graph of a compiled step": partial(OursGraphed, mode="max-autotune-no-cudagraphs"),
    "diffusers, bf16": partial(Theirs, dtype=HALF),
    "diffusers, bf16, fastest recipe": TheirsFastest,
}


def show_unet(results: Sequence[Result], batch: int, flop: int, rate: float) -> None:
    lines = [
        [one.name, one.why, "", "", "", ""]
        if one.why
        else [
            one.name,
            f"{1e3 * one.seconds:.2f}",
            f"{1 / one.seconds:.2f}",
            f"{flop / one.seconds / rate:.2f}",
            f"{one.memory / 2**30:.2f}",
            f"{one.error:.1e}",
        ]
        for one in results
    ]
    head = [f"UNet call, batch {batch}", "ms", "calls/s", "share of matmul", "GiB", "relative error"]
    print(table(head, lines) + "\n", flush=True)


def show_pictures(results: Sequence[Result], batch: int, steps: int) -> None:
    lines = [
        [one.name, one.why, "", "", ""]
        if one.why
        else [
            one.name,
            f"{one.seconds:.2f}",
            f"{batch / one.seconds:.2f}",
            f"{one.memory / 2**30:.2f}",
            f"{one.error:.1e}",
        ]
        for one in results
    ]
    head = [f"pictures, {steps} steps, batch {batch}", "seconds", "pictures/s", "GiB", "relative error"]
    print(table(head, lines) + "\n", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cpu checks the code; rows that need CUDA say so")
    parser.add_argument("--tiny", action="store_true", help="a small UNet, 64x64 pixels, one batch, 2 steps")
    parser.add_argument("--size", type=int, default=512, help="side of a picture, a multiple of 64")
    parser.add_argument("--steps", type=int, default=20, help="of whole pictures; 0: only UNet calls")
    parser.add_argument("--batches", default="1,4,16", help="pictures at once, with commas between")
    parser.add_argument("--rounds", type=int, default=9, help="in each, every row has its turn")
    parser.add_argument("--rows", default="", help="parts of the names of rows, with semicolons between them")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there: --device cpu --tiny checks the code")
    if options.tiny:
        options.size, options.steps, options.batches, options.rounds = 64, 2, "1", 2
    return options


def race_all(rows: Sequence[Row], config: UNetConfig, options: argparse.Namespace, rate: float) -> None:
    for batch in map(int, options.batches.split(",")):
        flop = unet_flop(config, 2 * batch, options.size)  # two rows a picture, for guidance
        show_unet(race(rows, "unet", batch, options.rounds), batch, flop, rate)
        if options.steps:
            show_pictures(race(rows, "picture", batch, options.rounds), batch, options.steps)


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    makes = chosen(ROWS, options.rows)
    size = narrower(SD1, (32, 64)) if options.tiny else SD1
    rate = matmul_rate(device, HALF, 256 if options.tiny else 8192)
    print(
        f"{options.size}x{options.size} pixels with guidance; {hardware(device)}; medians of "
        f"{options.rounds} rounds; a product of bf16 matrices: {rate / 1e12:.3g} TFLOP/s\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_pipeline(size, Path(folder))
        threads, warm_up = torch.get_num_threads(), 3 if device.type == "cuda" else 1
        settings = Settings(Path(folder), options.device, options.size, options.steps, threads, warm_up)
        race_all(start(makes, settings, stack), size.unet, options, rate)


if __name__ == "__main__":
    main()
