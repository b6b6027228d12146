"""The autoencoder against diffusers' AutoencoderKL on the same weights, its posterior, and its errors."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from autoencoder.layers import OLD_ATTENTION_NAMES, GroupNorm, GroupNormSiLU
from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig, Posterior
from ldm.files.checkpoint import load_model, save_model
from ldm.files.config import read_config

TINY = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 24, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "scaling_factor": 0.7,
}
ATTENTION_EVERYWHERE = TINY | {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "shift_factor": 0.3,
}
BARE = TINY | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
SD = {  # Stable Diffusion 1 and 2
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
X4_UPSCALER = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (128, 256, 512),
    "layers_per_block": 2,
    "sample_size": 256,
    "scaling_factor": 0.08333,
}


def tiny(**changes):
    return AutoencoderKL(AutoencoderKLConfig(**(TINY | changes)))


def pair(arguments):
    """diffusers' autoencoder with random weights, and ours with the same tensors."""
    from diffusers import AutoencoderKL as Reference

    reference = Reference(**arguments)
    with torch.device("meta"):
        ours = AutoencoderKL(read_config(AutoencoderKLConfig, reference.config, "config.json"))
    ours.load_state_dict(reference.state_dict(), assign=True)
    return ours, reference


def error(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(TINY, id="tiny"),
        pytest.param(ATTENTION_EVERYWHERE, id="attention"),
        pytest.param(BARE, id="bare"),
        pytest.param(SD, id="sd", marks=pytest.mark.slow),
        pytest.param(X4_UPSCALER, id="x4-upscaler", marks=pytest.mark.slow),
    ],
)
def test_matches_diffusers(arguments):
    """Same keys (strict), posterior, decoded image and gradients of every parameter."""
    ours, reference = pair(arguments)
    factor = ours.downsample_factor
    image = torch.randn(2, 3, 3 * factor, 5 * factor)
    noise = torch.randn(2, ours.config.latent_channels, 3, 5)
    weight = torch.randn_like(image)

    posterior = ours.encode(image)
    expected = reference.encode(image).latent_dist
    assert error(posterior.mean, expected.mean) < 1e-5
    assert error(posterior.std, expected.std) < 1e-5
    assert error(posterior.kl(), expected.kl()) < 1e-5

    decoded = ours.decode(ours.to_latents(posterior.sample(noise)))
    target = reference.decode(expected.mean + expected.std * noise).sample
    assert error(decoded, target) < 1e-5

    ((decoded * weight).sum() + posterior.kl().sum()).backward()
    ((target * weight).sum() + expected.kl().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        # keys' biases have no gradient but rounding: softmax ignores what all keys share
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * largest.item(), msg=name
        )


@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_old_attention_names_load(shape):
    """query, key, value, proj_attn; their weights as (C, C) or as 1x1 convolutions."""
    state = tiny().state_dict()
    old = {}
    for name, tensor in state.items():
        for past, today in OLD_ATTENTION_NAMES.items():
            if f".{today}." in name:
                name = name.replace(today, past)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 and shape == "conv" else tensor
        old[name] = tensor
    assert old.keys() != state.keys()
    renamed = AutoencoderKL.rename_keys(old)
    assert all(torch.equal(renamed[name], tensor) for name, tensor in state.items())
    assert renamed.keys() == state.keys()
    assert AutoencoderKL.rename_keys(state).keys() == state.keys()
    tiny().load_state_dict(renamed)


@pytest.mark.parametrize("key", AutoencoderKLConfig.NEUTRAL)
def test_unsupported_options_are_refused_by_name(key):
    with pytest.raises(ValueError, match=f"{key}=.*not supported"):
        read_config(AutoencoderKLConfig, TINY | {key: (1.0, 2.0, 3.0)}, "config.json")


def test_posterior_is_a_diagonal_normal():
    posterior = Posterior(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5))
    q = Normal(posterior.mean, posterior.std)
    expected = kl_divergence(q, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    assert Posterior(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)).kl().tolist() == [0, 0]
    z = posterior.sample(torch.randn(10_000, 2, 3, 4, 5))
    torch.testing.assert_close(z.mean(0), posterior.mean, rtol=0, atol=0.2)
    torch.testing.assert_close(z.std(0), posterior.std, rtol=0.1, atol=0)


def test_log_variance_is_clamped():
    """A wild encoder gives a finite posterior."""
    vae = tiny()
    with torch.no_grad():
        vae.quant_conv.bias[3:] = torch.tensor([1e4, -1e4, 0.0])
    logvar = vae.encode(torch.zeros(1, 3, 8, 12)).logvar
    assert (logvar.max(), logvar.min()) == (20, -30)


