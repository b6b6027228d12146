"""Judge an autoencoder: how near pictures come back, what its latents are like, what the prior decodes to.

  python -m train.evaluate_autoencoder --model runs/shapes-autoencoder/model --data shapes
  python -m train.evaluate_autoencoder --model runs/shapes-prior/model --data my_pictures --prior 16

Prints two small tables and writes a sheet: pictures, below each its reconstruction, below them what samples
of the prior N(0, 1) decode to. A weak KL, as most autoencoders have, leaves these samples mere noise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from PIL import Image
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm.diffusion.noise import start_noise
from ldm.files.checkpoint import load_model
from ldm.recipes.picture import check_output, save_picture
from train.batches.latents import autoencoder_folder
from train.batches.plan import spread
from train.command import command
from train.config import parse
from train.data.pictures import grid, to_images
from train.data.sources import DataConfig
from train.data.squares import Squares
from train.measure.features import perceptual_distance
from train.measure.fidelity import Fidelity, encoded, judge, reconstruct

COLUMNS = 8  # of the sheet


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Which autoencoder is judged by which pictures."""

    model: str  # folder of the autoencoder, or of a pipeline or run that has one
    data: str  # as data.source of a training: shapes, pictograms, a folder, tars, or a `datasets` name
    size: int | None = None  # pixels of the squares; null: the autoencoder's sample_size
    split: str = "train"  # of drawn scenes: train or held_out
    count: int = 256  # pictures, evenly spread over the data
    prior: int = 0  # samples of the prior on the sheet
    seed: int = 0  # of the first of these samples; the next have the next
    vgg: str | None = None  # file of VGG16's weights with torchvision's names: LPIPS too
    lpips_heads: str | None = None  # file of LPIPS's heads for VGG16; null: all channels count alike
    output: str = "reconstructions.png"  # the sheet
    overwrite: bool = False  # the sheet of before

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count}: expected 1 or more pictures")
        if self.prior < 0:
            raise ValueError(f"prior={self.prior}: expected 0 or more samples")
        if self.split not in ("train", "held_out"):
            raise ValueError(f"split={self.split!r}: expected train or held_out")
        if self.lpips_heads and not self.vgg:
            raise ValueError(f"lpips_heads={self.lpips_heads} has no effect without vgg")


def prior_samples(vae: AutoencoderKL, size: int, count: int, seed: int) -> Tensor:
    """What z ~ N(0, 1) decodes to: (count, 3, size, size); picture k depends on seed + k alone."""
    side = size // vae.downsample_factor
    z = start_noise(range(seed, seed + count), (vae.config.latent_channels, side, side))
    return vae.decode(vae.to_latents(z))


def sheet(vae: AutoencoderKL, pictures: Tensor, drawn: Tensor) -> Image.Image:
    """Pictures above their reconstructions, row by row, then the samples drawn from the prior."""
    rows = []
    for first in range(0, len(pictures), COLUMNS):
        row = pictures[first : first + COLUMNS]
        rows += [row, reconstruct(vae, row)]
    rows += [drawn[first : first + COLUMNS] for first in range(0, len(drawn), COLUMNS)]
    images = []
    for row in rows:
        blank = row.new_ones(COLUMNS - len(row), *row.shape[1:])
        images += to_images(torch.cat([row, blank]))
    return grid(images, columns=COLUMNS)


def tables(fidelity: Fidelity, count: int, size: int) -> str:
    """What is printed: the pictures, then the latents by channel."""
    numbers = {
        "pictures": f"{count}",
        "size": f"{size}x{size}",
        "PSNR dB": f"{fidelity.psnr:.2f}",
        "SSIM": f"{fidelity.ssim:.4f}",
        "LPIPS": f"{fidelity.lpips:.4f}",
        "KL nats": f"{fidelity.kl:.1f}",
    }
    shown = {name: value for name, value in numbers.items() if value != "nan"}
    widths = [max(len(name), len(value)) for name, value in shown.items()]
    lines = [
        "  ".join(word.rjust(width) for word, width in zip(words, widths, strict=True))
        for words in (list(shown), list(shown.values()))
    ]
    lines += ["", "channel    mean     std   noise"]
    for channel, row in enumerate(zip(fidelity.mean, fidelity.std, fidelity.noise, strict=True)):
        mean, std, noise = row
        lines.append(f"{channel:>7} {mean:>7.3f} {std:>7.3f} {noise:>7.1%}")
    return "\n".join([*lines, f"scaling_factor {fidelity.scaling_factor:.4f}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write the sheet that the command line asks for."""
    recipe = parse(EvaluateRecipe, sys.argv[1:] if argv is None else argv, None, __doc__ or "")
    output = Path(recipe.output)
    check_output(output, overwrite=recipe.overwrite)
    distance = perceptual_distance(recipe.vgg, recipe.lpips_heads) if recipe.vgg else None
    vae = load_model(AutoencoderKL, autoencoder_folder(recipe.model))
    own = vae.config.sample_size
    size = recipe.size or (own if isinstance(own, int) else min(own))
    if size % vae.downsample_factor:
        raise ValueError(f"size={size} is not a multiple of {vae.downsample_factor}, the downsampling")
    squares = Squares(DataConfig(source=recipe.data, size=size, split=recipe.split))  # type: ignore[arg-type]
    chosen = spread(len(squares), recipe.count)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    fidelity = judge(vae, encoded(vae.to(device), squares.batches(chosen)), distance)
    print(tables(fidelity, len(chosen), size))
    with torch.no_grad():
        shown = squares.stack(chosen[: 2 * COLUMNS])
        drawn = prior_samples(vae.cpu(), size, recipe.prior, recipe.seed) if recipe.prior else shown[:0]
        page = sheet(vae, shown, drawn)
    save_picture(page, output, overwrite=recipe.overwrite)
    print(output)
    return 0


if __name__ == "__main__":
    command(main)
