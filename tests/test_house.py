"""The rules of the house: direction of imports, a fast start, no torchvision, short rooms, all data found."""

import ast
import copy
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from train.config import read_recipe
from train.tasks.autoencoding import AutoencoderRecipe
from train.tasks.classifying import ClassifierRecipe
from train.tasks.consistency import ConsistencyRecipe
from train.tasks.contrastive import ContrastiveRecipe
from train.tasks.diffusion import DiffusionRecipe
from train.tasks.embedding import EmbeddingRecipe
from train.tasks.inpainting import InpaintingRecipe
from train.tasks.lora import LoraRecipe
from train.tasks.upscaling import UpscalerRecipe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAY_IMPORT = {
    "autoencoder": set(),
    "text_encoder": set(),
    "ldm": {"autoencoder", "text_encoder"},
    "train": {"ldm", "autoencoder", "text_encoder"},
}
LATE = {
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "yaml",
    "huggingface_hub",
    "peft",
}  # slow to import
NEVER_IN_LDM = {"accelerate", "datasets", "yaml"}
MAX_LINES, MAX_FUNCTION_LINES = 400, 60
LONG: dict[str, str] = {}  # "path" or "path:function": the reason why it is long

SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
RECIPES = {
    "train_autoencoder": AutoencoderRecipe,
    "train_classifier": ClassifierRecipe,
    "train_text_encoder": ContrastiveRecipe,
    "train_ldm": DiffusionRecipe,
    "train_lora": LoraRecipe,
    "train_embedding": EmbeddingRecipe,
    "train_upscaler": UpscalerRecipe,
    "train_inpainting": InpaintingRecipe,
    "train_consistency": ConsistencyRecipe,
}
COMMANDS = [
    'pip install -c constraints.txt . && python -m ldm.generate "a red fox in snow"',
    "pip install -c constraints.txt '.[test]' && pytest -n auto",
]


@cache
def parsed(path: Path) -> ast.Module:
    """The code of a file; several rules look at each."""
    return ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every absolute import under tree; a relative one stays in its package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]


def at_import(tree: ast.Module) -> ast.Module:
    """The statements that run when the module is imported: no function bodies, no `if TYPE_CHECKING`."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Cut().visit(copy.deepcopy(tree))


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints for code; fails with its stderr."""
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    """train -> ldm -> autoencoder, text_encoder, and never back."""
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package} | {"tests", "bench"}
    for path in (ROOT / package).rglob("*.py"):
        wrong = [
            f"{names(path)}:{line} imports {name}"
            for line, name in imported(parsed(path))
            if name in forbidden
        ]
        assert not wrong


@pytest.mark.parametrize("package", ["ldm", "autoencoder", "text_encoder"])
def test_slow_libraries_load_late(package):
    """A picture needs none of them, and they cost seconds: they are imported inside the functions that do."""
    for path in (ROOT / package).rglob("*.py"):
        tree = parsed(path)
        never = {name for _, name in imported(tree)} & NEVER_IN_LDM
        assert not never, f"{names(path)} may never import {never}"
        early = {name for _, name in imported(at_import(tree))} & LATE
        assert not early, f"{names(path)} imports {early} at module level"


def test_the_start_is_light():
    loaded = python("import sys, ldm.generate, ldm.pipeline; print(*sys.modules)").split()
    assert not {name.split(".")[0] for name in loaded} & (LATE | {"torchvision", "xformers", "train"})


@pytest.mark.slow
def test_importing_changes_nothing():
    """No global torch flag and no environment variable is set by an import."""
    code = """
import os, torch
flags = (torch.get_num_threads, torch.get_default_dtype, torch.is_grad_enabled, torch.initial_seed,
    torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.benchmark)
state = lambda: (dict(os.environ), [flag() for flag in flags])
before = state()
import ldm.generate, ldm.pipeline, ldm.diffusion.objective
print(before == state())
"""
    assert python(code).strip() == "True"


