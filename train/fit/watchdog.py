"""Signs of life: heartbeat.json for whoever watches a run from outside, and an end for a run that hangs."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)
EXIT_HUNG = 76  # beside 75, stopped early: the same command goes on from the last checkpoint
BEAT_SECONDS = 5.0  # between writings of heartbeat.json
SLICES = 20  # in which the watchdog counts its limit: it is late by at most one of them
STDERR = 2  # the descriptor: sys.stderr may be anything


class Watchdog:
    """A context around a run. Without a beat for `minutes` it writes all threads' stacks and exits 76.

    It counts how often it woke without a beat, not the clock: a process that was stopped, or a laptop that
    slept, does not hang. Its thread needs the interpreter, which all that waits for disks, devices and other
    ranks leaves free. minutes: None for no watchdog; heartbeat.json is written all the same, by rank 0.
    """

    def __init__(self, folder: Path, minutes: float | None, rank: int) -> None:
        self.minutes, self.rank = minutes, rank
        self.heartbeat, self.stacks = folder / "heartbeat.json", folder / f"stacks-rank{rank}.txt"
        self.beats = self.step = 0
        self.written = -float("inf")  # when heartbeat.json was
        self.resting = False
        self.hooks: list[RemovableHandle] = []
        self.left = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.minutes is not None:
            self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        self.left.set()
        if self.thread is not None:
            self.thread.join()

    def listen(self, module: nn.Module) -> None:
        """Take every answer of the module or of a part of it for progress: a long validation has many."""
        parts = [module, *module.children()]
        self.hooks = [part.register_forward_hook(self.progress) for part in parts]

    def progress(self, *answer: Any) -> None:
        self.beats += 1

    def beat(self, step: int) -> None:
        """The run is at `step`, and works. Costs nothing but, every BEAT_SECONDS, a small file."""
        self.beats += 1
        self.step, now = step, time.monotonic()
        if self.rank == 0 and now - self.written > BEAT_SECONDS:
            self.written = now
            temporary = self.heartbeat.with_suffix(f".tmp-{os.getpid()}")
            try:  # not synced: beside a checkpoint that takes long, and after a crash nobody reads it
                temporary.write_text(json.dumps({"step": step, "time": time.time()}) + "\n")
                temporary.replace(self.heartbeat)
            except OSError as error:
                log.warning("no heartbeat at step %d, training goes on: %s", step, error)

    @contextmanager
    def piece(self, step: int) -> Iterator[None]:
        """A save, picture, validation or export: rank 0 does it and the others wait as long as it takes.

        A rank 0 that hangs is ended by its own watchdog, and its end is that of all.
        """
        self.resting = self.rank != 0
        try:
            yield
        finally:
            self.resting = False
            self.beat(step)

    def watch(self) -> None:
        assert self.minutes is not None
        seen, quiet = self.beats, 0
        while quiet < SLICES:
            if self.left.wait(60 * self.minutes / SLICES):
                return
            quiet = quiet + 1 if self.beats == seen and not self.resting else 0
            seen = self.beats
        self.bite()

    def bite(self) -> None:
        """Say where every thread is, on stderr and in the folder of the run, and end the process."""
        text = (
            f"hung: {self.minutes:g} minutes without progress after step {self.step} (watchdog_minutes). "
            f"The stacks of rank {self.rank} follow and lie in {self.stacks}; the same command goes on from "
            "the last checkpoint\n"
        )
        os.write(STDERR, text.encode())
        faulthandler.dump_traceback(STDERR)
        writer = threading.Thread(target=self.write_stacks, args=(text,), daemon=True)
        writer.start()
        writer.join(10)  # seconds: it may be the disk that hangs
        os._exit(EXIT_HUNG)

    def write_stacks(self, text: str) -> None:
        try:
            with self.stacks.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            os.write(STDERR, f"{self.stacks} could not be written: {error}\n".encode())
