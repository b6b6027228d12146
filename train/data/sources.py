"""Captioned pictures, read by index in any order: drawn scenes, a folder, tars, a `datasets` name."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from train.batches.buckets import Buckets, Size, bucket_sizes, sort_into_buckets
from train.data.captions import READERS, Captions, captions_of, plain, read_captions, tell_kinds, uncaptioned
from train.data.labels import FOLDER, Labels, in_subfolders, of_folder, of_scenes, of_table
from train.data.pictures import UNREADABLE, opacity, open_checked, tell_rejected, upright, upright_size
from train.data.scenes import SceneSource
from train.data.sizes import find_sizes
from train.data.source import Source
from train.data.tars import Tars, holds_only_tars

STYLES = ("shapes", "pictograms")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures: what is drawn or read, and at which size."""

    source: str = "shapes"  # shapes or pictograms (drawn), a folder with captions, tars, or a `datasets` name
    size: int = 64  # pixels; pictures become squares of this side, or fill buckets of this area
    max_aspect: float = 1.0  # longest side of a bucket in shortest sides; 1: all pictures become squares
    side_multiple: int = 64  # pixels that divide both sides of a bucket that is no square
    max_enlargement: float | None = None  # times; pictures that their bucket enlarges more give no latents
    crops: int = 1  # of each picture that training sees: one in the middle, then some anywhere
    flip: bool = False  # mirror images too; not where captions tell left from right, or pictures hold words
    length: int = 100_000  # scenes in an epoch; folders and datasets have their own length
    subjects: str | tuple[str, ...] = "all"  # of the scenes: all, few or names
    font: str | None = None  # path of NotoColorEmoji.ttf, for pictograms; null: where systems keep it
    scene_seed: int = 0  # which endless book of scenes
    split: Literal["train", "held_out"] = "train"  # held_out: combinations that training never shows
    dataset_config: str | None = None  # of a dataset that has several: the name of one
    image_column: str = "image"  # of a dataset
    caption_column: str = "text"  # of a dataset, of a folder's metadata file, or of .json files in tars
    captions: dict[str, float] | None = (
        None  # several such columns and their weights, as {long: 95, short: 5}
    )
    label: str | None = None  # class of a picture: subject (of scenes), folder (its subfolder), or a column
    caption: str | None = None  # of every picture, as "a photo of sks dog"; null: what the data says
    dataset_split: str = "train"  # of a dataset
    max_bad_fraction: float = 0.01  # of the pictures that may be unreadable and are left out

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(
                f"data.size={self.size} is not a multiple of 8 pixels: use {max(8, self.size // 8 * 8)}"
            )
        if self.length < 1:
            raise ValueError(f"data.length={self.length}: an epoch has 1 scene or more")
        if not 1 <= self.max_aspect <= 16:
            raise ValueError(f"data.max_aspect={self.max_aspect}: expected 1, all squares, to 16; 2 is usual")
        if self.side_multiple < 8 or self.side_multiple % 8:
            raise ValueError(f"data.side_multiple={self.side_multiple}: expected a multiple of 8 pixels")
        if self.max_enlargement is not None and not self.max_enlargement > 0:
            raise ValueError(
                f"data.max_enlargement={self.max_enlargement}: expected more than 0, such as 1.25"
            )
        if self.crops < 1:
            raise ValueError(f"data.crops={self.crops}: expected 1 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"data.max_bad_fraction={self.max_bad_fraction}: a fraction lies between 0 and 1"
            )
        if self.captions is not None:
            if not all(0 <= weight < math.inf for weight in self.captions.values()) or not any(
                self.captions.values()
            ):
                raise ValueError(f"data.captions={self.captions}: expected weights of 0 or more, such as 95")
            if self.source in STYLES:
                raise ValueError(f"data.captions={self.captions}: the captions of scenes are of one kind")

    @property
    def kinds(self) -> list[str]:
        """Of captions: the columns that hold them."""
        return list(self.captions or [self.caption_column])

    @property
    def squares(self) -> DataConfig:
        """The same for what learns from squares of whatever pictures there are."""
        return replace(self, max_aspect=1.0, max_enlargement=None)

    def check_squares(self, what: str) -> None:
        """Raises ValueError for options of buckets, which have no effect on what learns from squares."""
        for name in ("max_aspect", "max_enlargement"):
            if getattr(self, name) != getattr(self.squares, name):
                raise ValueError(
                    f"data.{name}={getattr(self, name)} has no effect: {what} learns from squares, leave "
                    "it out"
                )


