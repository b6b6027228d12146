"""What the command line draws with: the model asked for, on a device, and what a recipe notes of them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

import ldm
from ldm import options, pipeline, stock
from ldm.arguments import DTYPES
from ldm.checkpoint import model_hash
from ldm.hub import find_folder
from ldm.inputs import check_device, devices
from ldm.optimize import pays

BUNDLED = "bundled"  # the name of the model that comes with the package


def find_device(name: str | None, usual: str | None = None) -> torch.device:
    """The device by that name, else the usual one where it is here, else the fastest.

    Raises ValueError if it is not here.
    """
    here = devices()
    if name is None and usual in here:
        name = usual
    return check_device(name or here[0])


def load(
    settled: Mapping[str, Any], device: torch.device, dtype: str | None, *, fetch: bool
) -> tuple[pipeline.LatentDiffusionPipeline, dict[str, Any]]:
    """The pipeline, and the fields of Recipe that it decides.

    settled: holds the model and its variant, by Recipe's names. dtype: such as "float32"; None suits the
    device. fetch: whether a model may come from the hub.
    Raises ValueError if there is no such model.
    """
    options.check_choice("dtype", dtype or "float32", DTYPES.values())
    kind = getattr(torch, dtype) if dtype else pipeline.default_dtype(device)
    model, variant = settled.get("model") or BUNDLED, settled.get("variant")
    if model == BUNDLED and not pipeline.BUNDLED.is_dir():
        raise ValueError("this installation carries no bundled model: name a folder or a hub id with --model")
    folder = pipeline.BUNDLED if model == BUNDLED else find_folder(model, variant, fetch=fetch)
    with ThreadPoolExecutor(1) as beside:  # hashing lets go of the interpreter
        digest: Future[str] = beside.submit(model_hash, [folder / name for name in stock.MODELS], variant)
        pipe = pipeline.LatentDiffusionPipeline.from_pretrained(folder, dtype=kind, variant=variant)
        pipe.to(device)
        asked, int8 = settled.get("optimize"), bool(settled.get("int8"))
        if int8 and asked is False:
            raise ValueError("int8 is a part of optimize: give --optimize too, or --no-int8")
        if int8 or (pays(pipe) if asked is None else asked):
            pipe.optimize(int8=int8)
    return pipe, {
        "model": model,
        "model_hash": digest.result(),
        "variant": variant,
        "dtype": str(kind).removeprefix("torch."),
        "device": device.type,
        "optimize": pipe.optimized,
        "int8": pipe.int8,
        "version": ldm.__version__,
        "torch": str(torch.__version__),
    }
