"""Time, memory and error of a call, the rate of the machine's multiplications, and a table of them."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

Call = Callable[[], object]


def seconds(call: Call, device: torch.device) -> float:
    """Of one call, by CUDA's events on a GPU; nothing else is under way there before or after it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def forget_peak(device: torch.device) -> None:
    """Begins anew what `peak_bytes` tells. Where the system cannot forget, it is the peak of all time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held since `forget_peak`, what it held before included.

    On a GPU what torch has reserved there: it counts the pools of CUDA graphs, which "allocated" does not.
    Elsewhere the resident set, libraries included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)
    return resident_peak()


def resident_peak() -> int:
    """The most bytes of this process that were in memory at once, since the last reset."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_bytes() -> float:
    """Memory that a new process may take without swapping; infinite where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return float("inf")


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a product of two square matrices, two for each multiplication: a ceiling."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(10)]
    return 2 * side**3 / statistics.median(times[3:])


def relative_error(answer: np.ndarray, reference: np.ndarray) -> float:
    """|answer - reference| / |reference|, Euclidean norms over all numbers."""
    difference = answer.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


def hardware(device: torch.device) -> str:
    """What the figures were measured on."""
    words = f"torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {words}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else model
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}, {words}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
