"""Captioned pictures, read by index in any order: drawn scenes, a folder, a `datasets` name."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from train.scenes import SceneSource

log = logging.getLogger(__name__)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 64_000_000  # of a file, read from its header before anything is decoded
MAX_CAPTION = 20_000  # characters; far more than any text encoder reads
BACKGROUND = "white"  # what transparent pictures are laid on
STYLES = ("shapes", "pictograms")


class Source(Protocol):
    """Captioned pictures by index; `description` changes whenever what an index holds may have changed."""

    description: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]: ...
    def mask(self, index: int) -> Image.Image:
        """What the picture is about, 255, and what is around it, 0: greys (L) of the picture's size."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures: what is drawn or read, and at which size."""

    source: str = "shapes"  # shapes or pictograms (drawn), a folder with captions, or a `datasets` name
    size: int = 64  # pixels, side of the square that each picture is resized and cropped to
    length: int = 100_000  # scenes in an epoch; folders and datasets have their own length
    subjects: str | tuple[str, ...] = "all"  # of the scenes: all, few or names
    font: str | None = None  # path of NotoColorEmoji.ttf, for pictograms; null: where systems keep it
    scene_seed: int = 0  # which endless book of scenes
    split: Literal["train", "held_out"] = "train"  # held_out: combinations that training never shows
    dataset_config: str | None = None  # of a dataset that has several: the name of one
    image_column: str = "image"  # of a dataset
    caption_column: str = "text"  # of a dataset, metadata.jsonl or metadata.csv
    dataset_split: str = "train"  # of a dataset
    max_bad_fraction: float = 0.01  # of a folder's pictures that may be unreadable and are left out

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(
                f"data.size={self.size} is not a multiple of 8 pixels: use {max(8, self.size // 8 * 8)}"
            )
        if self.length < 1:
            raise ValueError(f"data.length={self.length}: an epoch has 1 scene or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"data.max_bad_fraction={self.max_bad_fraction}: a fraction lies between 0 and 1"
            )


