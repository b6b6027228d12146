"""compile: true: a compiled step is the same step, and a run of such steps repeats and resumes."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch

from ldm.model.compiled import CompiledInTraining
from ldm.model.unet import UNet
from tests.test_fit import UNET, autoencoder, diffusion_recipe, latents, losses, state, stop_at
from train.fit.checkpoint import load_checkpoint
from train.fit.loop import fit
from train.tasks.diffusion import LatentDiffusion, check_compile

__all__ = ["autoencoder"]  # a fixture

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile for the CPU")


FEW_BLOCKS = replace(
    UNET,
    block_out_channels=(16,),
    down_block_types=("DownBlock2D",),
    mid_block_type=None,
    up_block_types=("CrossAttnUpBlock2D",),
)


def gradients(unet: UNet, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Of a fixed step."""
    draw = torch.Generator().manual_seed(0)
    xt, context = (torch.randn(shape, generator=draw) for shape in ((4, 4, 8, 6), (4, 3, 24)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        prediction = unet(xt, torch.tensor([3, 20, 400, 700]), context)
    (prediction.float() - 1).square().mean().backward()
    return {name: p.grad for name, p in unet.named_parameters()}


@pytest.mark.slow
def test_compiled_gradients_in_float32_are_the_plain_ones():
    """By the graphs alone; inductor's kernels, which take ten seconds a block, are in the next test."""
    plain = UNet(UNET)
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks(backend="aot_eager")
    found = gradients(compiled)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.slow
@needs_a_compiler
def test_compiled_fit_ends_as_the_plain_one_and_resumes_bit_for_bit(tmp_path, autoencoder):
    def train(name: str, compile: bool, stop_after: int = 0) -> None:
        recipe = diffusion_recipe(tmp_path / name, steps=6, compile=compile, unet=FEW_BLOCKS)
        task = LatentDiffusion(recipe, autoencoder, latents())
        stop_at(task, stop_after)
        fit(task, recipe)

    train("plain", compile=False)
    train("whole", compile=True)
    train("halves", compile=True, stop_after=2)
    train("halves", compile=True)
    assert state(tmp_path / "halves", 6) == state(tmp_path / "whole", 6)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    plain, whole = (
        load_checkpoint(tmp_path / name / "checkpoints/step-00000006").tensors["model"]
        for name in ("plain", "whole")
    )
    for name, value in plain.items():
        if "k_proj.bias" not in name:  # it has no effect (Adam makes steps of its gradient's rounding errors)
            torch.testing.assert_close(whole[name], value, atol=5e-5, rtol=1e-3, msg=name)


def test_a_copy_has_a_forward_of_its_own():
    """Rank 0 keeps a copy of the module that is trained in shards."""
    layer = torch.nn.Linear(2, 1)
    layer.forward = CompiledInTraining(layer, "eager")
    twin = copy.deepcopy(layer)
    torch.nn.init.zeros_(twin.weight)
    x = torch.ones(1, 2)
    assert torch.equal(twin.eval()(x)[0], twin.bias)
    assert not torch.equal(layer.eval()(x)[0], layer.bias)


def test_compile_with_bf16_on_the_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = diffusion_recipe(tmp_path, compile=True)
    check_compile(recipe)  # float32
    with pytest.raises(ValueError, match=r"compile=true with precision=bf16.* changes the gradients"):
        check_compile(replace(recipe, precision="bf16"))
    check_compile(replace(recipe, precision="bf16", compile=False))
