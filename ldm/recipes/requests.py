"""Many pictures: what each line of a file asks for, and which of them are drawn together.

Imports no torch, so that what cannot be is told before a model is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.files.config import read_config
from ldm.recipes import options

MAX_NAME = 200  # characters of a picture's name; file systems take 255 bytes and writing needs some
NUMBERED = "{:05d}"  # the name of a picture that its line does not name


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of one picture, by Recipe's names. None takes the default of the model."""

    prompt: str
    name: str | None = None  # of its file, without .png
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    width: int | None = None  # pixels
    height: int | None = None
    clip_skip: int | None = None
    prompt_weighting: str | None = None
    image: str | None = None  # the file of a picture to start from
    mask: str | None = None  # likewise: white is repainted
    extend: tuple[int, int, int, int] | None = None  # pixels added to image: left, top, right, bottom
    strength: float | None = None
    two_pass: float | None = None  # the strength of the second pass
    first_size: tuple[int, int] | None = None  # width and height in the first of two passes
    variation_seed: int | None = None
    variation_strength: float | None = None
    class_label: int | str | None = None

    def __post_init__(self) -> None:
        stated = {name: value for name, value in vars(self).items() if value is not None}
        options.check_request(stated)
        options.check_together(stated)

    @property
    def alike(self) -> tuple[Any, ...]:
        """What requests of one batch have in common: all that one call of the pipeline takes but once."""
        guidance = (self.guidance_scale, self.guidance_rescale, self.guidance_interval)
        text = (self.clip_skip, self.prompt_weighting, self.class_label is None)
        masked = self.mask is not None or self.extend is not None
        start = (self.strength, self.two_pass, self.first_size, self.variation_strength)
        start += (self.image is not None, masked)  # type: ignore[assignment]
        return self.height, self.width, self.steps, self.sampler, *guidance, *text, *start


# Reading


def read_requests(source: str, given: Mapping[str, Any]) -> dict[str, Request]:
    """The requests of a file by their lines, "file:1" first: JSON objects of a .jsonl, prompts of a .txt.

    source: a path, or "-" for standard input, which holds objects if it begins with {. Empty lines count,
    and ask for nothing. given: what holds for lines that do not say otherwise, by Request's names; line
    number i without a seed has given's seed (or 0) + i - 1.
    Raises ValueError, naming the first line that cannot be and how many more there are.
    """
    text = _read(source)
    objects = text.lstrip().startswith("{") if source == "-" else source.endswith(".jsonl")
    requests: dict[str, Request] = {}
    lines: dict[str, str] = {}  # of names as file systems see them that ignore case
    wrong: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a prompt may hold its other signs
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            values = _object(line, where) if objects else {"prompt": line.strip()}
            counted = {"name": NUMBERED.format(number), "seed": given.get("seed", 0) + number - 1}
            stated = {name: value for name, value in values.items() if value is not None}
            request = read_config(Request, {**given, **counted, **stated}, where)
            name = _checked(request.name or "", where)
            if (other := lines.setdefault(name.casefold(), where)) != where:
                raise ValueError(f"{where}: name={name!r} is that of {other} too: give it another")
            requests[where] = request
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(wrong[0] + (f" (and {len(wrong) - 1} more lines cannot be)" if wrong[1:] else ""))
    if not requests:
        raise ValueError(f"{source} holds no prompt: expected one a line")
    return requests


def _read(source: str) -> str:
    try:
        if source == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        if not source.endswith((".jsonl", ".txt")):
            raise ValueError(
                f"{source}: expected a .jsonl with an object a line, a .txt with a prompt a line, or -"
            )
        return Path(source).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 at byte {error.start}") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f'{where}: a JSON {type(values).__name__}: expected an object, {{"prompt": "..."}}')
    if "num_images" in values:
        raise ValueError(f"{where}: num_images: a line is one picture; repeat the line with another seed")
    return values


def _checked(name: str, where: str) -> str:
    """The name. Raises ValueError unless it is that of a file, with no folder, that is not hidden."""
    plain = name.isprintable() and not name.startswith(".") and 0 < len(name.encode()) <= MAX_NAME
    if not plain or "/" in name or "\\" in name or name.lower().endswith(".png"):
        raise ValueError(
            f"{where}: name={name[:80]!r}: expected a file's name of at most {MAX_NAME} bytes, without .png "
            "and without a folder"
        )
    return name


# Batches


def pack(requests: Sequence[Request], size: Callable[[Request], int]) -> list[list[int]]:
    """The places of the requests, in batches of alike ones, in the order of the first of each batch.

    size: how many like this one are drawn together. What is drawn together depends on the requests alone,
    not on what is drawn already or by whom: a picture has the same bits after a resume and on any rank.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.alike, []).append(place)
    batches = []
    for places in groups.values():
        step = size(requests[places[0]])
        batches += [places[start : start + step] for start in range(0, len(places), step)]
    return sorted(batches)
