"""Large pictures through the autoencoder in strips: the answer of the whole but for rounding, in less memory.

Tiles that go through a network alone do not fit together: a group norm sees the whole picture, and the middle
attends over all of it. Here every layer goes over all strips before the next one begins. A convolution is
shown the rows that touch its strip, and a norm uses the mean and deviation of the whole picture. The middle,
at the smallest size, and attention wherever else it is are computed whole.

A layer's strips are given away as the next layer uses them up, so what is held is a resnet's two branches and
the temporaries of one strip. No layer is computed twice but for the touching rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.architecture import Decoder, Encoder, Stage
from autoencoder.layers import AttentionBlock, GroupNormSiLU, ResnetBlock, Upsample

PIXELS = 2**17  # of a strip, about, at the size of its layer; fewer cost more touching rows

Strips = deque[Tensor]  # (B, C, rows, W) each, from the top down


def decode(decoder: Decoder, z: Tensor) -> Tensor:
    """The decoder's answer. z: (B, latent_channels, h, w). Returns (B, 3, H, W). No gradients."""
    strips = split([decoder.mid_block(decoder.conv_in(z))])
    for block in decoder.up_blocks:
        strips = through_stage(block, strips)  # type: ignore[arg-type]
        for layer in block.upsamplers:  # type: ignore[union-attr]
            strips = enlarged(layer, strips)
    norm = norm_of_all(decoder.conv_norm_out, strips)
    return join(through(strips, lambda x: decoder.conv_out(norm(x))))


def encode(encoder: Encoder, image: Tensor) -> Tensor:
    """The encoder's answer. image: (B, 3, H, W). Returns (B, 2 * latent_channels, h, w). No gradients."""
    strips = through(split([image]), encoder.conv_in)
    for block in encoder.down_blocks:
        strips = through_stage(block, strips)  # type: ignore[arg-type]
        for layer in block.downsamplers:  # type: ignore[union-attr]
            strips = split([join(halved(layer, strips))])
    x = encoder.mid_block(join(strips))
    return encoder.conv_out(encoder.conv_norm_out(x))


def split(strips: Iterable[Tensor], pixels: int = PIXELS) -> Strips:
    """The same rows in strips of at most so many pixels, but of two rows at least. Views."""
    return deque(part for x in strips for part in x.split(max(2, pixels // x.shape[3] // 2 * 2), dim=2))


def join(strips: Strips) -> Tensor:
    """All rows: (B, C, H, W)."""
    return torch.cat(tuple(strips), dim=2)


def touched(strips: Strips) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Each strip, taken out of `strips`; a copy with the rows that touch it; and its place in that."""
    above: list[Tensor] = []
    while strips:
        x = strips.popleft()
        below = [strips[0][:, :, :1]] if strips else []
        yield x, torch.cat([*above, x, *below], dim=2), slice(len(above), len(above) + x.shape[2])
        above = [x[:, :, -1:].clone()]  # a copy, or all of x would be held


def through(strips: Strips, layer: Callable[[Tensor], Tensor]) -> Strips:
    """What a layer that sees one row beyond makes of strips, which it uses up. It may change its input."""
    return deque(layer(seen)[:, :, rows].clone() for _, seen, rows in touched(strips))


def through_stage(block: Stage, strips: Strips) -> Strips:
    """The resnets and attentions of a stage, without its change of size."""
    for resnet, attention in zip(block.resnets, block.attentions, strict=True):
        strips = through_resnet(resnet, strips)  # type: ignore[arg-type]
        if isinstance(attention, AttentionBlock):
            strips = split([attention(join(strips))])
    return strips


def through_resnet(block: ResnetBlock, strips: Strips) -> Strips:
    """Both branches go on together, so that a wide input is gone before its output is there."""
    norm = norm_of_all(block.norm1, strips)
    h, shortcut = Strips(), Strips()
    for x, seen, rows in touched(strips):
        h.append(block.conv1(norm(seen))[:, :, rows].clone())
        shortcut.append(block.conv_shortcut(x))
    norm = norm_of_all(block.norm2, h)  # type: ignore[arg-type]
    return deque(shortcut.popleft() + block.conv2(norm(seen))[:, :, rows] for _, seen, rows in touched(h))


def enlarged(layer: Upsample, strips: Strips) -> Strips:
    """Upsample of all strips, cut finer beforehand, since each grows to four times its pixels."""
    fine = split(strips, PIXELS // 4)
    strips.clear()  # fine ones are views, which alone hold them now
    out = Strips()
    for _, seen, rows in touched(fine):
        y = layer(seen, size=(2 * seen.shape[2], 2 * seen.shape[3]))
        out.append(y[:, :, 2 * rows.start : 2 * rows.stop].clone())
    return out


def halved(layer: Callable[[Tensor], Tensor], strips: Strips) -> Strips:
    """The autoencoder's Downsample, which pads below and never above, of strips of even rows."""
    return deque(layer(seen[:, :, rows.start :]) for _, seen, rows in touched(strips))


def norm_of_all(layer: GroupNormSiLU, strips: Strips) -> Callable[[Tensor], Tensor]:
    """The layer with the mean and deviation of all strips together, for some of their rows, in place.

    Strips are put together, in float64, as Chan, Golub & LeVeque 1983 put two samples together: each gives
    its mean and the squares around that, which float32 has exactly enough also where a picture is flat.
    """
    count, mean, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()  # of each channel: (B, C)
    device = strips[0].device
    for x in strips:
        pixels = x.float().permute(0, 2, 3, 1).flatten(1, 2)  # (B, n, C)
        own = pixels.mean(1)
        around = (pixels - own[:, None]).square_().sum(1)
        n, off = pixels.shape[1], own.cpu().double() - mean  # on the CPU: not every device has float64
        mean = mean + off * (n / (count + n))
        squares = squares + around.cpu().double() + off**2 * (count * n / (count + n))
        count += n
    groups = mean.unflatten(1, (layer.num_groups, -1))  # (B, groups, C / groups)
    middle = groups.mean(2, keepdim=True)
    spread = squares.view_as(groups) / count + (groups - middle) ** 2
    scale = (spread.mean(2, keepdim=True) + layer.eps).rsqrt()

    def of_channels(values: Tensor) -> Tensor:
        """(B, groups, 1) to (B, C, 1, 1) float32, where the strips are."""
        return values.expand_as(groups).flatten(1)[:, :, None, None].float().to(device)

    center = of_channels(middle)
    weight, bias = (value.float().view(1, -1, 1, 1) for value in (layer.weight, layer.bias))
    factor = of_channels(scale) * weight

    def norm(x: Tensor) -> Tensor:
        y = x.float().sub_(center).mul_(factor).add_(bias)
        return F.silu(y, inplace=True).to(x.dtype)

    return norm
