"""What a run leaves in its folder: config.yaml, metrics.jsonl, pictures; and what it says while it runs."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.files.config import read_json, replacing, write_json
from ldm.formats.parts import TRAINED
from ldm.recipes.picture import save_picture
from train.config import to_yaml

log = logging.getLogger(__name__)


class Record:
    """The folder of a run. Only the main process writes."""

    def __init__(self, folder: Path, config: Any, accelerator: Accelerator) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.checkpoints, self.model = folder / "checkpoints", folder / "model"
        self.metrics, self.samples = folder / "metrics.jsonl", folder / "samples"
        self.snapshots = folder / "snapshots"
        self.waiting: list[tuple[int, dict[str, Tensor], float, int]] = []  # steps not yet written
        self.saved_step = -1
        self.last_good: Path | None = None  # checkpoint
        self.began = self.written = time.monotonic()
        self.first = 0  # step this process began at
        self.bar: tqdm[Any] | None = None
        self.tracking = False

    def start(self, step: int, checkpoint: Path | None) -> None:
        """Begin, or go on after `step`: what metrics.jsonl holds beyond it is dropped."""
        self.first = step
        self.saved_step = step if checkpoint else -1
        self.last_good = checkpoint
        self.began = self.written = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        if self.exported_step() != step:  # the weights will be others, even if they reach that step again
            (self.folder / "exported.json").unlink(missing_ok=True)
        with replacing(self.folder / "config.yaml") as path:
            path.write_text(to_yaml(self.config), encoding="utf-8")
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        with replacing(self.metrics) as path:
            path.write_text("".join(f"{line}\n" for line in lines if step_of(line) <= step))
        if self.config.tracker:
            self.start_tracker()
        self.say(f"going on from {checkpoint}" if checkpoint else f"starting in {self.folder}")
        self.bar = tqdm(
            total=self.config.steps,
            initial=step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def add(self, step: int, values: Mapping[str, Tensor], rate: float, skipped: int) -> None:
        """Note one step. Values stay on the device until `flush`, so that nothing waits for it."""
        self.waiting.append((step, dict(values), rate, skipped))
        if self.bar is not None:
            self.bar.update()
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.flush()

    def flush(self) -> None:
        """Write the waiting steps to metrics.jsonl, a line each, averaged over the ranks."""
        if not self.waiting:
            return
        names = list(self.waiting[0][1])
        table = torch.stack(
            [torch.stack([values[name].float() for name in names]) for _, values, *_ in self.waiting]
        )
        table = self.accelerator.reduce(table, "mean").cpu()
        now = time.monotonic()
        lines = [
            {"step": step, **dict(zip(names, row, strict=True)), "lr": rate, "skipped": skipped}
            for (step, _, rate, skipped), row in zip(self.waiting, table.tolist(), strict=True)
        ]
        speed = len(lines) * self.config.batch_size / max(now - self.written, 1e-9)
        lines[-1]["samples_per_second"] = round(speed, 2)
        if self.accelerator.is_main_process:
            self.append(lines)
            self.show(int(lines[-1]["step"]), names, table.mean(0).tolist(), speed)
            self.track(lines[-1])
        self.waiting, self.written = [], now

    def show(self, step: int, names: list[str], means: list[float], speed: float) -> None:
        """Progress: in the bar on a terminal, else a line in the log."""
        text = " ".join(f"{name} {value:.4g}" for name, value in zip(names, means, strict=True))
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(f"{text} {speed:.1f} samples/s")
            return
        done = max(1, step - self.first)
        left = (time.monotonic() - self.began) / done * (self.config.steps - step)
        self.say(f"step {step}/{self.config.steps} {text} {speed:.1f} samples/s, {minutes(left)} left")

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl of its own, with "validation/" before every name."""
        line = {"step": step, **{f"validation/{name}": value for name, value in values.items()}}
        self.append([line])
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"validation after step {step}: {text}")
        self.track(line)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Lines to metrics.jsonl. A full disk does not end the run: training is worth more than its log."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(finite(line)) + "\n" for line in lines)
        except OSError as error:
            log.warning("%s misses lines up to step %s: %s", self.metrics, lines[-1]["step"], error)

    def bad_batches(self, batches: Mapping[int, Sequence[int]]) -> str:
        """Leave the samples of batches, by step, in bad_batches.json; returns words that say where they are.

        batches: indices in the source, which encode_latents.py and rejected.jsonl count alike, from 0.
        """
        path = self.folder / "bad_batches.json"
        try:
            if self.accelerator.is_main_process:
                write_json(
                    path, {"steps": [{"step": step, "samples": each} for step, each in batches.items()]}
                )
        except OSError as error:
            return f", and {path}, which would list their samples, cannot be written: {error}"
        return f"; their samples are listed in {path}"

    def track(self, line: Mapping[str, Any]) -> None:
        """Hand the newest line to the tracker."""
        values = {name: value for name, value in line.items() if name != "step"}
        self.hand_over(lambda: self.accelerator.log(values, line["step"]))

    def hand_over(self, call: Callable[[], None]) -> None:
        """Let a tracker have something; one that fails is left out from then on."""
        if self.tracking:
            try:
                call()
            except Exception as error:  # noqa: BLE001 (trackers raise what they like; training goes on)
                self.tracking = False
                log.warning("%s fails and is left out, metrics.jsonl goes on: %s", self.config.tracker, error)

    def start_tracker(self) -> None:
        try:
            self.accelerator.init_trackers(self.folder.name)
            self.tracking = bool(self.accelerator.trackers)  # accelerate leaves out what is not installed
            if not self.tracking:
                log.warning("tracker=%s has no effect: it is not installed", self.config.tracker)
        except Exception as error:  # noqa: BLE001
            log.warning("no tracker %s, metrics.jsonl goes on: %s", self.config.tracker, error)

    def close(self) -> None:
        """The end of the bar, and of the tracker, which may still hold its last lines in memory."""
        if self.bar is not None:
            self.bar.close()
        try:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except Exception as error:  # noqa: BLE001
            log.warning("%s did not finish: %s", self.config.tracker, error)

    def exported_step(self) -> int:
        """The step whose weights lie in model/, -1 if none do."""
        path = self.folder / "exported.json"
        return int(read_json(path).get("step", -1)) if path.exists() and self.model.is_dir() else -1

    def mark_exported(self, step: int) -> None:
        """Note that the model of this step is whole and, in a pipeline's folder, which average it is."""
        if self.accelerator.is_main_process:
            decay = self.config.ema_decay
            average = f"average of decay {decay:g}" if decay else "no average, the last weights"
            if (self.model / "model_index.json").is_file():
                write_json(self.model / TRAINED, {"step": step, "ema": average})
            write_json(self.folder / "exported.json", {"step": step})

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            with tqdm.external_write_mode(file=sys.stderr):
                log.info(text)

    def picture(self, step: int, image: Image.Image) -> None:
        """Into samples/ and to the tracker. Raises OSError when the disk refuses it."""
        self.hand_over(lambda: self.show_picture(step, image))
        save_picture(image, self.samples / f"step-{step:08d}.png", overwrite=True)

    def show_picture(self, step: int, image: Image.Image) -> None:
        """To every tracker that takes pictures: accelerate passes each what its own library takes."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                rows = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
                tracker.log_images({"samples": rows}, step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                alone = tracker.name in ("aim", "clearml")  # the others take a list
                tracker.log_images({"samples": image if alone else [image]}, step)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for a line that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with null for what JSON has no word for."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def training_seconds(folder: Path, batch_size: int) -> float | None:
    """What the steps in metrics.jsonl took, by the speeds it notes; None where there are none."""
    total, steps = 0.0, 0
    for line in steps_of(folder):
        steps += 1
        if speed := line.get("samples_per_second"):
            total, steps = total + steps * batch_size / speed, 0
    return total or None


def steps_of(folder: Path) -> Iterator[dict[str, Any]]:
    """What metrics.jsonl says of each step of training, without validations and what a kill cut short."""
    path = folder / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text) if step_of(text) < math.inf else {}
        if "lr" in line:
            yield line


def loss_curve(folder: Path, points: int = 100) -> list[tuple[float, float]]:
    """The training's loss: (last step, mean) of each of so many equal parts of the steps, fewer of few."""
    steps = [(line["step"], line["loss"]) for line in steps_of(folder) if line["loss"] is not None]
    length = -(-len(steps) // points)
    parts = [steps[start : start + length] for start in range(0, len(steps), max(length, 1))]
    return [(float(part[-1][0]), sum(loss for _, loss in part) / len(part)) for part in parts]


@contextmanager
def open_run(folder: Path, config: Any, accelerator: Accelerator) -> Iterator[Record]:
    """The record of the run in `folder`, which no other process may write meanwhile.

    Raises ValueError if the folder cannot be made or written, or if another run holds it.
    """
    record = Record(folder, config, accelerator)
    if not accelerator.is_main_process:
        yield record
        return
    try:
        record.checkpoints.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=record.checkpoints):  # what refuses it now would refuse hours of training
            lock = (folder / "lock").open("a+")
    except OSError as error:
        raise ValueError(f"output={folder} cannot be written: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends
        except OSError:
            lock.seek(0)
            raise ValueError(
                f"another run is writing {folder}: {lock.read() or 'it does not say which'}; wait for it or "
                "choose another output"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield record
        finally:
            record.close()
