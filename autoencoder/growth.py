"""An autoencoder that grows: pictures twice as large, and the latents that a smaller one knows.

What was trained on those latents draws twice as large without training. A level is added in front of the
encoder and behind the decoder, as Karras et al. 2018 (section 2) grow a GAN. Where the widths are the same
all else goes on from the small one, and the new level starts as good as nothing: it averages pixels, and it
repeats them (Chen et al. 2016, Net2Net, section 2).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig, Posterior

FREE = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "norm_num_groups")
NOTES = ("sample_size", "force_upcast")  # any weights do with any value
MEASURED = ("scaling_factor", "shift_factor", *AutoencoderKLConfig.OPTIONAL)  # of the latents


def grown(small: AutoencoderKL, config: AutoencoderKLConfig) -> AutoencoderKL:
    """An autoencoder of `config` with the latents of `small`: what fits it of its weights, and their scale.

    All of them fit if config is that of `small` with a level more, of the largest pictures. It may be wider,
    as a larger picture has more to tell; then it has more to learn. Raises ValueError as check_growth does.
    """
    check_growth(small.config, config)
    vae = AutoencoderKL(
        dataclasses.replace(config, **{name: getattr(small.config, name) for name in MEASURED})
    )
    weights, before = vae.state_dict(), small.state_dict()
    for name in weights:
        old = before.get(name_in_small(name))
        if old is not None and old.shape == weights[name].shape:
            weights[name] = old.clone()
    vae.load_state_dict(weights)
    start_as_nothing(vae)
    return vae


def check_growth(small: AutoencoderKLConfig, config: AutoencoderKLConfig) -> None:
    """Raises ValueError if one of `config` has not a level more than one of `small`, or other latents."""
    differ = [
        f"{one.name}={getattr(config, one.name)}, not {getattr(small, one.name)}"
        for one in dataclasses.fields(config)
        if one.name not in (*FREE, *NOTES, *MEASURED)
        and getattr(config, one.name) != getattr(small, one.name)
    ]
    levels, known = len(config.block_out_channels), len(small.block_out_channels)
    if levels != known + 1:
        differ.append(f"block_out_channels has {levels} levels, not {known + 1}")
    if differ:
        raise ValueError(f"the small autoencoder cannot become the model: {'; '.join(differ)}")


def name_in_small(name: str) -> str:
    """The name in the small autoencoder of what does the same there; the encoder's levels count from 0 on."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "down_blocks"]:
        parts[2] = str(int(parts[2]) - 1)
    return ".".join(parts)


@torch.no_grad()
def start_as_nothing(vae: AutoencoderKL) -> None:
    """The new level averages 2x2 pixels in the encoder, and repeats them in the decoder."""
    new = ("encoder.down_blocks.0.", f"decoder.up_blocks.{len(vae.decoder.up_blocks) - 1}.")
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if name.startswith(new) and name.endswith("conv2"):  # of a resnet, which then is its shortcut
            nn.init.zeros_(module.weight)
        elif name == "encoder.down_blocks.0.downsamplers.0.conv":
            nn.init.dirac_(module.weight)  # at [1, 1]; it pads below and to the right: [:2, :2]
            square = module.weight[:, :, 1:2, 1:2] / 4
            module.weight.zero_()[:, :, :2, :2] = square
        elif name == f"decoder.up_blocks.{len(vae.decoder.up_blocks) - 2}.upsamplers.0.conv":
            nn.init.dirac_(module.weight)
        else:
            continue
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def distance(one: Posterior, other: Posterior) -> Tensor:
    """The squared 2-Wasserstein distance between normal distributions, a mean over C, h and w: (B,).

    Of means and deviations alike (Dowson & Landau 1982, eq. 4, for diagonal covariances).
    """
    return ((one.mean - other.mean) ** 2 + (one.std - other.std) ** 2).mean(dim=(1, 2, 3))
