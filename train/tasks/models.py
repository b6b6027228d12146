"""Where a model is that a training starts from, or that is measured."""

from __future__ import annotations

from pathlib import Path

from ldm import pipeline
from ldm.files.hub import find_folder


def named_folder(name: str) -> Path:
    """Of the model that a recipe names by folder, hub id or "bundled". Raises ValueError if there is none."""
    return pipeline.BUNDLED if name == "bundled" else find_folder(name)


def pipeline_folder(path: str | None) -> Path:
    """The folder of a pipeline: the path, its model/ (of a run), or the bundled one.

    Raises ValueError if there is none.
    """
    if path is None:
        return pipeline.BUNDLED
    for folder in (Path(path), Path(path, "model")):
        if (folder / "model_index.json").is_file():
            return folder
    raise ValueError(f"model={path!r} holds no pipeline: name its folder, or a run that has come to its end")
