"""The average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.ema import EMA


def test_decay_warms_up():
    """After constant weights w the average is w; the first updates weigh (1 + t) / (10 + t)."""
    module = nn.Linear(3, 2, bias=False)
    start = module.weight.detach().clone()
    ema = EMA(module, decay=0.5)
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
    ema = EMA(module, decay=0.9999)
    nn.init.zeros_(module.weight)
    for t in range(10**6, 10**6 + 200):
        ema.update(t)
    torch.testing.assert_close(ema.average["weight"], torch.full((2, 2), 0.9999**200))


def test_applied_puts_the_weights_back_even_after_an_error():
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.9)
    with torch.no_grad():
        module.weight.mul_(3)
    own = module.weight.detach().clone()
    with pytest.raises(AttributeError), ema.applied():
        assert torch.equal(module.weight, ema.average["weight"]) and module.typo  # noqa: PT018
    assert torch.equal(module.weight, own)


def test_no_decay_is_the_last_weights_and_frozen_parameters_are_left_out():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    ema = EMA(module, decay=0.0)
    nn.init.ones_(module.weight)
    ema.update(0)
    assert ema.state_dict().keys() == {"weight"}
    torch.testing.assert_close(ema.average["weight"], torch.ones(2, 3))


def test_errors():
    with pytest.raises(ValueError, match=r"ema_decay=1\.5"):
        EMA(nn.Linear(1, 1), 1.5)
    with pytest.raises(
        ValueError, match=r"1 tensors differ, the first is weight \(file \(3, 2\), model \(2, 3\)\)"
    ):
        EMA(nn.Linear(3, 2), 0.9).load_state_dict({"weight": torch.ones(3, 2), "bias": torch.ones(2)})
