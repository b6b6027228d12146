"""From what a user names, a path or an id of the Hugging Face hub, to a folder on this disk.

A path on this disk comes first and costs no network. From the hub come only JSON, text and safetensors.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PARTS = (
    *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("scheduler", "low_res_scheduler"),
)
TEXTS = (
    "model_index.json",
    "generation.json",
    *(f"{part}/*.{end}" for part in PARTS for end in ("json", "txt")),
)
PATIENCE = 3.0  # seconds for the hub's first answer; without network its own library tries for minutes


def find_folder(
    name: str | os.PathLike[str], variant: str | None = None, *, fetch: bool = True, option: str = "--model"
) -> Path:
    """The folder of a pipeline: a local one, or the cached or downloaded copy of a hub repository.

    fetch: whether the hub may be asked; else, where a picture's recipe has the name, only its cache is looked
    at. option: by which a user names another one then.
    Raises ValueError when there is no such folder, for a single file, and when the hub does not answer.
    """
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is a single file: load it by LatentDiffusionPipeline.from_single_file")
        raise ValueError(
            f"{path} is a file: expected a folder with model_index.json. Pickles are never opened here: "
            "python -m ldm.convert --allow-pickle makes safetensors of them"
        )
    text = os.fspath(name)
    if not HUB_ID.fullmatch(text) or ".." in text:
        moved = "" if fetch else f"; has it moved? Say by {option} where it is"
        raise ValueError(f"no such folder {path} (nor is it a hub id, which looks like owner/name){moved}")
    return download(text, variant, fetch=fetch, option=option)


def download(repo: str, variant: str | None, *, fetch: bool = True, option: str = "--model") -> Path:
    """A snapshot of a hub repository in the usual cache; the cached one when the hub cannot be reached."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ValueError(f"no such folder {repo}; for a hub id, pip install huggingface_hub") from None

    info: list[hub.ModelInfo] = []
    failure: list[Exception] = []

    def ask() -> None:
        try:
            info.append(hub.HfApi().model_info(repo, timeout=PATIENCE))
        except Exception as error:  # noqa: BLE001  # for the thread that waits
            failure.append(error)

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if fetch and not offline:  # on a thread of its own: looking up a name has no time limit
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(PATIENCE)
    if not info:
        try:
            # one file stands for all: without a pattern a snapshot of some files counts as incomplete
            return Path(hub.snapshot_download(repo, allow_patterns=TEXTS[0], local_files_only=True))
        except Exception:  # noqa: BLE001  # many kinds say the same: not in the cache
            reason = "HF_HUB_OFFLINE is set" if offline else _reason(failure, repo)
            reason = reason if fetch else f"only a name given with {option} is fetched"
            where = "it is neither a folder here nor in the cache of the hub"
            raise ValueError(f"cannot load {repo}: {where}, and {reason}") from None
    names = [file.rfilename for file in info[0].siblings or []]
    wanted = [*TEXTS, *choose_weights(names, variant)]
    try:
        # not by its hash: what is fetched under the name `main` is found again without network
        return Path(hub.snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001  # its HTTP library's errors have no base class among ours
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot download {repo}: {reason}") from None


def _reason(failure: list[Exception], repo: str) -> str:
    """One clause that says why the hub gave nothing."""
    name = type(failure[0]).__name__ if failure else ""
    if name in ("RepositoryNotFoundError", "GatedRepoError", "DisabledRepoError"):
        return f"the hub has no {repo} that you may read"
    return f"the hub does not answer ({name or f'nothing in {PATIENCE:.0f} s'})"


def choose_weights(names: Iterable[str], variant: str | None) -> list[str]:
    """Of a repository's files, the safetensors to fetch: of each part the variant, where the part has it."""
    chosen = []
    for part in PARTS:
        mine = [name for name in names if fnmatch.fnmatchcase(name, f"{part}/*.safetensors")]
        plain = [name for name in mine if re.fullmatch(r"\w+(-\d+-of-\d+)?", Path(name).stem)]
        special = [name for name in mine if variant and f".{variant}" in Path(name).stem]
        chosen += special or plain
    return chosen
