"""Which samples make which batch: a pure function of (seed, step), so a resumed run needs no sampler state.

Samples of one shape are a bucket, and every global batch is of one bucket. The buckets take turns, each as
often as it has samples, evenly spread. A bucket's batches run through its epochs without a gap: sample number
n that it gives is entry n % length of the permutation of its epoch n // length, so no sample is left over and
none comes twice in an epoch of its bucket. Ranks and micro-batches are slices of the same global batch: the
order of samples does not depend on how many processes share the work.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.noise import generator, key


@dataclass(frozen=True)
class Draw:
    """One sample of one global batch, and the key of everything random that happens to it."""

    index: int  # in the source
    step: int  # optimizer step, from 0
    position: int  # in the global batch
    count: int  # samples in the global batch
    seed: int  # of the run

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh CPU generator for one purpose ("noise", "caption", ...) of this sample in this step."""
        return generator(purpose, self.seed, self.step, self.position)


@dataclass(frozen=True)
class Plan:
    """Sample order of a run over buckets of samples, less those that are held out for validation."""

    buckets: Sequence[Sequence[int]]  # source indices of the samples of each shape
    batch_size: int  # samples an optimizer step, over all ranks
    seed: int
    ranks: int = 1
    micro_batch: int = 0  # samples a rank computes at a time; 0: its whole share
    held_out: int = 0  # samples, evenly spread, that are in no batch
    first: int = 0  # step at which the first epoch of these buckets begins
    micro_batches: int = field(init=False, default=1)  # micro-batches a rank adds up in one optimizer step
    trained: Sequence[Sequence[int]] = field(init=False)  # of each bucket, without what is held out
    validation: Sequence[Sequence[int]] = field(init=False)  # what is held out, by bucket
    orders: dict[int, dict[int, Tensor]] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        length = sum(len(bucket) for bucket in self.buckets)
        if not length:
            raise ValueError("the data holds no sample: nothing to train on")
        if self.held_out >= length:
            raise ValueError(
                f"validation_samples={self.held_out} of {length} samples leave none to train on: lower it, "
                "or give more samples"
            )
        trained, validation = hold_out(self.buckets, self.held_out)
        object.__setattr__(self, "trained", trained)
        object.__setattr__(self, "validation", validation)
        micro_batches = split_batch(self.batch_size, self.ranks, self.micro_batch)
        object.__setattr__(self, "micro_batches", micro_batches)

    def batch(self, step: int) -> list[Draw]:
        """The global batch of optimizer step `step`, from 0."""
        return self.draws(step, range(self.batch_size))

    def micro(self, step: int, micro: int, rank: int) -> list[Draw]:
        """The slice of the global batch that `rank` computes as its micro-batch number `micro`."""
        size = self.batch_size // self.ranks // self.micro_batches
        first = (rank * self.micro_batches + micro) * size
        return self.draws(step, range(first, first + size))

    def draws(self, step: int, positions: range) -> list[Draw]:
        """The samples at some places of the global batch of `step`."""
        turn = self.turn(step)
        bucket = self.trained[turn.bucket]
        draws = []
        for position in positions:
            epoch, place = divmod(turn.number * self.batch_size + position, len(bucket))
            index = bucket[int(self.order(turn.bucket, epoch)[place])]
            draws.append(Draw(index, step, position, self.batch_size, self.seed))
        return draws

    def turn(self, step: int) -> Turn:
        """Whose batch that of `step` is."""
        return turn_of(tuple(len(bucket) for bucket in self.trained), self.seed, step - self.first)

    def order(self, bucket: int, epoch: int) -> Tensor:
        """The permutation of a bucket's samples in one epoch: (n,) int64. The last two of each are kept."""
        kept = self.orders.setdefault(bucket, {})
        if epoch not in kept:
            if len(kept) > 1:
                kept.pop(min(kept), None)
            kept[epoch] = permutation(len(self.trained[bucket]), self.seed, epoch)
        return kept[epoch]