def sort_source(source: Source, config: DataConfig, kept: Path | None = None) -> Buckets:
    """The buckets of a source. It reads every header, unless all pictures go into one bucket anyway.

    kept: a file that keeps what was read. Raises ValueError if no picture is left.
    """
    sizes = bucket_sizes(config.size, config.side_multiple, config.max_aspect)
    if len(sizes) == 1 and config.max_enlargement is None:
        return Buckets(sizes, [range(len(source))])  # without a look at any picture
    pictures, unreadable = find_sizes(source, kept)
    if not pictures:
        named = {f"picture {index}": why for index, why in unreadable.items()}
        tell_rejected(config.source, named, len(named), config.max_bad_fraction)
    return sort_into_buckets(pictures, sizes, config.max_enlargement, unreadable)


def open_source(config: DataConfig) -> Source:
    """The source that a recipe names. Raises ValueError when there is none or it holds no usable picture."""
    source = find_source(config)
    return source if config.caption is None else OneCaption(source, config)


def find_source(config: DataConfig) -> Source:
    """The same with the captions that it has."""
    if config.source in STYLES:
        return Scenes(config)
    tars = (config.source, config.kinds, config.max_bad_fraction)
    path, in_tars = Path(config.source), config.source.endswith(".tar")
    if path.is_dir() and not any(
        (path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")
    ):
        in_tars = holds_only_tars(path)
        if not in_tars:
            return ImageFolder(path, config)
    if in_tars:
        if config.label is not None:
            raise ValueError(
                f"data.label={config.label!r}: pictures in tars have no labels here, leave it out"
            )
        return Tars(*tars)
    if not path.exists() and (path.is_absolute() or config.source.startswith(".")):
        raise ValueError(
            f"no such folder {config.source}; data.source is {', '.join(STYLES)}, a folder or a dataset"
        )
    return HubDataset(config)


class OneCaption:
    """A source whose pictures all have the caption of the recipe."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self.source, self.rejected, self.mask = source, source.rejected, source.mask
        self.size, self.contents, self.labels = source.size, source.contents, source.labels
        self.captions = {config.kinds[0]: [config.caption or ""]}
        self.description = f"{source.description}, all captioned {config.caption!r}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, Captions]:
        return self.source[index][0], self.captions


class Scenes:
    """The first `length` scenes of an endless book (train/data/scenes.py)."""

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
        self.length, self.kind = config.length, config.caption_column
        self.labels = None if config.label is None else of_scenes(self.scenes, config.label)
        self.rejected: dict[str, str] = {}
        self.description = (
            f"{config.source} scenes, seed {config.scene_seed}, {config.size} px, {config.split}, "
            f"{self.length} of {', '.join(self.scenes.subjects)}, {self.scenes.drawing}"
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, Captions]:
        image, captions = self.scenes[index]
        return image, {self.kind: captions}

    def mask(self, index: int) -> Image.Image:
        return self.scenes.mask(index)

    def size(self, index: int) -> Size:
        return Size(self.scenes.size, self.scenes.size)

    def contents(self) -> dict[str, str]:
        return {}  # `description` says all


def captions_in(folder: Path, config: DataConfig) -> dict[str, Captions]:
    """The captions of the pictures in a folder, by their names; none where all get that of the recipe."""
    listed = any((folder / name).exists() for name in READERS)
    if config.label == FOLDER and not listed:
        return in_subfolders(folder, config.kinds[0])
    if config.caption is None or (config.label is not None and listed):
        return read_captions(folder, config.kinds)
    return uncaptioned(folder)


class ImageFolder:
    """Pictures in a folder with captions in metadata.jsonl, .csv or .parquet, or a .txt beside each picture.

    Unreadable pictures are found from their headers at the start, told in the log and listed in `rejected`.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.folder = folder
        captions = captions_in(folder, config)
        self.rejected: dict[str, str] = {}  # name -> why
        self.entries: list[tuple[str, Captions]] = []
        self.sizes: list[Size] = []
        for name in sorted(captions):
            try:
                with open_checked(folder / name) as image:
                    self.sizes.append(upright_size(image))
                    self.entries.append((name, captions[name]))
            except UNREADABLE as error:
                self.rejected[name] = str(error)
        tell_rejected(str(folder), self.rejected, len(captions), config.max_bad_fraction)
        self.labels: Labels | None = None
        if config.label is not None:
            self.labels = of_folder(folder, config.label, [name for name, _ in self.entries])
        digest = hashlib.sha256()
        self.digests: list[str] = []  # of each entry
        for index, (name, texts) in enumerate(self.entries):
            content: list[Any] = [name, (folder / name).stat().st_size, plain(texts, config.kinds)]
            if self.labels is not None:
                content.append(self.labels.names[self.labels.number(index)])
            told = json.dumps(content, sort_keys=True).encode()
            digest.update(told)
            self.digests.append(hashlib.sha256(told).hexdigest()[:16])
        self.description = (
            f"{len(self.entries)} pictures, {config.size} px, contents {digest.hexdigest()[:16]}"
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Image.Image, Captions]:
        name, captions = self.entries[index]
        return self.read(name, upright), captions

    def mask(self, index: int) -> Image.Image:
        return self.read(self.entries[index][0], opacity)

    def size(self, index: int) -> Size:
        return self.sizes[index]

    def contents(self) -> dict[str, str]:
        return {name: digest for (name, _), digest in zip(self.entries, self.digests, strict=True)}

    def read(self, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
        """What `convert` makes of a file. Raises ValueError if the file cannot be decoded."""
        try:
            with open_checked(self.folder / name) as image:
                return convert(image)
        except UNREADABLE as error:
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
        for columns in ([config.image_column], config.kinds):
            if not any(column in table.column_names for column in columns):
                raise ValueError(
                    f"{config.source} has no column {' or '.join(map(repr, columns))}; it has "
                    f"{', '.join(table.column_names)}: set data.image_column and data.caption_column"
                )
        tell_kinds(config.source, [table.column_names], config.kinds)
        kind = table.features[config.image_column]
        if not isinstance(kind, datasets.Image):
            raise ValueError(
                f"{config.source}: column {config.image_column!r} holds {kind}, not datasets.Image(): "
                "set data.image_column, or cast it"
            )
        if not len(table):
            raise ValueError(f"{config.source} {config.dataset_split} has no rows")
        self.table, self.config = table, config
        self.labels = None if config.label is None else of_table(table, config.label)
        self.rejected: dict[str, str] = {}
        self.files = table.cast_column(config.image_column, datasets.Image(decode=False))
        self.description = f"{config.source} {config.dataset_split}, {config.size} px, {table._fingerprint}"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Image.Image, Captions]:
        image, row = self.read(index, upright)
        kinds = self.config.kinds
        return image, captions_of(row, kinds) or {kinds[0]: [""]}  # no text: the empty prompt

    def mask(self, index: int) -> Image.Image:
        return self.read(index, opacity)[0]

    def size(self, index: int) -> Size:
        file = self.files[index][self.config.image_column]
        try:
            if file is None or (file["bytes"] is None and file["path"] is None):
                raise ValueError("it is null")
            place = Path(file["path"]) if file["bytes"] is None else io.BytesIO(file["bytes"])
            with open_checked(place) as image:
                return upright_size(image)
        except UNREADABLE as error:
            raise self.undecodable(index, error) from error

    def contents(self) -> dict[str, str]:
        return {}  # rows have no names

    def read(
        self, index: int, convert: Callable[[Image.Image], Image.Image]
    ) -> tuple[Image.Image, Mapping[str, Any]]:
        """What `convert` makes of a row's picture, and the row. Raises ValueError if it has no picture."""
        try:
            row = self.table[index]
            if row[self.config.image_column] is None:
                raise ValueError("it is null")
            return convert(row[self.config.image_column]), row
        except UNREADABLE as error:
            raise self.undecodable(index, error) from error

    def undecodable(self, index: int, error: Exception) -> ValueError:
        picture = f"the picture in row {index} of {self.config.source}"
        return ValueError(f"{picture} cannot be decoded: {error}; leave it out")
