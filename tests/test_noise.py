"""What an image gets depends on its own seed and step alone."""

import torch

from ldm.diffusion.noise import generator, key, start_noise, step_noise

SHAPE = (4, 5, 7)


def test_start_noise_is_that_of_a_cpu_generator():
    rows = start_noise([3, 0, 2**63], SHAPE)
    assert rows.shape == (3, *SHAPE)
    assert rows.dtype == torch.float32
    for row, seed in zip(rows, [3, 0, 2**63]):
        assert torch.equal(
            row, torch.randn((1, *SHAPE), generator=torch.Generator("cpu").manual_seed(seed))[0]
        )


def test_noise_does_not_depend_on_the_batch():
    """Alone, in a batch of three and in another order: the same bits."""
    together, swapped = step_noise([7, 8, 9], SHAPE), step_noise([9, 7], SHAPE)
    for step in (5, 0, 5, 31):  # nor on what was asked before
        assert torch.equal(step_noise([8], SHAPE)(step)[0], together(step)[1])
        assert torch.equal(swapped(step)[0], together(step)[2])
    assert torch.equal(start_noise([9, 7], SHAPE), start_noise([7, 8, 9], SHAPE)[[2, 0]])


def test_draws_differ():
    noise = step_noise([1, 2], SHAPE)
    draws = [*noise(0), *noise(1), *start_noise([1, 2], SHAPE)]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(draws) for b in draws[:i])
    many = torch.stack([noise(step) for step in range(100)])
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_key_separates_its_parts():
    keys = {
        key(*parts)
        for parts in [(1, 2), (12,), ("1", 2), (1, "2"), ("a", "b"), ("ab",), ("a, b",), (), (-1,), (1,)]
    }
    assert len(keys) == 10
    assert all(0 <= k < 2**63 for k in keys)


def test_key_is_the_same_in_every_process():
    """Pinned: another value would change every picture and every training run."""
    assert key("step", 7, 3) == 2382954656077251849
    assert torch.equal(torch.rand(3, generator=generator("a", 1)), torch.rand(3, generator=generator("a", 1)))