def split_batch(batch_size: int, ranks: int, micro_batch: int) -> int:
    """How many micro-batches a rank adds up in a step. Raises ValueError if a batch has no such parts."""
    share, rest = divmod(batch_size, ranks)
    if rest or share < 1:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by {ranks} ranks: "
            f"use {max(1, share) * ranks} or {(share + 1) * ranks}"
        )
    if micro_batch and share % micro_batch:
        raise ValueError(
            f"micro_batch={micro_batch} does not divide the {share} samples that a rank has in a "
            f"step (batch_size={batch_size}, {ranks} ranks)"
        )
    return share // micro_batch if micro_batch else 1


class Turn(NamedTuple):
    """Whose batch a step is."""

    bucket: int
    number: int  # how many batches the bucket gave before


@lru_cache(maxsize=8)
def turn_of(sizes: tuple[int, ...], seed: int, step: int) -> Turn:
    """Batch k of a bucket with n samples is due at (k + u) / n, u one draw a bucket; steps come by due time.

    After every sum(sizes) steps each bucket has given exactly its share, and in between it is never far off.
    """
    offsets = [Fraction(key("turn", seed, bucket) % 2**16, 2**16) for bucket in range(len(sizes))]
    # a time by which no more than `step` batches are due, and how many of each bucket those are
    time = Fraction(max(0, step - len(sizes)), sum(sizes))
    given = [max(0, math.ceil(time * size - u)) for size, u in zip(sizes, offsets, strict=True)]
    waiting = [((given[k] + offsets[k]) / size, k) for k, size in enumerate(sizes) if size]
    heapq.heapify(waiting)
    for _ in range(step - sum(given)):
        due, bucket = waiting[0]
        given[bucket] += 1
        heapq.heapreplace(waiting, (due + Fraction(1, sizes[bucket]), bucket))
    bucket = waiting[0][1]
    return Turn(bucket, given[bucket])


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the `length` samples of a bucket in one epoch: (length,) int64."""
    return torch.randperm(length, generator=generator("order", seed, epoch))


def hold_out(
    buckets: Sequence[Sequence[int]], count: int
) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """The buckets without `count` samples that are evenly spread over all of them, and those samples."""
    if not count:
        return buckets, [[] for _ in buckets]
    everything = sorted(index for bucket in buckets for index in bucket)
    held = {everything[place] for place in spread(len(everything), count)}
    kept = [[index for index in bucket if index not in held] for bucket in buckets]
    return kept, [[index for index in bucket if index in held] for bucket in buckets]


def spread(length: int, count: int) -> list[int]:
    """`count` indices, or all, evenly spread and always the same: what previews and measurements look at."""
    count = min(length, count)
    return [(i * length + key("spread", i) % length) // count % length for i in range(count)]


def fixed_draws(buckets: Sequence[Sequence[int]], size: int = 32) -> Iterator[list[Draw]]:
    """Samples of a validation in lists of at most `size`, each of one bucket.

    A sample's noise is always the same, whatever the seed.
    """
    count, place = sum(map(len, buckets)), 0
    for bucket in buckets:
        for first in range(0, len(bucket), size):
            part = bucket[first : first + size]
            yield [Draw(index, 0, place + k, count, 0) for k, index in enumerate(part)]
            place += len(part)


def normal(draws: list[Draw], shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal draws, a row per sample, each from the sample's own counter: (B, *shape) float32."""
    return torch.stack([torch.randn(shape, generator=draw.generator(purpose)) for draw in draws])


def uniform(draws: list[Draw], purpose: str) -> Tensor:
    """Uniform draws in [0, 1), one per sample, each from the sample's own counter: (B,) float64."""
    return torch.stack(
        [torch.rand((), dtype=torch.float64, generator=draw.generator(purpose)) for draw in draws]
    )


def choose(draws: list[Draw], count: int, purpose: str) -> list[int]:
    """One of `count` things for each sample, each as likely, from the sample's own counter."""
    return [0] * len(draws) if count == 1 else (uniform(draws, purpose) * count).long().tolist()
