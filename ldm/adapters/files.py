"""Adapter files: read in any of the field's spellings, written in three. Safetensors alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters import names
from ldm.adapters.deltas import NEEDS, Layer, tucker
from ldm.files.checkpoint import PICKLES, read_tensors
from ldm.files.config import read_json, replacing, write_json

METADATA = "lora_adapter_metadata"  # of diffusers, in a safetensors' header: PEFT's configuration as JSON
CONFIG = "adapter_config.json"  # of PEFT, beside its adapter_model.safetensors
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and of PEFT
SPELLINGS = ("diffusers", "kohya", "peft")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """The layers that a file changes, by `part.name`, such as unet.mid_block.attentions.0.proj_in."""

    layers: Mapping[str, Layer]
    source: str = "the tensors"  # what errors call it

    @property
    def parts(self) -> list[str]:
        return [part for part in names.FLAT if any(name.startswith(f"{part}.") for name in self.layers)]


# Reading


def find_file(path: str | Path, weight_name: str | None = None, usual: tuple[str, ...] = USUAL) -> Path:
    """The safetensors file at path, or in the folder there, by its name or the usual ones or as the only one.

    Raises ValueError where there is none, where there are several, and for a pickle.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(each.name for each in path.glob("*.safetensors"))
        known = [name for name in usual if name in found]
        name = weight_name or (known or found or [""])[0]
        if not name or (weight_name is None and not known and len(found) > 1):
            held = f"it holds {', '.join(found[:4])}: name one" if found else "it holds no .safetensors"
            raise ValueError(f"{path} is a folder, and {held}")
        path = path / name
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run any code: get or convert it to .safetensors")
    if not path.is_file():
        raise ValueError(f"no such file {path}: expected a .safetensors here (get it from a hub beforehand)")
    return path


def read_adapter(
    source: str | Path | Tensors, index: Mapping[str, str], weight_name: str | None = None
) -> Adapter:
    """The adapter of a file, a folder or tensors by name.

    index: from names to those of the model's layers, see names.lookup.
    Raises ValueError, with what it looks made for, unless every tensor is understood, finite and of a layer.
    """
    if isinstance(source, Mapping):
        return parse(source, {}, index, "the tensors")
    path = find_file(source, weight_name)
    tensors = read_tensors(path)
    config: dict[str, Any] = {}
    if path.name == USUAL[1] and (path.parent / CONFIG).exists():
        config = read_json(path.parent / CONFIG)
    with safe_open(path, framework="pt") as file:
        note = (file.metadata() or {}).get(METADATA)
    if note is not None:
        try:
            config = json.loads(note)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {METADATA} is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: {METADATA} holds a {type(config).__name__}, expected an object")
    return parse(tensors, config, index, str(path))


