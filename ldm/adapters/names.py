"""What files call the layers of a model and the factors of an adapter: PEFT, diffusers, kohya and CompVis.

kohya's files join the parts of a name by underscores, which names hold too. So no name is ever taken apart:
every layer of the model is spelled in all ways, and the names of a file are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

# The parts of a pipeline that can be adapted, and what stands before their layers' names in kohya's files.
FLAT = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
PEFT = "base_model.model."
TEXT = "text_model."  # of transformers 4, before every name in a text encoder
# The end of a key: which factor of which kind it is. kohya's and LyCORIS's own come first: we write them.
FACTORS: dict[tuple[str, str], str] = {
    (
        "lora",
        "down",
    ): r"\.lora_down\.weight|\.lora_A(\.\w+)?\.weight|([._]lora|\.lora_linear_layer)\.down\.weight",
    ("lora", "up"): r"\.lora_up\.weight|\.lora_B(\.\w+)?\.weight|([._]lora|\.lora_linear_layer)\.up\.weight",
    ("lora", "mid"): r"\.lora_mid\.weight",
    **{("loha", name): rf"\.hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{("lokr", name): rf"\.lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ("", "alpha"): r"\.alpha",
    ("", "dora_scale"): r"\.dora_scale",
    ("", "magnitude"): r"\.lora_magnitude_vector(\.\w+)*",
}
ENDINGS = [(re.compile(rf"(.+?)(?:{ending})"), field) for field, ending in FACTORS.items()]

RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def split(key: str) -> tuple[str, str, str] | None:
    """A key's layer, as the file calls it, its kind ("" where any) and factor; None if it is no such key."""
    for pattern, (kind, factor) in ENDINGS:
        if found := pattern.fullmatch(key):
            return found[1], kind, factor
    return None


def compvis(name: str, resnets: int, attentive: Iterable[int]) -> str | None:
    """The name in CompVis' UNet (Rombach et al. 2022, released code) of a layer of diffusers'; None without.

    resnets: of a level on the way down. attentive: the levels on the way up that have attention.
    """
    if name in ENDS:
        return ENDS[name]
    found = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        return None
    side, kind, place, rest = found[1], found[3], int(found[4]), found[5]
    level = int(found[2] or 0)
    rest = RESNET.get(rest, rest) if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{rest}"
    if side == "down_blocks":
        first = 1 + level * (resnets + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + resnets}.0.op"
        return f"input_blocks.{first + place}.{int(kind == 'attentions')}.{rest}"
    first = level * (resnets + 1)
    if kind == "upsamplers":
        return f"output_blocks.{first + resnets}.{1 + (level in attentive)}.{rest}"
    return f"output_blocks.{first + place}.{int(kind == 'attentions')}.{rest}"


def _dotted(part: str, name: str) -> Iterator[str]:
    """A layer's name and what older files of diffusers called it, without what stands before them."""
    names = [name]
    if name.endswith(".to_out.0"):
        names.append(name.removesuffix(".0"))
    if part != "unet" and (found := re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", name)):
        names.append(f"{found[1]}.to_{found[2]}")
    for each in names:
        yield each
        if part != "unet":
            yield TEXT + each


def lookup(layers: Mapping[str, Iterable[str]], resnets: int) -> dict[str, str]:
    """From every name that a file may give a layer to `part.name`.

    layers: the names of each part's layers. resnets: of a level of the UNet on the way down.
    """
    index: dict[str, str] = {}
    for part, names in layers.items():
        known = list(names)
        attentive = {
            int(name.split(".")[1]) for name in known if re.match(r"up_blocks\.\d+\.attentions", name)
        }
        for name in known:
            spelled = [(f"{part}.", each) for each in _dotted(part, name)]
            spelled += [
                (before, each) for before in ("", PEFT, PEFT + f"{part}.") for each in _dotted(part, name)
            ]
            flat = list(_dotted(part, name))
            if part == "unet" and (original := compvis(name, resnets, attentive)):
                flat.append(original)
                spelled.append(("diffusion_model.", original))
            ours = f"{part}.{name}"
            for before, each in spelled:
                index.setdefault(before + each, ours)  # bare names may be of both text encoders: the first
            for before in FLAT[part]:
                for each in flat:
                    other = index.setdefault(before + each.replace(".", "_"), ours)
                    assert other == ours, f"{other} and {ours} have one name in kohya's spelling"
    return index


def made_for(tensors: Mapping[str, Tensor]) -> str:
    """What kind of model an adapter's keys and shapes speak of: "" where they do not say."""
    text = " ".join(tensors)
    if any(word in text for word in ("double_blocks", "single_blocks", "single_transformer_blocks")):
        return "Flux"
    if "joint_blocks" in text or "transformer.transformer_blocks" in text:
        return "Stable Diffusion 3"
    if any(word in text for word in ("lora_te2_", "text_encoder_2.", "clip_g")):
        return "SDXL"
    widths = {
        value.shape[1]
        for key, value in tensors.items()
        if re.search(r"attn2[._]to_[kv]", key)
        and (split(key) or ("", "", ""))[2] == "down"
        and value.ndim > 1
    }
    for width, name in ((2048, "SDXL"), (1024, "Stable Diffusion 2"), (768, "Stable Diffusion 1")):
        if widths == {width}:
            return name
    return ""
