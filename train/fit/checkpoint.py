"""Checkpoints of a training run: safetensors and JSON, complete or not there at all.

A checkpoint is the folder `checkpoints/step-00001200`: its files are written into a temporary folder beside
it and fsynced, the manifest (size and sha256 of each) comes last, then one rename. Older ones are deleted
only after that. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` optimizer steps."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
    state: dict[str, Any]  # JSON


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write folder/step-N from {"model": {name: tensor}, ...} and a JSON state; returns its path.

    Raises OSError when the disk refuses; then nothing is left behind and older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for stem, group in tensors.items():
            plain = {name: value.detach().cpu().contiguous() for name, value in group.items()}
            save_file(plain, temporary / f"{stem}.safetensors")
        (temporary / "trainer.json").write_text(json.dumps({**state, "step": step}, indent=1))
        files = sorted(temporary.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, temporary / MANIFEST, temporary]:
            fsync(path)
        if final.exists():  # a damaged one of the same step, which resuming skipped
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync(folder)
    except SafetensorError as error:
        raise OSError(f"could not write {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """A verified checkpoint. Raises ValueError saying which file is missing, cut or changed."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{path} is no complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text())
        for name, entry in manifest.items():
            file = path / name
            if not file.is_file():
                raise ValueError(f"{file} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{file} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}"
                )
            if sha256(file) != entry["sha256"]:
                raise ValueError(f"{file} has another sha256 than its manifest says")
        state = json.loads((path / "trainer.json").read_text())
        tensors = {
            Path(name).stem: load_file(path / name) for name in manifest if name.endswith(".safetensors")
        }
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return Checkpoint(path, state["step"], tensors, state)


def find_checkpoint(folder: Path, resume: str) -> Checkpoint | None:
    """What to go on from: `none`, `auto` (the newest that verifies) or a path.

    Raises ValueError if the checkpoint named is damaged, or if there are some and `auto` finds none intact.
    """
    if resume == "none":
        if list_checkpoints(folder):
            raise ValueError(
                f"{folder} holds checkpoints of an earlier run: choose another output, delete it, "
                "or go on from it with --resume auto"
            )
        return None
    if resume != "auto":
        return load_checkpoint(Path(resume))
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
    if list_checkpoints(folder):
        raise ValueError(
            f"no checkpoint in {folder} is intact: --resume none with another output starts anew"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first; temporary folders are none."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def clean(folder: Path, keep_last: int, step: int) -> None:
    """After the checkpoint of `step`: delete all but the newest `keep_last`, and what a killed run left.

    Later checkpoints go too: they are of the run as it was before it was set back with --resume PATH.
    """
    finished = list_checkpoints(folder)
    later = [path for path in finished if int(path.name.removeprefix("step-")) > step]
    kept = [path for path in finished if path not in later][-keep_last:]
    for path in [*folder.glob("step-*.tmp-*"), *(path for path in finished if path not in kept)]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("could not delete %s: %s", path, error)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
