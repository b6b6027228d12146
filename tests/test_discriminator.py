"""The discriminator, its losses, the adaptive weight, and both sides learning from one backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from autoencoder.discriminator import (
    AdversaryConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from autoencoder.loss import ReconstructionConfig
from autoencoder.vae import AutoencoderKL
from tests.test_fit import VAE
from train.tasks.reconstruction import Reconstruction

ADVERSARY = AdversaryConfig(weight=0.5, width=8, layers=2)


@pytest.mark.parametrize(
    ("layers", "size", "patches"),
    [(3, (256, 256), (30, 30)), (3, (24, 32), (1, 2)), (2, (32, 16), (6, 2)), (1, (6, 10), (1, 3))],
)
def test_shapes(layers, size, patches):
    """Half the size in each layer, less one in each of the last two: 30x30 of 256x256, as in the paper."""
    config = AdversaryConfig(weight=0.5, width=8, layers=layers)
    discriminator = PatchDiscriminator(config)
    with torch.no_grad():
        assert discriminator(torch.zeros(2, 3, *size)).shape == (2, 1, *patches)
    widths = [p.shape[0] for name, p in discriminator.named_parameters() if p.ndim == 4]
    assert widths == [8 * 2**k for k in range(layers + 1)] + [1]
    assert config.smallest == 3 * 2**layers


def test_a_patch_is_of_70_pixels():
    """A pixel changes the verdict on a patch only where it lies within 70x70 of it; norms aside."""
    discriminator = PatchDiscriminator(AdversaryConfig(width=8))
    for k, layer in enumerate(discriminator.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            discriminator.layers[k] = torch.nn.Identity()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(image)[0, 0, 7, 7].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_a_verdict_does_not_depend_on_the_batch():
    discriminator, image = PatchDiscriminator(ADVERSARY), torch.randn(3, 3, 16, 20)
    torch.testing.assert_close(discriminator(image)[1:2], discriminator(image[1:2]))


def test_losses():
    """Hinge: nothing beyond 1 on the right side; the autoencoder lowers minus the verdict."""
    real, drawn = torch.tensor([[2.0, 0.5], [0.0, -1.0]]), torch.tensor([[-3.0, -0.5], [0.0, 1.0]])
    real, drawn = real.view(2, 1, 1, 2), drawn.view(2, 1, 1, 2)
    assert discriminator_loss(real, drawn).tolist() == [0.25, 1.5]
    assert generator_loss(drawn).tolist() == [1.75, -0.5]


def test_the_adaptive_weight_is_the_quotient_of_gradients():
    layer = torch.randn(4, 3, requires_grad=True)
    x, y = torch.randn(3), torch.randn(4)
    error, verdict = (layer @ x).square().sum(), (y @ layer).sum() * 0.1
    of_error, of_verdict = 2 * torch.outer(layer.detach() @ x, x), 0.1 * y[:, None].expand(4, 3)
    weight = adaptive_weight(error, verdict, layer)
    torch.testing.assert_close(weight, of_error.norm() / (of_verdict.norm() + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(error, 0 * verdict, layer) == 1e4  # the clamp: the quotient is larger
    (error + weight * verdict).backward()  # the graph is still there
    torch.testing.assert_close(layer.grad, of_error + weight * of_verdict)


def module_and_batch() -> tuple[Reconstruction, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = Reconstruction(AutoencoderKL(VAE), ReconstructionConfig(equivariance=0.0, kl=1e-3), ADVERSARY)
    batch = {"image": torch.rand(2, 3, 16, 20) * 2 - 1, "noise": torch.randn(2, 4, 8, 10)}
    return module, batch


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_one_backward_gives_both_sides_their_own_gradient():
    """As two losses that know nothing of each other would: the other side is constant in each."""
    module, batch = module_and_batch()
    other = copy.deepcopy(module)
    loss, parts = module(**batch, adversarial=torch.full((2,), 0.5))
    loss.mean().backward()

    posterior = other.vae.encode(batch["image"])
    drawn = other.vae.decode(other.vae.to_latents(posterior.sample(batch["noise"])))
    plain, _ = other(**batch)  # without the adversary
    verdict = other.discriminator(drawn).mean()
    weight = parts["adaptive_weight"][0]
    ours = {name: p for name, p in other.named_parameters() if name.startswith("vae.")}
    expected = torch.autograd.grad(
        plain.mean() - 0.5 * weight * verdict, list(ours.values()), retain_graph=True
    )
    for name, gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradients(module)[name], gradient, rtol=1e-4, atol=1e-6)
    theirs = {name: p for name, p in other.named_parameters() if name.startswith("discriminator.")}
    hinge = discriminator_loss(
        other.discriminator(batch["image"]), other.discriminator(drawn.detach())
    ).mean()
    for name, gradient in zip(theirs, torch.autograd.grad(hinge, list(theirs.values())), strict=True):
        torch.testing.assert_close(gradients(module)[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["discriminator"].mean(), hinge)
    torch.testing.assert_close(parts["generator"].mean(), -verdict)


def test_before_its_start_the_adversary_neither_speaks_nor_learns():
    module, batch = module_and_batch()
    alone = Reconstruction(module.vae, module.config)
    loss, parts = module(**batch)
    torch.testing.assert_close(loss, alone(**batch)[0])
    assert all(not parts[name].any() for name in ("generator", "discriminator", "adaptive_weight"))
    loss.mean().backward()
    theirs = [p.grad for p in module.discriminator.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in theirs)  # ranks wait for each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "adversary.weight=-1.0"),
        ({"start": 1.5}, "adversary.start=1.5: a share of the run"),
        ({"width": 12}, "adversary.width=12: expected a multiple of 8"),
        ({"layers": 0}, "adversary.layers=0: expected 1 to 6"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AdversaryConfig(**options)
