"""Strips give what the whole gives, here and in stock diffusers, and are cut where they should be."""

import copy
import math

import pytest
import torch

from autoencoder import tiling
from autoencoder.layers import GroupNormSiLU
from ldm.drawing.optimize import try_kernels
from tests.test_autoencoder import ATTENTION_EVERYWHERE, BARE, TINY, error, pair
from tests.tiny import tiny_pipeline

F8 = {  # as wide as the kernels in C++ take, and of Stable Diffusion's factor
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


@pytest.fixture(params=[1, 300, tiling.PIXELS], ids=["two rows", "some rows", "larger than the picture"])
def strips(request, monkeypatch):
    """Strips of so many pixels."""
    monkeypatch.setattr(tiling, "PIXELS", request.param)


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(TINY, id="f4"),
        pytest.param(F8, id="f8"),
        pytest.param(ATTENTION_EVERYWHERE, id="attention"),
        pytest.param(BARE, id="bare"),
    ],
)
def test_strips_are_the_whole_of_stock_diffusers(strips, arguments):
    """Decoded and encoded, of an odd number of rows, two pictures at once, in both layouts of memory."""
    ours, reference = pair(arguments)
    ours.enable_tiling()
    factor = ours.downsample_factor
    image, latents = (
        torch.randn(2, 3, 7 * factor, 5 * factor),
        torch.randn(2, ours.config.latent_channels, 7, 5),
    )
    z = latents / ours.config.scaling_factor + (ours.config.shift_factor or 0.0)
    decoded, encoded = reference.decode(z).sample, reference.encode(image).latent_dist
    layout = torch.contiguous_format if arguments is TINY else torch.channels_last
    ours.to(memory_format=layout)
    posterior = ours.encode(image.to(memory_format=layout))
    assert error(ours.decode(latents.to(memory_format=layout)), decoded) < 1e-5
    assert error(posterior.mean, encoded.mean) < 1e-5
    assert error(posterior.std, encoded.std) < 1e-5


@torch.no_grad()
def test_strips_by_kernels_in_cpp_are_the_whole(strips):
    whole, _ = pair(F8)
    ours = copy.deepcopy(whole)
    if not try_kernels(ours):
        pytest.skip("no g++ here, so no kernels in C++")
    ours.enable_tiling()
    latents = torch.randn(1, 4, 7, 5)
    assert error(ours.decode(latents), whole.decode(latents)) < 1e-5


@torch.no_grad()
def test_bfloat16_strips_round_as_the_whole(strips):
    exact, _ = pair(TINY)
    latents = torch.randn(1, 3, 7, 5)
    true, half = exact.decode(latents), copy.deepcopy(exact).bfloat16()
    rounding = error(half.decode(latents), true)
    half.enable_tiling()
    assert error(half.decode(latents), true) < 1.5 * rounding


def test_the_norm_of_strips_is_that_of_float64():
    """Also of flat pictures, around whose mean float32 has few digits."""
    layer = GroupNormSiLU(4, 16)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    for deviation, bar in ((1.0, 2e-6), (0.001, 1e-3)):
        x = deviation * torch.randn(2, 16, 37, 11) + 3 * torch.randn(2, 16, 1, 1).sign()
        x = (x + torch.arange(37.0).view(1, 1, 37, 1) * deviation).to(memory_format=torch.channels_last)
        true = copy.deepcopy(layer).double()(x.double().contiguous())
        norm = tiling.norm_of_all(layer, tiling.split([x], pixels=55))
        assert error(norm(x.clone()), true) < bar


def test_a_picture_is_cut_above_a_size_and_where_no_gradients_are_kept(monkeypatch):
    pipe, cut = tiny_pipeline(), []
    monkeypatch.setattr(tiling, "decode", lambda decoder, z: cut.append(tuple(z.shape[2:])) or decoder(z))
    latents = torch.randn(1, 4, 6, 10)
    pixels = 12 * 20  # of two pixels a latent
    for largest, strips in ((pixels, False), (pixels - 1, True)):
        pipe.vae.largest_whole = largest
        pipe.decode(latents)
        assert bool(cut) == strips
    with torch.enable_grad():
        pipe.vae.decode(latents)
    assert cut == [(6, 10)]
    pipe.enable_vae_tiling()
    pipe.decode(latents)
    assert len(cut) == 2
    pipe.disable_vae_tiling()
    pipe.decode(latents)
    assert len(cut) == 2
    assert pipe.vae.largest_whole == math.inf


@torch.no_grad()
def test_strips_are_given_away():
    """A layer holds its own output and what is left of its input: the widest decode holds two of its maps."""
    maps, most = tiling.split([torch.ones(1, 2, 64, 8)], pixels=64), 0
    pieces = [torch.clone(one) for one in maps]
    maps = tiling.Strips(pieces)
    pieces.clear()

    def layer(x):
        nonlocal most
        most = max(most, len(maps))
        return x

    out = tiling.through(maps, layer)
    assert most == 7  # of eight: the one that is being worked on is taken out already
    assert not maps
    assert torch.equal(tiling.join(out), torch.ones(1, 2, 64, 8))
