"""Kill a training run again and again, at random instants, and see whether it ever notices.

python bench/soak_resume.py --kills 200            kill -9 at random instants, also within a save
python bench/soak_resume.py --kills 50 --workers 2 --optimizer muon
python bench/soak_resume.py --kills 50 --async-save     checkpoints are written in a thread

The run is a small latent diffusion model with its text encoder. What every process leaves is compared with
what an uninterrupted run left at the same step: weights, averages and optimizer by their SHA-256, and, when a
run has come to its end, every line of metrics.jsonl. Needs a system with fork.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.checkpoint import save_model
from ldm.unet import UNetConfig
from train.checkpoint import load_checkpoint
from train.data import DataConfig
from train.diffusion import DiffusionRecipe, LatentDiffusion
from train.encoding import compute_latents
from train.latents import Latents
from train.loop import fit
from train.optim import OptimConfig
from train.text import TextConfig

STEPS, SAVE_EVERY = 60, 5
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    mid_block_add_attention=False,
)
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=2,
    cross_attention_dim=24,
    dropout=0.1,  # draws from the global generator
)
DATA = DataConfig(size=16, length=50)  # a run is nearly five epochs


def recipe(output: Path, optimizer: str, workers: int, **options: Any) -> DiffusionRecipe:
    return DiffusionRecipe(
        output=str(output),
        autoencoder="",
        steps=STEPS,
        batch_size=4,
        save_every=SAVE_EVERY,
        sample_every=0,
        workers=workers,
        data=DATA,
        unet=UNET,
        text_encoder=TextConfig(width=24, layers=1, heads=2, vocab_size=600, max_length=16),
        optim=OptimConfig(lr=3e-3, warmup_steps=4, optimizer=optimizer),  # type: ignore[arg-type]
        **options,
    )


def start(run: DiffusionRecipe, autoencoder: Path, latents: Latents) -> int:
    """The process id of a child that trains, from the newest checkpoint if there is one."""
    child = os.fork()
    if child:
        return child
    code = 1
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (progress)
    try:
        fit(LatentDiffusion(run, autoencoder, latents), run)
        code = 0
    except BaseException as error:  # noqa: BLE001 (the parent prints what it finds)
        Path(run.output, "error.txt").write_text(repr(error))
    finally:
        os._exit(code)


def hashes(folder: Path) -> dict[int, dict[str, str]]:
    """By step: the SHA-256 of every tensor file of the checkpoints that are whole."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step-????????")):
        try:
            step = load_checkpoint(path).step
            manifest = json.loads((path / "manifest.json").read_text())
        except (ValueError, OSError):  # the kill came while rotation removed it
            continue
        found[step] = {name: one["sha256"] for name, one in manifest.items() if name.endswith(".safetensors")}
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


def finished(child: int, folder: Path) -> bool:
    """Whether a child has ended. Raises RuntimeError if it failed."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the training failed: {(folder / 'error.txt').read_text()}")
    return bool(done)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--workers", type=int, default=0, help="threads that read ahead")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--async-save", action="store_true", help="write checkpoints beside the training")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return soak(Path(folder), args)


def soak(folder: Path, args: argparse.Namespace) -> int:
    rng, counts = random.Random(args.seed), Counter[str]()
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), folder / "autoencoder")
    latents = compute_latents(DATA, folder / "autoencoder", folder / "latents")
    whole = recipe(folder / "whole", args.optimizer, args.workers, keep_last=STEPS)
    begin = time.monotonic()
    child = start(whole, folder / "autoencoder", latents)
    while not finished(child, folder / "whole"):
        time.sleep(0.01)
    length = time.monotonic() - begin
    wanted, lines = hashes(folder / "whole"), metrics(folder / "whole")
    print(f"the uninterrupted run: {STEPS} steps, {len(wanted)} checkpoints, {length:.1f} s", flush=True)
    run = recipe(folder / "run", args.optimizer, args.workers, async_save=args.async_save)
    newest = 0
    while counts["kills"] < args.kills:
        before = set((folder / "run/checkpoints").glob("*.tmp-*"))
        child, ended = start(run, folder / "autoencoder", latents), False
        deadline = time.monotonic() + rng.uniform(0, 0.6 * length)
        while time.monotonic() < deadline and not ended:
            ended = finished(child, folder / "run")
            time.sleep(0.0005)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            counts["kills"] += 1
            counts["in a save"] += bool(set((folder / "run/checkpoints").glob("*.tmp-*")) - before)
        left = hashes(folder / "run")
        good = all(wanted[step] == sums for step, sums in left.items())
        good = good and max(left, default=0) >= newest  # nothing that was saved is lost
        counts["of another run"] += not good
        if max(left, default=0) > newest:
            counts["went on"] += 1
            counts["identical"] += good
        newest = max(left, default=0)
        if ended:
            assert newest == STEPS, f"the run ended after step {newest}"
            counts["ends"] += 1
            counts["identical ends"] += metrics(folder / "run") == lines
            shutil.rmtree(folder / "run")
            newest = 0
    print(
        f"{counts['kills']} kills, {counts['in a save']} of them within a save. {counts['identical']} of "
        f"{counts['went on']} processes that saved anything saved what the uninterrupted run had at that "
        f"step; {counts['identical ends']} of {counts['ends']} runs that ended had the same metrics"
    )
    same = counts["identical"] == counts["went on"] and counts["identical ends"] == counts["ends"]
    return 0 if same and not counts["of another run"] else 1


if __name__ == "__main__":
    sys.exit(main())
