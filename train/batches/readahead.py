"""Batches read ahead in threads and handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from types import TracebackType
from typing import Protocol

from torch import Tensor

from train.batches.plan import Draw, Plan


class Reader(Protocol):
    def batch(self, draws: list[Draw]) -> dict[str, Tensor]: ...


class ReadAhead:
    """The micro-batches of one rank from `step` on, without end.

    Each is a pure function of its draws, so threads change when it is made and never what it is.
    """

    def __init__(self, reader: Reader, plan: Plan, rank: int, step: int, workers: int) -> None:
        self.reader, self.workers = reader, workers
        self.wanted: Iterator[list[Draw]] = (
            plan.micro(later, micro, rank) for later in count(step) for micro in range(plan.micro_batches)
        )
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead") if workers else None
        self.pending: deque[Future[dict[str, Tensor]]] = deque()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def next(self) -> dict[str, Tensor]:
        if self.pool is None:
            return self.reader.batch(next(self.wanted))
        while len(self.pending) <= self.workers:
            self.pending.append(self.pool.submit(self.reader.batch, next(self.wanted)))
        return self.pending.popleft().result()
