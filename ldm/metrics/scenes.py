"""Does a model draw what it is asked for? What `python -m ldm.evaluate scenes` does, by a judge of pictures.

Place, colour, subject and count are each a question with one right answer; "all" is that all of them are
right at once. Of combinations that training shows, and of such as it never showed.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from autoencoder.vae import AutoencoderKL
from ldm.command.arguments import DTYPES
from ldm.command.gallery import Rank
from ldm.command.loading import find_device, load
from ldm.drawing.pixels import to_tensor
from ldm.metrics.arguments import drawing_options
from ldm.metrics.drawing import averaged, draw, drawn_how, recipes, wait_for
from ldm.metrics.folders import Folder
from ldm.metrics.judges import (
    BATCH,
    SPLITS,
    Answers,
    Asked,
    Judge,
    open_judge,
    read_asked,
    read_tested,
    right,
)
from ldm.metrics.measurement import output_folder
from ldm.metrics.report import Figure, page, write_report
from ldm.recipes.picture import save_picture

NORMAL = 1.959964  # standard deviations that hold 95 % of a normal distribution
SHOWN = 48  # failures on the sheet


class Share(NamedTuple):
    """How many answers were right, of how many."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """In which the true share lies with 95 % confidence (Wilson 1927): within 0 and 1 however few."""
        n, p, z = self.asked, self.value, NORMAL
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(middle - reach, 0.0), min(middle + reach, 1.0)  # rounding may go beyond

    def __str__(self) -> str:
        if not self.asked:
            return "–"
        low, high = self.interval
        return f"{self.value:.1%} ({100 * low:.1f} to {100 * high:.1f})"


class Sitting(NamedTuple):
    """What a judge said of some pictures."""

    asked: Sequence[Asked]
    said: Answers
    right: Answers
    shares: Mapping[str, Share]  # by question, and "all"

    def failures(self) -> list[int]:
        """The places of pictures of which not all is right."""
        return (~right(self.said, self.right)["all"]).nonzero().flatten().tolist()


def shares(said: Answers, asked: Answers) -> dict[str, Share]:
    """Of right answers to each question, over the pictures of which it was asked, and of "all"."""
    return {name: Share(int(hit.sum()), len(hit)) for name, hit in right(said, asked).items()}


def sit(judge: Judge, image: Tensor, asked: Sequence[Asked]) -> Sitting:
    """The judge on pictures (N, 3, size, size) in [-1, 1] of what was asked."""
    said, answers = judge(image), judge.places(asked)
    return Sitting(asked, said, answers, shares(said, answers))


@torch.no_grad()
def through(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) as they come back of an autoencoder: the best that any UNet could do with it."""
    weights = next(vae.parameters())
    rows = [vae.decode(vae.to_latents(vae.encode(part.to(weights)).mean)) for part in image.split(BATCH)]
    return torch.cat([row.float().cpu() for row in rows]).clamp(-1, 1)


def judged_itself(folder: Path, judge: Judge, vae: AutoencoderKL) -> dict[str, Mapping[str, Share]]:
    """The judge on the pictures that it was tested on, as they are drawn and through a model's autoencoder.

    Raises ValueError for an autoencoder that does not take pictures of the judge's size.
    """
    if judge.size % vae.downsample_factor:
        raise ValueError(
            f"the judge sees {judge.size} pixels, and the autoencoder takes multiples of "
            f"{vae.downsample_factor}: teach a judge of another size"
        )
    image, answers = read_tested(folder)
    return {
        f"judge, on {len(image):,} drawn scenes": shares(judge(image), answers),
        "the same through the autoencoder": shares(judge(through(vae, image)), answers),
    }


def table(rows: Mapping[str, Mapping[str, Share]]) -> str:
    """Shares with their intervals, in Markdown."""
    names = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {title} | {' | '.join(str(row[name]) for name in names)} |" for title, row in rows.items()]
    return "\n".join(lines)