def test_torchvision_is_nowhere():
    """Its wheels want a CUDA build of torch; beside another torch it breaks diffusers and transformers."""
    for path in SOURCES:
        assert "torchvision" not in {name for _, name in imported(parsed(path))}, names(path)
    assert "torchvision" not in (ROOT / "pyproject.toml").read_text()
    assert "torchvision" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.slow
def test_every_module_imports_without_torchvision():
    modules = [
        names(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in SOURCES
    ]
    modules = [name for name in modules if not name.endswith("__main__")]
    python(
        "import sys, importlib; sys.modules['torchvision'] = None\n"
        f"for name in {modules}: importlib.import_module(name)"
    )


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_rooms_are_small(path):
    text = path.read_text()
    lines = {names(path): (text.count("\n"), MAX_LINES)}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines[f"{names(path)}:{node.name}"] = (node.end_lineno - node.lineno + 1, MAX_FUNCTION_LINES)
    long = {name: count for name, (count, limit) in lines.items() if count > limit and name not in LONG}
    assert not long, f"split, or give the reason in LONG: {long}"
    assert path.stem not in {"utils", "util", "misc", "common", "helpers"}, (
        "a function lives with what it is about"
    )


def test_reasons_for_length_are_still_needed():
    known = {names(path) for path in SOURCES}
    assert all(entry.split(":")[0] in known and reason for entry, reason in LONG.items())


def test_public_names_resolve():
    ldm = importlib.import_module("ldm")
    assert ldm.__all__ == sorted(set(ldm.__all__), key=ldm.__all__.index), "a name twice"
    for name in ldm.__all__:
        assert getattr(ldm, name) is not None
        assert name in dir(ldm)
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(ldm, "no_such_" + "name")


def test_every_package_is_shipped():
    """A folder with code that [tool.setuptools] does not name would be missing after pip install."""
    listed = PROJECT["tool"]["setuptools"]["packages"]
    code = {names(path.parent).replace("/", ".") for path in SOURCES}
    assert code <= set(listed), f"name {code - set(listed)} in [tool.setuptools] packages"
    assert all((ROOT / name.replace(".", "/")).is_dir() for name in listed)


def test_the_bundled_model_is_whole_and_small():
    """It travels in the wheel: a complete pipeline folder with its model card, at most 60 MB."""
    bundled = ROOT / "ldm/bundled"
    for name in (
        "README.md",
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "tokenizer/vocab.json",
    ):
        assert (bundled / name).is_file(), f"ldm/bundled/{name} is missing"
    files = [path for path in bundled.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".png", ".safetensors"}


def test_versions_and_licence_agree():
    project = PROJECT["project"]
    assert project["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence[:200]
    assert "Version 2.0" in licence[:200]
    if version := getattr(importlib.import_module("ldm"), "__version__", None):
        assert version in (project["version"], "0+checkout")  # the latter where it is not installed


def test_constraints_meet_the_minimum_versions():
    number = lambda text: tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    canonical = lambda name: name.lower().replace("_", "-")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonical(name): version for name, version in pins.items()}
    assert pins["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in PROJECT["project"]["dependencies"] + [entry for extra in extras for entry in extra]:
        name, floor = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert number(pins[canonical(name)]) >= number(floor), requirement


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=names)
def test_every_recipe_parses(path):
    """The first lines tell command, hardware, time and result, and the script they name reads the recipe."""
    command = r"# command: .*\btrain/(train_\w+)\.py( --config (?P<path>\S+))?\n"
    head = re.match(command + r"# hardware: .+\n# time: .+\n# result: .+\n", path.read_text())
    assert head, "the first lines are `# command:`, `# hardware:`, `# time:` and `# result:`"
    script = importlib.import_module(f"train.{head[1]}")
    assert (head["path"] or script.DEFAULT) == names(path), "the command is not that of this recipe"
    read_recipe(RECIPES[head[1]], path)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands(command):
    """README promises them and the checks of a change run them, word for word."""
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci/run").read_text().splitlines()
