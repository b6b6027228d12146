"""The average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from train.fit.ema import EMA, classic, exponent, power, rebuild


def test_decay_warms_up():
    """After constant weights w the average is w; the first updates weigh (1 + t) / (10 + t)."""
    module = nn.Linear(3, 2, bias=False)
    start = module.weight.detach().clone()
    ema = EMA(module, classic(0.5))
    expected = start.clone()
    for t in range(20):
        with torch.no_grad():
            module.weight += 1
        ema.update(t)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)


def test_bfloat16_weights_move():
    """An average kept in bfloat16 would stand still: the steps are below its last bit."""
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    ema = EMA(module, classic(0.9999))
    nn.init.zeros_(module.weight)
    for t in range(10**6, 10**6 + 200):
        ema.update(t)
    torch.testing.assert_close(ema.average["weight"], torch.full((2, 2), 0.9999**200))


def test_applied_puts_the_weights_back_even_after_an_error():
    module = nn.Linear(3, 2)
    ema = EMA(module, classic(0.9))
    with torch.no_grad():
        module.weight.mul_(3)
    own = module.weight.detach().clone()
    with pytest.raises(AttributeError), ema.applied():
        assert torch.equal(module.weight, ema.average["weight"]) and module.typo  # noqa: PT018
    assert torch.equal(module.weight, own)


def test_no_decay_is_the_last_weights_and_frozen_parameters_are_left_out():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    ema = EMA(module, classic(0.0))
    nn.init.ones_(module.weight)
    ema.update(0)
    assert ema.state_dict().keys() == {"weight"}
    torch.testing.assert_close(ema.average["weight"], torch.ones(2, 3))


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_exponents_of_widths(width, gamma):
    """The paper's figures, and the definition: the standard deviation of time^gamma on [0, 1]."""
    found = exponent(width)
    assert found == pytest.approx(gamma, abs=5e-3)
    mean, square = (found + 1) / (found + 2), (found + 1) / (found + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(width)


def weights_over_time(updates: int) -> Tensor:
    """(updates, 3): a walk, a curve and a straight line."""
    time = torch.arange(1, updates + 1) / updates
    walk = torch.randn(updates, generator=torch.Generator().manual_seed(0)).cumsum(0) / updates**0.5
    return torch.stack([walk, (5 * time).sin(), time], dim=1)


def averages(path: Tensor, width: float) -> Tensor:
    """(updates, 3): the power-function average after every update."""
    module = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3))})
    ema, result = EMA(module, power(width)), []
    for t, value in enumerate(path):
        module["w"].data.copy_(value)
        ema.update(t)
        result.append(ema.average["w"].clone())
    return torch.stack(result)


def test_a_power_average_weighs_by_time_to_the_gamma():
    """The recursion is the paper's integral, up to the width of an update."""
    path, gamma = weights_over_time(2000), exponent(0.1)
    share = torch.arange(1, 2001, dtype=torch.float64) ** gamma
    expected = (share[:, None] * path).sum(0) / share.sum()
    torch.testing.assert_close(averages(path, 0.1)[-1], expected.float(), atol=2e-3, rtol=0)
    assert averages(path, 0.1)[-1, 2] == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)  # the line's mean


@pytest.mark.parametrize("width", [0.04, 0.07, 0.1, 0.15])
def test_any_width_is_rebuilt_from_snapshots_of_two(width):
    path = weights_over_time(2000)
    kept = {each: averages(path, each) for each in (0.05, 0.1)}
    snapshots = [(t, each) for t in range(100, 2001, 100) for each in kept]
    shares = rebuild(snapshots, width, 2000)
    rebuilt = sum(
        share * kept[each][t - 1].double() for share, (t, each) in zip(shares, snapshots, strict=True)
    )
    torch.testing.assert_close(rebuilt.float(), averages(path, width)[-1], atol=5e-3, rtol=0)
    nearest = min((kept[each][-1] - averages(path, width)[-1]).abs().max().item() for each in kept)
    assert width in kept or nearest > 2 * (rebuilt - averages(path, width)[-1]).abs().max()


def test_errors():
    with pytest.raises(ValueError, match=r"width=0\.3: expected more than 0, at most 0\.28"):
        exponent(0.3)
    with pytest.raises(ValueError, match=r"ema_decay=1\.5"):
        classic(1.5)
    with pytest.raises(
        ValueError, match=r"1 tensors differ, the first is weight \(file \(3, 2\), model \(2, 3\)\)"
    ):
        EMA(nn.Linear(3, 2), classic(0.9)).load_state_dict(
            {"weight": torch.ones(3, 2), "bias": torch.ones(2)}
        )
