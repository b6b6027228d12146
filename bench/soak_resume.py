"""Stop a training run again and again, at random instants, and see whether it ever notices.

python bench/soak_resume.py --kills 200                      both kinds of signal, one rank and two
python bench/soak_resume.py --kills 50 --ranks 1 --workers 2 --optimizer muon

Half of the processes get kill -9, half SIGTERM; a third of them while they write a checkpoint. The run is a
small latent diffusion model with its text encoder. Whatever a process leaves is compared with what a run that
nobody stopped had at the same step: weights, averages and optimizer by their SHA-256, the lines of
metrics.jsonl, and that no checkpoint is lost. The counts are kept in the output folder: the same command goes
on when it is itself interrupted. Needs a system with fork.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch._dynamo
import torch.distributed.tensor  # as the line above: a training imports it late, here once for all of them

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.files.checkpoint import save_model
from ldm.files.config import read_json, write_json
from ldm.model.unet import UNetConfig
from train.batches.encoding import compute_latents
from train.command import leave_group
from train.data.sources import DataConfig
from train.fit.checkpoint import list_checkpoints, load_checkpoint
from train.fit.loop import fit
from train.fit.optim import OptimConfig
from train.fit.stop import EXIT_RESUMABLE
from train.tasks.diffusion import DiffusionRecipe, LatentDiffusion
from train.tasks.text import TextConfig

STEPS, SAVE_EVERY = 40, 4
PATIENCE = 120.0  # seconds in which a process that was asked to stop has to
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
DATA = DataConfig(size=16, length=34)  # a run is nearly five epochs


class Settings(NamedTuple):
    """What the figures are of."""

    optimizer: str
    workers: int  # threads that read ahead
    async_save: bool  # checkpoints are written beside the training
    seed: int  # of the instants


# the training, in processes of its own


def train(folder: Path, name: str, settings: Settings, save_every: int) -> int:
    """Train in folder/name, from the newest checkpoint if there is one; returns the exit code."""
    run = DiffusionRecipe(
        output=str(folder / name),
        autoencoder="",
        steps=STEPS,
        batch_size=4,
        save_every=save_every,
        keep_last=2 if save_every > 1 else STEPS,
        sample_every=0,
        workers=settings.workers,
        async_save=settings.async_save,
        precision="fp32",
        data=DATA,
        unet=UNET,
        text_encoder=TextConfig(width=24, layers=1, heads=2, vocab_size=600, max_length=16),
        optim=OptimConfig(lr=3e-3, warmup_steps=4, optimizer=settings.optimizer),  # type: ignore[arg-type]
    )
    latents = compute_latents(DATA, folder / "autoencoder", folder / "latents")
    code = fit(LatentDiffusion(run, folder / "autoencoder", latents), run).exit_code
    leave_group()
    return code


def start(folder: Path, name: str, settings: Settings, ranks: int, save_every: int = SAVE_EVERY) -> list[int]:
    """The process ids of the ranks of a training in folder/name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)  # dies with this script
            log = os.open(folder / "children.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                os.environ.update({key: str(value) for key, value in places.items()})
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            code = train(folder, name, settings, save_every)
        except BaseException as error:  # noqa: BLE001 (the parent shows what it finds)
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return children


class Ranks:
    """The processes of one training, watched without waiting for them."""

    def __init__(self, children: list[int]) -> None:
        self.alive = list(children)
        self.codes: list[int] = []  # exit codes of those that ended; a signal's number is negative

    def poll(self) -> bool:
        """Whether all have ended. Where one was killed, the others are: a launcher does that."""
        for child in list(self.alive):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self.alive.remove(child)
                self.codes.append(os.waitstatus_to_exitcode(status))
        if any(code not in (0, EXIT_RESUMABLE) for code in self.codes):
            self.signal(signal.SIGKILL, self.alive)
        return not self.alive

    @property
    def failed(self) -> bool:
        """Whether they ended by themselves and not well."""
        return min(self.codes) >= 0 and bool(set(self.codes) - {0, EXIT_RESUMABLE})

    def signal(self, number: int, children: list[int]) -> None:
        for child in children:
            os.kill(child, number)

    def wait(self) -> None:
        """Raises RuntimeError if they do not end."""
        deadline = time.monotonic() + PATIENCE
        while not self.poll():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL, self.alive)
                raise RuntimeError(f"a process did not end within {PATIENCE:.0f} s of its signal")
            time.sleep(0.001)


