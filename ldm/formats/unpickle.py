"""Pickled weights (.ckpt, .pt, .bin) to safetensors, in a process of its own that can do nothing else.

torch.load reads with weights_only=True and no other way: a file that names code is refused, and never read
again less strictly. Beneath that the process has no network where the system grants it a world without, no
new processes, writes one file, and takes a limited amount of memory. A pickle's other notes are dropped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
ROOM = 6 << 30  # bytes of addresses that torch itself maps, with room to work
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # of Linux' sched.h
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "shutil.",
)
# What old trainers left in their files beside the weights: read as an object that holds and does nothing.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)


class Inert:
    """An object that forgets what it is given."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def unpickle(source: Path, target: Path) -> None:
    """Writes the tensors of a pickle as safetensors, by a child process.

    Raises ValueError, with the child's words, if the pickle is refused or cannot be read.
    """
    if not source.is_file():
        raise ValueError(f"no such file {source}")
    command = [sys.executable, "-m", "ldm.formats.unpickle", str(source.absolute()), str(target.absolute())]
    root = Path(__file__).parents[2]
    environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"the reading process ended with {run.returncode}"])[-1]
        raise ValueError(f"{source} is refused: {last[:400]}")


def leave_network() -> None:
    """This process gets a network of its own, with nothing in it, where the system allows that.

    Before any thread starts: afterwards the system refuses.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def confine(source: Path) -> None:
    """From now on this process writes nothing by Python's means, starts nothing, and has limited memory."""
    if sys.platform == "linux":
        import resource

        limit = 3 * source.stat().st_size + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed while a pickle is read")
        if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(f"nothing may be written while a pickle is read, not {arguments[0]!r}")

    sys.addaudithook(watch)


def read_pickle(path: Path) -> dict[str, Any]:
    """The tensors of a pickle by name, those of its `state_dict` if it has one.

    Raises ValueError if it holds none, or anything but the plain data of weights.
    """
    import pickle

    import torch

    mapped = zipfile.is_zipfile(path)
    try:
        # stand-ins under others' names: nothing of those names is imported
        with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        words = " ".join(str(error).split())
        at = words.find("GLOBAL ")
        what = words[at : at + 120] if at >= 0 else words[:200]
        raise ValueError(f"it holds more than weights, which could run code: {what}") from None
    except (RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no whole file of torch.save ({str(error)[:200]})") from None
    for inner in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
            break
    tensors = content.items() if isinstance(content, dict) else ()
    found = {
        name: value for name, value in tensors if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not found:
        raise ValueError("it holds no tensors by name")
    return found


def main() -> int:
    """What the child process does."""
    source, target = map(Path, sys.argv[1:])
    leave_network()
    import torch
    from safetensors.torch import save_file  # writes without Python's open

    confine(source)
    try:
        tensors, seen = {}, set()
        for name, value in read_pickle(source).items():
            place = value.untyped_storage().data_ptr()
            shared = place in seen
            tensors[name] = (
                value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
            )
            seen.add(place)
        save_file(tensors, target, {"format": "pt"})
    except (ValueError, PermissionError, MemoryError) as error:
        print(f"{error or 'it does not fit into memory'}", file=sys.stderr)  # noqa: T201  # for the parent
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
