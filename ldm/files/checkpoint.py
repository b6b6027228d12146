"""Model folders in diffusers' layout, read strictly and written atomically: config.json beside safetensors.

No pickle is ever opened, nothing named in a file is imported, and a module comes back complete or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.files.config import read_config, read_json, replacing, write_json
from ldm.formats.report import Report

__all__ = ["load_model", "read_config", "read_json", "read_tensors", "replacing", "save_model", "write_json"]

DIFFUSERS_VERSION = "0.42.1"  # the release whose configuration keys we write
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")  # file stems of diffusers and of transformers
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Model(Protocol):
    """What load_model and save_model ask of a class of models, beside being an nn.Module."""

    config: Any
    config_class: ClassVar[type]
    stock_class: ClassVar[str]

    @staticmethod
    def rename_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]: ...


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def config_json(model: Any, stock_class: str | None = None) -> dict[str, Any]:
    """The config.json of a model, as the stock class of diffusers or transformers reads it."""
    stock_class = stock_class or model.stock_class
    neutral = {key: value for key, value in getattr(model.config, "NEUTRAL", {}).items() if key[0] != "_"}
    optional: frozenset[str] = getattr(
        model.config, "OPTIONAL", frozenset()
    )  # ours: not written where they say nothing
    values = neutral | {
        key: value
        for key, value in dataclasses.asdict(model.config).items()
        if key not in optional or value is not None
    }
    if stock_class.startswith("CLIPText"):
        dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
        return {"architectures": [stock_class], "model_type": "clip_text_model", "dtype": dtype} | values
    return {"_class_name": stock_class, "_diffusers_version": DIFFUSERS_VERSION} | values


# Weights


def weight_file(folder: Path, variant: str | None = None) -> Path:
    """The safetensors file or the index of shards that holds the weights of a model folder.

    Raises ValueError when there is none, saying which variants there are, or that pickles are not opened.
    """
    middle = f".{variant}" if variant else ""
    for stem in WEIGHT_NAMES:
        for name in (f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"):
            if (folder / name).is_file():
                return folder / name
    present = sorted(path.name for path in folder.iterdir())
    safe = [name for name in present if ".safetensors" in name]
    if safe:
        wanted = f"variant {variant!r}" if variant else "weights without a variant"
        raise ValueError(f"{folder} has no {wanted}; it holds {', '.join(safe[:4])}: see the option variant")
    pickles = [name for name in present if name.endswith(PICKLES)]
    if pickles:
        raise ValueError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run any code when they are opened: "
            "refused. Get or convert them to safetensors"
        )
    raise ValueError(f"{folder} has no weights: expected {' or '.join(WEIGHT_NAMES)}.safetensors")


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a model folder holds safetensors of this variant."""
    endings = (f".{variant}.safetensors", f".safetensors.index.{variant}.json")
    return any((folder / f"{stem}{ending}").is_file() for stem in WEIGHT_NAMES for ending in endings)


def model_hash(folders: Iterable[Path], variant: str | None = None) -> str:
    """The first 10 hex digits of the SHA-256 of some models' weight files, or of their indices and shards.

    One of folders may be a single file: the digits are then those that AUTOMATIC1111 shows.

    variant: for the models that have it.
    """
    digest = hashlib.sha256()
    for folder in folders:
        special = variant if variant and has_variant(folder, variant) else None
        path = folder if folder.is_file() else weight_file(folder, special)
        shards = sorted(set(read_json(path)["weight_map"].values())) if path.suffix == ".json" else []
        for each in (path, *(folder / name for name in shards)):
            with each.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:10]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of an index of shards, mapped from the disk.

    Raises ValueError naming the file for a broken one, a missing shard or a dtype not in DTYPES.
    """
    if path.suffix == ".json":
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{path} has no weight_map from names to files")
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(shards.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{path} names the shard {name!r}: expected a .safetensors beside it")
            tensors |= read_tensors(path.parent / name)
        if tensors.keys() != shards.keys():
            differ = sorted(tensors.keys() ^ shards.keys())
            raise ValueError(f"{path} and its shards differ in {len(differ)} tensors, the first {differ[0]}")
        return tensors
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # a safe_open is not a mapping
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES and dtype[0] in "FBC" and dtype != "BOOL":
                    raise ValueError(f"{path}: {name} is stored as {dtype}, not one of {', '.join(DTYPES)}")
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            pointer = raw.read(20).startswith(b"version https://git-")
        hint = "it is a Git LFS pointer: git lfs pull" if pointer else "is it cut short? Get it again"
        raise ValueError(f"{path} is not a whole safetensors file ({error}); {hint}") from None


class Undrawn(TorchFunctionMode):
    """Where initial values are not drawn: to draw on the meta device would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(cls: type[ModuleT], config: Any) -> ModuleT:
    """A model whose tensors have shapes and no values, to be filled by load_state_dict(assign=True)."""
    with torch.device("meta"), Undrawn():
        return cls(config)


def load_model(
    cls: type[ModuleT], folder: str | Path, dtype: torch.dtype | None = None, variant: str | None = None
) -> ModuleT:
    """The model of a folder, in evaluation mode on the CPU; dtype None is float32.

    Raises ValueError, naming the file and the first keys, unless config and weights fit the class exactly.
    """
    folder = Path(folder)
    model_class = typing.cast("type[Model]", cls)
    if not folder.is_dir():
        raise ValueError(f"no such folder {folder}")
    values = read_json(folder / "config.json")
    named = values.get("_class_name", model_class.stock_class)
    if named != model_class.stock_class:
        raise ValueError(f"{folder / 'config.json'} is of a {named}: expected a {model_class.stock_class}")
    config: Any = read_config(model_class.config_class, values, folder / "config.json")
    path = weight_file(folder, variant)
    tensors = model_class.rename_keys(read_tensors(path))
    return fill_model(cls, config, tensors, path, dtype)


def fill_model(
    cls: type[ModuleT],
    config: Any,
    tensors: Mapping[str, Tensor],
    source: Path | str,
    dtype: torch.dtype | None = None,
) -> ModuleT:
    """The model of this configuration with copies of these tensors, in evaluation mode; None is float32.

    Raises ValueError, naming the source and the first keys, unless they fit the class exactly.
    """
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(f"{source}: {name} is stored as {value.dtype}, not one of {', '.join(DTYPES)}")
    model = empty_model(cls, config)
    check_tensors(
        {name: tuple(value.shape) for name, value in model.state_dict().items()}, tensors, source, cls
    )
    # Copied out of the mapping: aligned memory, and a file that is replaced later does no harm.
    state = {name: value.to(dtype or torch.float32, copy=True) for name, value in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not lost, f"{cls.__name__} has buffers outside its state dict, which loading cannot fill: {lost}"
    return model.eval()


def check_tensors(
    want: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], path: Path | str, cls: type
) -> None:
    """Raises ValueError with the first differences unless the tensors have exactly these names and shapes."""
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    Report.compare(want, have, path, cls.__name__).check("Is the config.json beside it the right one?")


def save_model(
    model: nn.Module, folder: str | Path, stock_class: str | None = None, variant: str | None = None
) -> None:
    """Writes config.json, then the weights in the dtype that they have, each file atomically."""
    folder = Path(folder)
    stock_class = stock_class or typing.cast("Model", model).stock_class
    state = getattr(model, "save_keys", dict)(model.state_dict())
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    stem = WEIGHT_NAMES[1] if stock_class.startswith("CLIP") else WEIGHT_NAMES[0]
    write_json(folder / "config.json", config_json(model, stock_class))
    with replacing(folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})  # transformers asks for this note
