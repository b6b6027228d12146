"""Memory and time of decoding against resolution, whole and in strips, and how far each is off.

  python bench/decoding.py                                    Stable Diffusion's autoencoder, random weights
  python bench/decoding.py --sides 2048 --channels 32,64,128,128          a quarter as wide, in a few minutes
  python bench/decoding.py --sides 512 --exact                errors against a decode in float64
  python bench/decoding.py --tiny                             a check of seconds

Each figure is that of a process of its own. Memory is what decoding takes beyond what was held before it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from bench.measure import forget_peak, hardware, peak_bytes, seconds, table
from ldm.drawing.optimize import use_kernels
from ldm.native.memory import keep_pages


class Figures(NamedTuple):
    """Of one decode."""

    bytes: int
    seconds: float
    image: Tensor


WAYS = ("whole", "in strips", "float64")


def decode(options: argparse.Namespace, side: int, way: str) -> Figures:
    """In this process, which has decoded nothing before. way: one of WAYS."""
    device, channels = torch.device(options.device), options.channels
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = AutoencoderKLConfig(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        norm_num_groups=min(32, channels[0] // 4),
    )
    vae = AutoencoderKL(config).eval().to(device)
    latents = torch.randn(1, 4, *(side // vae.downsample_factor,) * 2, device=device)
    if way == "float64":
        vae, latents = vae.double(), latents.double()
    else:
        vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.kernels and way != "float64":
        keep_pages()
        use_kernels(vae)
    vae.largest_whole = 0 if way == "in strips" else float("inf")
    forget_peak(device)
    before, answers = peak_bytes(device), []
    with torch.no_grad():
        spent = seconds(lambda: answers.append(vae.decode(latents)), device)
    return Figures(peak_bytes(device) - before, spent, answers[0].cpu())


def apart(options: argparse.Namespace, side: int, way: str) -> Figures:
    """In a process of its own."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        spent, seconds, image = pool.apply(numbers_of, (options, side, way))
    return Figures(spent, seconds, torch.from_numpy(image))


def numbers_of(options: argparse.Namespace, side: int, way: str) -> tuple[int, float, np.ndarray]:
    """The figures as they pass between processes."""
    figures = decode(options, side, way)
    return figures.bytes, figures.seconds, figures.image.numpy()


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=numbers, default="512,1024,2048", help="of pictures, in pixels")
    parser.add_argument("--channels", type=numbers, default="128,256,512,512", help="of each level")
    parser.add_argument("--kernels", action="store_true", help="by our kernels in C++, as pipe.optimize()")
    parser.add_argument("--exact", action="store_true", help="also in float64, and errors against that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--tiny", action="store_true", help="few and small points, to check the code")
    options = parser.parse_args()
    if options.tiny:
        options.sides, options.channels = (64,), (32, 32)
    print(f"float32, {options.channels} channels, on {hardware(torch.device(options.device))}", flush=True)
    rows = []
    for side in options.sides:
        found = {}
        for way in WAYS if options.exact else WAYS[:2]:
            found[way] = apart(options, side, way)
            print(f"{side} {way}: {found[way].bytes / 2**20:,.0f} MiB", flush=True)
        true = found["float64" if options.exact else "whole"].image
        for way, figures in found.items():
            error = (figures.image - true).abs().max() / true.abs().max()
            rows.append(
                [str(side), way, f"{figures.bytes / 2**20:,.0f}", f"{figures.seconds:.1f}", f"{error:.1g}"]
            )
    against = "float64" if options.exact else "whole"
    print(table(["side", "decoded", "peak memory, MiB", "seconds", f"largest error against {against}"], rows))


if __name__ == "__main__":
    main()
