"""The files that a picture was made with, found again by the hashes in its recipe. Imports no torch."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from ldm.recipes.recipe import Recipe


def file_hash(path: Path) -> str:
    """The first 10 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def find(file: str, digest: str, picture: Path, option: str) -> str:
    """The file of this hash: where the recipe says, else by its name beside the picture or here.

    Raises ValueError, naming the option that gives another, if it is in none of these places.
    """
    places = [Path(file), picture.parent / Path(file).name, Path(Path(file).name)]
    there = [place for place in places if place.is_file()]
    for place in there:
        if file_hash(place) == digest:
            return str(place)
    found = (
        f"the one there has the hash {file_hash(there[0])}"
        if there
        else "no such file, nor beside the picture"
    )
    raise ValueError(
        f"{picture} was made with {file} of hash {digest}: {found}; put it there, or name another by {option}"
    )


def find_noted(recipe: Recipe, picture: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's adapters, classifier, words and pictures at today's paths, but for those that args name.

    Raises ValueError, saying which file is missing.
    """
    found: dict[str, Any] = {}
    if args.loras is None:
        found["loras"] = [
            (find(file, digest, picture, "--lora"), weight, digest) for file, weight, digest in recipe.loras
        ]
    if args.classifier is None and recipe.classifier is not None:
        found["classifier"] = find(*recipe.classifier, picture, "--classifier")
    if args.embeddings is None:
        found["embeddings"] = [
            find(file, digest, picture, "--embedding") for file, digest in recipe.embeddings
        ]
    for name in ("image", "mask"):
        if getattr(recipe, name) is not None and getattr(args, name) is None:
            file, digest = getattr(recipe, name)
            found[name] = (find(file, digest, picture, f"--{name}"), digest)
    return found
