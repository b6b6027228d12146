"""The library of the kernels beside this file: compiled for this CPU when it is first asked for, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # first: the library shares its threads, whose runtime torch brings

HERE = Path(__file__).parent
# A product and a sum may become one operation and zeros lose their signs; infinities and NaN stay.
FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -shared -fPIC"


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Takes some seconds when this CPU has not had them before.

    Raises ValueError, which says why and what to do, if they cannot be had here.
    """
    sources = sorted(HERE.glob("*.cpp"))
    compiler = find_compiler()
    parts = [FLAGS, version(compiler), torch.__version__, cpu()]
    parts += [path.read_text() for path in (*sources, *sorted(HERE.glob("*.h")))]
    kept = cache_folder() / f"native-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not kept.exists():
        compile_to(kept, compiler, sources)
    try:
        return ctypes.CDLL(str(kept))
    except OSError as error:
        raise ValueError(
            f"native kernels: {kept} cannot be loaded ({error}); delete it and try again"
        ) from error


def find_compiler() -> list[str]:
    """$CXX, else g++, as the words of a command. Raises ValueError if there is none."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(words[0]) is None:
        raise ValueError(
            f"native kernels: there is no C++ compiler {words[0]!r}; install g++ (Debian: apt install g++) "
            "or name it in the environment variable CXX"
        )
    return words


def version(compiler: list[str]) -> str:
    """What the compiler says of itself. Raises ValueError unless it is GCC, whose OpenMP is torch's."""
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    if "Free Software Foundation" not in told:
        first = (told.splitlines() or ["nothing"])[0]
        raise ValueError(
            f"native kernels: expected GCC, and {shlex.join(compiler)} says {first!r}; set CXX to a g++"
        )
    return told


def cpu() -> str:
    """What distinguishes this CPU from others that may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm"


def compile_to(path: Path, compiler: list[str], sources: list[Path]) -> None:
    """Whole or not at all, whoever else compiles the same. Raises ValueError with what the compiler said."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
            made = Path(folder, path.name)
            command = [*compiler, *shlex.split(FLAGS), *map(str, sources), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr[-300:])
                raise ValueError(f"native kernels: {compiler[0]} failed ({said.strip()})")
            os.replace(made, path)
    except OSError as error:
        raise ValueError(
            f"native kernels: {path.parent} cannot be written ({error}); set XDG_CACHE_HOME to a "
            "folder that can"
        ) from error
