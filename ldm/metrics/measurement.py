"""What `python -m ldm.evaluate` does: pictures, or what an autoencoder makes of them, against a reference."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autoencoder.similarity import decibels
from ldm.command.arguments import DTYPES
from ldm.command.gallery import Rank
from ldm.command.loading import find_device, load
from ldm.metrics.arguments import drawing_options, reference_options
from ldm.metrics.blocks import Pictures, share_out
from ldm.metrics.collection import Collection, check_alike, collect, is_kept, reference, reference_pictures
from ldm.metrics.drawing import averaged, draw, drawn_how, recipes, requests_of, wait_for
from ldm.metrics.extractors import Clip, Extractor, find_extractor, label
from ldm.metrics.folders import Folder
from ldm.metrics.reconstructions import Reconstructions
from ldm.metrics.report import Figure, compare, contact_sheet, page, table, write_report
from ldm.metrics.scores import clip_score
from ldm.recipes.picture import check_output, save_picture
from ldm.recipes.recipe import Recipe

log = logging.getLogger(__name__)

TEXTS = 32  # that CLIP reads at once
SHOWN = 8  # pictures on the sheet of reconstructions
FEATURES = "features"  # folder in the output: see blocks.py


def find_extractors(args: argparse.Namespace) -> list[Extractor]:
    """Those that were asked for, on the device. Raises ValueError for one that cannot be."""
    device = find_device(args.device)
    return [find_extractor(each, device, args.resize) for each in args.extractor or ["random-conv"]]


def output_folder(args: argparse.Namespace) -> Path:
    """Where the results go. Raises ValueError unless it can be written."""
    output = Path(os.path.expanduser(args.output))
    check_output(output / "sheet.png", overwrite=True)
    return output


def help_out(args: argparse.Namespace, extractors: Sequence[Extractor], sets: Sequence[Pictures]) -> None:
    """Computes this rank's share of the features of the reference and of the sets."""
    options = reference_options(args)
    real = reference_pictures(args.reference, count=options["count"], side=options["side"])
    for extractor in extractors:
        for pictures in (*([] if real is None else [real]), *sets):
            share_out(pictures, extractor, output_folder(args) / FEATURES)


def measure(args: argparse.Namespace) -> Path | None:
    """Draws, measures and writes: the path of the report; None on ranks that only help.

    Raises ValueError for what cannot be.
    """
    output, extractors = output_folder(args), find_extractors(args)
    if args.prompts:
        lines = requests_of(args.prompts, args.count, args.seed)
        names = [f"{line['name']}.png" for line in lines]
        folder = draw(lines, drawing_options(args), output)
        wait_for([folder / name for name in names])
        pictures = Folder(folder, names=names, side=args.size)
    else:
        pictures = Folder(Path(os.path.expanduser(args.pictures)), count=args.count, side=args.size)
    if Rank.of_environment().number:
        help_out(args, extractors, [pictures])
        return None
    made, kept = recipes(pictures), output / FEATURES
    ema = args.ema or (averaged(args.model) if args.prompts else "not told")
    protocol = {"drawn": drawn_how(made) if made else "not by this program", "ema": ema}
    figures = []
    for extractor in extractors:
        real = reference(args.reference, extractor, **reference_options(args), kept=kept)
        fake = collect(pictures, extractor, keep=args.keep, title=extractor.name, kept=kept)
        check_alike(fake, real, "the reference")
        figures += [
            *compare(extractor, fake, real, protocol),
            *against_texts(extractor, fake, made, protocol),
        ]
    contact_sheet(pictures, output / "sheet.png")
    return write_report(output, figures, protocol, [table(figures)])


def against_texts(
    extractor: Extractor, fake: Collection, made: Sequence[Recipe] | None, protocol: Mapping[str, Any]
) -> Iterator[Figure]:
    """The CLIP score, where the extractor has a text half and the pictures' recipes hold their prompts."""
    if not isinstance(extractor, Clip) or extractor.text is None:
        return
    if made is None:
        log.warning("no CLIP score: these pictures hold no recipe, so their prompts are not known")
        return
    keep = len(fake.features)
    prompts = [each.prompt for place, each in enumerate(made) if is_kept(place, len(made), keep)]
    rows = [extractor.embed(prompts[start : start + TEXTS]) for start in range(0, keep, TEXTS)]
    score = clip_score(fake.features, torch.cat(rows))
    stamp = {**protocol, "pictures": fake.stamp}
    yield Figure(label("CLIP score", extractor), score.mean, score.std, stamp)


def measure_reconstruction(args: argparse.Namespace) -> Path | None:
    """Measures what the model's autoencoder makes of the reference; the path of the report, or None as above.

    Raises ValueError for what cannot be.
    """
    output, extractors = output_folder(args), find_extractors(args)
    given = Path(os.path.expanduser(args.reference))
    folder = Folder(given, count=args.reference_count, side=args.size)
    pipe, facts = load(vars(args), find_device(args.device), DTYPES.get(args.dtype), fetch=True)
    pictures = Reconstructions(pipe.vae, folder, f"{facts['model_hash']} {facts['dtype']}")
    if Rank.of_environment().number:
        help_out(args, extractors, [pictures])
        return None
    kept = output / FEATURES
    protocol = {"autoencoder": facts, "ema": args.ema or averaged(args.model)}
    figures: list[Figure] = []
    for extractor in extractors:
        real = reference(args.reference, extractor, **reference_options(args), kept=kept)
        title = f"through it, {extractor.name}"
        fake = collect(pictures, extractor, keep=args.keep, title=title, kept=kept)
        figures += compare(extractor, fake, real, protocol, "r")
    told = {**protocol, "pictures": real.stamp}
    assert fake.near is not None
    error, alike = fake.near.tolist()  # over all pictures
    figures += [Figure("PSNR", decibels(error), None, told), Figure("SSIM", alike, None, told)]
    shown = [pictures.pair(place) for place in range(min(SHOWN, len(folder)))]
    rows = [above for above, _ in shown] + [below for _, below in shown]
    save_picture(page(rows, len(shown)), output / "sheet.png", overwrite=True)
    note = "The sheet: pictures above, what comes back of them below."
    return write_report(output, figures, protocol, [table(figures), "", note])
