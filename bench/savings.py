"""What a guided UNet call costs without and with what is computed once, in a UNet of Stable Diffusion 1.5's
shape.

  python bench/savings.py                      512x512 pixels, random weights; 15 minutes
  python bench/savings.py --pixels 256 --images 4 --rounds 9
  python bench/savings.py --bundled            the bundled model at its own size

All four take turns in every round; medians of their times are shown, and of their ratios to the first in the
same round. Times are the processor's, of one thread, so that other work on the machine counts little. Counted
are the operations of convolutions and matrix products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.model.architecture import UNetConfig
from ldm.model.context import Context
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline

Call = Callable[[], Tensor]


def sd15() -> UNet:
    """Random weights; with zeros, some kernels would be faster."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(cross_attention_dim=768)).eval().requires_grad_(False)
    unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.uniform_(-0.02, 0.02)
    return unet


def calls(unet: UNet, images: int, size: int) -> dict[str, Call]:
    """A call for each way to compute it, all with the same answer."""
    xt = torch.randn(images, unet.config.in_channels, size, size).contiguous(
        memory_format=torch.channels_last
    )
    t, context = torch.full((images,), 500.0), torch.randn(2 * images, 77, unet.config.cross_attention_dim)
    run = Context(context)
    twice, t_twice = torch.cat([xt, xt]), t.repeat(2)
    return {
        "all of it": lambda: unet(twice, t_twice, context),
        "once: what no text has touched": lambda: unet(xt, t, context),
        "once a run: keys and values of the text": lambda: unet(twice, t_twice, run),
        "both": lambda: unet(xt, t, run),
    }


def seconds(call: Call) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def operations(call: Call) -> int:
    """Floating point operations of a call, the second of its run."""
    call()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="in each, every way has its turn")
    parser.add_argument("--pixels", type=int, default=512, help="side of a picture, a multiple of 8")
    parser.add_argument("--images", type=int, default=1, help="in a call, each with two texts")
    parser.add_argument("--bundled", action="store_true", help="the bundled model, at its own size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.bundled:
        pipe = LatentDiffusionPipeline.bundled(dtype=torch.float32)
        unet, pixels = pipe.unet, pipe.default_size[0]
        size = pixels // pipe.vae.downsample_factor
    else:
        unet, pixels, size = sd15().to(memory_format=torch.channels_last), options.pixels, options.pixels // 8
    ways = calls(unet, options.images, size)
    answers = [call() for call in ways.values()]  # they also warm up
    with torch.device("meta"):
        counts = [operations(way) for way in calls(UNet(unet.config), options.images, size).values()]
    off = max((answer - answers[0]).abs().max() / answers[0].abs().max() for answer in answers).item()
    rounds = [[seconds(call) for call in ways.values()] for _ in range(options.rounds)]
    print(
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, {pixels}x{pixels} pixels, "
        f"{options.images} images with two texts each, float32, one thread, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; medians of {options.rounds} "
        f"rounds; answers alike to {off:.0e}\n"
    )
    print("| computed | Gflop a call | of the first | ms | of the first |\n|---|---|---|---|---|")
    for name, count, times in zip(ways, counts, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(mine / first for mine, (first, *_) in zip(times, rounds, strict=True))
        operating = f"{count / 1e9:.1f} | {count / counts[0]:.4f}"
        print(f"| {name} | {operating} | {1e3 * statistics.median(times):.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
