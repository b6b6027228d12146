"""Has a model learnt pictures by heart? What it draws against every picture that it was trained on.

  python -m train.audit_model --output audit --data.source pictograms --data.subjects few --data.size 128 \\
      --data.length 134400 --quantile 0.003
  python -m train.audit_model --output audit --model runs/mine --data.source photos --data.size 256 \\
      --extractor dinov2=dinov2-large
  python -m train.audit_model --output audit --model runs/mine --data.source photos --drawn pictures

Give it the --data.* of the training. The model draws captions that it was trained on and, of drawn scenes,
others of combinations that it never saw. A picture is called a copy if it is nearer to one training picture,
by its distance over the mean of those to the 50 nearest (Carlini et al. 2023), than the nearest of 1,000
training pictures is to the others. Chance makes some copies so: the verdict is whether there are more. The
report also tells how many it takes to tell, and which share of training pictures is found when they come back
from the autoencoder, as a copy would.

--output holds report.md, copies.json, sheet.png and the pictures; a second run draws what lacks.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from PIL import Image

from autoencoder.vae import AutoencoderKL
from ldm.command.loading import find_device
from ldm.files.checkpoint import load_model, model_hash
from ldm.files.config import replacing, write_json
from ldm.formats.stock import MODELS
from ldm.metrics.copies import SIGNIFICANT, Verdict
from ldm.metrics.drawing import averaged, draw, recipes
from ldm.metrics.extractors import find_extractor
from ldm.metrics.folders import Folder
from ldm.metrics.report import page
from ldm.recipes.picture import check_output, save_picture
from train.batches.plan import spread
from train.command import command
from train.config import parse
from train.data.captions import every
from train.data.source import Source
from train.data.sources import STYLES, DataConfig, open_source
from train.measure.judge import SEED_ASKED
from train.measure.memory import GRID, PIXELS, Findings, Looking, look_for_copies
from train.tasks.models import pipeline_folder

TRAINED, UNSEEN, GIVEN = "captions of the training", "combinations never shown", "as given"


@dataclass(frozen=True, kw_only=True)
class ModelAuditRecipe:
    """Which model is looked at, and what it was trained on."""

    output: str  # folder for report.md, copies.json, sheet.png and pictures
    model: str | None = None  # folder of a pipeline, or of the run that trained it; null: the bundled one
    data: DataConfig = field(default_factory=DataConfig)  # of its training
    drawn: str | None = None  # folder of pictures that it drew; null: it draws now
    count: int = 100  # captions of the training to draw, and as many of what scenes it never saw
    seed: int = 0  # of the first picture; the next have the next
    overwrite: bool = False  # draw anew what another recipe drew
    known: int = 1000  # training pictures, evenly spread, that tell how near chance brings two
    quantile: float = 0.001  # of them, that lie below the threshold; duplicates in the data ask for more
    extractor: str | None = None  # beside pixels: inception=FILE, dinov2=FOLDER, clip=FOLDER, random-conv
    pairs: int = 32  # on the sheet, the nearest
    workers: int = os.cpu_count() or 1  # processes that read the training pictures; 0: none beside this one

    def __post_init__(self) -> None:
        for name, least in (("count", 2), ("known", 2), ("pairs", 1), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected {least} or more")
        for name in ("count", "seed", "overwrite"):
            value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.drawn is not None and value != usual:
                raise ValueError(f"{name}={value} with drawn={self.drawn!r}: nothing is drawn, leave one out")
        if not 0 < self.quantile < 0.5:
            raise ValueError(f"quantile={self.quantile}: expected above 0 and below 0.5; 0.001 is usual")


def prompts_of(recipe: ModelAuditRecipe, source: Source) -> dict[str, list[str]]:
    """What the model is to draw, by where it comes from. Raises ValueError if no picture can be decoded."""
    seen = []
    for index in spread(len(source), recipe.count):
        with suppress(ValueError):  # a picture that cannot be decoded
            seen.append(every(source[index][1])[0])
    if not seen:
        raise ValueError(f"no caption of the training can be read: none of {source.description} is whole")
    asked = {TRAINED: seen}
    if recipe.data.source in STYLES and recipe.data.split == "train":
        other = dataclasses.replace(recipe.data, split="held_out", scene_seed=SEED_ASKED, length=recipe.count)
        try:
            scenes = open_source(other)
        except ValueError:  # few subjects may leave no combination out
            return asked
        asked[UNSEEN] = [every(scenes[index][1])[0] for index in range(len(scenes))]
    return asked


def pictures_of(recipe: ModelAuditRecipe, source: Source) -> tuple[Folder, dict[str, range]]:
    """The pictures that the model drew, and which of them are of what."""
    side = recipe.data.size
    if recipe.drawn is not None:
        folder = Folder(Path(recipe.drawn), side=side)
        return folder, {GIVEN: range(len(folder))}
    asked = prompts_of(recipe, source)
    prompts = [prompt for some in asked.values() for prompt in some]
    lines = [
        {"prompt": prompt, "seed": recipe.seed + place, "name": f"{place + 1:05d}"}
        for place, prompt in enumerate(prompts)
    ]
    how = {"model": str(pipeline_folder(recipe.model)), "overwrite": recipe.overwrite}
    home = draw(lines, how, Path(recipe.output))
    groups, first = {}, 0
    for what, some in asked.items():
        groups[what], first = range(first, first + len(some)), first + len(some)
    return Folder(home, names=[f"{line['name']}.png" for line in lines], side=side), groups


def verdict_of(findings: Findings, groups: Mapping[str, range]) -> list[str]:
    """The lines of the report that say what was found."""
    rows, told = [], []
    for way, each in findings.verdicts.items():
        for what, places in groups.items():
            count, chance = each.copies(places), each.chance(places)
            expected = len(places) * each.rank / (each.known + 1)
            least = next((k for k in range(len(places) + 1) if each.chance_of(k, places) < SIGNIFICANT), "–")
            rows.append(
                f"| {what} | {way} | {count} of {len(places)} | {expected:.1f} | {chance:.2g} | {least} | "
                f"{each.threshold:.3f} | {each.found:.1%} |"
            )
            if chance < SIGNIFICANT:
                told.append(f"{count} of {len(places)} pictures of {what} are copies, by {way}")
    first = (
        f"**Learnt by heart: {'; '.join(told)}.** The sheet shows them."
        if told
        else "**No sign of pictures learnt by heart**: no more copies than chance makes."
    )
    blind = [way for way, each in findings.verdicts.items() if each.found < 0.9]
    return [
        first,
        "",
        "| pictures of | by | copies | by chance | chance of it | it takes | threshold | true ones found |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *(
            f"By {way} few true copies are found, so that none are told says little. Duplicates in the data "
            "lower the threshold: train.audit_data finds them, and a larger --quantile passes over them."
            for way in blind
        ),
    ]


def threshold_of(verdict: Verdict) -> str:
    """Which ratio the threshold is."""
    which = "the lowest" if verdict.rank == 1 else f"number {verdict.rank} from below"
    return f"{which} of the ratios of {verdict.known} training pictures"


def sheet(
    recipe: ModelAuditRecipe, drawn: Folder, source: Source, findings: Findings, looking: Looking
) -> Image.Image:
    """The nearest pairs: what was drawn, and beside it the nearest training picture, by pixels."""
    nearest = findings.verdicts[PIXELS].nearness
    made = recipes(drawn)
    images, words = [], []
    for place in nearest.ratio.argsort()[: recipe.pairs].tolist():
        other = int(nearest.place[place])
        square = looking.square(other)
        assert square is not None, "it came by"
        images += [drawn.read(place).image, square]
        words += [
            f"{drawn.called(place)}, ratio {nearest.ratio[place]:.3f}\n{made[place].prompt if made else ''}",
            f"training picture {other}\n{every(source[other][1])[0]}",
        ]
    return page(images, 8, captions=words)


def write(recipe: ModelAuditRecipe, lines: Sequence[str], facts: Mapping[str, Any]) -> Path:
    """Writes copies.json and report.md, which is read; its path."""
    output = Path(recipe.output)
    write_json(output / "copies.json", facts)
    protocol = [f"- {name}: {value}" for name, value in facts["protocol"].items()]
    parts = [
        *("# Learnt by heart?", "", *lines, ""),
        "A copy: its distance to the nearest training picture, over the mean of its 50 nearest, is below the "
        f"threshold, {facts['protocol']['threshold']}, each back from the autoencoder and against all but "
        "itself. True ones found: the share of these "
        "that are told as copies of themselves. It takes so many copies for a chance below "
        f"{SIGNIFICANT:g}. Pixels are averaged to {GRID}x{GRID}.",
        *("", "![the nearest by pixels: drawn, and beside it the training picture](sheet.png)", ""),
        *("## Protocol", "", *protocol),
    ]
    with replacing(output / "report.md") as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return output / "report.md"


def audit(recipe: ModelAuditRecipe) -> Path:
    """Draws, compares and writes: the path of the report. Raises ValueError for what cannot be."""
    output, home = Path(recipe.output), pipeline_folder(recipe.model)
    check_output(output / "sheet.png", overwrite=True)
    device = find_device(None)
    extractor = find_extractor(recipe.extractor, device) if recipe.extractor else None
    source = open_source(recipe.data)
    drawn, groups = pictures_of(recipe, source)
    findings = look_for_copies(
        [drawn.read(place).image for place in range(len(drawn))],
        source,
        load_model(AutoencoderKL, home / "vae").to(device),
        extractor,
        size=recipe.data.size,
        known=recipe.known,
        quantile=recipe.quantile,
        workers=recipe.workers,
    )
    looking = Looking(source, recipe.data.size, extractor)
    save_picture(sheet(recipe, drawn, source, findings, looking), output / "sheet.png", overwrite=True)
    protocol = {
        "model": recipe.model or "bundled",
        "model_hash": model_hash(home / name for name in MODELS),
        "ema": averaged(str(home)),
        "data": f"{findings.trained} pictures came by, of {source.description}",
        "extractor": f"{extractor.name}, {extractor.digest[:16]}" if extractor else "none",
        "threshold": threshold_of(findings.verdicts[PIXELS]),
        "quantile": recipe.quantile,
        "torch": str(torch.__version__),
    }
    pictures = [
        {"picture": drawn.called(place)}
        | {
            way: {"ratio": each.nearness.ratio[place].item(), "nearest": int(each.nearness.place[place])}
            for way, each in findings.verdicts.items()
        }
        for place in range(len(drawn))
    ]
    facts = {"protocol": protocol, "pictures": pictures}
    return write(recipe, verdict_of(findings, groups), facts)


def main(argv: Sequence[str] | None = None) -> int:
    """Look for copies as the command line says, and print where the report is."""
    print(audit(parse(ModelAuditRecipe, sys.argv[1:] if argv is None else argv, None, __doc__ or "")))
    return 0


if __name__ == "__main__":
    command(main)
