"""AdamW and Muon."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.model.unet import UNet
from tests.test_fit import UNET
from train.fit import optim
from train.fit.optim import (
    Muon,
    OptimConfig,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    polar_factor,
)

MUON = OptimConfig(lr=0.01, optimizer="muon")


def published(matrix: Tensor) -> Tensor:
    """Jordan et al. 2024, "Muon": five steps on the matrix itself, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(24, 150), (150, 24), (40, 40), (1, 7)])
def test_polar_factor(shape):
    """The published iteration, and what it is for: the singular vectors stay, their values come near to 1."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor, other = polar_factor(torch.stack([matrix, -3 * matrix]))
    torch.testing.assert_close(other, -factor)
    torch.testing.assert_close(factor.double(), published(matrix), atol=1e-4, rtol=1e-3)
    product = factor @ matrix.mT  # U Vt V S Ut: symmetric, no direction turned round
    torch.testing.assert_close(product, product.mT, atol=1e-3, rtol=1e-3)
    assert ((torch.linalg.svdvals(factor) > 0.3) & (torch.linalg.svdvals(factor) < 1.3)).all()


def test_which_parameters_muon_moves():
    """Kernels and matrices between hidden layers: neither the ends, nor tables, nor vectors."""
    module = UNet(replace(UNET, block_out_channels=(32, 64), cross_attention_dim=32, num_class_embeds=40))
    optimizer = build_optimizer(module, MUON)
    names = {p: name for name, p in module.named_parameters()}
    moved = {names[p] for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert {"mid_block.resnets.0.conv1.weight", "time_embedding.linear_2.weight"} < moved
    assert not moved & {"conv_in.weight", "conv_out.weight", "class_embedding.weight"}
    assert not [name for name in moved if name.endswith("bias") or "norm" in name]


def test_a_step_of_muon():
    """The step has AdamW's size whatever the gradient's, and what Muon does not move AdamW does."""
    module = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 3, 3))
    stock = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 3, 3))
    stock.load_state_dict(module.state_dict())
    before = module[0].weight.detach().clone()
    for net, config in ((module, MUON), (stock, replace(MUON, optimizer="adamw"))):
        optimizer = build_optimizer(net, config)
        assert isinstance(optimizer, Muon) == (net is module)
        torch.manual_seed(0)
        for p in net.parameters():
            p.grad = 1e-3 * torch.randn_like(p)
        optimizer.step()
    moved = (module[0].weight - before * (1 - 0.01 * 0.01)) / 0.01
    # singular values near 1 spread over all entries: a mean square of min / (rows columns), times 0.04 max
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)
    for name in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(module.state_dict()[name], stock.state_dict()[name])


def test_muon_steps_as_far_in_rare_directions():
    """A gradient of 32 directions, half of them with 3 % of the strength of the others."""
    u, v = (
        torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(k)))[0] for k in (0, 1)
    )
    strength = torch.ones(32)
    strength[16:] = 0.03

    def share_of_rare(optimizer: Literal["adamw", "muon"]) -> float:
        layer = nn.Linear(32, 32, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = u @ torch.diag(strength) @ v.T
        build_optimizer(layer, replace(MUON, optimizer=optimizer, weight_decay=0.0)).step()
        along = -(u.T @ (layer.weight - before) @ v).diagonal()
        return (along[16:].mean() / along[:16].mean()).item()

    assert share_of_rare("muon") > 0.6
    assert share_of_rare("adamw") < 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_the_state_goes_on_by_name(tmp_path, optimizer):
    """3 steps, through a file into a new module, and 3 more are 6, bit for bit."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra 8bit")
    config = OptimConfig(lr=0.01, optimizer=optimizer)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 32, 3))  # kernels above 4096, biases below
        module.to(memory_format=torch.channels_last)
        return module, build_optimizer(module, config)

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(2, 32, 7, 6, generator=torch.Generator().manual_seed(step))
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first = build(), build()
    train(*whole, range(6))
    train(*first, range(3))
    plain = {
        name: value.contiguous().clone() for name, value in optimizer_tensors(first[1], first[0]).items()
    }
    save_file(plain, tmp_path / "optimizer.safetensors")
    second = build()
    second[0].load_state_dict(first[0].state_dict())
    load_optimizer_tensors(second[1], second[0], load_file(tmp_path / "optimizer.safetensors"))
    train(*second, range(3, 6))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], value)
    if optimizer == "adamw8bit":
        assert whole[1].state[whole[0][0].weight]["state1"].dtype == torch.uint8


def test_8_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"adamw8bit needs bitsandbytes: pip install 'ldm\[8bit\]'"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="adamw8bit"))


def test_errors():
    with pytest.raises(ValueError, match=r"optim.momentum=1.0"):
        OptimConfig(momentum=1.0)
