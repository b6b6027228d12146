"""Pictures a second in computing latents: train/encode_latents.py's own path, whole and by part.

  python bench/encode_latents.py                   small pictures and a small autoencoder, on two cores
  python bench/encode_latents.py --pictures 16 --pixels 64 --rounds 1 --threads 1

The pictures are drawn scenes of several shapes, half of them JPEG, half PNG, in a folder with captions. Our
encoder is compared with diffusers' AutoencoderKL.encode of the same weights and pictures, in float32 and in
the memory layout in which that is faster. All parts take turns, and medians over the rounds are shown.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.files.checkpoint import save_model
from ldm.files.config import replacing
from train.batches.buckets import Size, frame
from train.batches.encoding import BATCH, Read, compute_latents, load_encoder, read_batches
from train.batches.latents import Shard
from train.data.sources import DataConfig, open_source, sort_source

SHAPES = ((4, 3), (3, 4), (1, 1), (16, 9))  # of the pictures, in turn
LARGER = 1.5  # sides of a picture in those of its bucket, about: framing has something to do
OURS, THEIRS = "encoder, ours", "encoder, diffusers"
PARTS = {
    "all": (
        "compute_latents into an empty folder: what the parts do, with reading one batch ahead of the "
        "encoder, and opening the folder, loading the weights and reading the latents back"
    ),
    "reading and framing": "decode JPEG or PNG, upright RGB, resize and crop to the bucket, to a tensor",
    OURS: "posterior mean and std of each batch in float16; channels_last",
    THEIRS: "latent_dist.mean and .std of the same batches in float16; {layout}",
    "writing": "mean and std of all pictures into one shard by safetensors, synced to the disk, renamed",
}


def draw(folder: Path, count: int, pixels: int) -> None:
    """`count` pictures with captions into `folder`: framed scenes, JPEG and PNG in turn."""
    folder.mkdir()
    largest = int(LARGER * pixels * max(max(shape) / min(shape) for shape in SHAPES) ** 0.5)
    scenes = open_source(DataConfig(size=-(-largest // 8) * 8, length=count))
    for index in range(count):
        image, captions = scenes[index]
        width, height = SHAPES[index % len(SHAPES)]
        side = LARGER * pixels / (width * height) ** 0.5
        suffix, options = (".jpg", {"quality": 90}) if index // len(SHAPES) % 2 else (".png", {})
        path = folder / f"{index:05d}{suffix}"
        frame(image, Size(int(side * width), int(side * height))).save(path, **options)
        path.with_suffix(".txt").write_text(captions["text"][0])


class Encoding:
    """The parts of encoding a folder of pictures, each a call that does it once for all of them."""

    def __init__(self, folder: Path, data: DataConfig) -> None:
        from diffusers import AutoencoderKL as StockVAE

        self.folder, self.data = folder, data
        self.vae = load_encoder(folder / "vae", torch.device("cpu"))
        self.stock = StockVAE.from_pretrained(folder / "vae").requires_grad_(False)
        self.source = open_source(data)
        buckets = sort_source(self.source, data)
        every = zip(buckets.sizes, buckets.members, strict=True)
        self.shards = [
            Shard(number, size, members) for number, (size, members) in enumerate(every) if members
        ]
        self.batches = [torch.stack(batch.images)[:, 0] for batch in self.read()]  # (B, 3, H, W) each
        self.latents = self.encode()

    def read(self) -> Iterator[Read]:
        for shard in self.shards:
            yield from read_batches(self.source, self.data, shard, BATCH)

    def all(self) -> None:
        shutil.rmtree(self.folder / "latents", ignore_errors=True)
        compute_latents(self.data, self.folder / "vae", self.folder / "latents")

    def reading(self) -> None:
        for _ in self.read():
            pass

    @torch.no_grad()
    def encode(self) -> list[tuple[Tensor, Tensor]]:
        posteriors = (self.vae.encode(batch) for batch in self.batches)
        return [(one.mean.half(), one.std.half()) for one in posteriors]

    @torch.no_grad()
    def encode_by_stock(self) -> list[tuple[Tensor, Tensor]]:
        posteriors = (self.stock.encode(batch).latent_dist for batch in self.batches)
        return [(one.mean.half(), one.std.half()) for one in posteriors]

    def writing(self) -> None:
        tensors = {}
        for number, (mean, std) in enumerate(self.latents):
            tensors |= {f"mean-{number}": mean.contiguous(), f"std-{number}": std.contiguous()}
        with replacing(self.folder / "shard.safetensors") as path:
            save_file(tensors, path)

    @torch.no_grad()
    def agreement(self) -> float:
        """The largest difference of the means of a batch by both encoders, in float32."""
        ours, theirs = self.vae.encode(self.batches[0]), self.stock.encode(self.batches[0]).latent_dist
        return (ours.mean - theirs.mean).abs().max().item()

    def faster_layout(self) -> str:
        """Leaves diffusers' encoder in the memory layout in which it is faster, by two turns after one."""
        layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
        spent = {}
        for name, layout in layouts.items():
            self.stock.to(memory_format=layout)
            spent[name] = min([seconds(self.encode_by_stock) for _ in range(3)][1:])
        best = min(spent, key=spent.__getitem__)
        self.stock.to(memory_format=layouts[best])
        words = ", ".join(f"{name} {value:.3f} s" for name, value in spent.items())
        return f"{best}, the faster of {words}"


def seconds(part: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    part()
    return time.perf_counter() - begin


def measure(encoding: Encoding, rounds: int) -> dict[str, float]:
    """Median seconds of each part for all pictures; a first round is not counted."""
    parts = (encoding.all, encoding.reading, encoding.encode, encoding.encode_by_stock, encoding.writing)
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(1 + rounds):
        for name, part in zip(PARTS, parts, strict=True):
            times[name].append(seconds(part))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=128, help="in the folder")
    parser.add_argument("--pixels", type=int, default=128, help="data.size, a multiple of 32")
    parser.add_argument("--channels", default="32,64,128,128", help="of the autoencoder's four levels")
    parser.add_argument("--rounds", type=int, default=5, help="in each, every part has its turn")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    widths = tuple(int(width) for width in options.channels.split(","))
    config = AutoencoderKLConfig(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        sample_size=options.pixels,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(AutoencoderKL(config), folder / "vae")
        draw(folder / "pictures", options.pictures, options.pixels)
        data = DataConfig(
            source=str(folder / "pictures"), size=options.pixels, max_aspect=2.0, side_multiple=32
        )
        encoding = Encoding(folder, data)
        print(f"both encoders answer alike to {encoding.agreement():.1e}")
        layout = encoding.faster_layout()
        median = measure(encoding, options.rounds)
    sizes = ", ".join(f"{len(shard.indices)} of {shard.size}" for shard in encoding.shards)
    print(
        f"{options.pictures} pictures, half JPEG, half PNG, buckets of {options.pixels}² pixels ({sizes}), "
        f"autoencoder {options.channels}, {options.threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; medians of {options.rounds}\n"
    )
    print("| | pictures/s | seconds | ours / diffusers |\n|---|---|---|---|")
    for name, spent in median.items():
        ratio = f"{median[THEIRS] / spent:.2f}" if name == OURS else ""
        print(f"| {name} | {options.pictures / spent:.1f} | {spent:.3f} | {ratio} |")
    print()
    for name, words in PARTS.items():
        print(f"- {name}: {words.format(layout=layout)}")


if __name__ == "__main__":
    main()
