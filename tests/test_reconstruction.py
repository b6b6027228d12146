"""The loss of the autoencoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace, Normal

from autoencoder.equivariance import shrink, shrunk_sides, turn
from autoencoder.loss import (
    ReconstructionConfig,
    balanced,
    image_gradients,
    kl_loss,
    picture_loss,
    pixel_loss,
)
from autoencoder.similarity import ms_ssim
from autoencoder.vae import AutoencoderKL, Posterior
from tests.test_fit import VAE
from train.tasks.reconstruction import Reconstruction


def test_terms():
    image = torch.rand(3, 3, 4, 6) * 2 - 1
    assert torch.equal(pixel_loss(image, image, ReconstructionConfig())[0], torch.zeros(3))
    shifted, parts = pixel_loss(image + 0.5, image, ReconstructionConfig())
    torch.testing.assert_close(shifted, torch.full((3,), 0.75))  # |0.5| + 0.5**2; a shift has no edges
    torch.testing.assert_close(parts["gradient"], torch.zeros(3), atol=1e-6, rtol=0)


def test_structure_counts_where_it_has_a_weight():
    image, other = torch.rand(2, 2, 3, 16, 13) * 2 - 1
    config = ReconstructionConfig(ms_ssim=0.3)
    loss, parts = picture_loss(other, image, config)
    torch.testing.assert_close(parts["ms_ssim"], ms_ssim(other, image))
    torch.testing.assert_close(loss - pixel_loss(other, image, config)[0], 0.3 * (1 - parts["ms_ssim"]))


def test_gradients_see_edges():
    across, down = image_gradients(torch.arange(6.0).reshape(1, 1, 2, 3))
    assert across.flatten().tolist() == [1, 1, 1, 1]
    assert down.flatten().tolist() == [3, 3, 3]


def test_kl_weight_refers_to_sums():
    """Both the KL and the reconstruction summed over an image, as in the paper: divided by its values."""
    posterior = Posterior(torch.ones(2, 4, 2, 3), torch.zeros(2, 4, 2, 3))  # KL = 24 * 1/2
    weighed, kl = kl_loss(posterior, torch.zeros(2, 3, 4, 6), ReconstructionConfig(kl=1.0))
    torch.testing.assert_close(kl, torch.full((2,), 12.0))
    torch.testing.assert_close(weighed, torch.full((2,), 12.0 / (3 * 4 * 6)))


def test_balanced_errors_are_log_likelihoods():
    """Of |d| a Laplace distribution's, of d**2 twice a normal one's, up to constants; least at the mean."""
    d, scale = torch.randn(500, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    laplace = -Laplace(0.0, scale).log_prob(d).mean() - math.log(2)
    torch.testing.assert_close(balanced(d.abs().mean(), scale.log()), laplace)
    normal = -2 * Normal(0.0, scale.sqrt()).log_prob(d).mean() - math.log(2 * math.pi)
    torch.testing.assert_close(balanced(d.square().mean(), scale.log()), normal)
    best = d.abs().mean().log().requires_grad_()
    balanced(d.abs().mean(), best).backward()
    assert best.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": -1.0}, "loss.kl=-1.0"),
        ({"equivariance": -1.0}, "loss.equivariance=-1.0"),
        ({"l1": 0.0, "mse": 0.0}, "both 0"),
        ({"half_size": 0.5, "equivariance": 0.5}, "set one of them to 0"),
        ({"lpips_heads": "vgg.pth"}, "has no effect without loss.vgg"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**options)


class Mirror(AutoencoderKL):
    """Latents that are the picture itself at half its size, and a decoder that enlarges them."""

    def encode(self, image: Tensor) -> Posterior:
        z = shrink(image, (image.shape[2] // 2, image.shape[3] // 2))
        return Posterior(z, torch.full_like(z, -30.0))

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def to_latents(self, z: Tensor) -> Tensor:
        return z


@pytest.mark.parametrize("name", ["half_size", "equivariance"])
def test_an_equivariant_autoencoder_has_nothing_to_learn(name):
    """Of blocks, latents that are turned and shrunk as the picture is: the term is 0, and else its weight."""
    config = ReconstructionConfig(**{"equivariance": 0.0, name: 0.4})
    module = Reconstruction(Mirror(VAE), config)
    image = shrink(torch.rand(4, 3, 4, 4) * 2 - 1, (2, 2)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    turns = torch.arange(4)
    transformed = turn(shrink(image, (8, 8)), turns)
    noise = torch.zeros(4, 3, 8, 8)
    plain, _ = module(image, noise)
    loss, parts = module(image, noise, transformed=transformed, turns=turns)
    torch.testing.assert_close(parts[name], torch.zeros(4), atol=1e-5, rtol=0)
    loss, parts = module(image, noise, transformed=transformed + 0.5, turns=turns)
    torch.testing.assert_close(parts[name], torch.full((4,), 0.75))
    torch.testing.assert_close(loss, plain + 0.4 * 0.75)


def test_turns_and_sizes():
    """A picture's own number of quarters to the left; turning and shrinking can change places."""
    x = torch.randn(4, 2, 12, 12)
    turns = torch.tensor([2, 0, 3, 1])
    for one, turned, k in zip(x, turn(x, turns), turns.tolist(), strict=True):
        assert torch.equal(turned, one.rot90(k, (1, 2)))
    torch.testing.assert_close(turn(shrink(x, (5, 5)), turns), shrink(turn(x, turns), (5, 5)))
    assert torch.equal(shrink(x, (6, 6)), torch.nn.functional.avg_pool2d(x, 2))
    assert list(shrunk_sides(8)) == [2, 3, 4, 5, 6, 7, 8]
    assert list(shrunk_sides(1)) == [1]