def told_wrong(sitting: Sitting, judge: Judge, place: int) -> str:
    """The prompt of a picture, and what the judge sees in it instead of what was asked."""
    each = sitting.asked[place]
    wrong = [
        f"{name}: {judge.answers[name][int(sitting.said[name][place])]}, not {answer}"
        for name, answer in each.answers.items()
        if answer is not None and sitting.said[name][place] != sitting.right[name][place]
    ]
    return "\n".join([each.prompt, *wrong])


def failures_sheet(
    judge: Judge, sittings: Sequence[tuple[Sitting, Sequence[Image.Image]]], path: Path
) -> int:
    """Writes pictures of which not all is right, with what was asked and seen; how many there are in all."""
    found = [(sitting, images, place) for sitting, images in sittings for place in sitting.failures()]
    shown = found[:: max(1, -(-len(found) // SHOWN))]
    path.unlink(missing_ok=True)  # of another model
    if shown:
        images = [images[place] for _, images, place in shown]
        words = [told_wrong(sitting, judge, place) for sitting, _, place in shown]
        save_picture(page(images, 6, captions=words), path, overwrite=True)
    return len(found)


def figures_of(rows: Mapping[str, Mapping[str, Share]], protocol: Mapping[str, Any]) -> Iterator[Figure]:
    """Every share as a figure with its protocol."""
    for title, row in rows.items():
        for name, share in row.items():
            if share.asked:
                counts = {"right": share.right, "asked": share.asked, "interval_95": share.interval}
                yield Figure(f"accuracy of {name}, {title}", share.value, None, {**protocol, **counts})


def examine(args: argparse.Namespace) -> Path | None:
    """Draws, judges and writes: the path of the report; None on ranks that only draw.

    Raises ValueError for what cannot be.
    """
    output, home = output_folder(args), Path(os.path.expanduser(args.judge))
    judge = open_judge(home)
    asked = questions(home, [args.split] if args.split else list(SPLITS), args.count)
    lines = [
        {"prompt": each.prompt, "seed": args.seed + place, "name": f"{split}-{place + 1:05d}"}
        for split, every in asked.items()
        for place, each in enumerate(every)
    ]
    folder = draw(lines, drawing_options(args), output)
    if Rank.of_environment().number:
        return None
    wait_for([folder / f"{line['name']}.png" for line in lines])
    pipe, _ = load(vars(args), find_device(args.device), DTYPES.get(args.dtype), fetch=True)
    rows, sittings = judged_itself(home, judge, pipe.vae), []
    for split, every in asked.items():
        names = [f"{line['name']}.png" for line in lines if line["name"].startswith(f"{split}-")]
        pictures = Folder(folder, names=names, side=judge.size)
        images = [pictures.read(place).image for place in range(len(pictures))]
        sitting = sit(judge, torch.stack([to_tensor(image) for image in images]), every)
        rows[f"model, on {len(every):,} captions of what {SPLITS[split]}"] = sitting.shares
        sittings.append((sitting, images))
    made = recipes(Folder(folder, names=[f"{line['name']}.png" for line in lines], mixed=True))
    protocol = {
        "drawn": drawn_how(made) if made else "not by this program",
        "ema": args.ema or averaged(args.model),
        "judge": judge.taught,
    }
    failed = failures_sheet(judge, sittings, output / "failures.png")
    notes = [table(rows), "", "In brackets: where the true share lies with 95 % confidence (Wilson)."]
    if failed:
        notes += ["", f"{failed} of {len(lines)} pictures fail in something; some of them:", ""]
        notes += ["![failures](failures.png)"]
    return write_report(output, list(figures_of(rows, protocol)), protocol, notes)


def questions(home: Path, splits: Sequence[str], count: int) -> dict[str, list[Asked]]:
    """What the judge asks for, `count` of each split that has any. Raises ValueError where it has fewer."""
    asked = {split: read_asked(home, split) for split in splits}
    if not any(asked.values()):
        raise ValueError(f"{home} asks for nothing of what {SPLITS[splits[0]]}: teach it with more subjects")
    for split, every in asked.items():
        if every and len(every) < count:
            raise ValueError(
                f"--count {count}: {home} asks {len(every)} of what {SPLITS[split]}; ask for fewer"
            )
    return {split: every[:count] for split, every in asked.items() if every}
