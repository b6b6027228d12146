"""The captions of a folder of pictures: metadata.jsonl, .csv or .parquet, or a .txt beside each picture."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.pictures import IMAGE_SUFFIXES

log = logging.getLogger(__name__)
MAX_CAPTION = 20_000  # characters; far more than any text encoder reads


def read_captions(folder: Path, column: str) -> dict[str, list[str]]:
    """Captions by file name. Raises ValueError, naming the first ten, where files and captions disagree."""
    kept = [name for name in READERS if (folder / name).exists()]
    if kept:
        rows = READERS[kept[0]](folder / kept[0])
        if kept[1:]:
            log.warning("%s: captions are read from %s, not from %s", folder, kept[0], " or ".join(kept[1:]))
    else:
        pictures = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        rows = [
            {
                "file_name": path.name,
                column: path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace"),
            }
            for path in pictures
            if path.with_suffix(".txt").exists()
        ]
        if not rows:
            raise ValueError(
                f"{folder} holds no captioned picture: put a metadata.jsonl, .csv or .parquet with the "
                f"columns file_name and {column} into it, or a .txt beside each picture"
            )
        if len(rows) < len(pictures):
            without = len(pictures) - len(rows)
            log.warning("%d of %d pictures in %s have no .txt: left out", without, len(pictures), folder)
    captions: dict[str, list[str]] = {}
    problems = []
    for number, row in enumerate(rows, 1):
        name, texts = row.get("file_name"), clean_captions(row.get(column))
        if not isinstance(name, str) or not name:
            problems.append(f"row {number} has no file_name")
        elif not texts:
            problems.append(f"row {number} ({name}) has no text in {column!r}")
        elif not (folder / name).resolve().is_relative_to(folder.resolve()):
            problems.append(f"row {number}: {name} leads out of the folder")
        elif not (folder / name).is_file():
            problems.append(f"row {number}: {name} is missing")
        elif name in captions:
            problems.append(f"row {number}: {name} again")
        else:
            captions[name] = texts
    if problems:
        raise ValueError(
            f"{folder}: {len(problems)} of {len(rows)} captions are wrong:\n  " + "\n  ".join(problems[:10])
        )
    if not captions:
        raise ValueError(f"{folder}: the list of captions is empty")
    return captions


def read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:  # such as a field of more than 128 kB
        raise ValueError(f"{path} cannot be read as CSV: {error}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    # not splitlines, which also splits at signs that may stand within a JSON string, such as U+2028
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(row, Mapping):
                raise ValueError(f"{path} line {number} is no JSON object: {line[:80]}")
            rows.append(dict(row))
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet  # half a second, and few folders need it

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "metadata.jsonl": read_jsonl,
    "metadata.csv": read_csv,
    "metadata.parquet": read_parquet,
}


def clean_captions(value: object) -> list[str]:
    """One caption or a list of them, without control characters, white space around, and excess length."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else []
    kept = []
    for text in texts:
        if isinstance(text, str):
            plain = "".join(sign if sign.isprintable() else " " for sign in text[:MAX_CAPTION]).strip()
            kept += [plain] if plain else []
    return kept
