"""What the command line draws with: the model asked for, on a device, and what a recipe notes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm import pipeline
from ldm.adapters.files import find_file
from ldm.adapters.words import USUAL as EMBEDDINGS
from ldm.command.arguments import DTYPES
from ldm.drawing.classifier_folder import WEIGHTS as CLASSIFIER
from ldm.drawing.devices import default_dtype
from ldm.drawing.inputs import check_device, devices
from ldm.drawing.optimize import pays
from ldm.files.checkpoint import model_hash
from ldm.files.hub import find_folder
from ldm.formats import stock
from ldm.recipes import options
from ldm.recipes.noted import file_hash

BUNDLED = "bundled"  # the name of the model that comes with the package


def worse_folder(path: str) -> Path:
    """The folder of the UNet of a pipeline, a run or its own. Raises ValueError if there is none."""
    given = Path(os.path.expanduser(path))
    for place in (given, given / "unet", given / "model" / "unet"):
        if (place / "config.json").is_file():
            return place
    raise ValueError(
        f"worse={path!r} holds no UNet: name by --worse the folder of a pipeline, a run or a UNet"
    )


def find_device(name: str | None, usual: str | None = None) -> torch.device:
    """The device by that name, else the usual one where it is here, else the fastest.

    Raises ValueError if it is not here.
    """
    here = devices()
    if name is None and usual in here:
        name = usual
    return check_device(name or here[0])


def find_classifier(path: str) -> Path:
    """The weights of the classifier in a folder, or at path. Raises ValueError if there are none."""
    given = Path(path).expanduser()
    file = given / CLASSIFIER if given.is_dir() else given
    if not file.is_file():
        raise ValueError(
            f"no such file {file}: --classifier takes a folder that train/train_classifier.py wrote"
        )
    return file


def wear(pipe: pipeline.LatentDiffusionPipeline, settled: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the adapters and learned words that are asked for; Recipe's fields of them, and of what guides.

    Raises ValueError for those that are not there or are for another model.
    """
    loras: list[tuple[str, float, str]] = []
    words: list[tuple[str, str]] = []
    for path, weight, *_ in settled.get("loras") or ():
        file = find_file(path)
        pipe.load_lora_weights(file, f"lora_{len(loras)}")
        loras.append((str(file), weight, file_hash(file)))
    pipe.set_adapters([f"lora_{index}" for index in range(len(loras))], [weight for _, weight, _ in loras])
    for path in settled.get("embeddings") or ():
        file = find_file(path if isinstance(path, str) else path[0], usual=EMBEDDINGS)
        pipe.load_textual_inversion(file)
        words.append((str(file), file_hash(file)))
    noted: dict[str, Any] = {"loras": tuple(loras), "embeddings": tuple(words)}
    if settled.get("classifier"):
        file = find_classifier(settled["classifier"])
        noted["classifier"] = (str(file), file_hash(file))
    if settled.get("worse"):
        noted["worse_hash"] = model_hash([worse_folder(settled["worse"])])
    return noted


def load(
    settled: Mapping[str, Any], device: torch.device, dtype: str | None, *, fetch: bool
) -> tuple[pipeline.LatentDiffusionPipeline, dict[str, Any]]:
    """The pipeline, and the fields of Recipe that it decides.

    settled: holds the model, its variant and the prompt's chunks, by Recipe's names. dtype: such as
    "float32"; None suits the device. fetch: whether a model may come from the hub.
    Raises ValueError if there is no such model.
    """
    options.check_choice("dtype", dtype or "float32", DTYPES.values())
    kind = getattr(torch, dtype) if dtype else default_dtype(device)
    model, variant = settled.get("model") or BUNDLED, settled.get("variant")
    if model == BUNDLED and not pipeline.BUNDLED.is_dir():
        raise ValueError("this installation carries no bundled model: name a folder or a hub id with --model")
    single = Path(os.path.expanduser(model))
    if single.suffix == ".safetensors" and single.is_file():
        if variant:
            raise ValueError(f"variant={variant!r} is of folders: {single} is a single file, leave it out")
        hashed = [single]
        read = partial(pipeline.LatentDiffusionPipeline.from_single_file, single)
    else:
        folder = pipeline.BUNDLED if model == BUNDLED else find_folder(model, variant, fetch=fetch)
        hashed = [folder / name for name in stock.read_index(folder)[0].models]
        read = partial(pipeline.LatentDiffusionPipeline.from_pretrained, folder, variant=variant)
    with ThreadPoolExecutor(1) as beside:  # hashing lets go of the interpreter
        digest: Future[str] = beside.submit(model_hash, hashed, variant)
        pipe = read(dtype=kind)
        pipe.to(device)
        for tokenizer in pipe.tokenizers:
            tokenizer.chunks = settled.get("chunks") or tokenizer.chunks
        noted = wear(pipe, settled)
        asked, quantization = settled.get("optimize"), settled.get("quantize")
        if quantization and asked is False:
            raise ValueError(f"quantize={quantization} is a part of optimize: leave out --no-optimize")
        if quantization or (pays(pipe) if asked is None else asked):
            pipe.optimize(quantize=quantization)
    return pipe, {
        "model": model,
        "model_hash": digest.result(),
        "variant": variant,
        "chunks": settled.get("chunks"),
        "dtype": str(kind).removeprefix("torch."),
        "device": device.type,
        "optimize": pipe.optimized,
        "quantize": pipe.quantization,
        **noted,
        "version": ldm.__version__,
        "torch": str(torch.__version__),
    }
