"""Which class each picture is of: what data.label names, in the pictures' order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data.captions import READERS, Captions
from train.data.painting import PLACES
from train.data.pictures import IMAGE_SUFFIXES, printable
from train.data.scenes import SceneSource

FOLDER = "folder"  # data.label of a folder of folders: the subfolder's name
OF_SCENES = ("subject", "place")


class Labels(NamedTuple):
    """The names of the classes of a source, and the number of a picture's class by the picture's index."""

    names: tuple[str, ...]
    number: Callable[[int], int]


def named(each: Sequence[str]) -> Labels:
    """Labels of pictures in order; the classes are those that come, sorted."""
    names = tuple(sorted(set(each)))
    numbers = {name: number for number, name in enumerate(names)}
    return Labels(names, lambda index: numbers[each[index]])


def of_scenes(scenes: SceneSource, label: str) -> Labels:
    """Raises ValueError unless label is one of OF_SCENES."""
    if label not in OF_SCENES:
        raise ValueError(f"data.label={label!r}: drawn scenes have {' and '.join(OF_SCENES)}")
    names = scenes.subjects if label == "subject" else tuple(PLACES)
    return Labels(names, lambda index: names.index(getattr(scenes.describe(index), label)))


def of_table(table: Any, column: str) -> Labels:
    """Of a column of a dataset. Raises ValueError if there is none, or if a row says nothing there."""
    if column not in table.column_names:
        raise ValueError(f"data.label={column!r} is no column; there are {', '.join(table.column_names)}")
    values, names = list(table[column]), getattr(table.features[column], "names", None)
    without = sum(value is None or (names is not None and value < 0) for value in values)  # -1: unlabelled
    if without:
        raise ValueError(f"data.label={column!r}: {without} of {len(values)} rows have none")
    if names:
        return Labels(tuple(names), lambda index: values[index])
    return named([str(value) for value in values])


def of_folder(folder: Path, label: str, names: Sequence[str]) -> Labels:
    """Of pictures of these names: their subfolder, or the column of the metadata file.

    Raises ValueError, with the first of them, if some have none.
    """
    if label == FOLDER:
        each = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
    else:
        rows = metadata_of(folder, label)
        each = ["" if rows[name].get(label) is None else str(rows[name][label]).strip() for name in names]
    without = [printable(name) for name, one in zip(names, each, strict=True) if not one]
    if without:
        what = "lie in no subfolder" if label == FOLDER else f"have no {label!r}"
        raise ValueError(
            f"data.label={label!r}: {len(without)} of {len(names)} pictures in {folder} {what}, the first "
            f"{without[0]}"
        )
    return named(each)


def metadata_of(folder: Path, label: str) -> dict[str, Mapping[str, Any]]:
    """The rows of the metadata file by the pictures' names. Raises ValueError if there is no such file."""
    path = next((folder / name for name in READERS if (folder / name).exists()), None)
    if path is None:
        raise ValueError(
            f"data.label={label!r} is a column of a metadata file, and {folder} has none of "
            f"{', '.join(READERS)}; {FOLDER} takes the names of subfolders"
        )
    return {str(row.get("file_name")): row for row in READERS[path.name](path)}


def in_subfolders(folder: Path, kind: str) -> dict[str, Captions]:
    """The pictures of a folder of folders, with the .txt beside each, or else the empty caption.

    Raises ValueError if there is none.
    """
    paths = [path for path in sorted(folder.glob("*/*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise ValueError(
            f"data.label={FOLDER!r}: {folder} has no subfolder with pictures, one for each class"
        )
    found: dict[str, Captions] = {}
    for path in paths:
        beside = path.with_suffix(".txt")
        text = beside.read_text("utf-8", errors="replace").strip() if beside.exists() else ""
        found[path.relative_to(folder).as_posix()] = {kind: [text]}
    return found
