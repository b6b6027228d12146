"""Pictures as files: PNGs that carry the recipe they were made by, and grids of them.

The recipe stands in two text chunks: `parameters`, AUTOMATIC1111's text, which the field's tools read, and
`ldm`, all of it as JSON, which wins. What is read from a file is data: parsed, checked, never run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ldm.files.config import read_config, replacing
from ldm.recipes.recipe import MAX_TEXT, Recipe, parse_parameters

GAP = 4  # pixels between the pictures of a grid
XMP = (  # the IPTC's mark of pictures that a model made
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)


def read_recipe(path: Path) -> Recipe | dict[str, Any]:
    """The recipe in a PNG: whole if this package wrote it, else what its AUTOMATIC1111 text gives.

    Raises ValueError, naming the file, if it is not a PNG, holds no recipe, or one that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixels are not decoded
            with Image.open(path, formats=["PNG"]) as image:
                chunks = {key: image.info.get(key) for key in ("ldm", "parameters")}
    except FileNotFoundError:
        raise ValueError(f"no such file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a PNG that can be read: {error}") from None
    whole, text = chunks["ldm"], chunks["parameters"]
    if isinstance(whole, str):
        try:
            if len(whole) > MAX_TEXT:
                raise ValueError(f"it has {len(whole)} characters: expected at most {MAX_TEXT}")
            values = json.loads(whole)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: the recipe is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: the recipe is a JSON {type(values).__name__}, not an object")
        return read_config(Recipe, values, path)
    if isinstance(text, str):
        try:
            return parse_parameters(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    raise ValueError(
        f"{path} holds no recipe: expected a text chunk `ldm` or `parameters` (was it converted or cleaned?)"
    )


def save_picture(
    image: Image.Image, path: Path, recipe: Recipe | None = None, *, overwrite: bool = False
) -> None:
    """Writes a PNG, whole or not at all, with its recipe inside unless that is None.

    Raises FileExistsError if there is a file and overwrite is False.
    """
    chunks = PngImagePlugin.PngInfo()
    if recipe is not None:
        chunks.add_text("parameters", recipe.parameters())  # iTXt where Latin-1 does not do
        chunks.add_text("ldm", json.dumps(dataclasses.asdict(recipe), ensure_ascii=False))
        chunks.add_itxt("XML:com.adobe.xmp", XMP)
    with replacing(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        image.save(file, format="PNG", pnginfo=chunks)


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The pictures, all of one size, row by row on a white sheet, nearly square unless columns says else."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + GAP), row * (height + GAP)))
    return sheet


def free_path(folder: Path, prompt: str) -> Path:
    """A path in folder that does not exist, named by the prompt's first words and a counter."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"
    taken = {path.stem for path in folder.glob(f"{words}-*.png")} if folder.is_dir() else set()
    numbers = [int(stem[len(words) + 1 :]) for stem in taken if stem[len(words) + 1 :].isdecimal()]
    return folder / f"{words}-{max(numbers, default=0) + 1:04d}.png"


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises ValueError unless a PNG can be written at path; creates nothing.

    A file that is there needs overwrite. Missing folders are made when the picture is written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"output {path}: pictures are PNG files, so give a name that ends in .png")
    try:
        if path.is_dir():
            raise ValueError(
                f"output {path} is a folder: give a file name, or the folder with a / at its end"
            )
        if path.exists() and not overwrite:
            raise ValueError(f"output {path} exists: give another name, or --overwrite")
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"output {path}: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"output {path}: {folder} cannot be written")
        trial = (
            folder / f".{os.getpid()}-{os.urandom(4).hex()}.tmp"
        )  # what access() says, some file systems deny
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"output {str(path)[:80]}: {error.strerror}") from None
