"""Attention kernels at every shape of a guided picture of Stable Diffusion 1.5, and which of them is chosen.

  python bench/attention.py                     float32 on the CPU, bf16 on a GPU; 512x512, one picture
  python bench/attention.py --batches 1,4,16 --size 768 --device cuda
  python bench/attention.py --size 64 --rounds 1     a check of seconds

All kernels of a shape take turns; medians of the rounds are shown. The relative error is to the sum over keys
in float64. Chosen is what a pipeline takes after `pipe.optimize()` on a CPU, and by itself on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoencoder.layers import scaled_dot_product
from bench.measure import hardware, relative_error, seconds, table
from bench.models import SD1
from bench.rows import reason
from ldm import native
from ldm.drawing.devices import default_dtype
from ldm.model.attention import WHY_NOT, CrossAttention, SelfAttention, memory_efficient
from ldm.model.unet import UNet, UNetConfig

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Shape(NamedTuple):
    """Of the queries and keys of one attention."""

    batch: int
    heads: int
    queries: int
    keys: int
    channels: int  # of a head

    def __str__(self) -> str:
        return " x ".join(map(str, self))


def only(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product(q, k, v, heads)


def ours(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    if not native.takes(q, k, v):
        raise ValueError("our kernel does not take this device and type")
    native.check()
    return native.attention(q, k, v, heads)


ON_CPU: dict[str, Kernel] = {
    "ours": ours,
    "SDPA flash": partial(only, SDPBackend.FLASH_ATTENTION),
    "SDPA products": partial(only, SDPBackend.MATH),
}
ON_GPU: dict[str, Kernel] = {
    "xformers": memory_efficient,
    "SDPA's choice": scaled_dot_product,
    "SDPA flash": partial(only, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(only, SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": partial(only, SDPBackend.EFFICIENT_ATTENTION),
}


def shapes(config: UNetConfig, batch: int, pixels: int) -> Counter[Shape]:
    """The shapes of attention in one UNet call for `batch` pictures with guidance, and how often each is.

    The autoencoder's one head of 512 channels, which decodes a picture at a time, is the last.
    """
    found: Counter[Shape] = Counter()

    def note(module: CrossAttention, inputs: tuple[Tensor, Tensor]) -> None:
        x, context = inputs
        keys = (x if isinstance(module, SelfAttention) else context).shape[1]
        channels = module.to_q.out_features // module.heads
        found[Shape(len(x), module.heads, x.shape[1], keys, channels)] += 1

    side = pixels // 8
    with torch.device("meta"), torch.no_grad():  # shapes without numbers
        unet = UNet(config)
        for module in unet.modules():
            if isinstance(module, CrossAttention):
                module.register_forward_pre_hook(note)
        xt = torch.empty(2 * batch, config.in_channels, side, side)
        unet(xt, torch.empty(2 * batch), torch.empty(2 * batch, 77, config.cross_attention_dim))
    found[Shape(1, 1, side**2, side**2, 512)] = 1
    return found


def race(
    kernels: dict[str, Kernel], shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """By kernel: seconds of a call, of several in a row that hide the launch; error; why it cannot run."""
    random = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        numbers = torch.randn(shape.batch, rows, shape.heads * shape.channels, generator=random)
        return numbers.to(device, dtype)

    q, k, v = draw(shape.queries), draw(shape.keys), draw(shape.keys)
    true = scaled_dot_product(*(x[:1, :, : shape.channels].double() for x in (q, k, v)), 1).cpu().numpy()
    calls = 20 if device.type == "cuda" else 1
    able, errors, why = {}, {}, {}
    for name, kernel in kernels.items():
        try:
            answer = kernel(q, k, v, shape.heads)[:1, :, : shape.channels]
            able[name], errors[name] = kernel, relative_error(answer.float().cpu().numpy(), true)
        except (ValueError, RuntimeError) as error:
            why[name] = reason(error)
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(rounds):
        for name, kernel in able.items():
            row = partial(repeat, partial(kernel, q, k, v, shape.heads), calls)
            times[name].append(seconds(row, device) / calls)
    return {name: statistics.median(spent) for name, spent in times.items()}, errors, why


def repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def chosen(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that a pipeline takes for this shape."""
    if device.type == "cuda":
        return "SDPA's choice" if WHY_NOT["xformers"](device) else "xformers"
    x = torch.empty(1, 1, shape.heads * shape.channels, device=device, dtype=dtype)
    return "ours" if native.attends(x, x, x, shape.heads) else "SDPA flash"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=512, help="side of a picture, a multiple of 64")
    parser.add_argument("--batches", default="1", help="pictures at once, with commas between")
    parser.add_argument("--rounds", type=int, default=9, help="in each, every kernel has its turn")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = default_dtype(device)
    kernels = ON_GPU if device.type == "cuda" else ON_CPU
    print(f"{hardware(device)}, {dtype}; medians of {options.rounds} rounds, milliseconds (relative error)\n")
    whys: dict[str, str] = {}
    for batch in map(int, options.batches.split(",")):
        lines = []
        for shape, count in shapes(SD1.unet, batch, options.size).items():
            times, errors, why = race(kernels, shape, device, dtype, options.rounds)
            whys |= why
            cells = [f"{1e3 * times[n]:.3g} ({errors[n]:.0e})" if n in times else "-" for n in kernels]
            fastest = min(times, key=times.__getitem__)
            lines.append([str(shape), str(count), *cells, fastest, chosen(shape, device, dtype)])
        head = [f"batch {batch}: rows x heads x queries x keys x channels", "times a call"]
        print(table([*head, *kernels, "fastest", "chosen"], lines) + "\n", flush=True)
    print(*(f"- {name}: {words}" for name, words in whys.items()), sep="\n")


if __name__ == "__main__":
    main()
