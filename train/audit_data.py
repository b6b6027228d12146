"""Look for near-duplicates in a training set, whatever it is: a folder, tars, a dataset, drawn scenes.

  python -m train.audit_data --output audit --data.source 'photos/{000..009}.tar'
  python -m train.audit_data --output audit --data.source pictograms --data.subjects few --data.length 5000

It tells what python -m ldm.evaluate audit tells of a folder, by the same rules. --output holds report.md,
pairs.json and sheet.png with the nearest pairs side by side. The features of all pictures are in memory, and
each picture is read twice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ldm.command.loading import find_device
from ldm.metrics.audit import BITS, audit_sets
from ldm.metrics.extractors import find_extractor
from ldm.recipes.picture import check_output
from train.command import command
from train.config import parse
from train.data.sources import DataConfig
from train.measure.seen import SourcePictures


@dataclass(frozen=True, kw_only=True)
class DataAuditRecipe:
    """Which pictures are looked through, and how near is near."""

    output: str  # folder for report.md, pairs.json and sheet.png
    data: DataConfig = field(default_factory=DataConfig)  # of a training
    extractor: str = "random-conv"  # or inception=FILE, dinov2=FOLDER, clip=FOLDER
    bits: int = 6  # of 63, in which perceptual hashes of near pictures may differ
    ratio: float | None = None  # 0 to 1; null: 0.5, and 0.1 for random-conv, to which one colour looks alike
    pairs: int = 32  # on the sheet, the nearest

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= BITS:
            raise ValueError(f"bits={self.bits}: expected 0 to {BITS}")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: expected 0 to 1")
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs}: expected 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Look through the pictures that the command line names, and print where the report is."""
    recipe = parse(DataAuditRecipe, sys.argv[1:] if argv is None else argv, None, __doc__ or "")
    extractor = find_extractor(recipe.extractor, find_device(None))
    pictures, output = [SourcePictures(recipe.data)], Path(recipe.output)
    check_output(output / "sheet.png", overwrite=True)
    print(audit_sets(pictures, extractor, output, bits=recipe.bits, ratio=recipe.ratio, show=recipe.pairs))
    return 0


if __name__ == "__main__":
    command(main)
