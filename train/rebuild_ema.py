"""Rebuild the averaged weights of a run with another width, when its pictures are there to choose by.

  accelerate launch train/train_ldm.py --ema-widths '[0.05, 0.1]'     # keeps snapshots while it trains
  python -m train.rebuild_ema --run runs/shapes --width 0.07 --output runs/shapes/model-0.07

A width is a share of the run: 0.1 averages over about the last fifth, 0.02 over little more than the end.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import load_model, save_model, weight_file
from ldm.files.config import read_json, write_json
from ldm.formats.parts import TRAINED
from ldm.model.unet import UNet
from text_encoder.clip import CLIPTextEncoder
from train.command import command
from train.config import parse
from train.fit.ema import exponent, rebuild

# by the first part of a parameter's name: the class, and its folder in what the run exported
PARTS = {
    "unet": (UNet, "unet"),
    "text_encoder": (CLIPTextEncoder, "text_encoder"),
    "vae": (AutoencoderKL, ""),
}


@dataclass(frozen=True, kw_only=True)
class RebuildRecipe:
    """An average of another width."""

    run: str  # folder of a finished run that had ema_widths
    width: float  # of the average, in shares of the run: more than 0, at most 0.28
    output: str  # folder for the model, which may not exist yet

    def __post_init__(self) -> None:
        exponent(self.width)


class Snapshot(NamedTuple):
    """An average as it was after so many updates."""

    path: Path
    updates: int
    width: float


def find_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first. Raises ValueError if there are none."""
    found = []
    for path in sorted((run / "snapshots").glob("step-*-ema-*.safetensors")):
        with safe_open(path, "pt") as file:
            note = file.metadata()
        found.append(Snapshot(path, int(note["updates"]), float(note["width"])))
    if not found:
        raise ValueError(f"{run / 'snapshots'} holds no snapshot: train with --ema-widths '[0.05, 0.1]'")
    return sorted(found, key=lambda one: one.updates)


def rebuilt(snapshots: Sequence[Snapshot], width: float) -> dict[str, Tensor]:
    """The average of `width` at the time of the newest snapshot, by parameter name, float32."""
    shares = rebuild([(one.updates, one.width) for one in snapshots], width, snapshots[-1].updates)
    total: dict[str, Tensor] = {}
    for share, snapshot in zip(shares, snapshots, strict=True):
        for name, value in load_file(snapshot.path).items():
            part = share * value.double()  # shares of early snapshots are large and of both signs
            total[name] = total[name] + part if name in total else part
    return {name: value.float() for name, value in total.items()}


def replace_weights(model: Path, average: dict[str, Tensor]) -> None:
    """Put the average into an exported model, in the dtype that it is stored in."""
    for part, (cls, subfolder) in PARTS.items():
        own = {name.split(".", 1)[1]: value for name, value in average.items() if name.startswith(f"{part}.")}
        if not own:
            continue
        folder = model / subfolder
        dtype = next(iter(load_file(weight_file(folder)).values())).dtype
        module: torch.nn.Module = load_model(cls, folder, dtype)
        module.load_state_dict({**module.state_dict(), **{name: own[name].to(dtype) for name in own}})
        save_model(module, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the model of the run with the average that the command line asks for."""
    recipe = parse(RebuildRecipe, sys.argv[1:] if argv is None else argv, None, __doc__ or "")
    run, output = Path(recipe.run), Path(recipe.output)
    snapshots = find_snapshots(run)
    if output.exists():
        raise ValueError(f"output={output} exists: choose another, nothing is overwritten")
    if not (run / "exported.json").is_file():
        raise ValueError(f"{run} has exported no model yet: finish the run first")
    average = rebuilt(snapshots, recipe.width)
    if PARTS.keys().isdisjoint(name.split(".")[0] for name in average):
        raise ValueError(f"{run} trained no {', '.join(PARTS)}: only averages of these are put into a model")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(run / "model", temporary)
        with torch.no_grad():
            replace_weights(temporary, average)
        step = read_json(run / "exported.json")["step"]
        average_of = f"average of a power function, width {recipe.width:g}"
        write_json(temporary / TRAINED, {"step": step, "ema": average_of})
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{output}: the average of width {recipe.width:g}, from {len(snapshots)} snapshots")
    return 0


if __name__ == "__main__":
    command(main)