def test_latents_are_scaled_z():
    """decode(to_latents(z)) undoes the scale: the image does not depend on it, the latents do."""
    z = torch.randn(2, 3, 2, 3)
    vae = tiny(scaling_factor=2.0, shift_factor=0.25)
    assert torch.equal(vae.to_latents(z), (z - 0.25) * 2)
    image = vae.decode(vae.to_latents(z))
    vae.config = dataclasses.replace(vae.config, scaling_factor=0.5, shift_factor=None)
    torch.testing.assert_close(vae.decode(vae.to_latents(z)), image)


def test_an_image_does_not_depend_on_its_batch():
    vae = tiny().eval()
    latents = torch.randn(3, 3, 4, 5)
    together = vae.decode(latents)
    for i in range(3):
        torch.testing.assert_close(vae.decode(latents[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_bit():
    vae = tiny()
    twin = copy.deepcopy(vae)
    twin.enable_gradient_checkpointing()
    twin.enable_gradient_checkpointing()  # a second call does nothing
    image, noise = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 2, 3)
    for model in (vae, twin):
        model.decode(model.to_latents(model.encode(image).sample(noise))).square().mean().backward()
    for ours, again in zip(vae.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, again.grad)


def test_bfloat16_weights_answer_in_float32():
    vae = tiny().to(torch.bfloat16)
    assert vae.encode(torch.randn(1, 3, 8, 12)).mean.dtype == torch.float32
    assert vae.decode(torch.randn(1, 3, 2, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types.*3 levels"),
        ({"up_block_types": ("UpDecoderBlock2D", "UpBlock2D", "UpDecoderBlock2D")}, "UpBlock2D"),
        ({"block_out_channels": (8, 18, 16)}, "18 is not a multiple of norm_num_groups=4"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0"),
        ({"latent_rgb_factors": ((1.0, 1.0, 1.0),)}, "expected 3 numbers for each latent channel"),
        ({"latent_rgb_bias": (1.0, 1.0, 1.0)}, "with latent_rgb_factors only"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig(**(TINY | changes))


def test_input_errors():
    vae = tiny()
    with pytest.raises(ValueError, match=r"13x8 pixels.*multiples of 4.*12 or 16"):
        vae.encode(torch.zeros(1, 3, 8, 13))
    with pytest.raises(ValueError, match="C = 3 channels"):
        vae.decode(torch.zeros(1, 4, 2, 2))


def test_colours_are_linear_in_latents_and_stock_diffusers_reads_the_folder(tmp_path):
    from diffusers import AutoencoderKL as Reference

    rows, bias = ((1.0, 2.0, 3.0), (0.0, -1.0, 0.5), (0.25, 0.0, 0.0)), (0.1, 0.2, 0.3)
    vae, latents = tiny(latent_rgb_factors=rows, latent_rgb_bias=bias), torch.randn(2, 3, 4, 5)
    expected = latents[1, :, 2, 3] @ torch.tensor(rows) + torch.tensor(bias)
    torch.testing.assert_close(vae.to_colours(latents)[1, :, 2, 3], expected)
    save_model(vae, tmp_path / "ours")
    stock = Reference.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(stock.decode(latents / 0.7).sample, vae.decode(latents), rtol=1e-4, atol=1e-5)
    stock.save_pretrained(tmp_path / "again")  # a key that it does not know, and keeps
    assert load_model(AutoencoderKL, tmp_path / "again").config == vae.config
    save_model(tiny(), tmp_path / "plain")
    assert "latent_rgb" not in (tmp_path / "plain/config.json").read_text()
    with pytest.raises(ValueError, match="no latent_rgb_factors"):
        tiny().to_colours(latents)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", [GroupNorm, GroupNormSiLU])
def test_a_norm_of_flat_pictures_is_that_of_float64(layer, layout):
    """Drawn scenes are flat; torch's own channels_last norm is wrong there by a tenth."""
    torch.manual_seed(0)
    x = (0.001 * torch.randn(2, 64, 24, 17) + 3).to(memory_format=layout)
    norm = layer(8, 64)
    nn.init.normal_(norm.weight)
    true = layer(8, 64).double()
    true.load_state_dict(norm.state_dict())
    answer, expected = norm(x), true(x.double().contiguous())
    assert ((answer - expected).norm() / expected.norm()).item() < 1e-3
    leaf, double = x.clone().requires_grad_(), x.double().contiguous().requires_grad_()
    weight = torch.randn_like(answer)
    (norm(leaf) * weight).sum().backward()
    (true(double) * weight).sum().backward()
    assert ((leaf.grad - double.grad).norm() / double.grad.norm()).item() < 1e-3
