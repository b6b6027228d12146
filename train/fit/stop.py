"""Being asked to stop: signals, a lost launcher, a time limit. The step in hand is always finished first."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

log = logging.getLogger(__name__)
STARTED = time.monotonic()  # of the process, as nearly as we see it: --max-minutes counts from here
PARENT = os.getppid()  # the launcher, where there is one
GRACE = 2.0  # seconds after a request in which a Ctrl-C is the same one: torchrun passes on what we got too
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: stopped early, the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: Slurm's warning before its limit


class StopRequest:
    """A context in which signals set `reason`; after that a further Ctrl-C ends the process at once.

    Other signals do not: one Ctrl-C under `accelerate launch` is a SIGINT and, as the launcher dies of it, a
    SIGTERM; Slurm's SIGUSR1 is followed by a SIGTERM. The step in hand and its save are still finished.
    """

    def __init__(self, accelerator: Accelerator, max_minutes: float | None) -> None:
        self.accelerator = accelerator
        self.deadline = None if max_minutes is None else STARTED + 60 * max_minutes
        self.reason = ""
        self.asked = 0.0  # when the signal came

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        follow_launcher()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.reason:
            self.reason, self.asked = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self.asked > GRACE:
            os._exit(128 + number)  # finished checkpoints are complete on disk, nothing to clean up

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; called once a step by all ranks."""
        if not self.reason and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "max_minutes"
        if self.accelerator.num_processes == 1:
            return bool(self.reason)
        asked = torch.tensor([float(bool(self.reason))], device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum").item() and not self.reason:
            self.reason = "another rank was asked to stop"
        return bool(self.reason)


def follow_launcher() -> None:
    """On Linux, get SIGTERM when the launcher dies: `accelerate launch` of one process forwards no signal."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != PARENT:  # it died before we asked, as while latents were computed
            signal.raise_signal(signal.SIGTERM)
