"""The tensors of a single file and those of the parts: the same numbers, under other names and shapes.

Two things differ beside the names. OpenCLIP keeps q, k and v in one tensor, (3D, D). And CompVis' autoencoder
keeps the layers of its attention as 1x1 convolutions, (C, C, 1, 1). One layout says where everything lies,
for both ways.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import empty_model
from ldm.formats.keys import OPEN_CLIP, PARTS, UNET, ema_name, is_open_clip, part_table, rename
from ldm.formats.report import Report, Shape
from ldm.model.unet import UNet
from text_encoder.clip import CLIPTextEncoder

CLASSES: dict[str, Any] = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": CLIPTextEncoder}
Tensors = Mapping[str, Tensor]
QKV = re.compile(r"(.+\.self_attn)\.[qkv]_proj\.(weight|bias)")
VAE_PROJECTION = re.compile(r".+\.attentions\.0\.to_(q|k|v|out\.0)\.weight")
CLIP_OLD = re.compile(r"cond_stage_model\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)")
EMA_HINT = "averages of the UNet's weights: the option ema reads those"
SCHEDULE = (
    r"betas|alphas_cumprod(_prev)?|sqrt_(alphas_cumprod|one_minus_alphas_cumprod|recipm?1?_alphas_cumprod)"
    r"|log_one_minus_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar"
)
CLIP_REST = r"logit_scale|text_projection(\.weight)?|attn_mask"
# Names of single files that no part needs, and what each is.
EXTRAS = {
    r"model_ema\..+": EMA_HINT,
    rf"(low_scale_model\.)?({SCHEDULE})": "the noise schedule, which the configuration gives",
    r"cond_stage_model\..+\.position_ids": "the numbers of the positions",
    rf"cond_stage_model\.(model\.|transformer\.)?({CLIP_REST})": "what else CLIP has beside its text encoder",
    r"first_stage_model\.(loss|model_ema)\..+": "the autoencoder's training",
    r"scale_factor|global_step|v_pred|ztsnr|model\.(v_pred|ztsnr)": "a note",
}


class Place(NamedTuple):
    """What a tensor of a single file is here."""

    part: str
    names: tuple[str, ...]  # in the part; three where the file keeps q, k and v in one
    shape: Shape  # in the file


@functools.lru_cache(maxsize=32)
def part_shapes(part: str, config: Any) -> Mapping[str, Shape]:
    """The names and shapes of a part's weights. config: of the part's class."""
    return {
        name: tuple(value.shape) for name, value in empty_model(CLASSES[part], config).state_dict().items()
    }


def layout(configs: Mapping[str, Any]) -> dict[str, Place]:
    """Every name of a single file of these parts, and its place.

    Raises ValueError for a configuration that CompVis' modules do not have.
    """
    places = {}
    for part in PARTS:
        prefix, table = part_table(part, configs[part])
        fused = part == "text_encoder" and is_open_clip(configs[part])
        for name, shape in part_shapes(part, configs[part]).items():
            qkv = QKV.fullmatch(name) if fused else None
            if qkv:
                if not name.endswith(f"q_proj.{qkv[2]}"):
                    continue
                names = tuple(f"{qkv[1]}.{each}_proj.{qkv[2]}" for each in "qkv")
                name, shape = f"{qkv[1]}.in_proj.{qkv[2]}", (3 * shape[0], *shape[1:])
            else:
                names = (name,)
            if part == "vae" and VAE_PROJECTION.fullmatch(name):
                shape = (*shape, 1, 1)
            places[prefix + rename(name, table)] = Place(part, names, shape)
    return places


def usual(name: str) -> str:
    """The usual name of a single file's tensor: some writers leave `text_model.` out of CLIP's."""
    return CLIP_OLD.sub("cond_stage_model.transformer.text_model.", name)


def extras(shapes: Mapping[str, Shape], configs: Mapping[str, Any]) -> dict[str, str]:
    """The names that no part needs and that are known, each with what it is."""
    found = {}
    layers = configs["text_encoder"].num_hidden_layers
    for name in shapes:
        block = re.match(re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.", name)
        if block and int(block[1]) >= layers:
            found[name] = "the last layer of OpenCLIP, which Stable Diffusion 2 leaves out"
        for pattern, what in EXTRAS.items():
            if re.fullmatch(pattern, name):
                found[name] = what
    return found


def averaged(tensors: Tensors, source: str) -> dict[str, Tensor]:
    """The file with the averages of the UNet's weights in the place of the weights.

    Raises ValueError if it has none.
    """
    averages = {name: value for name, value in tensors.items() if name.startswith("model_ema.")}
    ours = [name for name in tensors if name.startswith(UNET)]
    if not averages:
        raise ValueError(
            f"{source} has no averaged weights, which are named model_ema.*: leave the option ema out"
        )
    lost = [name for name in ours if ema_name(name) not in averages]
    if lost:
        raise ValueError(
            f"{source} has no averages of {len(lost)} of the UNet's weights, the first {lost[0]}"
        )
    rest = {name: value for name, value in tensors.items() if name not in averages}
    return rest | {name: averages[ema_name(name)] for name in ours}


def _plain(shape: Shape) -> Shape:
    """A shape without the 1s at its end: a 1x1 convolution and a linear layer hold the same numbers."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def split(
    tensors: Tensors, configs: Mapping[str, Any], source: str, target: str
) -> tuple[dict[str, dict[str, Tensor]], Report]:
    """The tensors of each part, views where they can be, and the report of what else the file holds.

    Raises ValueError, with the first names, unless the file has exactly what the parts need and known extras.
    """
    places = layout(configs)
    tensors = {usual(name): value for name, value in tensors.items()}
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    known = extras(have, configs)
    for name, place in places.items():
        if name in have and _plain(have[name]) == _plain(place.shape):
            have[name] = place.shape
    want = {name: place.shape for name, place in places.items()}
    report = Report.compare(want, have, source, target, known).check()
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    shapes = {part: part_shapes(part, configs[part]) for part in PARTS}
    for name, place in places.items():
        for ours, piece in zip(place.names, tensors[name].chunk(len(place.names)), strict=True):
            parts[place.part][ours] = piece.reshape(shapes[place.part][ours])
    return parts, report


def join(parts: Mapping[str, Tensors], configs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a single file of these parts: split's inverse."""
    tensors = {}
    for name, place in layout(configs).items():
        pieces = [parts[place.part][ours] for ours in place.names]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        tensors[name] = whole.reshape(place.shape)
    return tensors