# what it leaves


def hashes(folder: Path) -> dict[str, dict[str, str]]:
    """By step: the SHA-256 of every tensor file of the checkpoints that are whole."""
    found = {}
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            step = load_checkpoint(path).step
            manifest = read_json(path / "manifest.json")
        except ValueError:  # the kill came while rotation removed it
            continue
        found[str(step)] = {
            name: one["sha256"] for name, one in manifest.items() if name.endswith(".safetensors")
        }
    return found


def metrics(folder: Path) -> dict[str, Any]:
    """By step: the lines of metrics.jsonl without what depends on the clock; one that a kill cut is none."""
    path, lines = folder / "metrics.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        line.pop("samples_per_second", None)
        lines[str(line["step"])] = line
    return lines


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint."""
    return max(map(int, hashes(folder)), default=0)


def unstopped(folder: Path, settings: Settings, ranks: int) -> dict[str, Any]:
    """What a run that nobody stops has at every step, hashes and metrics, and the seconds that it takes."""
    name = f"unstopped-{ranks}"
    shutil.rmtree(folder / name, ignore_errors=True)
    begin = time.monotonic()
    processes = Ranks(start(folder, name, settings, ranks, save_every=1))
    processes.wait()
    if processes.codes != [0] * ranks:
        raise RuntimeError(f"the training failed; see {folder / 'children.log'}")
    seconds = time.monotonic() - begin
    found = {"hashes": hashes(folder / name), "metrics": metrics(folder / name), "seconds": seconds}
    assert len(found["hashes"]) == len(found["metrics"]) == STEPS
    print(f"{ranks} ranks that nobody stops: {STEPS} steps and as many saves in {seconds:.1f} s", flush=True)
    shutil.rmtree(folder / name)
    return found


# the soak


class Kill(NamedTuple):
    """How one process is stopped, a function of (seed, number)."""

    number: int  # of the signal
    saving: bool  # while it writes a checkpoint
    wait: float  # seconds, from the start or, if saving, from the moment that the write is seen
    everyone: bool  # all ranks, else the one below
    rank: int


def choose_kill(settings: Settings, count: int, ranks: int, length: float) -> Kill:
    """The kill number `count`. length: seconds that a training takes."""
    rng = random.Random(f"{settings.seed}/{count}")
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    saving = rng.random() < 1 / 3
    wait = rng.uniform(0, 0.02) if saving else rng.uniform(0, length)
    return Kill(number, saving, wait, rng.random() < 0.5, rng.randrange(ranks))


def writing(folder: Path) -> set[str]:
    """The checkpoints being written, or left so."""
    return {path.name for path in (folder / "checkpoints").glob("*.tmp-*")}


def stop(processes: Ranks, run: Path, kill: Kill) -> bool:
    """Let the processes train until the instant of the kill, then stop them. False: they ended before it."""
    left = writing(run)
    deadline = None if kill.saving else time.monotonic() + kill.wait
    while deadline is None or time.monotonic() < deadline:
        if processes.poll():
            return False
        if deadline is None and writing(run) - left:
            deadline = time.monotonic() + kill.wait
        time.sleep(0.0005)
    alive = processes.alive
    processes.signal(kill.number, alive if kill.everyone or len(alive) <= kill.rank else [alive[kill.rank]])
    processes.wait()
    return True


def faults(run: Path, wanted: dict[str, Any], before: int) -> list[str]:
    """What a run has left that one which nobody stops has not. before: the step of its newest checkpoint."""
    wanted_of = wanted["hashes"]
    found = [  # a stop before the first step leaves a checkpoint of step 0: what follows from it is looked at
        f"checkpoint of step {step}"
        for step, sums in hashes(run).items()
        if step != "0" and wanted_of[step] != sums
    ]
    found += [
        f"metrics of step {step}" for step, line in metrics(run).items() if wanted["metrics"][step] != line
    ]
    if newest(run) < before:
        found.append(f"the checkpoint of step {before} is lost")
    return found


class Soak:
    """Trainings, one after another, each stopped and started again until it is done."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Goes on from folder/state.json if there is one, which must be of the same settings."""
        self.folder, self.settings = folder, settings
        fresh = {"settings": settings._asdict(), "unstopped": {}, "counts": {}, "seconds": 0.0}
        self.state = read_json(folder / "state.json") if (folder / "state.json").exists() else fresh
        if self.state["settings"] != settings._asdict():
            raise SystemExit(f"{folder} is of {self.state['settings']}: delete it or choose another --output")
        self.counts = Counter[str](self.state["counts"])

    def keep(self) -> None:
        self.state["counts"] = dict(self.counts)
        write_json(self.folder / "state.json", self.state)

    def once(self, ranks: int) -> None:
        """Start a training of so many ranks where it is, stop it, and look at what it left."""
        if str(ranks) not in self.state["unstopped"]:
            self.state["unstopped"][str(ranks)] = unstopped(self.folder, self.settings, ranks)
        wanted, run = self.state["unstopped"][str(ranks)], self.folder / f"run-{ranks}"
        begin, before = time.monotonic(), newest(run)
        kill = choose_kill(self.settings, self.counts["kills"], ranks, 0.5 * wanted["seconds"])
        processes = Ranks(start(self.folder, run.name, self.settings, ranks))
        stopped = stop(processes, run, kill)
        wrong = faults(run, wanted, before)
        if processes.failed and (not stopped or kill.number == signal.SIGTERM):
            wrong.append(f"exit codes {processes.codes}, see {self.folder / 'children.log'}")
        if not stopped and metrics(run).keys() != wanted["metrics"].keys():
            wrong.append("metrics.jsonl does not have every step")
        for line in wrong:
            print(f"after kill {self.counts['kills']}, {kill}: {line}", flush=True)
        self.counts["looked at"] += 1
        self.counts["identical"] += not wrong
        self.counts["went on"] += newest(run) > before
        if not stopped and processes.failed:
            raise RuntimeError(f"the training fails by itself: see {self.folder / 'children.log'}")
        self.counts["kills" if stopped else "ends"] += 1
        if stopped:
            self.counts["by -9"] += kill.number == signal.SIGKILL
            self.counts["in a save"] += kill.saving
            self.counts["of two ranks"] += ranks == 2
        else:
            shutil.rmtree(run)
        self.state["seconds"] += time.monotonic() - begin
        self.keep()

    def go_on(self, kills: int, ranks: list[int]) -> None:
        """Until so many processes were stopped; the run after one that ends has the next number of ranks."""
        while self.counts["kills"] < kills:
            self.once(ranks[self.counts["ends"] % len(ranks)])
            if self.counts["looked at"] % 20 == 0:
                print(f"{self.counts['kills']} kills: {self}", flush=True)

    def __str__(self) -> str:
        return f"{self.counts['identical']} of {self.counts['looked at']} identical"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=200, help="in all, those of interrupted commands included"
    )
    parser.add_argument("--ranks", default="1,2", help="of the runs, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--async-save", action="store_true", help="write checkpoints beside the training")
    parser.add_argument("--workers", type=int, default=0, help="threads that read ahead")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/soak_resume"), help="its state and its runs"
    )
    args = parser.parse_args()
    logging.disable(logging.INFO)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "autoencoder/config.json").exists():
        torch.manual_seed(0)
        save_model(AutoencoderKL(VAE), args.output / "autoencoder")
    soak = Soak(args.output, Settings(args.optimizer, args.workers, args.async_save, args.seed))
    soak.go_on(args.kills, [int(count) for count in args.ranks.split(",")])
    counts, rate = soak.counts, 60 * soak.counts["kills"] / soak.state["seconds"]
    print(
        f"{counts['kills']} kills, {counts['by -9']} by -9 and the others by SIGTERM, {counts['in a save']} "
        f"in a save, {counts['of two ranks']} of two ranks; {rate:.0f} a minute.\n"
        f"{counts['went on']} processes saved something new, {counts['ends']} came to the end of a run."
    )
    print(soak)
    return 0 if counts["identical"] == counts["looked at"] else 1


if __name__ == "__main__":
    sys.exit(main())
