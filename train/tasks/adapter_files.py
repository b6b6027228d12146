"""Files of trained adapters and tokens, in the spellings that other programs read.

diffusers': `unet.<layer>.lora_A.weight` and the settings as JSON in the header. kohya's, shared by LyCORIS:
`lora_unet_<layer_>.lora_down.weight` with an `alpha` beside each, and hada_ or lokr_ where it is no LoRA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.config import replacing
from text_encoder.clip import PREFIX
from train.tasks.adapters import LoKr, adapters_of

LORA_FILE = "pytorch_lora_weights.safetensors"  # the names that diffusers looks for in a folder
TOKENS_FILE = "learned_embeds.safetensors"
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
# peft's own files have no .weight there, and then transformers 5 finds no lengths for its text encoder
TEXT_LENGTHS = re.compile(r"^text_encoder\..*\.lora_magnitude_vector$")
LEAVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}  # peft's -> kohya's


def stock_name(model: str, name: str) -> str:
    """The name of a layer of one of the models as files have it."""
    return PREFIX + name if model == "text_encoder" else name


def diffusers_tensors(trees: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every number under peft's names, each after its model's. trees: by the name of the model."""
    tensors = {
        f"{model}.{stock_name(model, name)}": value
        for model, tree in trees.items()
        for name, value in tree.state_dict().items()
    }
    return {TEXT_LENGTHS.sub(r"\g<0>.weight", name): value for name, value in tensors.items()}


def kohya_tensors(trees: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The same under kohya's and LyCORIS' names, with an alpha for each layer."""
    tensors: dict[str, Tensor] = {}
    for model, tree in trees.items():
        for name, adapter in adapters_of(tree).items():
            layer = KOHYA[model] + stock_name(model, name).replace(".", "_")
            values = {LEAVES.get(leaf, leaf): value for leaf, value in adapter.state_dict().items()}
            if "lora_magnitude_vector" in values:
                values["dora_scale"] = values.pop("lora_magnitude_vector").reshape(-1, 1)
            if isinstance(adapter, LoKr) and adapter.whole:
                values["lokr_w2"] = adapter.scale * values["lokr_w2"]  # readers know no alpha without a rank
            else:
                values["alpha"] = torch.tensor(adapter.scale * adapter.rank)
            tensors |= {f"{layer}.{leaf}": value for leaf, value in values.items()}
    return tensors


def write_adapters(
    path: Path, trees: Mapping[str, nn.Module], settings: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """A file of adapters. settings: peft's for each model, and so diffusers' spelling; None: kohya's."""
    notes = {"format": "pt"}
    if settings is not None:
        every = {f"{model}.{key}": value for model, one in settings.items() for key, value in one.items()}
        notes["lora_adapter_metadata"] = json.dumps(every, indent=2, sort_keys=True)
    tensors = diffusers_tensors(trees) if settings is not None else kohya_tensors(trees)
    write(path, tensors, notes)


def write_tokens(path: Path, tokens: Mapping[str, Tensor]) -> None:
    """A file of learned tokens, {token: (vectors, D)}: textual inversion's as diffusers writes it."""
    write(path, tokens, {"format": "pt"})


def write(path: Path, tensors: Mapping[str, Tensor], notes: dict[str, str]) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata=notes)
