"""Which samples make which batch, and that neither ranks nor threads change it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from ldm.diffusion.noise import key
from train.batches.plan import Draw, Plan, fixed_draws, normal, spread, turn_of, uniform
from train.batches.readahead import ReadAhead


def indices(draws: list[Draw]) -> list[int]:
    return [draw.index for draw in draws]


def test_every_epoch_is_a_permutation_and_batches_cross_its_border():
    plan = Plan([range(10)], batch_size=4, seed=1)
    run = [index for step in range(5) for index in indices(plan.batch(step))]  # two epochs of 10
    assert sorted(run[:10]) == sorted(run[10:]) == list(range(10))
    assert run[:10] != run[10:]
    assert indices(Plan([range(10)], batch_size=4, seed=2).batch(0)) != run[:4]


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(indices(Plan([range(3)], batch_size=6, seed=0).batch(0))) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 0), (1, 3), (2, 0), (2, 2), (3, 1), (6, 2)])
def test_ranks_and_micro_batches_are_slices_of_one_batch(ranks, micro_batch):
    whole = Plan([range(100)], batch_size=12, seed=3).batch(7)
    plan = Plan([range(100)], batch_size=12, seed=3, ranks=ranks, micro_batch=micro_batch)
    shared = [
        draw for rank in range(ranks) for m in range(plan.micro_batches) for draw in plan.micro(7, m, rank)
    ]
    assert shared == whole
    torch.testing.assert_close(
        normal(shared, (2, 3), "noise"), normal(whole, (2, 3), "noise"), rtol=0, atol=0
    )


def test_draws_are_counted_by_purpose_step_and_position():
    first, second = Plan([range(9)], batch_size=2, seed=0).batch(4)
    rows = normal([first, second], (50,), "noise")
    assert torch.equal(rows[0], normal([first], (50,), "noise")[0])
    for other in (normal([first], (50,), "posterior")[0], rows[1]):
        assert not torch.equal(rows[0], other)
    assert 0 <= uniform([first], "drop").item() < 1


class Reader:
    def batch(self, draws: list[Draw]) -> dict[str, Tensor]:
        return {"index": torch.tensor(indices(draws)), "noise": normal(draws, (2,), "noise")}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_neither_order_nor_content(workers):
    plan = Plan([range(7)], batch_size=4, seed=0, ranks=2, micro_batch=1)
    with ReadAhead(Reader(), plan, rank=1, step=5, workers=workers) as batches:
        for step in range(5, 9):
            for micro in range(2):
                batch, draws = batches.next(), plan.micro(step, micro, rank=1)
                assert batch["index"].tolist() == indices(draws)
                assert torch.equal(batch["noise"], normal(draws, (2,), "noise"))


@pytest.mark.parametrize(("length", "count"), [(1, 1), (5, 8), (100, 8), (8, 8), (7, 3)])
def test_spread_picks_different_samples(length, count):
    picked = spread(length, count)
    assert picked == sorted(set(picked))
    assert len(picked) == min(length, count)
    assert all(0 <= index < length for index in picked)


@pytest.mark.parametrize(("length", "held_out"), [(10, 3), (1000, 64), (5, 4)])
def test_held_out_samples_are_in_no_batch(length, held_out):
    """And every other one is in each epoch."""
    plan = Plan([range(length)], batch_size=1, seed=0, held_out=held_out)
    rest = sorted(set(range(length)) - set(spread(length, held_out)))
    epochs = [index for step in range(2 * len(rest)) for index in indices(plan.batch(step))]
    assert sorted(epochs[: len(rest)]) == sorted(epochs[len(rest) :]) == rest


def test_draws_of_a_validation_are_fixed():
    """The same noise for a sample whatever the size of the lists; a list is of one bucket."""
    small, large = (list(fixed_draws([[4, 9, 2], [7, 5]], size)) for size in (2, 32))
    assert [indices(draws) for draws in small] == [[4, 9], [2], [7, 5]]
    assert [indices(draws) for draws in large] == [[4, 9, 2], [7, 5]]
    small = [draw for draws in small for draw in draws]
    assert small == [draw for draws in large for draw in draws]
    assert len({draw.generator("noise").initial_seed() for draw in small}) == 5


BUCKETS = [range(12), [], range(12, 43), range(43, 48)]


def test_a_batch_is_of_one_bucket_and_buckets_come_as_often_as_they_have_samples():
    """After 48 batches of one sample, and after any multiple of that, each sample came equally often."""
    plan = Plan(BUCKETS, batch_size=1, seed=5)
    run = [index for step in range(3 * 48) for index in indices(plan.batch(step))]
    for epoch in range(3):
        assert sorted(run[48 * epoch : 48 * (epoch + 1)]) == list(range(48))
    plan = Plan(BUCKETS, batch_size=8, seed=5)
    seen = []
    for step in range(48):
        batch = indices(plan.batch(step))
        assert any(set(batch) <= set(bucket) for bucket in BUCKETS)
        seen += batch
    assert sorted(seen) == sorted(list(range(48)) * 8)


def test_turns_come_by_due_time_and_are_a_function_of_the_step():
    """Against all due times sorted; asked in any order, and far on, at once."""
    sizes = (12, 0, 31, 5)
    due = sorted(
        ((k + Fraction(key("turn", 7, bucket) % 2**16, 2**16)) / size, bucket, k)
        for bucket, size in enumerate(sizes)
        if size
        for k in range(5 * size)
    )
    for step in reversed(range(4 * 48)):
        assert turn_of(sizes, 7, step) == (due[step][1], due[step][2])
    far = [turn_of(sizes, 7, 48 * 10**9 + step) for step in range(48)]
    assert far == [(bucket, 10**9 * sizes[bucket] + number) for _, bucket, number in due[:48]]


def test_held_out_samples_are_sorted_by_bucket():
    plan = Plan(BUCKETS, batch_size=4, seed=0, held_out=12)
    assert sum(map(len, plan.validation)) == 12
    for bucket, trained, held in zip(BUCKETS, plan.trained, plan.validation, strict=True):
        assert sorted([*trained, *held]) == list(bucket)


def test_buckets_that_came_later_begin_with_their_first_epoch():
    """The samples are those of the first steps; what is drawn for them is not."""
    plan, later = (Plan(BUCKETS, batch_size=4, seed=5, first=first) for first in (0, 37))
    for step in range(30):
        assert indices(later.batch(37 + step)) == indices(plan.batch(step))
    assert later.batch(37)[0].step == 37


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 10}, "validation_samples=10 of 10 samples leave none to train on"),
        ({"buckets": [range(0), []]}, "no sample"),
        ({"ranks": 3}, "batch_size=8 is not divisible by 3 ranks: use 6 or 9"),
        ({"ranks": 2, "micro_batch": 3}, "micro_batch=3 does not divide the 4 samples"),
    ],
)
def test_what_does_not_divide_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"buckets": [range(10)], "batch_size": 8, "seed": 0, **options})
