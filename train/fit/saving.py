"""Saving while a run goes on: checkpoints, at once or in a thread beside the training, and snapshots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from ldm.files.config import replacing
from train.fit.checkpoint import clean, save_checkpoint
from train.fit.failure import RunFailed
from train.fit.record import Record
from train.fit.shards import gather
from train.fit.state import State

log = logging.getLogger(__name__)
Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem -> name -> tensor


class Saver:
    """A context that writes the checkpoints of a run, by rank 0, one at a time.

    beside: in a thread, from a copy, so that what is saved is the state of its step while the training goes
    on. The next save, and the end, wait for it; its error is met at the next step. about: JSON for each.
    """

    def __init__(
        self, record: Record, accelerator: Accelerator, about: Mapping[str, Any], beside: bool
    ) -> None:
        self.record, self.accelerator, self.about = record, accelerator, about
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="save") if beside else None
        self.pending: tuple[int, Future[Path]] | None = None  # step, and the checkpoint that comes of it
        self.copies: dict[tuple[str, str], Tensor] = {}
        self.error: OSError | None = None  # of the newest save

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        if self.pool is not None:
            self.pool.shutdown()

    def save(self, state: State) -> None:
        """A checkpoint of `state` as it is now, then rotation. A full disk is a warning, not the end."""
        self.settle()
        self.record.flush()
        tensors, about = state.tensors(), self.story(state)
        if not self.accelerator.is_main_process:
            return
        if self.pool is None:
            future = now(partial(self.write, state.step, tensors, about))
        else:
            future = self.pool.submit(self.write, state.step, self.copy(tensors), about)
        self.pending = state.step, future
        self.settle(wait=self.pool is None)

    def story(self, state: State) -> dict[str, Any]:
        counters = {"updates": state.updates, "bad": state.bad, "data_since": state.data_since}
        return {**counters, **self.about}

    def write(self, step: int, tensors: Tensors, about: Mapping[str, Any]) -> Path:
        path = save_checkpoint(self.record.checkpoints, step, tensors, about)
        clean(self.record.checkpoints, self.record.config.keep_last, step)
        return path

    def copy(self, tensors: Tensors) -> Tensors:
        """`tensors` on the CPU, in memory that every save uses again, locked there if they come from CUDA."""
        cuda = self.accelerator.device.type == "cuda"
        for stem, group in tensors.items():
            for name, value in group.items():
                kept = self.copies.get((stem, name))
                if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                    kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=cuda)
                    self.copies[stem, name] = kept
                kept.copy_(value.detach(), non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize(self.accelerator.device)
        return {stem: {name: self.copies[stem, name] for name in group} for stem, group in tensors.items()}

    def settle(self, wait: bool = True) -> None:
        """Take the result of the save in hand; without `wait` only if it is there, as after every step."""
        if self.pending is None or not (wait or self.pending[1].done()):
            return
        (step, future), self.pending, self.error = self.pending, None, None
        try:
            self.record.last_good = future.result()
            self.record.saved_step = step
        except OSError as error:
            self.error = error
            log.warning("no checkpoint at step %d, training goes on: %s", step, error)

    def finish(self, state: State) -> None:
        """Return when `state` is on disk. Raises RunFailed, on all ranks, if it cannot be."""
        self.settle()
        if self.on_disk(state.step):
            return
        self.save(state)
        self.settle()
        if self.on_disk(state.step):
            return
        error = self.error or "rank 0 says why"
        raise RunFailed(f"the last state could not be saved: {error}; {self.rescue(state)}") from self.error

    def rescue(self, state: State) -> str:
        """Try config.emergency_output, where there is one; returns what is left to go on from."""
        newest = f"the newest good checkpoint is {self.record.last_good or 'none'}"
        folder = self.record.config.emergency_output
        if folder is None:
            return newest
        tensors = state.tensors()
        if not self.accelerator.is_main_process:
            return newest
        try:
            path = save_checkpoint(Path(folder), state.step, tensors, self.story(state))
        except OSError as error:
            return f"nor in emergency_output: {error}; {newest}"
        return f"it lies in {path} instead: --resume {path} goes on from it"

    def on_disk(self, step: int) -> bool:
        """Whether the state of `step` is saved, which rank 0 knows."""
        known = self.accelerator.is_main_process and self.record.saved_step == step
        told = torch.tensor([float(known)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, "sum").item())


def now(work: Callable[[], Path]) -> Future[Path]:
    """The future of work that is done here, at once."""
    future: Future[Path] = Future()
    try:
        future.set_result(work())
    except OSError as error:
        future.set_exception(error)
    return future


def snapshot(state: State, record: Record, accelerator: Accelerator) -> None:
    """The power-function averages as they are now, for `rebuild_ema.py`, in float16: half a checkpoint."""
    averages = {name: gather(ema.state_dict()) for name, ema in state.powers.items()}
    if accelerator.is_main_process:
        try:
            for name, average in averages.items():
                with replacing(record.snapshots / f"step-{state.step:08d}-{name}.safetensors") as path:
                    half = {key: value.half().cpu().contiguous() for key, value in average.items()}
                    save_file(half, path, metadata={"updates": str(state.updates), "width": name[4:]})
        except OSError as error:
            log.warning("no snapshot at step %d, training goes on: %s", state.step, error)
    accelerator.wait_for_everyone()
