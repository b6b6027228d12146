"""From the start of the process to the picture's file: what a user waits for, and where it goes.

python bench/start_to_file.py               the bundled model, 5 processes
python bench/start_to_file.py --runs 9 --threads 2 -- --steps 10
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "python alone": "pass",
    "+ import torch": "import torch",
    "+ import ldm.pipeline": "import ldm.pipeline",
    "+ load the bundled model": "from ldm.pipeline import LatentDiffusionPipeline as P; P.bundled()",
}


def seconds(command: list[str], threads: int) -> float:
    """Wall-clock time of one process. Raises CalledProcessError, with its words shown, if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="processes of each kind, after one that is not counted"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument("options", nargs="*", help="further options of ldm.generate, behind --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder, "fox.png"))
        draw = ["-m", "ldm.generate", "a red fox in snow", "--seed", "0", "--output", picture, "--overwrite"]
        commands = {name: [sys.executable, "-c", code] for name, code in STAGES.items()}
        commands["the whole command"] = [sys.executable, *draw, *arguments.options]
        times: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(arguments.runs + 1):  # in turn, so that a slow minute of the machine meets all
            for name, command in commands.items():
                spent = seconds(command, arguments.threads)
                if run:
                    times[name].append(spent)
    print(f"| median of {arguments.runs} processes, {arguments.threads} threads | seconds | min | max |")
    print("|---|---|---|---|")
    for name, spent in times.items():
        print(f"| {name} | {statistics.median(spent):.2f} | {min(spent):.2f} | {max(spent):.2f} |")


if __name__ == "__main__":
    main()
