"""The door to attention: every backend gives the formula, and one that cannot run says why."""

import subprocess
import sys

import pytest
import torch

from ldm.model import attention as door
from ldm.model.attention import CrossAttention, SelfAttention, attention, check_backend


def formula(q, k, v, heads):
    """softmax(q k^T / sqrt(D)) v, head by head, in float64."""
    outs = []
    for q_, k_, v_ in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = q_.double() @ k_.double().mT / q_.shape[-1] ** 0.5
        outs.append(scores.softmax(-1) @ v_.double())
    return torch.cat(outs, -1)


def inputs(device="cpu", dtype=torch.float32, channels=40, text=7):
    shape = {"device": device, "dtype": dtype}
    return torch.randn(3, 15, channels, **shape), *torch.randn(2, 3, text, channels, **shape)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("heads", [1, 5])
def test_backends_give_the_formula(backend, heads):
    q, k, v = inputs()
    out = attention(q, k, v, heads, backend)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), formula(q, k, v, heads), rtol=1e-5, atol=1e-6)


def test_what_each_attention_looks_at():
    """Cross-attention sees the context alone; self-attention does not see it at all."""
    x, context = torch.randn(2, 15, 24), torch.randn(2, 7, 10)
    cross, own = CrossAttention(24, 10, heads=3), SelfAttention(24, heads=3)
    assert torch.equal(own(x, context), own(x, 2 * context))
    assert not torch.equal(cross(x, context), cross(x, 2 * context))
    shuffled = context[:, torch.randperm(7)]  # tokens are a set: their place is in the text encoder's output
    torch.testing.assert_close(cross(x, shuffled), cross(x, context))
    k, v = cross.keys_values(x, context)
    assert k.shape == v.shape == (2, 7, 24)
    assert torch.equal(k, cross.keys_values(x + 1, context)[0])


def test_unknown_backend():
    with pytest.raises(ValueError, match="'flash': expected auto, sdpa, xformers"):
        check_backend("flash", torch.device("cpu"))


def test_xformers_on_a_cpu_says_why():
    with pytest.raises(ValueError, match=r"xformers.*needs a CUDA device.*on cpu.*'sdpa' or 'auto'"):
        check_backend("xformers", torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        attention(*inputs(), 1, "xformers")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ImportError("no module xformers.ops"), "no module"),
        (RuntimeError("built for 2.10\nhelp"), "built for 2.10"),
    ],
)
def test_a_build_that_does_not_fit_is_a_reason(monkeypatch, fault, reason):
    """The probe's own error, its first line, reaches the user."""

    def broken(*args, **kwargs):
        raise fault

    monkeypatch.setattr(
        torch, "zeros", broken
    )  # stands for what fails where xformers was built for another torch
    why = door._why_not_xformers.__wrapped__(torch.device("cuda", 0))
    assert "not installed" in why or (reason in why and "help" not in why)


@pytest.mark.slow
def test_importing_the_unet_imports_nothing_heavy():
    """xformers prints warnings where there is no CUDA, diffusers and transformers cost seconds."""
    heavy = ("xformers", "diffusers", "transformers", "accelerate", "datasets", "yaml")
    loaded = f"print([name for name in {heavy} if name in sys.modules])"
    code = f"import sys, ldm.model.unet, autoencoder.vae; {loaded}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def needs_xformers():
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := door._why_not_xformers(device):
        pytest.skip(f"xformers cannot run: {reason}")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_xformers_agrees(dtype, heads):
    device = needs_xformers()
    q, k, v = inputs(device, dtype, channels=64, text=77)
    expected = formula(q, k, v, heads)
    error = (attention(q, k, v, heads, "xformers") - expected).abs().max()
    assert error < 2 * (attention(q, k, v, heads, "sdpa") - expected).abs().max() + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])  # xformers has kernels for the first alone
def test_auto_is_xformers_where_it_has_a_kernel(dtype):
    q, k, v = inputs(needs_xformers(), dtype, channels=64)
    expected = attention(q, k, v, 2, "xformers" if dtype == torch.float16 else "sdpa")
    assert torch.equal(attention(q, k, v, 2, "auto"), expected)


@pytest.mark.gpu
def test_auto_has_a_backward_pass():
    q, k, v = (x.requires_grad_() for x in inputs("cuda", torch.bfloat16, channels=64))
    attention(q, k, v, 2, "auto").sum().backward()
    assert torch.isfinite(q.grad).all()
