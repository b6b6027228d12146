"""Memory that is used again, for the kernels' results and for torch's: the system clears its pages before it
gives them, and that takes as long as many a layer.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

LEAST = 1 << 18  # floats, 1 MiB: what is smaller the C library keeps itself
PAGE = 1 << 16  # floats, to whose multiple blocks are rounded
ALIGNED = 16  # floats: a line of the cache

TRIM, MMAP = -1, -3  # glibc's malloc.h: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes


def keep_pages() -> bool:
    """From now on the C library keeps what this process gives back, for torch's operators to use again.

    False where it is not glibc, of which alone that can be asked. Nothing is kept longer than the process.
    """
    most = (1 << 31) - 1
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(MMAP, most) and libc.mallopt(TRIM, most))
    except (AttributeError, OSError, TypeError):  # no such function, or on Windows no such name
        return False


class Pool:
    """Blocks of floats, lent to tensors and taken back when the last of those that share one is gone."""

    def __init__(self) -> None:
        self.idle: list[np.ndarray] = []
        self.lent = 0  # floats
        self._turn = threading.RLock()  # a block may come back while its thread is in here

    def empty(self, *shape: int) -> Tensor:
        """A contiguous float32 tensor of whatever was there."""
        count = math.prod(shape)
        if count < LEAST:
            return torch.empty(shape)
        with self._turn:
            block = self._take(count)
            self.lent += len(block)
        part = block[:count]
        weakref.finalize(part, self._give_back, block).atexit = False
        return torch.frombuffer(part, dtype=torch.float32).view(shape)  # it holds `part` as long as it lives

    def _take(self, count: int) -> np.ndarray:
        """The smallest idle block that is large enough and not twice that, else a new one.

        A new one is made only after idle ones are let go, should they be more than all that is in use.
        """
        fit = [block for block in self.idle if count <= len(block) <= 2 * count]
        if fit:
            best = min(fit, key=len)
            self.idle = [block for block in self.idle if block is not best]
            return best
        if sum(map(len, self.idle)) > self.lent:
            self.idle = []
        whole = np.empty(-(-count // PAGE) * PAGE + ALIGNED, np.float32)
        offset = -whole.ctypes.data // whole.itemsize % ALIGNED
        return whole[offset : offset + len(whole) - ALIGNED]

    def _give_back(self, block: np.ndarray) -> None:
        with self._turn:
            self.lent -= len(block)
            self.idle.append(block)


POOL = Pool()
