"""The arguments of `python -m ldm.evaluate`; of what it does beside, in subcommands.py.

Imports no torch, so help and errors come at once.
"""

from __future__ import annotations

import argparse
from typing import Any

from ldm.command.arguments import HOW, PIXELS, SWITCH, WHAT, WHERE, WHOLE, Parser, Table
from ldm.recipes import options

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

A second run draws and computes what is missing; torchrun or accelerate launch share out the pictures and the
features. In --output are the pictures, features, report.md, sheet.png, and figures.json with the whole
protocol of every figure.

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
EMA = {
    "metavar": "TEXT",
    "help": "which average of the weights this is, for the protocol; if left out, what training noted of it",
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
    "ema": EMA,
    "keep": {
        **WHOLE,
        "default": 10_000,
        "help": "pictures, evenly spread, whose features are kept for all but the Fréchet distances; 10000",
    },
}


def make_parser() -> Parser:
    """The options of a measurement."""
    parser = Parser(
        prog="python -m ldm.evaluate",
        usage="python -m ldm.evaluate [sweep | scenes | losses | audit] [options]",
        description="Measures pictures against real ones. The words have a --help of their own each.",
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
    table["sampler"] = {"metavar": "NAME", "help": "the solver: see python -m ldm.generate --list-samplers"}
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


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers and extractors that cannot be."""
    least = {"count": 2, "reference_count": 2, "keep": 2, "size": 8, "probes": 0, "pairs": 1, "lines": 1}
    for name in least.keys() & vars(args).keys():
        value = getattr(args, name)
        if value is not None and (not isinstance(value, int) or value < least[name]):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value}: expected a whole number from {least[name]}")
    options.check_seed(getattr(args, "seed", 0))
    asked = getattr(args, "extractor", None) or "random-conv"
    for kind in asked if isinstance(asked, list) else [asked]:
        if kind.partition("=")[0] not in ("random-conv", "inception", "dinov2", "clip"):
            raise ValueError(
                f"extractor={kind!r} is unknown: expected random-conv, inception=, dinov2= or clip="
            )


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a measurement that cannot be, before torch is loaded."""
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
    if not args.prompts:
        drawn = ["sampler", "steps", "guidance_scale", "guidance_rescale", "clip_skip", "width", "height"]
        drawn += (
            ["negative_prompt", "batch_size", "count"] if args.reconstruction else ["batch_size", "model"]
        )
        for name in drawn:
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                instead = "; use --reference-count" if name == "count" else ""
                raise ValueError(f"--{option} has no effect without --prompts: leave it out{instead}")
    check_numbers(args)


def drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the drawing takes, by the names of `python -m ldm.generate`'s arguments."""
    names = (*drawing_table(), "guidance-scale", "overwrite", "progress")
    keys = [name.replace("-", "_") for name in names if name != "seed"]
    return {key: value for key, value in vars(args).items() if key in keys}


def reference_options(args: argparse.Namespace) -> dict[str, Any]:
    """What collection.reference takes beside the reference and the extractor."""
    return {
        "count": args.reference_count,
        "side": args.size,
        "keep": args.keep,
        "kept_as": args.save_reference,
    }
