"""Configuration files: JSON into frozen dataclasses, strictly, and files written whole or not at all.

Imports no torch, so a command line can check what it was given before it pays for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

MAX_JSON = 16 << 20  # bytes; the largest index of a sharded model is some hundred kB
LARGEST = sys.float_info.max  # a whole number of JSON may be larger

ConfigT = TypeVar("ConfigT")


# Writing: whole or not at all


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path`, synced to disk, when the block ends well.

    Raises FileExistsError at the end if `path` exists and overwrite is False, even if it came in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:40]}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            try:
                os.link(temporary, path)  # unlike a rename this fails where there is something
            except OSError:
                if path.exists():  # named by itself: link's own error names the temporary file
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
                temporary.replace(path)  # a file system without links: as near as it gets
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes values to path as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# Configurations


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it is missing, too large or broken."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path} has {path.stat().st_size} bytes: a configuration has fewer")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values


def read_config(config_class: type[ConfigT], values: Mapping[str, Any], source: str | Path) -> ConfigT:
    """A config dataclass from the mapping of a config.json, every key understood or refused by name.

    Keys that start with an underscore and those in config_class.IGNORED are notes. A key in
    config_class.NEUTRAL must have the value given there: the dataclass does not implement another.
    Raises ValueError for unknown, unsupported, missing or mistyped keys; `source` is the file it names.
    """
    hints = typing.get_type_hints(config_class)
    known = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    neutral: Mapping[str, Any] = getattr(config_class, "NEUTRAL", {})
    ignored: frozenset[str] = getattr(config_class, "IGNORED", frozenset())
    arguments = {}
    for key, value in values.items():
        if key in known:
            try:
                arguments[key] = _fit(value, hints[key])
            except TypeError:
                kind = str(known[key].type)  # as written: the modules of configs postpone annotations
                raise ValueError(f"{source}: {key}={value!r} is not of type {kind}") from None
        elif key in neutral:
            if _plain(value) != _plain(neutral[key]):
                raise ValueError(f"{source}: {key}={value!r} is not supported here, only {neutral[key]!r} is")
        elif not (key.startswith("_") or key in ignored or value is None):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ValueError(f"{source}: unknown key {key}={value!r}; {hint}")
    missing = [
        name
        for name, field in known.items()
        if field.init
        and name not in arguments
        and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} not given")
    try:
        return config_class(**arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _fit(value: Any, hint: Any) -> Any:
    """value as the annotated type; JSON lists become tuples, whole numbers floats. Else raises TypeError."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in inner:
            with contextlib.suppress(TypeError):
                return _fit(value, choice)
    elif origin is Literal:
        if value in inner:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if inner[-1] is Ellipsis:
            return tuple(_fit(item, inner[0]) for item in value)
        if len(inner) == len(value):
            return tuple(_fit(item, each) for item, each in zip(value, inner, strict=True))
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError


def _plain(value: Any) -> Any:
    """value with tuples as lists, as JSON has them."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
