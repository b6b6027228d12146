"""Is a picture a copy of one that training saw? Its nearest ones, and how near chance alone would bring it.

A picture's ratio is its distance to the nearest training picture over the mean distance to the AROUND
nearest, as Carlini et al. (2023) have it: a copy is far nearer to one of them than to the others. What ratio
is too low is read off training pictures, each against all others: to these it is as new as a picture that
nobody learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.metrics.audit import AROUND
from ldm.metrics.kernels import squared_distances

SIGNIFICANT = 0.01  # the chance below which so many copies are none


class Neighbours:
    """The nearest rows to some queries among rows that come by in parts and are not kept."""

    def __init__(self, queries: Tensor, count: int) -> None:
        """queries: (Q, D) float32. count: neighbours of each."""
        self.queries, self.count, self.seen = queries, count, 0
        self.squares = queries.new_full((len(queries), count), math.inf)  # (Q, count), the nearest first
        self.places = torch.full((len(queries), count), -1)

    def add(self, rows: Tensor, places: Tensor) -> None:
        """rows: (N, D) float32. places: (N,) int64, what each is called."""
        squares = torch.cat([self.squares, squared_distances(self.queries, rows)], 1)
        every = torch.cat([self.places, places.expand(len(self.queries), -1)], 1)
        nearest = squares.topk(self.count, largest=False)
        self.squares, self.places = nearest.values, every.gather(1, nearest.indices)
        self.seen += len(rows)


class Nearness(NamedTuple):
    """Of some pictures."""

    ratio: Tensor  # (N,) distance to the nearest over the mean of the AROUND nearest
    place: Tensor  # (N,) int64: which one is nearest


def nearness(neighbours: Neighbours, rows: slice, own: Tensor | None = None) -> Nearness:
    """Of the queries at `rows`. own: (N,) the places of themselves, which are no neighbours of theirs.

    Raises ValueError if so few have come by that nothing is left to compare with.
    """
    if neighbours.seen < 3:
        raise ValueError(f"{neighbours.seen} training pictures are too few to compare with: give 3 or more")
    squares, places = neighbours.squares[rows].double(), neighbours.places[rows]
    if own is not None:
        squares = squares.masked_fill(places == own[:, None], math.inf)
        order = squares.argsort(dim=1, stable=True)
        squares, places = squares.gather(1, order), places.gather(1, order)
    count = min(AROUND, neighbours.seen - (own is not None))
    distances = squares[:, :count].sqrt()
    mean = distances.mean(1)
    return Nearness(torch.where(mean > 0, distances[:, 0] / mean, 0.0), places[:, 0])


def chance_of(copies: int, count: int, rank: int, known: int) -> float:
    """That so many or more of `count` new values lie below the rank-th smallest of `known` others, all alike.

    The share of values below the rank-th smallest is Beta(rank, known + 1 - rank) distributed (Wilks 1941),
    so the number of them is beta-binomial. rank: from 1.
    """
    a, b = rank, known + 1 - rank
    beta = lambda x, y: math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)
    terms = (
        -math.log(count + 1) - beta(k + 1, count - k + 1) + beta(k + a, count - k + b) - beta(a, b)
        for k in range(copies, count + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


class Verdict(NamedTuple):
    """On pictures by one way of looking."""

    threshold: float  # a ratio below it tells a copy
    rank: int  # it is this smallest ratio of training pictures against the others
    known: int  # of so many
    found: float  # share of training pictures that are told as copies of themselves: what the way can see
    nearness: Nearness  # of the pictures

    def copies(self, rows: Sequence[int]) -> int:
        """How many of the pictures at `rows` are told."""
        return int((self.nearness.ratio[list(rows)] < self.threshold).sum())

    def chance_of(self, copies: int, rows: Sequence[int]) -> float:
        """That so many or more are told, of pictures that are as new as training pictures to each other."""
        return chance_of(copies, len(rows), self.rank, self.known)

    def chance(self, rows: Sequence[int]) -> float:
        """The same of as many as are told."""
        return self.chance_of(self.copies(rows), rows)


def judge(neighbours: Neighbours, own: Tensor, quantile: float) -> Verdict:
    """neighbours: of the pictures, then of the training pictures at the places own (K,).

    quantile: of the ratios of these against all others, at which the threshold lies.
    """
    count = len(neighbours.queries) - len(own)
    known = slice(count, None)
    apart = nearness(neighbours, known, own).ratio.sort().values
    rank = max(1, round(quantile * len(own)))
    threshold = apart[rank - 1].item()
    themselves = nearness(neighbours, known)
    found = ((themselves.ratio < threshold) & (themselves.place == own)).double().mean().item()
    return Verdict(threshold, rank, len(own), found, nearness(neighbours, slice(count)))
