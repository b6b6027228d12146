"""SSIM and MS-SSIM: against their formulas written out, and the laws they obey."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autoencoder.similarity import SCALES, ms_ssim, ssim


def pictures(height: int = 12, width: int = 13) -> tuple[Tensor, Tensor]:
    a = torch.rand(2, 3, height, width, dtype=torch.float64) * 2 - 1
    return a, (a + 0.4 * torch.randn_like(a)).clamp(-1, 1)


def written_out(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Wang et al. 2004, eq. 13, and 9 times 10, at each place of the window; a, b: (C, H, W)."""
    a, b = (a + 1) / 2, (b + 1) / 2  # luminances, black is 0
    gauss = [math.exp(-((k - 5) ** 2) / (2 * 1.5**2)) for k in range(11)]
    weights = torch.tensor([[x * y for x in gauss] for y in gauss], dtype=torch.float64)
    weights /= weights.sum()
    places = [image.unfold(1, 11, 1).unfold(2, 11, 1) for image in (a, b)]  # (C, H - 10, W - 10, 11, 11)
    mean = lambda x: (weights * x).sum((-2, -1), keepdim=True)
    p, q = places
    m, n = mean(p), mean(q)
    v, w, c = mean((p - m) ** 2), mean((q - n) ** 2), mean((p - m) * (q - n))
    structure = (2 * c + 0.03**2) / (v + w + 0.03**2)
    luminance = (2 * m * n + 0.01**2) / (m**2 + n**2 + 0.01**2)
    return (luminance * structure).mean().item(), structure.mean().item()


def test_ssim_is_its_formula():
    a, b = pictures()
    expected = [written_out(p, q)[0] for p, q in zip(a, b, strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(ssim(a.float(), b.float()), torch.tensor(expected), atol=1e-5, rtol=0)


def test_ms_ssim_is_its_formula_over_the_scales_that_fit():
    """23 pixels have room for the window twice: the structure of the whole, then all of the half."""
    a, b = pictures(23, 24)
    half = lambda x: (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    fine, coarse = SCALES[0] / sum(SCALES[:2]), SCALES[1] / sum(SCALES[:2])
    expected = [
        written_out(p, q)[1] ** fine * written_out(half(p[:, :22]), half(q[:, :22]))[0] ** coarse
        for p, q in zip(a, b, strict=True)
    ]
    assert ms_ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert sum(SCALES) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("similarity", [ssim, ms_ssim])
def test_laws(similarity):
    """1 of a picture and itself, symmetric, a picture's own, less the more noise there is."""
    a, b = pictures(48, 50)
    assert similarity(a, a).tolist() == pytest.approx([1, 1], abs=1e-12)
    torch.testing.assert_close(similarity(a, b), similarity(b, a))
    torch.testing.assert_close(similarity(a, b)[1:], similarity(a[1:], b[1:]))
    smooth = torch.nn.functional.avg_pool2d(a, 9, 1, 4)
    noise = torch.randn_like(a)
    values = [similarity(smooth, smooth + level * noise).mean().item() for level in (0.01, 0.03, 0.1, 0.3)]
    assert values == sorted(values, reverse=True)
    assert similarity(smooth, smooth + 0.05).mean() > similarity(smooth, smooth + 0.05 * noise).mean()


def test_gradients_are_finite_even_for_unlike_pictures():
    a, _ = pictures(48, 50)
    for other in (-a, torch.zeros_like(a), a.clone()):
        other.requires_grad_()
        ms_ssim(a, other).sum().backward()
        assert other.grad.isfinite().all()


def test_half_precision_is_not_used_inside():
    a, b = pictures(40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ssim(a.float(), b.float()).double(), ssim(a, b), atol=1e-5, rtol=0)


def test_a_picture_smaller_than_the_window():
    a, b = pictures(10, 16)
    for similarity in (ssim, ms_ssim):
        with pytest.raises(ValueError, match="16x10 pixels has no SSIM: expected 11 or more"):
            similarity(a, b)
