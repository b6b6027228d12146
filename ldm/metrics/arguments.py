"""The arguments of `python -m ldm.evaluate`, of its sweep and of its audit.

Imports no torch, so help and errors come at once.
"""

from __future__ import annotations

import argparse
from typing import Any

from ldm import options
from ldm.arguments import HOW, PIXELS, SWITCH, WHAT, WHERE, WHOLE, Parser, Table

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
    "ema": {
        "metavar": "TEXT",
        "default": "not told",
        "help": "which average of the weights this is, for the protocol: a model's folder does not say",
    },
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
    least = {"count": 2, "reference_count": 2, "keep": 2, "size": 8, "probes": 0, "pairs": 1}
    for name in least.keys() & vars(args).keys():
        value = getattr(args, name)
        if value is not None and (not isinstance(value, int) or value < least[name]):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value}: expected a whole number from {least[name]}")
    options.check_seed(getattr(args, "seed", 0))
    asked = args.extractor if isinstance(args.extractor, list) else [args.extractor or "random-conv"]
    for kind in asked:
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


# Sweep

SWEEP_EXAMPLES = """
examples:
  python -m ldm.evaluate sweep --prompts captions.txt --count 500 --reference photos/ \\
      --samplers ddim,dpmpp_2m,unipc --steps 5,10,20 --guidance 1,3,7
  python -m ldm.evaluate sweep --prompts captions.txt --samplers ddim,dpmpp_2m --steps 5,10,20,50

Draws --count pictures for every sampler, number of steps and guidance, and tabulates and plots their figures
against model calls and seconds. Calls count both halves of guidance. Seconds are those of a
picture's latents, measured on --probes pictures drawn together. The error is how far these latents end from
the solution of 1,000 steps of dpmpp_2m with the same noise and guidance: |x - x*| / |x*|; solvers that add
noise have none. A grid of few steps starts below the noisiest level or ends above the cleanest, which is part
of the error whatever the solver. Without --reference nothing else is measured.

A second run draws what is missing; the solutions of 1,000 steps are kept too.
"""
SWEEP: Table = {
    "prompts": PICTURES["prompts"],
    "count": {**WHOLE, "help": "pictures for each setting; lines come again, with other seeds"},
    "samplers": {"metavar": "A,B", "help": "solvers; the model's own if left out"},
    "steps": {"metavar": "N,M", "default": "5,10,20", "help": "numbers of steps; 5,10,20"},
    "guidance": {"metavar": "X,Y", "help": "scales of guidance; the model's own if left out"},
    "probes": {
        **WHOLE,
        "default": 4,
        "help": "pictures of which seconds and errors are measured; 4, and 0 for none",
    },
}


def make_sweep_parser() -> Parser:
    """The options of a sweep."""
    parser = Parser(
        prog="python -m ldm.evaluate sweep",
        usage="python -m ldm.evaluate sweep --prompts FILE [options]",
        description="Quality against model calls and seconds, for samplers, steps and guidance.",
        epilog=SWEEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    table = {name: each for name, each in drawing_table().items() if name not in ("sampler", "steps")}
    groups = {"what is swept": SWEEP, "how pictures are drawn": table}
    add_groups(parser, {**groups, "how they are measured": MEASURE, "where it goes": where("sweep")})
    return parser


def settings_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every sampler with every number of steps and every guidance, by Recipe's names.

    Raises ValueError for one that cannot be.
    """
    if not args.prompts or args.prompts == "-":
        raise ValueError("no --prompts: give a file with a prompt a line, which a second run can read again")
    check_numbers(args)
    if not args.reference and args.count is not None:
        raise ValueError("--count has no effect without --reference: leave it out; --probes sets how many")
    settings: list[dict[str, Any]] = [{}]
    kinds = {
        "sampler": (args.samplers, str),
        "steps": (args.steps, int),
        "guidance_scale": (args.guidance, float),
    }
    for name, (text, kind) in kinds.items():
        if text is None:
            continue
        try:
            values = [kind(each.strip()) for each in text.split(",")]
        except ValueError:
            raise ValueError(f"{name}: {text!r} is no list such as 5,10,20") from None
        settings = [{**setting, name: value} for setting in settings for value in dict.fromkeys(values)]
    for setting in settings:
        options.check_request(setting)
    return settings


# Audit

AUDIT_EXAMPLES = """
examples:
  python -m ldm.evaluate audit photos/                          near-duplicates in a training set
  python -m ldm.evaluate audit drawn/ --against photos/         what a model has learnt by heart
  python -m ldm.evaluate audit drawn/ --against photos/ --extractor dinov2=dinov2-large/

Two pictures are told as near if their perceptual hashes, mirrored or not, differ in at most --bits of 63, or
if in the extractor's features one is nearer to the other than --ratio times the mean of its 50 nearest
(Carlini et al. 2023). What is near is for the eye to judge: the sheet has the nearest pairs side by side.
"""
AUDIT: Table = {
    "against": {"metavar": "FOLDER", "help": "look for them there; in the folder itself if left out"},
    "extractor": {"metavar": "NAME[=PATH]", "help": MEASURE["extractor"]["help"].partition(";")[0]},
    "bits": {**WHOLE, "default": 6, "help": "of 63, in which near pictures may differ; 6"},
    "ratio": {
        "type": float,
        "metavar": "X",
        "help": "0 to 1; 0.5, and 0.1 for random-conv, to which all of one colour looks alike",
    },
    "pairs": {**WHOLE, "default": 32, "help": "on the sheet, the nearest; 32"},
    "device": HOW["device"],
    "output": {
        "metavar": "FOLDER",
        "default": "audit",
        "help": "for report.md, pairs.json, sheet.png; audit",
    },
}


def make_audit_parser() -> Parser:
    """The options of an audit."""
    parser = Parser(
        prog="python -m ldm.evaluate audit",
        usage="python -m ldm.evaluate audit FOLDER [options]",
        description="Near-duplicates in a folder, or between what a model draws and what it was trained on.",
        epilog=AUDIT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the pictures")
    add_groups(parser, {"options": AUDIT})
    return parser


def check_audit(args: argparse.Namespace) -> None:
    """Raises ValueError for an audit that cannot be."""
    check_numbers(args)
    if not isinstance(args.bits, int) or not 0 <= args.bits <= 63:
        raise ValueError(f"--bits {args.bits}: expected a whole number from 0 to 63")
    if args.ratio is not None and not 0 <= args.ratio <= 1:
        raise ValueError(f"--ratio {args.ratio}: expected 0 to 1")
