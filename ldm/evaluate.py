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

from ldm import options
from ldm.arguments import HOW, PIXELS, SWITCH, WHAT, WHERE, WHOLE, Parser, Table

if TYPE_CHECKING:
    from ldm.metrics.collection import Collection
    from ldm.metrics.extractors import Extractor
    from ldm.metrics.report import Figure

log = logging.getLogger(__name__)

EXAMPLES = """
examples:
  python -m ldm.evaluate --prompts captions.txt --count 1000 --reference photos/
  python -m ldm.evaluate --model FOLDER --prompts captions.txt --count 50000 --reference photos/ --size 256 \\
      --extractor inception=pt_inception-2015-12-05-6726825d.pth --extractor dinov2=dinov2-large/ \\
      --extractor clip=clip-vit-large-patch14-336/ --save-reference photos
  python -m ldm.evaluate --pictures drawn/ --reference photos/        two folders
  python -m ldm.evaluate --model FOLDER --reconstruction --reference photos/     its autoencoder

Extractors: random-conv needs no weights; it sees colours and textures alone. inception, dinov2 and clip take
a file or a folder, which is never fetched: inception a .pth or .safetensors with the names of the FID's
PyTorch port, the others folders of transformers. NAME=PATH@SHA256 refuses other weights. A figure is called
FID if its weights are the FID's very file; else its name says by what it was made, and it compares with
figures of that name alone.

A second run draws what is missing, and torchrun or accelerate launch share out the pictures. In --output are
the pictures, report.md, figures.json with the whole protocol of every figure, and sheet.png.

The path of the report is printed on standard output, everything else on standard error.
Exit status: 0 done, 1 the machine failed, 2 the request cannot be met, 130 interrupted.
"""
PICTURES: Table = {
    "prompts": {"metavar": "FILE", "help": "draw each line of a .txt of prompts or .jsonl of objects"},
    "count": {
        **WHOLE,
        "help": "pictures to draw, or to take of --pictures, evenly spread; lines come again, with other "
        "seeds; all if left out",
    },
    "pictures": {"metavar": "FOLDER", "help": "measure these, which are there already"},
    "reconstruction": {
        **SWITCH,
        "help": "measure what the model's autoencoder makes of the reference: rFD, PSNR, SSIM",
    },
}
MEASURE: Table = {
    "reference": {
        "metavar": "PATH",
        "help": "a folder of real pictures, or what --save-reference wrote; with several extractors its name",
    },
    "reference-count": {**WHOLE, "help": "take so many of them, evenly spread; all if left out"},
    "save-reference": {
        "metavar": "NAME",
        "help": "keep the features of the reference as NAME-EXTRACTOR.safetensors, for --reference NAME",
    },
    "extractor": {
        "metavar": "NAME[=PATH]",
        "action": "append",
        "help": "random-conv, inception=FILE, dinov2=FOLDER, clip=FOLDER; may be given several times",
    },
    "resize": {
        "choices": ["bicubic", "tf-bilinear"],
        "help": "how pictures are scaled for the extractor: bicubic, antialiased, as clean-fid has it, or as "
        "ADM's evaluator and torch-fidelity do; bicubic if left out",
    },
    "size": {**PIXELS, "help": "first crop all to the square in their middle and scale it to this"},
    "keep": {
        **WHOLE,
        "help": "pictures, evenly spread, whose features are kept for all but the Fréchet distances; 10000",
    },
}


def make_parser() -> Parser:
    """The options of a measurement."""
    parser = Parser(
        prog="python -m ldm.evaluate",
        usage="python -m ldm.evaluate [sweep | audit] [options]",
        description="Measures pictures against real ones. sweep and audit have a --help of their own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_groups(
        parser,
        {
            "which pictures": PICTURES,
            "how they are drawn": {**drawing_table(), "guidance-scale": HOW["guidance-scale"]},
            "how they are measured": MEASURE,
            "where it goes": where("evaluation"),
        },
    )
    return parser


def drawing_table() -> Table:
    """What `python -m ldm.generate` takes of how to draw, less what every picture has of its own."""
    names = ["model", "variant", "sampler", "steps", "guidance-rescale", "clip-skip"]
    names += ["dtype", "batch-size", "optimize", "device"]
    table = {name: HOW[name] for name in names} | {name: WHAT[name] for name in ("width", "height")}
    table["negative-prompt"] = WHAT["negative-prompt"]
    return table | {"seed": {**WHOLE, "default": 0, "help": "of the first line; the next has the next; 0"}}


def where(usual: str) -> Table:
    """Options of the output."""
    return {
        "output": {"metavar": "FOLDER", "default": usual, "help": f"where all of it goes; {usual}"},
        "overwrite": {**SWITCH, "help": "draw anew what another recipe drew"},
        "progress": WHERE["progress"],
    }


