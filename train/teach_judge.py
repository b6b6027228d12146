"""Teach a judge of drawn scenes, by which python -m ldm.evaluate scenes measures what a model draws.

  python -m train.teach_judge --data.source pictograms --data.subjects few --data.size 128 --output judge
  python -m train.teach_judge --data.source shapes --data.size 32 --output shapes-judge

The first is for the bundled model: give it the --data of the model's training. The folder holds weights, what
to ask for of combinations that training shows and that it never showed, and pictures on which the judge is
judged itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ldm.metrics.judges import open_judge, read_tested
from ldm.metrics.scenes import shares, table
from train.command import command
from train.config import parse
from train.data.sources import DataConfig
from train.measure.judge import LEAST, SEES, book_of, kept_judge


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """What a judge is taught."""

    output: str  # folder of the judge; another that is there is replaced
    data: DataConfig = field(default_factory=DataConfig)  # of the training: source, size, subjects, font
    sees: int = SEES  # pixels a side that it shrinks pictures to, where they are larger
    scenes: int = 40_000  # that teach it
    asked: int = 1000  # captions of each split that it can ask of a model
    tested: int = 1000  # drawn scenes on which it is judged itself

    def __post_init__(self) -> None:
        for name, least in (("sees", 8), ("scenes", LEAST), ("asked", 1), ("tested", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected {least} or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Teach the judge that the command line asks for, unless it is there, and print how good it is."""
    recipe = parse(JudgeRecipe, sys.argv[1:] if argv is None else argv, None, __doc__ or "")
    folder = kept_judge(
        Path(recipe.output),
        book_of(recipe.data),
        sees=recipe.sees,
        scenes=recipe.scenes,
        asked=recipe.asked,
        tested=recipe.tested,
    )
    judge = open_judge(folder)
    image, answers = read_tested(folder)
    print(table({f"judge, on {len(image):,} drawn scenes": shares(judge(image), answers)}))
    print(folder)
    return 0


if __name__ == "__main__":
    command(main)
