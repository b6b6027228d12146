"""Where a finished model is."""

from __future__ import annotations

from pathlib import Path

from ldm import pipeline


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
