"""Where the time of a call goes, by groups of kernels, as torch.profiler sees it."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench.measure import Call
from ldm import native

CALLS = 3  # that are looked at
# What the names of a group's kernels have, on CUDA, or its operators, on the CPU. The first that fits counts.
GROUPS = {
    "optimizer": r"adam|foreach|multi_tensor|vector_norm",  # with clipping and the average of the weights
    "attention": r"fmha|flash|attention|softmax",
    "convolution": r"conv(?!ert)|fprop|dgrad|wgrad|implicit_gemm|im2col|winograd|to_?n(chw|hwc)",
    "norm": r"(group|layer|batch|rms)_?norm|moments|welford|gamma|fusedparams|internalgradients",
    "matmul": r"gemm|gemv|addmm|\bb?mm\b|matmul|cutlass|nvjet|splitk|linear",
    "elementwise": r"elementwise|vectorized|reduce|triton|copy|memcpy|memset|cat|fill|zero|upsample"
    r"|aten::(add|sub|mul|div|silu|gelu|sum|mean|exp|pow|neg|sqrt|sin|cos|clamp|where|index|mse)",
}
OTHER, IDLE = "other", "idle"
OURS = "native::"  # before the name of a kernel of ldm.native, which the profiler does not see by itself


class Share(NamedTuple):
    """Of the wall-clock time of a call."""

    groups: dict[str, float]  # with what fits no group, and the time in which nothing ran
    others: list[str]  # the names of the largest that fit none


def tell_profiler() -> None:
    """From now on kernels of ldm.native stand in profiles."""
    kernel = native.call

    def call(name: str, *arguments: Any) -> None:
        with record_function(OURS + name):
            kernel(name, *arguments)

    native.call = call


def group_of(name: str) -> str:
    found = (group for group, words in GROUPS.items() if re.search(words, name, re.IGNORECASE))
    return next(found, OTHER)


def shares(call: Call, device: torch.device) -> Share:
    """Of some calls. On a GPU its kernels are timed; on the CPU operators, without those that they call."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    with profile(activities=activities) as run:
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        wall = 1e6 * (time.perf_counter() - begin)  # microseconds, as below
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    spent: Counter[str] = Counter()
    for event in run.key_averages():
        ours = event.key.startswith(OURS)
        if event.device_type == wanted and (ours or not event.is_user_annotation):
            spent[event.key] += event.self_device_time_total if cuda else event.self_cpu_time_total
    groups: Counter[str] = Counter()
    for name, microseconds in spent.items():
        groups[group_of(name)] += microseconds
    groups[IDLE] = max(wall - groups.total(), 0)
    others = [name for name, _ in spent.most_common() if group_of(name) == OTHER]
    return Share({name: groups[name] / wall for name in (*GROUPS, OTHER, IDLE)}, others[:5])
