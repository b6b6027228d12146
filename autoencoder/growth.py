"""An autoencoder that grows on the latents of a smaller one: pictures twice as large, or more width.

What was trained on those latents draws as before, twice as large or finer, without training. For larger
pictures a level is added in front of the encoder and behind the decoder, as Karras et al. 2018 (section 2)
grow a GAN; it starts as good as nothing: it averages pixels, and it repeats them. Where a level is to have a
multiple of the channels, each channel becomes several that together do what it did (Chen et al. 2016,
Net2Net, section 2.3).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig, Posterior

FREE = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "norm_num_groups")
NOTES = ("sample_size", "force_upcast")  # any weights do with any value
MEASURED = ("scaling_factor", "shift_factor", *AutoencoderKLConfig.OPTIONAL)  # of the latents


def grown(small: AutoencoderKL, config: AutoencoderKLConfig) -> AutoencoderKL:
    """An autoencoder of `config` with the latents of `small`: what fits it of its weights, and their scale.

    All of them fit if config is that of `small` with multiples of its widths and perhaps a level more, of the
    largest pictures; without that level it computes what `small` does. With other widths or more layers it
    has more to learn. Raises ValueError as check_growth does.
    """
    check_growth(small.config, config)
    vae = AutoencoderKL(
        dataclasses.replace(config, **{name: getattr(small.config, name) for name in MEASURED})
    )
    levels = len(config.block_out_channels) - len(small.config.block_out_channels)
    weights, before = vae.state_dict(), small.state_dict()
    for name, new in weights.items():
        at = name_in_small(name, levels)
        if at.endswith("conv_shortcut.bias") and at not in before:
            nn.init.zeros_(new)
            continue
        old = before.get(at)
        if old is None and at.endswith("conv_shortcut.weight"):
            old = straight(before.get(at.replace("conv_shortcut", "conv1")))
        if old is not None and is_multiple(old, new):
            weights[name] = widened(old, new.shape)
            if ".to_q." in name:  # attention divides by the root of its channels, of which there are more
                weights[name] *= math.sqrt(len(old) / len(new))
    vae.load_state_dict(weights)
    if levels:
        start_as_nothing(vae)
    return vae


def is_multiple(old: Tensor, new: Tensor) -> bool:
    """Whether `new` has whole multiples of the channels of `old`, both ways, and kernels of its size."""
    alike = old.ndim == new.ndim and old.shape[2:] == new.shape[2:]
    return alike and all(large % few == 0 for few, large in zip(old.shape[:2], new.shape[:2], strict=True))


def widened(old: Tensor, shape: torch.Size) -> Tensor:
    """Weights of `shape` that do what `old` do where each channel is several. old: (out, in, ...) or (out,).

    A channel's copies lie beside one another, so that groups of channels stay groups. What reads them shares
    its weight out among them unevenly, or else they would learn the same for ever.
    """
    new = old.repeat_interleave(shape[0] // old.shape[0], 0)
    if old.ndim == 1 or old.shape[1] == shape[1]:
        return new.clone()
    copies = shape[1] // old.shape[1]
    share = new.unsqueeze(2) / copies  # (out, in, 1, ...)
    uneven = share.std() * torch.randn(*share.shape[:2], copies, *share.shape[3:])
    return (share + uneven - uneven.mean(2, keepdim=True)).flatten(1, 2)


def straight(conv1: Tensor | None) -> Tensor | None:
    """The shortcut (C, C, 1, 1) of a resnet that has none, as its channels are as many after it as before."""
    return None if conv1 is None else torch.eye(len(conv1))[:, :, None, None]


def check_growth(small: AutoencoderKLConfig, config: AutoencoderKLConfig, keep_encoder: bool = False) -> None:
    """Raises ValueError if one of `config` has other latents than one of `small`, fewer levels or two more.

    keep_encoder: its encoder shall compute what the small one's does, without training.
    """
    differ = [
        f"{one.name}={getattr(config, one.name)}, not {getattr(small, one.name)}"
        for one in dataclasses.fields(config)
        if one.name not in (*FREE, *NOTES, *MEASURED)
        and getattr(config, one.name) != getattr(small, one.name)
    ]
    levels, known = len(config.block_out_channels), len(small.block_out_channels)
    if levels not in (known, known + 1):
        differ.append(f"block_out_channels has {levels} levels, not {known} or {known + 1}")
    if differ:
        raise ValueError(f"the small autoencoder cannot become the model: {'; '.join(differ)}")
    if keep_encoder:
        check_same_encoder(small, config)


def check_same_encoder(small: AutoencoderKLConfig, config: AutoencoderKLConfig) -> None:
    """Raises ValueError if growth from `small` to `config` is more than multiples of its widths."""
    widths, known = config.block_out_channels, small.block_out_channels
    multiples = len(widths) == len(known) and all(w % k == 0 for w, k in zip(widths, known, strict=True))
    same = ("layers_per_block", "norm_num_groups")
    if not multiples or any(getattr(config, name) != getattr(small, name) for name in same):
        raise ValueError(
            f"train_encoder=false with grow: the encoder of block_out_channels={list(widths)} does not "
            f"compute what that of {list(known)} does. Take multiples of these and the same "
            f"{' and '.join(same)}, or train_encoder=true"
        )


def name_in_small(name: str, levels: int) -> str:
    """The name in one of `levels` less of what does the same there; the encoder's levels count from 0."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "down_blocks"]:
        parts[2] = str(int(parts[2]) - levels)
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