def open_source(config: DataConfig) -> Source:
    """The source that a recipe names. Raises ValueError when there is none or it holds no usable picture."""
    if config.source in STYLES:
        return Scenes(config)
    path = Path(config.source)
    if path.is_dir() and not any(
        (path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")
    ):
        return ImageFolder(path, config)
    if not path.exists() and (path.is_absolute() or config.source.startswith(".")):
        raise ValueError(
            f"no such folder {config.source}; data.source is {', '.join(STYLES)}, a folder or a dataset"
        )
    return HubDataset(config)


class Scenes:
    """The first `length` scenes of an endless book (train/scenes.py)."""

    def __init__(self, config: DataConfig) -> None:
        subjects = config.subjects
        self.scenes = SceneSource(
            config.scene_seed,
            config.size,
            config.source,  # type: ignore[arg-type]
            subjects,
            config.font,
            config.split,
        )
        self.length = config.length
        self.description = (
            f"{config.source} scenes, seed {config.scene_seed}, {config.size} px, {config.split}, "
            f"{self.length} of {', '.join(self.scenes.subjects)}, {self.scenes.drawing}"
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        return self.scenes[index]

    def mask(self, index: int) -> Image.Image:
        return self.scenes.mask(index)


class ImageFolder:
    """Pictures in a folder with captions in metadata.jsonl, metadata.csv, or a .txt beside each picture.

    Unreadable pictures are found from their headers at the start, told in the log and listed in `rejected`.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.folder = folder
        captions = read_captions(folder, config.caption_column)
        self.rejected: dict[str, str] = {}  # name -> why
        self.entries: list[tuple[str, list[str]]] = []
        for name in sorted(captions):
            problem = check_header(folder / name)
            if problem:
                self.rejected[name] = problem
            else:
                self.entries.append((name, captions[name]))
        lines = [f"\n  {name}: {why}" for name, why in list(self.rejected.items())[:10]]
        problem = f"{len(self.rejected)} of {len(captions)} pictures in {folder} cannot be used"
        if len(self.rejected) > config.max_bad_fraction * len(captions) or not self.entries:
            limit = f"more than data.max_bad_fraction={config.max_bad_fraction}" if self.entries else "all"
            raise ValueError(f"{problem}, {limit}; the first are" + "".join(lines))
        if self.rejected:
            log.warning("%s and are left out; the first are%s", problem, "".join(lines))
        digest = hashlib.sha256()
        for name, texts in self.entries:
            digest.update(json.dumps([name, (folder / name).stat().st_size, texts]).encode())
        self.description = (
            f"{len(self.entries)} pictures, {config.size} px, contents {digest.hexdigest()[:16]}"
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        name, captions = self.entries[index]
        return self.read(name, upright), captions

    def mask(self, index: int) -> Image.Image:
        return self.read(self.entries[index][0], opacity)

    def read(self, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
        """What `convert` makes of a file. Raises ValueError if the file cannot be decoded."""
        try:
            with open_checked(self.folder / name) as image:
                return convert(image)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files cut in the middle
            raise ValueError(
                f"{self.folder / name} cannot be decoded: {error}; delete it or its caption"
            ) from error


class HubDataset:
    """A dataset of the `datasets` library: a name on the hub, or a folder that save_to_disk wrote."""

    def __init__(self, config: DataConfig) -> None:
        import datasets  # seconds to import, and few runs need it

        try:
            if Path(config.source).is_dir():
                loaded = datasets.load_from_disk(config.source)
                table = loaded[config.dataset_split] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                table = datasets.load_dataset(
                    config.source, config.dataset_config, split=config.dataset_split
                )
        except (datasets.exceptions.DatasetsError, OSError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"data.source={config.source!r} cannot be loaded as a dataset with a split "
                f"{config.dataset_split!r}: {error}"
            ) from error
        for column in (config.image_column, config.caption_column):
            if column not in table.column_names:
                raise ValueError(
                    f"{config.source} has no column {column!r}; it has {', '.join(table.column_names)}: "
                    "set data.image_column and data.caption_column"
                )
        kind = table.features[config.image_column]
        if not isinstance(kind, datasets.Image):
            raise ValueError(
                f"{config.source}: column {config.image_column!r} holds {kind}, not datasets.Image(): "
                "set data.image_column, or cast it"
            )
        if not len(table):
            raise ValueError(f"{config.source} {config.dataset_split} has no rows")
        self.table, self.config = table, config
        self.description = f"{config.source} {config.dataset_split}, {config.size} px, {table._fingerprint}"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        image, row = self.read(index, upright)
        return image, clean_captions(row[self.config.caption_column]) or [""]  # no text: the empty prompt

    def mask(self, index: int) -> Image.Image:
        return self.read(index, opacity)[0]

    def read(
        self, index: int, convert: Callable[[Image.Image], Image.Image]
    ) -> tuple[Image.Image, Mapping[str, Any]]:
        """What `convert` makes of a row's picture, and the row. Raises ValueError if it has no picture."""
        try:
            row = self.table[index]
            if row[self.config.image_column] is None:
                raise ValueError("it is null")
            return convert(row[self.config.image_column]), row
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"the picture in row {index} of {self.config.source} cannot be decoded: {error}; leave it out"
            ) from error


def read_captions(folder: Path, column: str) -> dict[str, list[str]]:
    """Captions by file name. Raises ValueError, naming the first ten, where files and captions disagree."""
    if (folder / "metadata.jsonl").exists():
        rows = read_jsonl(folder / "metadata.jsonl")
    elif (folder / "metadata.csv").exists():
        rows = read_csv(folder / "metadata.csv")
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
                f"{folder} holds no captioned picture: put a metadata.jsonl or metadata.csv with the columns "
                f"file_name and {column} into it, or a .txt beside each picture"
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


def clean_captions(value: object) -> list[str]:
    """One caption or a list of them, without control characters, white space around, and excess length."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else []
    kept = []
    for text in texts:
        if isinstance(text, str):
            plain = "".join(sign if sign.isprintable() else " " for sign in text[:MAX_CAPTION]).strip()
            kept += [plain] if plain else []
    return kept


def check_header(path: Path) -> str:
    """Why a file cannot be used, judged from its header; "" if it can."""
    try:
        with open_checked(path):
            return ""
    except (OSError, SyntaxError, ValueError) as error:
        return str(error)


def open_checked(path: Path) -> Image.Image:
    """The file opened, not yet decoded. Raises ValueError for what is no picture or has too many pixels."""
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError("not a picture that Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} million pixels")
    return image


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned as EXIF says, transparency laid on white, 16-bit greys scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def opacity(image: Image.Image) -> Image.Image:
    """The alpha channel as greys (L), turned as EXIF says; 255 everywhere in a picture without one."""
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resized (Lanczos) until the shorter side is `size`, then cropped in the middle."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_images(image: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clamped, to RGB pictures."""
    pixels = (
        ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    )
    return [Image.fromarray(picture) for picture in pixels]


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return page
