"""The arguments of what `python -m ldm.evaluate` does beside measuring: sweep, scenes, losses and audit.

Imports no torch, so help and errors come at once.
"""

from __future__ import annotations

import argparse
from typing import Any

from ldm.command.arguments import HOW, WHOLE, Parser, Table
from ldm.metrics.arguments import EMA, MEASURE, PICTURES, add_groups, check_numbers, drawing_table, where
from ldm.recipes import options


def make_subparser(word: str, takes: str, description: str, examples: str) -> Parser:
    """A parser of `python -m ldm.evaluate WORD`."""
    return Parser(
        prog=f"python -m ldm.evaluate {word}",
        usage=f"python -m ldm.evaluate {word} {takes}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# Sweep

SWEEP_EXAMPLES = """
examples:
  python -m ldm.evaluate sweep --prompts captions.txt --count 500 --reference photos/ \\
      --samplers ddim,dpmpp_2m,unipc --steps 5,10,20 --guidance 1,3,7
  python -m ldm.evaluate sweep --prompts captions.txt --samplers ddim,dpmpp_2m --steps 5,10,20,50
  python -m ldm.evaluate sweep --prompts captions.txt --samplers ddim,dpmpp_2m --beside diffusers

Draws --count pictures for every sampler, number of steps and guidance, and tabulates and plots their figures
against model calls and seconds. Calls count both halves of guidance. Seconds are those of a
picture's latents, measured on --probes pictures drawn together. The error is how far these latents end from
the solution of 1,000 steps of dpmpp_2m with the same noise and guidance: |x - x*| / |x*|; solvers that add
noise have none. A grid of few steps starts below the noisiest level or ends above the cleanest, which is part
of the error whatever the solver. Without --reference nothing else is measured. --beside diffusers has
stock diffusers draw the same probes from the same weights, texts and noise, and measures its calls, seconds
and error to the very same solution.

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
    "beside": {"choices": ["diffusers"], "help": "measure the probes as this library draws them, too"},
}


def make_sweep_parser() -> Parser:
    """The options of a sweep."""
    what = "Quality against model calls and seconds, for samplers, steps and guidance."
    parser = make_subparser("sweep", "--prompts FILE [options]", what, SWEEP_EXAMPLES)
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
    if args.beside and not args.probes:
        raise ValueError(f"--beside {args.beside} has no effect with --probes 0: ask for 1 or more")
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


# Scenes

SCENES_EXAMPLES = """
examples:
  python -m train.teach_judge --data.source pictograms --data.subjects few --data.size 128 --output judge
  python -m ldm.evaluate scenes --judge judge                      the bundled model
  python -m ldm.evaluate scenes --judge judge --model RUN/model --count 100 --split held_out

Draws what the judge asks for: scenes of which place, colour, subject and count are known, of combinations
that training shows (seen) and of such as it never showed (held_out). The judge then says what it sees.
report.md has the shares that are right, with their intervals of 95 % confidence, those of the judge on drawn
scenes, and those through the model's autoencoder; failures.png shows what is wrong and how.

A second run draws what is missing, and torchrun or accelerate launch share out the pictures.
"""
SCENES: Table = {
    "judge": {"metavar": "FOLDER", "help": "of python -m train.teach_judge"},
    "count": {**WHOLE, "default": 300, "help": "pictures of each split; 300"},
    "split": {"choices": ["held_out", "seen"], "help": "combinations asked for; both if left out"},
    "ema": EMA,
}


def make_scenes_parser() -> Parser:
    """The options of an examination by a judge."""
    parser = make_subparser(
        "scenes", "--judge FOLDER [options]", "Does a model draw what it is asked for?", SCENES_EXAMPLES
    )
    table = {**drawing_table(), "guidance-scale": HOW["guidance-scale"]}
    groups = {"what is asked": SCENES, "how pictures are drawn": table, "where it goes": where("scenes")}
    add_groups(parser, groups)
    return parser


def check_scenes(args: argparse.Namespace) -> None:
    """Raises ValueError for an examination that cannot be."""
    if not args.judge:
        raise ValueError("no --judge: teach one by python -m train.teach_judge, see its --help")
    check_numbers(args)


# Losses

LOSSES_EXAMPLES = """
examples:
  python -m ldm.evaluate losses runs/mine                how the loss fell, by timestep
  python -m ldm.evaluate losses runs/mine runs/other     the newest of several runs, side by side
  python -m ldm.evaluate losses runs/mine measured       with what python -m train.evaluate_losses measured

Reads what a run with --validation-samples has logged in its metrics.jsonl: at each timestep the mean squared
error on pictures held out of training, by the averaged weights, without weights of the loss and always with
the same noise. Of any model on any data, python -m train.evaluate_losses measures the same.
"""


def make_losses_parser() -> Parser:
    """The options of a plot of validation losses."""
    parser = make_subparser(
        "losses", "RUN ... [options]", "Validation loss by timestep, as a plot and a table.", LOSSES_EXAMPLES
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or of train.evaluate_losses")
    output = {"metavar": "FOLDER", "default": "losses", "help": "for report.md and losses.png; losses"}
    lines = {**WHOLE, "default": 6, "help": "of one run, evenly spread over its validations; 6"}
    add_groups(parser, {"options": {"lines": lines, "output": output}})
    return parser


# Audit

AUDIT_EXAMPLES = """
examples:
  python -m ldm.evaluate audit photos/                          near-duplicates in a training set
  python -m ldm.evaluate audit drawn/ --against photos/         what a model has learnt by heart
  python -m ldm.evaluate audit drawn/ --against photos/ --extractor dinov2=dinov2-large/

Two pictures are told as near if their perceptual hashes, mirrored or not, differ in at most --bits of 63, or
if in the extractor's features one is nearer to the other than --ratio times the mean of its 50 nearest
(Carlini et al. 2023). What is near is for the eye to judge: the sheet has the nearest pairs side by side.

python -m train.audit_data does the same for tars, datasets and drawn scenes, and python -m train.audit_model
tells whether a model draws more copies of its training than chance makes.
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
    what = "Near-duplicates in a folder, or between what a model draws and what it was trained on."
    parser = make_subparser("audit", "FOLDER [options]", what, AUDIT_EXAMPLES)
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
