"""The command line: `python -m ldm.evaluate` measures pictures, or a model by the pictures it draws.

torch is imported once the arguments are known to be good, so help and errors come at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.metrics.arguments import (
    check,
    drawing_options,
    make_audit_parser,
    make_parser,
    make_sweep_parser,
    reference_options,
)

if TYPE_CHECKING:
    from ldm.metrics.collection import Collection
    from ldm.metrics.extractors import Extractor
    from ldm.metrics.report import Figure

log = logging.getLogger(__name__)


def measure(args: argparse.Namespace) -> Path | None:
    """Draws, measures and writes what is asked for: the path of the report; None on ranks that only draw.

    Raises ValueError for what cannot be.
    """
    check(args)
    from ldm.loading import find_device
    from ldm.metrics import drawing
    from ldm.metrics.collection import check_alike, collect, reference
    from ldm.metrics.extractors import find_extractor
    from ldm.metrics.folders import Folder
    from ldm.metrics.report import compare, contact_sheet, write_report

    device = find_device(args.device)
    asked = args.extractor or ["random-conv"]
    extractors = [find_extractor(each, device, args.resize) for each in asked]
    output = Path(os.path.expanduser(args.output))
    pictures: Any
    if args.reconstruction:
        return reconstruct(args, extractors, output)
    if args.prompts:
        lines = drawing.requests_of(args.prompts, args.count, args.seed)
        folder = drawing.draw(lines, drawing_options(args), output)
        if folder is None:
            return None
        pictures = Folder(folder, names=[f"{line['name']}.png" for line in lines], side=args.size)
    else:
        pictures = Folder(Path(os.path.expanduser(args.pictures)), count=args.count, side=args.size)
    made = drawing.recipes(pictures)
    protocol = {"drawn": drawing.drawn_how(made) if made else "not by this program"}
    protocol["ema"] = "as the model's folder holds it"
    figures: list[Figure] = []
    for extractor in extractors:
        real = reference(args.reference, extractor, **reference_options(args))
        fake = collect(pictures, extractor, keep=args.keep, title=extractor.name)
        check_alike(fake, real, "the reference")
        figures += compare(extractor, fake, real, protocol)
        figures += text_figures(extractor, fake, made, protocol)
    contact_sheet(pictures, output / "sheet.png")
    return write_report(output, figures, protocol, [])


def text_figures(
    extractor: Extractor, fake: Collection, made: Sequence[Any] | None, protocol: dict[str, Any]
) -> list[Figure]:
    """The CLIP score, where the extractor has a text half and the pictures' recipes hold their prompts."""
    if getattr(extractor, "text", None) is None:
        return []
    if made is None:
        log.warning("no CLIP score: these pictures hold no recipe, so their prompts are not known")
        return []
    from ldm.metrics.collection import is_kept
    from ldm.metrics.extractors import label
    from ldm.metrics.report import Figure
    from ldm.metrics.scores import clip_score

    count = len(made)
    prompts = [
        recipe.prompt for place, recipe in enumerate(made) if is_kept(place, count, len(fake.features))
    ]
    import torch

    embed: Callable[[list[str]], Any] = extractor.embed  # type: ignore[attr-defined]
    texts = torch.cat([embed(prompts[start : start + 32]) for start in range(0, len(prompts), 32)])
    score = clip_score(fake.features, texts)
    stamp = {**protocol, "pictures": fake.stamp}
    return [Figure(label("CLIP score", extractor), score.mean, score.std, stamp)]


def reconstruct(args: argparse.Namespace, extractors: Sequence[Extractor], output: Path) -> Path:
    """Measures what the model's autoencoder makes of the reference; the path of the report."""
    from ldm.arguments import DTYPES
    from ldm.loading import find_device, load
    from ldm.metrics.collection import check_alike, collect, reference
    from ldm.metrics.folders import Folder
    from ldm.metrics.reconstructions import Reconstructions
    from ldm.metrics.report import Figure, compare, page, write_report
    from ldm.picture import save_picture

    given = Path(os.path.expanduser(args.reference))
    folder = Folder(given, count=args.reference_count or args.count, side=args.size)
    pipe, facts = load(vars(args), find_device(args.device), DTYPES.get(args.dtype), fetch=True)
    pictures = Reconstructions(pipe.vae, folder)
    protocol: dict[str, Any] = {"reconstruction": facts}
    figures: list[Figure] = []
    for extractor in extractors:
        real = reference(args.reference, extractor, **reference_options(args))
        fake = collect(pictures, extractor, keep=args.keep, title=f"through it, {extractor.name}")
        check_alike(fake, real, "the reference")
        figures += compare(extractor, fake, real, protocol, "r")
        told = {**protocol, "pictures": fake.stamp}
    figures += [Figure("PSNR", pictures.psnr, None, told), Figure("SSIM", pictures.ssim, None, told)]
    shown = [pictures.pair(place) for place in range(min(8, len(folder)))]
    rows = [above for above, _ in shown] + [below for _, below in shown]
    save_picture(page(rows, len(shown)), output / "sheet.png", overwrite=True)
    note = "The sheet: pictures above, what comes back of them below."
    return write_report(output, figures, protocol, [note])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, or 1 where the machine fails, 2 where the request does, 130 on Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        path: Path | None
        if words[:1] == ["sweep"]:
            from ldm.metrics.sweep import sweep

            path = sweep(make_sweep_parser().parse_args(words[1:]))
        elif words[:1] == ["audit"]:
            from ldm.metrics.audit import audit

            path = audit(make_audit_parser().parse_args(words[1:]))
        else:
            path = measure(make_parser().parse_args(words))
        if path is not None:
            print(path)
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted; run it again to go on", 130
    except ValueError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # such as a full disk
        message, status = f"error: {error.filename or ''}: {error.strerror or error}", 1
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