def parse(tensors: Tensors, config: Mapping[str, Any], index: Mapping[str, str], source: str) -> Adapter:
    """The adapter of a file's tensors and PEFT's configuration; see read_adapter."""
    sorted_: dict[str, dict[tuple[str, str], Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        found = names.split(key)
        if found is None:
            unknown.append(key)
            continue
        name, kind, factor = found
        sorted_.setdefault(name.replace(".processor.", "."), {})[kind, factor] = value
        if not value.isfinite().all() or not value.numel():
            raise ValueError(
                f"{source}: {key} is {'not finite' if value.numel() else 'empty'}: get the file again"
            )
    strange = [name for name in sorted_ if name not in index]
    if unknown or strange or not sorted_:
        raise ValueError(f"{source} {_misfit(unknown, strange, len(sorted_), tensors)}")
    layers: dict[str, Layer] = {}
    for name, fields in sorted_.items():
        ours = index[name]
        if ours in layers:
            raise ValueError(f"{source} holds {ours} twice, once as {name}")
        layers[ours] = _layer(fields, name, _of_part(config, ours.partition(".")[0]), f"{source}: {name}")
    return Adapter(layers, source)


def _misfit(unknown: list[str], strange: list[str], count: int, tensors: Tensors) -> str:
    """Why these tensors are no adapter of this model."""
    kind = names.made_for(tensors)
    hint = f"; it looks made for {kind}" if kind else ""
    if not tensors:
        return "is empty: it would change nothing"
    if unknown and (strange or not count):
        return f"is no adapter for this model, its first key is {unknown[0]}{hint}"
    if unknown:
        return f"holds {len(unknown)} tensors that no adapter known here has, the first {unknown[0]}{hint}"
    return f"changes {len(strange)} of {count} layers that this model has not, the first {strange[0]}{hint}"


def _layer(fields: dict[tuple[str, str], Tensor], name: str, config: Mapping[str, Any], where: str) -> Layer:
    """The layer of one name's tensors. Raises ValueError unless they are those of one kind."""
    kinds = {kind for kind, _ in fields if kind}
    factors = {factor: value for (kind, factor), value in fields.items() if kind}
    kind = next(iter(kinds), "")
    if len(kinds) != 1 or set(factors) not in NEEDS[kind]:
        have = ", ".join(factor for _, factor in fields)
        raise ValueError(f"{where} has {have}: expected, for one kind of adapter, all of its factors")
    magnitude = fields.get(("", "dora_scale"))
    if ("", "magnitude") in fields:  # PEFT's: (out,), of convolutions (1, out, 1, 1)
        given, up = fields["", "magnitude"], factors["up"]
        magnitude = given.reshape(-1, *[1] * (factors["down"].ndim - 1 if up.ndim > 2 else 1))
    plain = Layer(kind, factors)
    alpha = fields.get(("", "alpha"))
    if alpha is not None:
        if alpha.numel() != 1:
            raise ValueError(f"{where}: alpha has the shape {tuple(alpha.shape)}: expected one number")
        scale = float(alpha) / plain.rank if plain.rank else 1.0
    else:
        scale = _scale(config, name, plain.rank, where)
    return Layer(kind, factors, scale, magnitude)


def _of_part(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """PEFT's configuration of a part: diffusers' notes have them all, each key behind its part's name."""
    mine = {
        key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")
    }
    return mine or {key: value for key, value in config.items() if "." not in key}


def _scale(config: Mapping[str, Any], name: str, rank: int | None, where: str) -> float:
    """alpha / r of a layer by PEFT's configuration; 1 without, as in diffusers.

    With use_rslora alpha / sqrt(r) (Kalajdzievski 2023).
    """
    r = rank or _of_pattern(config, "rank_pattern", name, config.get("r"), where)
    usual = config.get("lora_alpha", config.get("alpha", r))
    alpha = _of_pattern(config, "alpha_pattern", name, usual, where)
    if r is None or alpha is None:
        return 1.0
    if not all(isinstance(each, int | float) and math.isfinite(each) for each in (r, alpha)) or r < 1:
        raise ValueError(
            f"{where}: r={r!r} and alpha={alpha!r} in its configuration: expected numbers, r from 1"
        )
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _of_pattern(config: Mapping[str, Any], which: str, name: str, usual: Any, where: str) -> Any:
    """A layer's entry in a pattern of PEFT's configuration, else the usual one.

    A key is the end of a name, or behind ^ all of it. PEFT takes regular expressions; none is run here.
    """
    for key, value in (config.get(which) or {}).items():
        end = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", end):
            raise ValueError(f"{where}: {which} has the regular expression {key!r}: expected names of layers")
        if name == end or name.endswith(f".{end}"):
            return value
    return usual


# Writing


def spell(adapter: Adapter, spelling: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file in this spelling, and the configuration that diffusers and PEFT want with them.

    Raises ValueError for what the spelling has no way to say.
    """
    if spelling not in SPELLINGS:
        raise ValueError(f"spelling={spelling!r}: expected one of {', '.join(SPELLINGS)}")
    if spelling == "kohya":
        return _kohya(adapter), {}
    if spelling == "peft" and len(adapter.parts) > 1:
        raise ValueError(
            f"{adapter.source} is for {' and '.join(adapter.parts)}, and PEFT's files are for one model: "
            "use another spelling"
        )
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part in adapter.parts:
        mine = {name: layer for name, layer in adapter.layers.items() if name.startswith(f"{part}.")}
        before = names.PEFT if spelling == "peft" else f"{part}."
        before += names.TEXT if part != "unet" else ""
        for name, layer in mine.items():
            local = name.removeprefix(f"{part}.")
            tensors |= {before + local + end: value for end, value in _peft(name, layer, spelling).items()}
        config = _config({name.removeprefix(f"{part}."): layer for name, layer in mine.items()})
        configs |= config if spelling == "peft" else {f"{part}.{key}": value for key, value in config.items()}
    return tensors, configs


def _kohya(adapter: Adapter) -> dict[str, Tensor]:
    several = "text_encoder_2" in adapter.parts
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        part, _, local = name.partition(".")
        before = names.FLAT[part][-1 if several else 0]
        local = (names.TEXT if part != "unet" else "") + local
        flat = before + local.replace(".", "_")
        if layer.rank is None:  # whole factors, for which readers take no alpha
            layer = replace(
                layer, factors={**layer.factors, "w2": layer.scale * layer.factors["w2"]}, scale=1.0
            )
        for factor, value in layer.factors.items():
            end = {"lora": f"lora_{factor}.weight", "loha": f"hada_{factor}", "lokr": f"lokr_{factor}"}[
                layer.kind
            ]
            tensors[f"{flat}.{end}"] = value
        tensors[f"{flat}.alpha"] = torch.tensor(layer.scale * (layer.rank or 1))
        if layer.magnitude is not None:
            tensors[f"{flat}.dora_scale"] = layer.magnitude
    return tensors


def _peft(name: str, layer: Layer, spelling: str) -> dict[str, Tensor]:
    """A layer's tensors by the ends of their names in files of PEFT and diffusers."""
    if layer.kind != "lora":
        if layer.magnitude is not None:
            raise ValueError(f"{name}: DoRA of a {layer.kind} is in kohya's spelling alone")
        plain = layer.kind == "lokr" and layer.factors.keys() <= {"w1", "w2", "w2_a", "w2_b"}
        if spelling == "diffusers" and not (plain and name.startswith("unet.")):
            raise ValueError(
                f"{name}: diffusers' spelling is for LoRA, and of a UNet for LoKr of a whole w1 and no core, "
                f"and this is a {layer.kind}: use kohya or peft"
            )
        prefix = {"loha": ".hada_", "lokr": ".lokr_"}[layer.kind]
        return {prefix + factor: value for factor, value in layer.factors.items()}
    down, up = layer.factors["down"], layer.factors["up"]
    if "mid" in layer.factors:  # pointwise down and then mid are one convolution
        eye = torch.eye(layer.rank or 0)
        down = tucker(layer.factors["mid"].float(), eye, down.flatten(1).float()).to(down.dtype)
    found = {".lora_A.weight": down, ".lora_B.weight": up}
    if layer.magnitude is not None:
        if layer.magnitude.shape[0] != len(up):
            raise ValueError(
                f"{name}: its DoRA has a norm for each input, which is in kohya's spelling alone"
            )
        end = ".lora_magnitude_vector"
        if spelling == "diffusers" and not name.startswith("unet."):
            end += ".weight"  # or transformers 5, which reads them for diffusers, finds no lengths
        found[end] = layer.magnitude.reshape(1, -1, 1, 1) if up.ndim > 2 else layer.magnitude.flatten()
    return found


def _rank(layer: Layer) -> int:
    """r in PEFT's configuration: where the factors are whole, the least with which PEFT makes them so."""
    return layer.rank or math.ceil(max(layer.factors["w2"].shape[:2]) / 2)


def _config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """PEFT's configuration of the layers of one model: the first layer's rank and alpha, and who differs.

    Raises ValueError where they are of several kinds, for which PEFT has no configuration.
    """
    kinds = {layer.kind for layer in layers.values()}
    if len(kinds) > 1 or len({layer.magnitude is None for layer in layers.values()}) > 1:
        raise ValueError(
            f"layers of several kinds ({', '.join(sorted(kinds))}, DoRA or not) are in kohya's alone"
        )
    kind = kinds.pop()
    ranks = {name: _rank(layer) for name, layer in layers.items()}
    alphas = {name: layer.scale * ranks[name] for name, layer in layers.items()}
    first = next(iter(layers))
    config: dict[str, Any] = {
        "r": ranks[first],
        ("lora_alpha" if kind == "lora" else "alpha"): alphas[first],
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": list(layers),
    }
    if kind == "lora" and next(iter(layers.values())).magnitude is not None:
        config["use_dora"] = True
    return config


def write_adapter(adapter: Adapter, path: str | Path, spelling: str = "diffusers") -> None:
    """Writes an adapter, whole or not at all; in PEFT's spelling its adapter_config.json beside it.

    Raises ValueError for what the spelling has no way to say, and for another ending than .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: an adapter is written as a .safetensors")
    tensors, config = spell(adapter, spelling)
    metadata = {"format": "pt"}
    if spelling == "diffusers":
        metadata[METADATA] = json.dumps(config)
    if spelling == "peft":
        kinds = {layer.kind for layer in adapter.layers.values()}
        write_json(path.parent / CONFIG, {"peft_type": kinds.pop().upper()} | config)
    with replacing(path) as temporary:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, metadata
        )
