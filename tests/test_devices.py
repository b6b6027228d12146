"""Offloading: models and weights come to the device when they are needed, and the picture stays the same."""

import pytest
import torch

from ldm.drawing import inputs
from tests.tiny import tiny_pipeline

MODES = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")
OPTIONS = {
    "seed": 3,
    "num_inference_steps": 1,
    "height": 16,
    "width": 24,
    "clip_skip": 1,
    "output_type": "pt",
}


@pytest.mark.parametrize("mode", MODES)
def test_without_an_accelerator_that_is_said(mode, monkeypatch):
    monkeypatch.setattr(inputs, "devices", lambda: ["cpu"])
    pipe = tiny_pipeline()
    for options, message in (
        ({}, "no accelerator: this machine has a CPU alone"),
        ({"gpu_id": 7}, "device='cuda:7' is not here"),
        ({"device": "tpu"}, "device='tpu' is not here"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(pipe, mode)(**options)
        assert not pipe.offloaded


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_pictures_are_the_same(mode):
    """The moves are from the CPU to itself here."""
    pipe = tiny_pipeline()
    want = pipe("a red fox", **OPTIONS).images
    getattr(pipe, mode)(device="cpu")
    assert pipe.offloaded
    assert torch.equal(pipe("a red fox", **OPTIONS).images, want)
    assert pipe.to(torch.float64).offloaded
    assert not pipe.to("cpu").offloaded


def test_every_weight_is_lent(monkeypatch):
    """Also those that no module's own call would bring, such as the positions of the text encoder."""
    pipe, lent, to = tiny_pipeline(), set(), torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *a, **k: lent.add(id(tensor)) or to(tensor, *a, **k)
    )
    pipe.enable_sequential_cpu_offload(device="cpu")
    lent.clear()
    pipe("a red fox", **OPTIONS | {"clip_skip": None})
    decoder = (pipe.vae.decoder, pipe.vae.post_quant_conv)
    assert {id(p) for model in (pipe.text_encoder, pipe.unet, *decoder) for p in model.parameters()} <= lent


def test_one_model_is_there_at_a_time(monkeypatch):
    """In the order of a call, each moved in once, and out before the next one comes."""
    pipe, moves = tiny_pipeline(), []
    names = {id(getattr(pipe, name)): name for name in ("text_encoder", "unet", "vae")}
    pipe.enable_model_cpu_offload(device="cpu")
    pipe._present.device = "the device"
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda model, to: moves.append((names[id(model)], to)) or model
    )
    pipe("a red fox", **OPTIONS | {"num_inference_steps": 2})
    pipe._present(pipe.vae)(lambda: None)()  # is there already
    assert moves == [
        ("text_encoder", "the device"),
        ("text_encoder", "cpu"),
        ("unet", "the device"),
        ("unet", "cpu"),
        ("vae", "the device"),
    ]


def test_sequential_offloading_leaves_the_weights_where_they_are():
    pipe = tiny_pipeline()
    before = [parameter.data_ptr() for parameter in pipe.unet.parameters()]
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe("a red fox", **OPTIONS)
    assert [parameter.data_ptr() for parameter in pipe.unet.parameters()] == before


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_offloading_to_a_gpu(mode):
    """The same pictures as with all models there."""
    pipe = tiny_pipeline().to("cuda")
    want = pipe("a red fox", **OPTIONS).images
    getattr(pipe, mode)()
    assert pipe.device.type == "cuda"
    assert next(pipe.unet.parameters()).device.type == "cpu"
    torch.testing.assert_close(pipe("a red fox", **OPTIONS).images, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(pipe.to("cuda")("a red fox", **OPTIONS).images, want, atol=1e-5, rtol=0)
