"""The autoencoder with its loss and its adversary: what `fit` trains and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autoencoder import growth
from autoencoder.discriminator import (
    AdversaryConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from autoencoder.equivariance import shrink, turn
from autoencoder.loss import ReconstructionConfig, balanced, kl_loss, picture_loss, pixel_loss
from autoencoder.vae import AutoencoderKL, Posterior

RATE = 10.0  # of log_scale: Adam moves a parameter by about the learning rate, and this one has far to go
Distance = Callable[[Tensor, Tensor], Tensor]  # of two batches of pictures: (B,)


class Reconstruction(nn.Module):
    """An autoencoder with its loss, so that wrappers which watch forward see all of it.

    The perceptual distance is called but is no part of this module, so it is not trained or saved.
    """

    NOT_AVERAGED: ClassVar = ("discriminator", "log_scale")  # they only help to train

    def __init__(
        self,
        vae: AutoencoderKL,
        config: ReconstructionConfig,
        adversary: AdversaryConfig = AdversaryConfig(),  # noqa: B008 (a constant)
        distance: Distance | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.config, self.distance = vae, config, distance
        self.discriminator = PatchDiscriminator(adversary) if adversary.weight else None
        self.log_scale = nn.Parameter(torch.zeros(())) if config.variance else None

    def forward(self, image: Tensor, *rest: Tensor, **named: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (B,) and its parts. image: (B, 3, H, W); the rest as of `losses`."""
        return self.losses(self.vae.encode(image), image, *rest, **named)

    def losses(
        self,
        posterior: Posterior,
        image: Tensor,
        noise: Tensor,
        added: Tensor | None = None,
        transformed: Tensor | None = None,
        turns: Tensor | None = None,
        adversarial: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same where the picture's posterior is known. noise: (B, C, h, w), of a sample of it.

        added: (B, C, h, w), to the scaled latents. A decoder that has seen noise draws clean pictures from
        latents that are not quite right, as a UNet's are.
        transformed: (B, 3, H', W'), the pictures shrunk and then turned by turns (B,), quarters to the left:
        what is asked of the decoder for latents that are shrunk and turned alike.
        adversarial: (B,), the weight of the adversarial term; None where it has not begun.
        """
        given = self.given(posterior, image)
        z = given.sample(noise)
        latents = self.vae.to_latents(z)
        reconstruction = self.vae.decode(latents if added is None else latents + added)
        error, parts = picture_loss(reconstruction, image, self.config)
        if self.distance is not None:
            parts["lpips"] = self.distance(reconstruction, image)
            error = error + self.config.perceptual * parts["lpips"]
        log_scale = None if self.log_scale is None else RATE * self.log_scale
        if log_scale is not None:
            error = balanced(error, log_scale)
            parts["log_scale"] = log_scale.detach().expand(len(image))
        weighed, told = self.encoder_loss(posterior, given, image)
        loss, parts = error + weighed, parts | told
        if transformed is not None:
            name = "half_size" if self.config.half_size else "equivariance"
            parts[name] = self.transformed_loss(latents, transformed, turns)
            weight = getattr(self.config, name) or 0.0
            if log_scale is not None:
                weight = weight * torch.exp(-log_scale)
            loss = loss + weight * parts[name]
        parts["latent_std"] = z.detach().float().std(dim=(1, 2, 3))
        if self.discriminator is not None:
            judged, verdicts = self.judged(reconstruction, image, error, adversarial)
            loss = loss + judged
            parts |= verdicts
        return loss, parts

    def given(self, posterior: Posterior, image: Tensor) -> Posterior:
        """Of the latents that the decoder gets. posterior: the encoder's."""
        return posterior

    def encoder_loss(
        self, posterior: Posterior, given: Posterior, image: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What else the encoder is asked for (B,), and its parts (B,): kl."""
        weighed, kl = kl_loss(posterior, image, self.config)
        return weighed, {"kl": kl}

    def transformed_loss(self, latents: Tensor, image: Tensor, turns: Tensor | None) -> Tensor:
        """The pixel loss (B,) of what latents (B, C, h, w), shrunk and turned as `image` is, decode to."""
        factor = self.vae.downsample_factor
        small = shrink(latents, (image.shape[2] // factor, image.shape[3] // factor))
        decoded = self.vae.decode(small if turns is None else turn(small, turns))
        return pixel_loss(decoded, image, self.config)[0]

    def judged(
        self, reconstruction: Tensor, image: Tensor, error: Tensor, adversarial: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The adversarial terms (B,) and their parts (B,): generator, discriminator, adaptive_weight.

        Both sides learn from one backward, in the same step and from the same weights (simultaneous steps, as
        algorithm 1 of Nowozin et al. 2016): the reconstruction is judged by a discriminator that is constant,
        and the discriminator learns from reconstructions that are. Adam and Muon treat each parameter by
        itself, so one optimizer over both is two; only the norm that gradients are clipped to is shared.
        The adaptive weight is that of a rank's micro-batch.
        """
        assert self.discriminator is not None
        names = ("generator", "discriminator", "adaptive_weight")
        if adversarial is None:
            # Gradients of 0, because ranks wait for one of every parameter; only weight decay moves it then.
            nothing = sum(0.0 * p.sum() for p in self.discriminator.parameters())
            zeros = torch.zeros_like(error.detach())
            return zeros + nothing, dict.fromkeys(names, zeros)
        constant = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        generator = generator_loss(functional_call(self.discriminator, constant, (reconstruction,)))
        discriminator = discriminator_loss(
            self.discriminator(image), self.discriminator(reconstruction.detach())
        )
        weight = adaptive_weight(error.mean(), generator.mean(), self.vae.decoder.conv_out.weight)
        loss = adversarial * weight * generator + discriminator
        return loss, dict(zip(names, (generator, discriminator, weight.expand(len(image))), strict=True))


class Growth(Reconstruction):
    """An autoencoder that takes over the latents of a small one: its decoder gets these, of pictures as much
    smaller, and its encoder learns to give the same. The small one is called, and is no part of this module.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        small: AutoencoderKL,
        config: ReconstructionConfig,
        adversary: AdversaryConfig = AdversaryConfig(),  # noqa: B008 (a constant)
        distance: Distance | None = None,
    ) -> None:
        super().__init__(vae, config, adversary, distance)
        small.eval().requires_grad_(False)
        self.known: Callable[[Tensor], Posterior] = lambda image: small.to(image.device).encode(image)
        self.times = vae.downsample_factor // small.downsample_factor

    def given(self, posterior: Posterior, image: Tensor) -> Posterior:
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):  # as the cache is filled
            return self.known(shrink(image, (image.shape[2] // self.times, image.shape[3] // self.times)))

    def encoder_loss(
        self, posterior: Posterior, given: Posterior, image: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance of the encoder's posterior to the small one's, in units of the latents' variance."""
        far = self.vae.config.scaling_factor**2 * growth.distance(posterior, given)
        return far, {"latents": far}
