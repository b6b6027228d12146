"""The rows of a table, each in a process of its own: what one compiles or keeps in memory is not another's.

The parent asks them in turn, so that a slow minute of the machine meets all. One that waits for its turn
sleeps. A row that fails, or that this machine cannot have, says why in the table.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bench import kernels, measure

# Imported once on the CPU; every process of a row then begins with them.
PRELOADED = ["torch", "accelerate", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]


class Unavailable(Exception):
    """Why this machine cannot have a row."""


@dataclass(frozen=True)
class Settings:
    """What all rows of a table share."""

    folder: Path  # of the pipeline that all of them read
    device: str
    pixels: int  # side of a picture
    steps: int  # of a whole picture; 0: none is drawn
    threads: int  # of torch on the CPU
    warm_up: int  # calls that are not counted, of each kind


class Side(Protocol):
    """One row: what it can be asked to compute."""

    def call(self, what: str, batch: int) -> Tensor: ...


Make = Callable[[Settings], Side]


def serve(line: Connection, make: Make, settings: Settings) -> None:
    """Build a side, then answer until the parent is gone: (True, answer) or (False, why not)."""
    torch.set_num_threads(settings.threads)
    try:
        answers = Answers(make(settings), torch.device(settings.device), settings.warm_up)
        line.send((True, None))
    except Exception as error:  # noqa: BLE001  # whatever a library raises is this row's own
        line.send((False, reason(error)))
        return
    try:
        while True:
            asked = line.recv()
            try:
                line.send((True, answers(*asked)))
            except Exception as error:  # noqa: BLE001  # likewise
                line.send((False, reason(error)))
    except EOFError:
        return


class Answers:
    """What a side is asked, by the names of these methods. It begins with warm_up, which is not counted."""

    def __init__(self, side: Side, device: torch.device, warm_up: int) -> None:
        self.side, self.device, self.calls = side, device, warm_up
        self.last = torch.empty(0)  # what the last timed call computed

    def __call__(self, question: str, what: str, batch: int) -> Any:
        return getattr(self, question)(lambda: self.side.call(what, batch))

    def warm_up(self, call: Callable[[], Tensor]) -> None:
        for _ in range(self.calls):
            call()
        measure.forget_peak(self.device)

    def seconds(self, call: Callable[[], Tensor]) -> float:
        """Of one call."""

        def keep() -> None:
            self.last = call()

        return measure.seconds(keep, self.device)

    def memory(self, call: Callable[[], Tensor]) -> int:
        """The most bytes since the calls that are not counted."""
        return measure.peak_bytes(self.device)

    def answer(self, call: Callable[[], Tensor]) -> np.ndarray:
        """Of the last timed call, in float32."""
        return self.last.float().cpu().numpy()

    def profile(self, call: Callable[[], Tensor]) -> kernels.Share:
        return kernels.shares(call, self.device)


def reason(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    words = next((line for line in str(error).splitlines() if line.strip()), "").replace("|", "/")
    name = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return (name + words)[:120]


class Row:
    """A side in its own process, seen from the parent. why: it gives no answers, "" where it does."""

    def __init__(self, name: str, make: Make, settings: Settings) -> None:
        # A fork of a process that has looked for GPUs cannot use them, and libraries look when imported.
        context = multiprocessing.get_context("forkserver" if settings.device == "cpu" else "spawn")
        if settings.device == "cpu":
            context.set_forkserver_preload(PRELOADED)
        self.name, self.why = name, ""
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, settings))
        self.process.start()
        theirs.close()
        self.receive()

    def __enter__(self) -> Row:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.line.close()
        self.process.join(30)
        self.process.kill()

    def receive(self) -> Any:
        try:
            good, answer = self.line.recv()
        except (EOFError, OSError):
            good, answer = False, "its process died: is there memory enough?"
        if not good:
            self.why = answer
        return answer if good else None

    def ask(self, question: str, what: str, batch: int) -> Any:
        """An answer, or None; then `why` says what is wrong, and it is not asked again."""
        if self.why:
            return None
        try:
            self.line.send((question, what, batch))
        except OSError:
            self.why = "its process died: is there memory enough?"
            return None
        return self.receive()


class Result(NamedTuple):
    """Of one row."""

    name: str
    why: str  # there are no figures
    seconds: float = 0.0  # median
    memory: int = 0  # bytes at most
    error: float = 0.0  # relative, to the first row's answer


def race(
    rows: Sequence[Row], what: str, batch: int, rounds: int, warmed_by: str | None = None
) -> list[Result]:
    """Asks every row in turn, in every round. The first row's answer is what the others are compared with.

    warmed_by: what is called before, uncounted; None: the same.
    """
    for row in rows:
        row.ask("warm_up", warmed_by or what, batch)
    times: list[list[float]] = [[] for _ in rows]
    for _ in range(rounds):
        for row, spent in zip(rows, times):
            if (one := row.ask("seconds", what, batch)) is not None:
                spent.append(one)
    peaks = [row.ask("memory", what, batch) for row in rows]
    answers = [row.ask("answer", what, batch) for row in rows]
    results = []
    for row, found, spent, peak in zip(rows, answers, times, peaks):
        if row.why or answers[0] is None:
            results.append(Result(row.name, row.why or f"no answer of {rows[0].name} to compare with"))
            continue
        error = measure.relative_error(np.asarray(found), answers[0])
        results.append(Result(row.name, "", statistics.median(spent), peak, error))
    return results


def start(makes: Mapping[str, Make], settings: Settings, stack: ExitStack) -> list[Row]:
    """A process for each row, one built after the other; they end with the stack.

    On the CPU one that would be larger than what is left of the memory, by the largest so far, is left out.
    """
    rows: list[Row] = []
    largest = 0.0
    for name, make in makes.items():
        before = measure.available_bytes()
        if settings.device == "cpu" and before < 1.5 * largest:
            make = no_memory
        rows.append(stack.enter_context(Row(name, make, settings)))
        largest = max(largest, before - measure.available_bytes())
    return rows


def no_memory(settings: Settings) -> Side:
    raise Unavailable("no memory is left beside the others: name fewer with --rows")


def chosen(makes: Mapping[str, Make], words: str) -> dict[str, Make]:
    """The first row, with which the others are compared, and those whose names are or have one of the words.

    words: with semicolons between them, as names have commas; "" for all. A whole name is that row alone.
    Raises ValueError if none is found.
    """
    if not words:
        return dict(makes)
    wanted = [word.strip() for word in words.split(";")]
    for word in wanted:
        if not any(word in name for name in makes):
            raise ValueError(f"--rows {word!r} is in no row's name; rows are: {'; '.join(makes)}")
    first = next(iter(makes))
    parts = [word for word in wanted if word not in makes]
    return {
        name: make
        for name, make in makes.items()
        if name == first or name in wanted or any(part in name for part in parts)
    }
