"""Linear maps in 8 bits: exact about their numbers, near to float32, and fit for torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.drawing.optimize import quantize_maps
from ldm.model.quantized import MAPS, SCALED, STEP, quantize, why_not
from ldm.pipeline import LatentDiffusionPipeline
from tests.tiny import tiny_pipeline

ERROR = {"int8": 0.01, "fp8": 0.04}  # relative, of normal numbers


def layer_of(inputs=64, outputs=48, *, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).eval()


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_map_is_the_product_of_its_scaled_numbers(kind, bias):
    layer, x = layer_of(bias=bias), torch.randn(3, 7, 64)
    weight, by_channel = SCALED[kind](layer.weight.detach())
    values, by_row = SCALED[kind](x.flatten(0, 1))
    true = (values.double() * by_row) @ (weight.double() * by_channel).T
    if bias:
        true = true + layer.bias.detach().double()
    assert quantize(layer, kind)
    with torch.no_grad():
        answer = layer(x)
    assert answer.shape == (3, 7, 48)
    assert answer.dtype == torch.float32
    assert relative(answer.flatten(0, 1), true) < (1e-6 if kind == "int8" else 3e-3)  # fp8 answers in bf16


@pytest.mark.parametrize("kind", MAPS)
def test_the_error_is_that_of_8_bits(kind):
    layer, x = layer_of(320, 640), torch.randn(2, 100, 320)
    with torch.no_grad():
        true = layer(x)
        assert quantize(layer, kind)
        error = relative(layer(x), true)
    assert 1e-4 < error < ERROR[kind]


@pytest.mark.parametrize("kind", MAPS)
def test_a_row_is_scaled_by_itself(kind):
    """A row a thousand times as large does not cost the others their precision, and zeros are zeros."""
    layer, x = layer_of(bias=False), torch.randn(32, 64)
    assert quantize(layer, kind)
    with torch.no_grad():
        alone = layer(x)
        x[3] *= 1000
        x[5] = 0
        beside = layer(x)
    others = [k for k in range(32) if k not in (3, 5)]
    assert torch.equal(alone[others], beside[others])
    assert torch.count_nonzero(beside[5]) == 0


@pytest.mark.parametrize("kind", MAPS)
def test_few_rows_and_odd_sizes_stay_as_they_are(kind):
    layer, x = layer_of(), torch.randn(STEP, 64)
    with torch.no_grad():
        true = layer(x)
        assert quantize(layer, kind)
        assert torch.equal(layer(x), true)
    assert not quantize(layer_of(60), kind)
    assert not quantize(layer_of(64, 47), kind)


@pytest.mark.parametrize("kind", MAPS)
def test_the_weights_stay_as_they_are(kind):
    layer = layer_of()
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    assert quantize(layer, kind)
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in layer.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAPS)
def test_it_compiles_without_a_break(kind):
    layer, x = layer_of(), torch.randn(40, 64)
    assert quantize(layer, kind)
    with torch.no_grad():
        eager = layer(x)
        compiled = torch.compile(nn.Sequential(layer), backend="aot_eager", fullgraph=True)(x)
    assert relative(compiled, eager) < 1e-6


def test_fp8_on_a_cpu_is_refused_before_anything_changes():
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="quantize=fp8: it is for NVIDIA GPUs and the models are on cpu"):
        pipe.optimize(quantize="fp8")
    assert not pipe.optimized
    with pytest.raises(ValueError, match="quantize='int4' is unknown: expected one of int8, fp8"):
        pipe.optimize(quantize="int4")


def test_the_maps_are_those_of_transformers_but_of_the_text():
    unet = tiny_pipeline().unet
    quantize_maps(unet, "int8")
    mapped = {name for name, part in unet.named_modules() if "forward" in vars(part)}
    assert all(".transformer_blocks." in name or ".proj_" in name for name in mapped)
    assert not any(name.endswith(("attn2.to_k", "attn2.to_v")) for name in mapped)
    assert any(name.endswith("attn2.to_q") for name in mapped)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MAPS)
def test_pictures_stay_within_35_db(kind):
    pipe = LatentDiffusionPipeline.bundled().to("cuda")
    if reason := why_not(kind, pipe.device):
        pytest.skip(reason)
    asked = {"seed": [1, 2], "output_type": "pt"}
    prompts = ["a red fox in snow", "two blue boats on a beach"]
    plain, coarse = pipe(prompts, **asked).images, pipe.optimize(quantize=kind)(prompts, **asked).images
    assert (-10 * (plain - coarse).square().mean((1, 2, 3)).log10()).min() > 35
