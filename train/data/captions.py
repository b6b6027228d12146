"""The captions of a picture, of one kind or several, and where a folder of pictures keeps them.

A kind is the column, or the key of a .json, that captions come from, such as long and short. How often
training sees each kind is a matter of weights and may change; which kind a caption is stays with it.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from train.data.pictures import IMAGE_SUFFIXES, printable

log = logging.getLogger(__name__)
MAX_CAPTION = 20_000  # characters; far more than any text encoder reads

Captions = dict[str, list[str]]  # of a picture, by kind; a kind without a text is not in it


def captions_of(row: Mapping[Any, Any], kinds: Sequence[str]) -> Captions:
    """The captions in a row of a table or in a JSON object."""
    found = {kind: clean_captions(row.get(kind)) for kind in kinds}
    return {kind: texts for kind, texts in found.items() if texts}


def text_kind(ending: str, kinds: Sequence[str]) -> str:
    """The kind of a file that is text and nothing else: that of its ending, `.txt`, else the first."""
    return ending[1:] if ending[1:] in kinds else kinds[0]


def every(captions: Captions) -> list[str]:
    """All captions of a picture, whatever their kind."""
    return [text for texts in captions.values() for text in texts]


def plain(captions: Captions, kinds: Sequence[str]) -> Captions | list[str]:
    """What describes the captions: of one kind their list alone, so that its name does not matter."""
    return captions if len(kinds) > 1 else every(captions)


def chances(captions: Captions, weights: Mapping[str, float]) -> list[float]:
    """The chance of each of `every` caption, added up to 1: of its kind's weight an even share.

    The weights of kinds that a picture lacks go to those it has; where these weigh nothing, all are alike.
    """
    of_kind = {kind: weights.get(kind, 0.0) for kind in captions}
    if not any(of_kind.values()):
        of_kind = dict.fromkeys(captions, 1.0)
    shares = [of_kind[kind] / len(texts) for kind, texts in captions.items() for _ in texts]
    return [total / sum(shares) for total in accumulate(shares)]


def tell_kinds(where: str, found: Iterable[Iterable[str]], kinds: Sequence[str]) -> None:
    """Warns of kinds that no picture has: perhaps a name is mistyped. found: the kinds of each picture."""
    absent = set(kinds).difference(*found)
    if absent:
        log.warning("%s has no captions of kind %s: their weight goes to the others", where, sorted(absent))


def read_captions(folder: Path, kinds: Sequence[str]) -> dict[str, Captions]:
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
                text_kind(".txt", kinds): path.with_suffix(".txt").read_text("utf-8", errors="replace"),
            }
            for path in pictures
            if path.with_suffix(".txt").exists()
        ]
        if not rows:
            raise ValueError(
                f"{folder} holds no captioned picture: put a metadata.jsonl, .csv or .parquet with the "
                f"columns file_name and {' or '.join(kinds)} into it, or a .txt beside each picture"
            )
        if len(rows) < len(pictures):
            without = len(pictures) - len(rows)
            log.warning("%d of %d pictures in %s have no .txt: left out", without, len(pictures), folder)
    captions: dict[str, Captions] = {}
    problems = []
    for number, row in enumerate(rows, 1):
        name, texts = row.get("file_name"), captions_of(row, kinds)
        if not isinstance(name, str) or not name:
            problems.append(f"row {number} has no file_name")
        elif not texts:
            of = " or ".join(map(repr, kinds))
            problems.append(f"row {number} ({printable(name)}) has no text in {of}")
        elif problem := problem_of(folder, name):
            problems.append(f"row {number}: {printable(name)} {problem}")
        elif name in captions:
            problems.append(f"row {number}: {printable(name)} again")
        else:
            captions[name] = texts
    if problems:
        raise ValueError(
            f"{folder}: {len(problems)} of {len(rows)} captions are wrong:\n  " + "\n  ".join(problems[:10])
        )
    if not captions:
        raise ValueError(f"{folder}: the list of captions is empty")
    tell_kinds(str(folder), captions.values(), kinds)
    if kept:
        tell_without_row(folder, kept[0], captions)
    return captions


def uncaptioned(folder: Path) -> dict[str, Captions]:
    """The pictures that lie in a folder, without a caption. Raises ValueError if there is none."""
    names = [path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise ValueError(f"{folder} holds no picture: expected some with {', '.join(sorted(IMAGE_SUFFIXES))}")
    return {name: {} for name in names}


def problem_of(folder: Path, name: str) -> str | None:
    """Why a name is not that of a file in the folder, or None if it is."""
    try:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            return "leads out of the folder"
        return None if (folder / name).is_file() else "is missing"
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL in it, links in a circle
        return f"is no name of a file: {error}"


def tell_without_row(folder: Path, table: str, names: Iterable[str]) -> None:
    """Warns of pictures that lie beside those of the table and are not in it."""
    known = {folder / name for name in names}
    beside = (path for place in {path.parent for path in known} for path in place.iterdir())
    count = sum(path.suffix.lower() in IMAGE_SUFFIXES and path not in known for path in beside)
    if count:
        log.warning("%d pictures in %s have no row in %s: left out", count, folder, table)


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
