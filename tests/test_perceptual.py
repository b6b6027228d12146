"""LPIPS on VGG16, with random weights: names, the distance written out, and what files may hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.perceptual import LPIPS
from ldm.files.checkpoint import empty_model
from train.measure.features import digest, open_weights, perceptual_distance

CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
CONVOLUTIONS |= dict.fromkeys((17, 19, 21, 24, 26, 28), 512)  # number in torchvision's vgg16 -> channels
ENDS = (2, 7, 14, 21, 28)  # the last convolution of each stage


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random VGG16 weights of a size that keeps features alive, a classifier beside them, and heads."""
    rng = torch.Generator().manual_seed(0)
    vgg, channels = {}, 3
    for number, out in CONVOLUTIONS.items():
        scale = (2 / (9 * channels)) ** 0.5
        vgg[f"features.{number}.weight"] = torch.randn(out, channels, 3, 3, generator=rng) * scale
        vgg[f"features.{number}.bias"] = torch.randn(out, generator=rng) * 0.1
        channels = out
    vgg["classifier.6.bias"] = torch.zeros(3)
    heads = {
        f"lin{k}.model.1.weight": torch.rand(1, CONVOLUTIONS[end], 1, 1, generator=rng)
        for k, end in enumerate(ENDS)
    }
    return vgg, heads


def written_out(a: Tensor, b: Tensor, vgg: dict[str, Tensor], heads: dict[str, Tensor] | None) -> Tensor:
    """Zhang et al. 2018, eq. 1, in float64."""
    mean = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    deviation = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    x, y = ((image.double() - mean) / deviation for image in (a, b))
    total = torch.zeros(len(a), dtype=torch.float64)
    for number in CONVOLUTIONS:
        if number - 3 in ENDS:
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        weight, bias = (vgg[f"features.{number}.{name}"].double() for name in ("weight", "bias"))
        x, y = (F.conv2d(image, weight, bias, padding=1).clamp_min(0) for image in (x, y))
        if number in ENDS:
            unit = [image / (image.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for image in (x, y)]
            squares = (unit[0] - unit[1]) ** 2
            if heads is not None:
                squares = squares * heads[f"lin{ENDS.index(number)}.model.1.weight"].double()
            total += squares.sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("with_heads", [True, False])
def test_lpips_is_its_formula(weights, with_heads):
    vgg, heads = weights[0], weights[1] if with_heads else None
    lpips = LPIPS()
    lpips.load(vgg, heads)
    a, b = torch.rand(2, 3, 16, 21) * 2 - 1, torch.rand(2, 3, 16, 21) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(lpips(a, b).double(), written_out(a, b, vgg, heads), rtol=1e-4, atol=1e-5)
        assert lpips(a, a).tolist() == [0, 0]
        torch.testing.assert_close(lpips(a, b), lpips(b, a))


def test_the_gradient_is_finite_where_all_features_are_dead():
    lpips = LPIPS()
    for p in lpips.parameters():
        torch.nn.init.zeros_(p)
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(image, torch.ones(1, 3, 16, 16)).sum().backward()
    assert image.grad.isfinite().all()


def test_files(tmp_path, weights, monkeypatch):
    """safetensors and .pth give the same function; a pickle that is more than tensors is not opened."""
    vgg, heads = weights
    save_file(vgg, tmp_path / "vgg16.safetensors")
    torch.save(heads, tmp_path / "vgg.pth")
    distance = perceptual_distance(str(tmp_path / "vgg16.safetensors"), str(tmp_path / "vgg.pth"))
    a = (torch.rand(1, 3, 16, 16) * 2 - 1).requires_grad_()
    distance(a, torch.zeros_like(a)).sum().backward()
    assert a.grad.abs().sum() > 0
    assert digest(str(tmp_path / "vgg.pth")) != digest(str(tmp_path / "vgg16.safetensors"))
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"module\.pth is not a whole file of tensors alone"):
        open_weights(str(tmp_path / "module.pth"))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        open_weights(str(tmp_path / "list.pth"))
    with pytest.raises(ValueError, match=r"no such file .*missing"):
        open_weights(str(tmp_path / "missing.pth"))
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(ValueError, match=r"expected weights as \.safetensors or \.pth"):
        open_weights(str(tmp_path / "weights.onnx"))


def test_weights_of_something_else_are_refused(weights):
    (vgg, heads), empty = weights, empty_model(lambda config: LPIPS(), None)
    with pytest.raises(ValueError, match=r"vgg holds nothing as features\.28\.bias: expected .*\(512,\)"):
        empty.load({name: value for name, value in vgg.items() if name != "features.28.bias"})
    with pytest.raises(ValueError, match=r"lpips_heads holds \(1, 3, 1, 1\) as lin2\.model\.1\.weight"):
        empty.load(vgg, {**heads, "lin2.model.1.weight": torch.ones(1, 3, 1, 1)})
