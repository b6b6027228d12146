"""The loss of the autoencoder."""

from __future__ import annotations

import pytest
import torch

from autoencoder.loss import ReconstructionConfig, image_gradients, reconstruction_loss
from autoencoder.vae import Posterior


def normal_posterior(batch: int) -> Posterior:
    return Posterior(torch.zeros(batch, 4, 2, 3), torch.zeros(batch, 4, 2, 3))


def test_terms():
    image = torch.rand(3, 3, 4, 6) * 2 - 1
    loss, parts = reconstruction_loss(image, image, normal_posterior(3), ReconstructionConfig())
    assert torch.equal(loss, torch.zeros(3))
    shifted, parts = reconstruction_loss(image + 0.5, image, normal_posterior(3), ReconstructionConfig())
    torch.testing.assert_close(shifted, torch.full((3,), 0.75))  # |0.5| + 0.5**2; a shift has no edges
    torch.testing.assert_close(parts["gradient"], torch.zeros(3), atol=1e-6, rtol=0)


def test_gradients_see_edges():
    across, down = image_gradients(torch.arange(6.0).reshape(1, 1, 2, 3))
    assert across.flatten().tolist() == [1, 1, 1, 1]
    assert down.flatten().tolist() == [3, 3, 3]


def test_kl_weight_refers_to_sums():
    """Both the KL and the reconstruction summed over an image, as in the paper: divided by its values."""
    image = torch.zeros(2, 3, 4, 6)
    posterior = Posterior(torch.ones(2, 4, 2, 3), torch.zeros(2, 4, 2, 3))  # KL = 24 * 1/2
    loss, parts = reconstruction_loss(image, image, posterior, ReconstructionConfig(kl=1.0))
    torch.testing.assert_close(parts["kl"], torch.full((2,), 12.0))
    torch.testing.assert_close(loss, torch.full((2,), 12.0 / (3 * 4 * 6)))


@pytest.mark.parametrize(
    ("options", "message"), [({"kl": -1.0}, "loss.kl=-1.0"), ({"l1": 0.0, "mse": 0.0}, "both 0")]
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**options)


def test_half_size():
    """The pixel terms once more at half the size: a shift by 1/2 costs 0.75 of the weight."""
    image = torch.rand(3, 3, 4, 6) * 2 - 1
    half = torch.nn.functional.interpolate(image, scale_factor=0.5, mode="area")
    config = ReconstructionConfig(half_size=0.4)
    loss, parts = reconstruction_loss(image, image, normal_posterior(3), config, half)
    torch.testing.assert_close(loss, torch.zeros(3))
    loss, parts = reconstruction_loss(image, image, normal_posterior(3), config, half + 0.5)
    torch.testing.assert_close(parts["half_size"], torch.full((3,), 0.75))
    torch.testing.assert_close(loss, torch.full((3,), 0.4 * 0.75))
