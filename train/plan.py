"""Which samples make which batch: a pure function of (seed, step), so a resumed run needs no sampler state.

Batches run through the epochs without a gap: sample number n of the run is entry n % length of the
permutation of epoch n // length. Ranks and micro-batches are slices of the same global batch, so the order
of samples does not depend on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ldm.noise import generator, key


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
    """Sample order of a run over `length` samples, less those that are held out for validation."""

    length: int  # of the source
    batch_size: int  # samples an optimizer step, over all ranks
    seed: int
    ranks: int = 1
    micro_batch: int = 0  # samples a rank computes at a time; 0: its whole share
    held_out: int = 0  # samples, evenly spread, that are in no batch
    micro_batches: int = field(init=False, default=1)  # micro-batches a rank adds up in one optimizer step

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("the data holds no sample: nothing to train on")
        if self.held_out >= self.length:
            raise ValueError(
                f"validation_samples={self.held_out} of {self.length} samples leave none to train on"
            )
        share, rest = divmod(self.batch_size, self.ranks)
        if rest or share < 1:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by {self.ranks} ranks: "
                f"use {max(1, share) * self.ranks} or {(share + 1) * self.ranks}"
            )
        if self.micro_batch and share % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide the {share} samples that a rank has in a "
                f"step (batch_size={self.batch_size}, {self.ranks} ranks)"
            )
        object.__setattr__(self, "micro_batches", share // self.micro_batch if self.micro_batch else 1)

    def batch(self, step: int) -> list[Draw]:
        """The global batch of optimizer step `step`, from 0."""
        return [self.draw(step, position) for position in range(self.batch_size)]

    def draw(self, step: int, position: int) -> Draw:
        """The sample at one place of the global batch of `step`."""
        index = self.index(step * self.batch_size + position)
        return Draw(index, step, position, self.batch_size, self.seed)

    def index(self, number: int) -> int:
        """Source index of the sample that comes at place `number` of the whole run."""
        epoch, place = divmod(number, self.length - self.held_out)
        index = permutation(self.length - self.held_out, self.seed, epoch)[place]
        return int(trained(self.length, self.held_out)[index] if self.held_out else index)

    def micro(self, step: int, micro: int, rank: int) -> list[Draw]:
        """The slice of the global batch that `rank` computes as its micro-batch number `micro`."""
        size = self.batch_size // self.ranks // self.micro_batches
        first = (rank * self.micro_batches + micro) * size
        return [self.draw(step, position) for position in range(first, first + size)]


@lru_cache(maxsize=2)  # a batch touches two epochs at most unless the data is smaller than a batch
def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of `length` samples in one epoch: (length,) int64."""
    return torch.randperm(length, generator=generator("order", seed, epoch))


@lru_cache(maxsize=1)
def trained(length: int, held_out: int) -> Tensor:
    """Source indices, growing, without the `held_out` that `spread` picks: (length - held_out,) int64."""
    keep = torch.ones(length, dtype=torch.bool)
    keep[spread(length, held_out)] = False
    return keep.nonzero()[:, 0]


def spread(length: int, count: int) -> list[int]:
    """`count` indices, or all, evenly spread and always the same: what previews and measurements look at."""
    count = min(length, count)
    return [(i * length + key("spread", i) % length) // count % length for i in range(count)]


def fixed_draws(indices: Sequence[int], size: int = 32) -> Iterator[list[Draw]]:
    """Samples of a validation in lists of at most `size`: for each the same noise, whatever the seed."""
    for first in range(0, len(indices), size):
        part = range(first, min(first + size, len(indices)))
        yield [Draw(indices[place], 0, place, len(indices), 0) for place in part]


def normal(draws: list[Draw], shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal draws, a row per sample, each from the sample's own counter: (B, *shape) float32."""
    return torch.stack([torch.randn(shape, generator=draw.generator(purpose)) for draw in draws])


def uniform(draws: list[Draw], purpose: str) -> Tensor:
    """Uniform draws in [0, 1), one per sample, each from the sample's own counter: (B,) float64."""
    return torch.stack(
        [torch.rand((), dtype=torch.float64, generator=draw.generator(purpose)) for draw in draws]
    )
