"""Seconds of a training step of one global batch on the ranks that torchrun starts, each of one thread.

python -m torch.distributed.run --standalone --nproc_per_node 2 bench/ranks.py PIPELINE_FOLDER --batch 16

Rank 0 prints one line of JSON. bench/curves.py asks; the UNet of the folder learns from made-up latents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator

from autoencoder.vae import AutoencoderKL
from bench.measure import seconds
from bench.training import our_step
from ldm.files.checkpoint import load_model
from ldm.files.config import read_config, read_json
from ldm.model.unet import UNetConfig
from train.batches.cache import made_up
from train.data.sources import DataConfig
from train.fit.loop import cpu_only
from train.tasks.diffusion import DiffusionRecipe, LatentDiffusion
from train.tasks.text import TextConfig

WARM_UP = 2  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a pipeline")
    parser.add_argument("--batch", type=int, default=16, help="samples a step, over all ranks")
    parser.add_argument("--pixels", type=int, default=64, help="side of the pictures")
    parser.add_argument("--steps", type=int, default=8, help="that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder
    accelerator = Accelerator(cpu=cpu_only(), mixed_precision="no")
    latents = made_up(
        DataConfig(size=options.pixels, length=64), load_model(AutoencoderKL, folder / "vae").config
    )
    config = folder / "unet" / "config.json"
    with tempfile.TemporaryDirectory() as run:
        recipe = DiffusionRecipe(
            output=run,
            autoencoder=str(folder / "vae"),
            steps=10**6,
            batch_size=options.batch,
            precision="fp32",
            text_encoder=TextConfig(path=str(folder), train=False),
            unet=read_config(UNetConfig, read_json(config), config),
        )
        task = LatentDiffusion(recipe, folder / "vae", latents)
        step = our_step(recipe, task, accelerator)
        times = [seconds(step, accelerator.device) for _ in range(WARM_UP + options.steps)][WARM_UP:]
    if accelerator.is_main_process:
        print(json.dumps({"seconds": statistics.median(times)}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
