"""Generation on a GPU at the size of Stable Diffusion 1.5: our pipeline's ways, diffusers', and attention.

  python bench/gpu_generate.py                          512x512, batches of 1, 4 and 16, all rows
  python bench/gpu_generate.py --batches 1 --steps 0    UNet calls only
  python bench/gpu_generate.py --device cpu --tiny      a check that needs no GPU

Random weights, the same for all, with guidance, by DDIM. Each row is a process of its own and they take
turns. Memory is the most that torch reserves on the device in a call, weights included. The relative error is
to our pipeline in float32 without TF32. A share of 1 is the rate of a large product of two bf16 matrices,
measured in the same run. The last table times each kernel of attention at each shape of the UNet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoencoder.layers import scaled_dot_product
from bench.measure import hardware, matmul_rate, seconds, table
from bench.models import SD1, narrower, unet_flop, write_pipeline
from bench.rows import Make, Result, Row, Settings, chosen, race, reason, start
from bench.sides import Ours, OursCompiled, OursGraphed, OursOptimized, Theirs, TheirsFastest
from ldm.attention import CrossAttention, SelfAttention, memory_efficient
from ldm.unet import UNet, UNetConfig

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
    "ours, compiled": partial(OursCompiled, mode="default"),
    "ours, compiled, reduce-overhead": partial(OursCompiled, mode="reduce-overhead"),
    "ours, compiled, max-autotune": partial(OursCompiled, mode="max-autotune"),
    "ours, CUDA graph of a step": OursGraphed,
    "ours, CUDA graph of a compiled step": partial(OursGraphed, mode="max-autotune-no-cudagraphs"),
    "diffusers, bf16": partial(Theirs, dtype=HALF),
    "diffusers, bf16, fastest recipe": TheirsFastest,
}


# attention, shape by shape


class Shape(NamedTuple):
    """Of the queries and keys of one attention."""

    batch: int
    heads: int
    queries: int
    keys: int
    channels: int  # of a head


def attention_shapes(config: UNetConfig, batch: int, pixels: int) -> Counter[Shape]:
    """The shapes of attention in one UNet call for `batch` pictures with guidance, and how often each is."""
    found: Counter[Shape] = Counter()

    def note(module: CrossAttention, inputs: tuple[Tensor, Tensor]) -> None:
        x, context = inputs
        keys = (x if isinstance(module, SelfAttention) else context).shape[1]
        channels = module.to_q.out_features // module.heads
        found[Shape(len(x), module.heads, x.shape[1], keys, channels)] += 1

    with torch.device("meta"), torch.no_grad():  # shapes without numbers
        unet = UNet(config)
        for module in unet.modules():
            if isinstance(module, CrossAttention):
                module.register_forward_pre_hook(note)
        xt = torch.empty(2 * batch, config.in_channels, pixels // 8, pixels // 8)
        unet(xt, torch.empty(2 * batch), torch.empty(2 * batch, 77, config.cross_attention_dim))
    return found


def only(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product(q, k, v, heads)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "xformers": memory_efficient,
    "SDPA's choice": scaled_dot_product,
    "SDPA flash": partial(only, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(only, SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": partial(only, SDPBackend.EFFICIENT_ATTENTION),
}


def kernel_time(kernel: Callable[..., Tensor], shape: Shape, device: torch.device, rounds: int) -> float:
    """Seconds of one call, of several in a row that hide the launch. Raises what the kernel raises."""
    width = shape.heads * shape.channels
    q = torch.randn(shape.batch, shape.queries, width, device=device, dtype=HALF)
    k, v = (torch.randn(shape.batch, shape.keys, width, device=device, dtype=HALF) for _ in range(2))
    calls = 20 if device.type == "cuda" else 1

    def call() -> None:
        for _ in range(calls):
            kernel(q, k, v, shape.heads)

    call()
    return statistics.median(seconds(call, device) for _ in range(rounds)) / calls


@torch.no_grad()
def show_attention(config: UNetConfig, batch: int, pixels: int, device: torch.device, rounds: int) -> None:
    """Prints the time of every kernel at every shape, the fastest of each, and why some cannot run."""
    lines, why = [], {}
    for shape, count in attention_shapes(config, batch, pixels).items():
        times: dict[str, float] = {}
        for name, kernel in KERNELS.items():
            try:
                times[name] = kernel_time(kernel, shape, device, rounds)
            except (ValueError, RuntimeError) as error:
                why[name] = reason(error)
        cells = [f"{1e6 * times[name]:.0f}" if name in times else "-" for name in KERNELS]
        size = f"{shape.batch} x {shape.heads} x {shape.queries} x {shape.keys} x {shape.channels}"
        lines.append([size, str(count), *cells, min(times, key=times.__getitem__)])
    print(table(["rows x heads x queries x keys x channels", "times", *KERNELS, "fastest"], lines))
    print(f"\nMicroseconds of a call in {HALF}.", *(f"\n- {name}: {words}" for name, words in why.items()))


# the tables


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
    for batch in map(int, options.batches.split(",")):
        show_attention(size.unet, batch, options.size, device, options.rounds)


if __name__ == "__main__":
    main()