def add_groups(parser: argparse.ArgumentParser, groups: dict[str, Table]) -> None:
    """Adds options under titles."""
    for title, table in groups.items():
        group = parser.add_argument_group(title)
        for name, settings in table.items():
            group.add_argument(f"--{name}", **settings)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be, before torch is loaded."""
    chosen = [name for name in ("prompts", "pictures", "reconstruction") if getattr(args, name)]
    if len(chosen) != 1:
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in chosen) or 'nothing to measure'}: give one of --prompts "
            "FILE, to draw; --pictures FOLDER, to take what is there; --reconstruction, for the autoencoder"
        )
    if not args.reference:
        raise ValueError("no --reference: give a folder of real pictures to measure against")
    if args.prompts == "-":
        raise ValueError("--prompts -: give a file, which a second run can read again")
    for name, least in (("count", 2), ("reference_count", 2), ("keep", 2), ("size", 8)):
        value = getattr(args, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a whole number from {least}")
    options.check_seed(args.seed)
    for kind in args.extractor or []:
        if kind.partition("=")[0] not in ("random-conv", "inception", "dinov2", "clip"):
            raise ValueError(
                f"extractor={kind!r} is unknown: expected random-conv, inception=, dinov2= or clip="
            )


def reference_of(args: argparse.Namespace, extractor: Extractor) -> Collection:
    """The reference in this extractor's features: read where it was kept, else measured.

    Raises ValueError if there is neither a folder nor a file, or if the file was made another way.
    """
    from ldm.metrics.collection import KEPT, collect, load, save, seen_by
    from ldm.metrics.folders import Folder

    given = Path(os.path.expanduser(args.reference))
    kept = given if given.suffix == ".safetensors" else Path(f"{given}-{extractor.name}.safetensors")
    if not given.is_dir():
        if not kept.is_file():
            raise ValueError(
                f"--reference {given}: neither a folder of pictures nor a file of --save-reference"
            )
        reference = load(kept)
        for name, value in seen_by(extractor).items():
            if reference.stamp[name] != value:
                raise ValueError(
                    f"{kept} was made with {name}={reference.stamp[name]!r}, and asked for is {value!r}: "
                    "make it anew from the pictures"
                )
        return reference
    pictures = Folder(given, count=args.reference_count, side=args.size)
    title = f"reference, {extractor.name}"
    reference = collect(pictures, extractor, keep=args.keep or KEPT, title=title)
    if args.save_reference:
        path = Path(f"{os.path.expanduser(args.save_reference)}-{extractor.name}.safetensors")
        save(reference, path)
        log.info("kept %s", path)
    return reference


def measure(args: argparse.Namespace) -> Path | None:
    """Draws, measures and writes what is asked for: the path of the report; None on ranks that only draw.

    Raises ValueError for what cannot be.
    """
    check(args)
    from ldm.loading import find_device
    from ldm.metrics import drawing
    from ldm.metrics.collection import KEPT, check_alike, collect
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
        pictures = drawing.draw(
            args.prompts, args.count, drawing_options(args), output, seed=args.seed, side=args.size
        )
        if pictures is None:
            return None
    else:
        pictures = Folder(Path(os.path.expanduser(args.pictures)), count=args.count, side=args.size)
    made = drawing.recipes(pictures)
    protocol = {"drawn": drawing.drawn_how(made) if made else "not by this program"}
    protocol["ema"] = "as the model's folder holds it"
    figures: list[Figure] = []
    for extractor in extractors:
        real = reference_of(args, extractor)
        fake = collect(pictures, extractor, keep=args.keep or KEPT, title=extractor.name)
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
    from ldm.metrics.collection import KEPT, check_alike, collect
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
        real = reference_of(args, extractor)
        fake = collect(pictures, extractor, keep=args.keep or KEPT, title=f"through it, {extractor.name}")
        check_alike(fake, real, "the reference")
        figures += compare(extractor, fake, real, protocol, "r")
        told = {**protocol, "pictures": fake.stamp}
    figures += [Figure("PSNR", pictures.psnr, None, told), Figure("SSIM", pictures.ssim, None, told)]
    shown = [pictures.pair(place) for place in range(min(8, len(folder)))]
    rows = [above for above, _ in shown] + [below for _, below in shown]
    save_picture(page(rows, len(shown)), output / "sheet.png", overwrite=True)
    note = "The sheet: pictures above, what comes back of them below."
    return write_report(output, figures, protocol, [note])


def drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the drawing takes, by the names of `python -m ldm.generate`'s arguments."""
    names = (*drawing_table(), "guidance-scale", "overwrite", "progress")
    keys = [name.replace("-", "_") for name in names if name != "seed"]
    return {key: getattr(args, key) for key in keys}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, or 1 where the machine fails, 2 where the request does, 130 on Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
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
