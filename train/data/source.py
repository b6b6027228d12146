"""What a source of captioned pictures is, and which pictures two states of one do not share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from PIL import Image

from train.batches.buckets import Size
from train.data.captions import Captions
from train.data.labels import Labels
from train.data.pictures import printable

SHOWN = 10  # names of each kind of change


class Source(Protocol):
    """Captioned pictures by index; `description` changes whenever what an index holds may have changed."""

    description: str
    rejected: dict[str, str]  # what cannot be used and is left out, and why
    labels: Labels | None  # the classes of the pictures, where data.label asks for them

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, Captions]: ...
    def mask(self, index: int) -> Image.Image:
        """What the picture is about, 255, and what is around it, 0: greys (L) of the picture's size."""

    def size(self, index: int) -> Size:
        """Of the picture, in pixels, without decoding it. Raises ValueError if it has none."""

    def contents(self) -> dict[str, str]:
        """By name, a hash of a picture's captions and the length of its file; empty if they have no names."""


def changed_pictures(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How many pictures came, went or changed between two `contents`, and the first of them."""
    kinds = {
        "added": now.keys() - then.keys(),
        "removed": then.keys() - now.keys(),
        "with another file or caption": {
            name for name in now.keys() & then.keys() if now[name] != then[name]
        },
    }
    lines = [f"  {len(names):,} {kind}: {first(names)}" for kind, names in kinds.items() if names]
    return "\n".join(lines) or "  no picture came, went or changed"


def first(names: Collection[str]) -> str:
    """The first SHOWN of some names."""
    shown = ", ".join(printable(name) for name in sorted(names)[:SHOWN])
    return f"{shown} and more" if len(names) > SHOWN else shown
