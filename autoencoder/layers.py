"""The layers that the autoencoder and the UNet share.

Parameter names are those of diffusers' modules (`conv_shortcut`, `to_out.0`, `downsamplers.0.conv`): they are
the field's file format, not our taste. A part that a configuration leaves out is an `nn.Identity`, which has
no parameters, so that no `forward` asks what was configured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def dropout(p: float) -> nn.Module:
    """Dropout with probability p; nothing at all where p is 0."""
    return nn.Dropout(p) if p > 0 else nn.Identity()


class GroupNorm(nn.GroupNorm):
    """(B, C, H, W) -> (B, C, H, W): group norm (Wu & He 2018), also of flat pictures.

    For channels_last torch 2.13 on a CPU takes E[x^2] - E[x]^2 in float32, noise where a group hardly varies.
    A constant more or less in all of a group changes nothing, so each group gives away the mean of its first
    pixel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not x.is_contiguous():
            pixel = x[:, :, :1, :1].detach().unflatten(1, (self.num_groups, -1)).mean(2, keepdim=True)
            x = x - pixel.expand(-1, -1, self.num_channels // self.num_groups, -1, -1).flatten(1, 2)
        return super().forward(x)


class GroupNormSiLU(GroupNorm):
    """(B, C, H, W) -> (B, C, H, W): group norm, then x sigmoid(x)."""

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """added: (B, C), to every pixel of a channel beforehand."""
        return F.silu(super().forward(x if added is None else x + added[:, :, None, None]))


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): two convolutions beside a shortcut (He et al. 2016)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int = 32, eps: float = 1e-6, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2: GroupNorm = GroupNormSiLU(groups, out_channels, eps=eps)
        self.dropout = dropout(drop)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H / 2, W / 2) by a convolution of stride 2.

    padding: 1 pads all four sides (the UNet), 0 pads right and below only (the autoencoder).
    """

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """temb: not used; the resnet that takes this layer's place in ADM's blocks needs it."""
        return self.conv(self.pad(x))


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, *size): nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor | None = None, *, size: Sequence[int]) -> Tensor:
        """size: (H, W), about twice x's. temb: not used, see Downsample."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C); a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) with H and W of `like`: a view, laid out as channels_last."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1) in each head, by torch's own kernels.

    q: (B, N, heads * D). k, v: (B, M, heads * D). Returns (B, N, heads * D).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, D), views
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AttentionBlock(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): every pixel attends to every other, with its own norm and shortcut.

    Equal to the AttnBlock of Ho et al. 2020 (heads = 1) and, with more heads, of Dhariwal & Nichol 2021.
    """

    def __init__(self, channels: int, *, heads: int = 1, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, C) each; the UNet's blocks put their own door here."""
        return scaled_dot_product(q, k, v, self.heads)

    def forward(self, x: Tensor) -> Tensor:
        h = to_tokens(self.group_norm(x))
        h = self.attend(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + to_image(self.to_out[0](h), like=x)


OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_attention(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under today's names of an AttentionBlock.

    Old files say query, key, value and proj_attn, and the oldest keep these weights as 1x1 convolutions,
    (C, C, 1, 1) instead of (C, C).
    """
    renamed = {}
    for name, tensor in state_dict.items():
        block, _, leaf = name.rpartition(".")  # "...attentions.0.query", "weight"
        parent, _, layer = block.rpartition(".")
        if parent.rpartition(".")[0].endswith("attentions") and layer in OLD_ATTENTION_NAMES:
            name = f"{parent}.{OLD_ATTENTION_NAMES[layer]}.{leaf}"
            tensor = tensor.flatten(1) if leaf == "weight" else tensor
        renamed[name] = tensor
    return renamed


def recompute(module: nn.Module) -> None:
    """Gradient checkpointing of one module (Chen et al. 2016): keeps its inputs, computes the rest again.

    Replaces forward on this one object; its class, its parameters and its results stay as they are.
    """
    if "forward" not in vars(module):
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
