"""Recipes: YAML and command-line overrides into frozen dataclasses that live beside the code they configure.

The comment behind a field is its help text, so `--help` shows the units that the code shows. Unknown keys are
errors that name the nearest key; nothing is imported or called because a file names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent  # the checkout, or site-packages: configs/ lies beside train/


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """The dataclass that nested plain values describe; `where` is the dotted path put into messages.

    Raises ValueError for an unknown key, naming the nearest, for a value of the wrong type, and for what the
    dataclass itself refuses.
    """
    check_keys(cls, values, where)
    fields, hints = config_fields(cls), get_type_hints(cls)
    arguments = {key: coerce(value, hints[key], f"{where}{key}") for key, value in values.items()}
    missing = [
        f"{where}{name}" for name, field in fields.items() if required(field) and name not in arguments
    ]
    if missing:
        raise ValueError(f"{missing[0]} has no default: set it in the recipe or as --{missing[0]}")
    return cls(**arguments)


def check_keys(cls: Any, values: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError for a key that the dataclass, or one inside it, does not have."""
    fields, hints = config_fields(cls), get_type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1) or sorted(fields)
            raise ValueError(f"unknown key {where}{key}; did you mean {' or '.join(near)}?")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            check_keys(hints[key], value, f"{where}{key}.")


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value`, as YAML or the command line gave it, in the type that the field declares."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        lists = isinstance(value, str) and "," in value  # a,b on the command line
        kinds = [option for option in options if option is not type(None)]
        return coerce_first(value, sorted(kinds, key=lambda kind: lists and get_origin(kind) is None), where)
    if origin is Literal:
        if value not in options:
            near = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
            raise ValueError(
                f"{where}={value!r} is not one of {', '.join(map(str, options))}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r}: expected a group of keys: {', '.join(config_fields(hint))}")
        return from_mapping(cast("type", hint), value, f"{where}.")
    if origin in (tuple, list):
        return coerce_items(value, origin, options, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r}: expected keys and values, as {{a: 1, b: 2}}")
        return {str(key): coerce(item, options[1], f"{where}.{key}") for key, item in value.items()}
    return coerce_scalar(value, hint, where)


def coerce_first(value: Any, options: Sequence[Any], where: str) -> Any:
    """`value` in the first of several types that takes it."""
    for option in options[:-1]:
        try:
            return coerce(value, option, where)
        except ValueError:
            continue
    return coerce(value, options[-1], where)


def coerce_items(value: Any, origin: type, options: tuple[Any, ...], where: str) -> Any:
    """A tuple or list; on the command line `a,b` stands for [a, b]."""
    if isinstance(value, str):
        value = [yaml.safe_load(item) for item in value.split(",")] if value else []
    if not isinstance(value, Sequence):
        raise ValueError(f"{where}={value!r}: expected a list, as [a, b] in YAML or a,b on the command line")
    if origin is list or (len(options) == 2 and options[1] is Ellipsis):
        kinds = [options[0]] * len(value)
    elif len(options) == len(value):
        kinds = list(options)
    else:
        raise ValueError(f"{where}={value!r}: expected {len(options)} values, got {len(value)}")
    return origin(coerce(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds)))


def coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    """bool, int, float or str. YAML reads `1e-4` as text, so numbers are read from text here."""
    if hint is Any or (type(value) is hint):
        return value
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if (
        hint is int
        and isinstance(value, float | str)
        and re.fullmatch(r"[+-]?[\d_]+(\.0*)?(e\d+)?", str(value))
    ):
        return int(float(value)) if re.search(r"[.e]", str(value)) else int(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{where}={value!r}: expected {getattr(hint, '__name__', hint)}")


def required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def config_fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def to_mapping(config: Any) -> Any:
    """Plain nested values: what `from_mapping` reads and YAML and JSON can write."""
    if dataclasses.is_dataclass(config):
        return {name: to_mapping(getattr(config, name)) for name in config_fields(config)}
    if isinstance(config, list | tuple):
        return [to_mapping(item) for item in config]
    return config


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_mapping(config), sort_keys=False, width=100, default_flow_style=None)


def find_recipe(name: str | Path) -> Path:
    """The recipe file: as given, else among the recipes that come with this package.

    Raises ValueError if there is none, listing those that come with it.
    """
    for path in (Path(name), ROOT / name, ROOT / "configs" / name):
        if path.is_file():
            return path
    known = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml"))
    raise ValueError(f"no recipe {name}; these come with the package: {', '.join(known)}")


def is_recipe(path: str | None) -> bool:
    """Whether a path names a recipe, by its ending."""
    return path is not None and path.endswith((".yaml", ".yml"))


def read_recipe(cls: type[Config], path: str | Path) -> Config:
    """The recipe in a YAML file. Raises ValueError naming the file."""
    path = find_recipe(path)
    try:
        return from_mapping(cls, load_yaml(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected keys and values")
    return values


def parse(cls: type[Config], argv: Sequence[str], default: str | None, about: str) -> Config:
    """The recipe that a command line asks for: `--config FILE` (else `default`), then `--key.sub value`.

    Exits with the help text for --help. Raises ValueError for anything it does not understand.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(cls, default, about))
        raise SystemExit(0)
    overrides = list(split_arguments(argv))
    files = [str(value) for key, value in overrides if key == "config"]
    if ("config", True) in overrides:
        raise ValueError("--config needs a file, see --help")
    if default is not None and not files:
        files = [default]
    values: dict[str, Any] = {}
    for file in files:
        path = find_recipe(file)
        try:
            read = load_yaml(path)
            check_keys(cls, read)  # before the overrides, so that the message names the file
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        merge(values, read)
    for key, value in overrides:
        if key != "config":
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            merge(values, nested)
    return from_mapping(cls, values)


def split_arguments(argv: Sequence[str]) -> list[tuple[str, Any]]:
    """`--a.b-c 1 --d=x --e` as [("a.b_c", 1), ("d", "x"), ("e", True)]. Values are read as YAML."""
    pairs, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"unexpected argument {word!r}: options are written --key value, see --help")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        pairs.append((key.replace("-", "_"), value))
    return pairs


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Write `values` over `into`, group by group."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def help_text(cls: Any, default: str | None, about: str) -> str:
    """What --help prints: every key, its default and the comment that stands behind it in the code."""
    recipes = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml"))
    lines = [about.strip(), "", f"  --config FILE  recipe, default {default}; known: {', '.join(recipes)}"]
    return "\n".join(lines + help_lines(cls, ""))


def help_lines(cls: Any, prefix: str) -> list[str]:
    comments, hints = field_comments(cls), get_type_hints(cls)
    title = (inspect.getdoc(cls) or cls.__name__).splitlines()[0]
    lines, groups = ["", f"{prefix.rstrip('.') or 'recipe'}: {title}"], []
    for name, field in config_fields(cls).items():
        if dataclasses.is_dataclass(hints[name]):
            groups += help_lines(hints[name], f"{prefix}{name}.")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "" if default is dataclasses.MISSING else f" [{yaml_word(default)}]"
        lines.append(f"  --{prefix}{name}{shown}  {comments.get(name, '')}".rstrip())
    return lines + groups


def yaml_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def field_comments(cls: Any) -> dict[str, str]:
    """Field name -> the comment behind it, read from the source of the class and of its bases."""
    comments: dict[str, str] = {}
    for base in reversed(inspect.getmro(cls)):
        if dataclasses.is_dataclass(base):
            found = re.findall(r"^ +(\w+): [^#\n]*(?:# (.*))?$", inspect.getsource(base), re.MULTILINE)
            comments.update({name: comment for name, comment in found if comment})
    return comments
