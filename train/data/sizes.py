"""The sizes of a source's pictures, read once and kept: some sources read every byte of each for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ldm.files.config import replacing
from train.batches.buckets import Size
from train.data.source import Source

Sizes = tuple[dict[int, Size], dict[int, str]]  # by index in the source; and why other pictures have none


def find_sizes(source: Source, kept: Path | None) -> Sizes:
    """The sizes of all pictures, from the file `kept` if it is of this source; else it is written."""
    found = read_kept(kept, source.description) if kept else None
    if found is None:
        found = read_sizes(source)
        if kept:
            keep(kept, source.description, len(source), found)
    return found


def read_sizes(source: Source) -> Sizes:
    """Asks the source for the size of every picture."""
    sizes: dict[int, Size] = {}
    unreadable: dict[int, str] = {}
    bar = tqdm(range(len(source)), unit=" pictures", desc="reading sizes", disable=not sys.stderr.isatty())
    for index in bar:
        try:
            sizes[index] = source.size(index)
        except ValueError as error:
            unreadable[index] = str(error)
    return sizes, unreadable


def keep(path: Path, description: str, length: int, found: Sizes) -> None:
    """Writes sizes (length, 2) int32, 0 where a picture has none, and the reasons in the header."""
    sizes, unreadable = found
    table = torch.tensor([sizes.get(index, (0, 0)) for index in range(length)], dtype=torch.int32)
    header = {"data": description, "unreadable": json.dumps(unreadable)}
    with replacing(path) as temporary:
        save_file({"sizes": table}, temporary, metadata=header)


def read_kept(path: Path, description: str) -> Sizes | None:
    """What `keep` wrote of the source of that description; None if there is no such file, or it is cut."""
    try:
        with safe_open(path, framework="pt") as file:
            header, table = file.metadata(), file.get_tensor("sizes").tolist()
        unreadable = {int(index): why for index, why in json.loads(header["unreadable"]).items()}
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if header["data"] != description:
        return None
    return {index: Size(*size) for index, size in enumerate(table) if index not in unreadable}, unreadable
