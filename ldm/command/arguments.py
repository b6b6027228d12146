"""The arguments of `python -m ldm.generate`: what they are, and what they and a picture's recipe come to.

Imports no torch, so help and errors come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm.recipes import options
from ldm.recipes.noted import find_noted
from ldm.recipes.recipe import Recipe

if TYPE_CHECKING:
    from ldm.recipes.starts import Start

log = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
EXAMPLES = """
examples:
  python -m ldm.generate "a red fox in snow"
  python -m ldm.generate "a red fox in snow" --num-images 4 --seed 7 --output fox.png
  python -m ldm.generate "a red fox in snow" --model FOLDER --steps 30 --sampler dpmpp_2m
  python -m ldm.generate "a red fox in snow" --upscale  then enlarged by the bundled upscaler
  python -m ldm.generate --from fox.png                 the same picture again, bit for bit
  python -m ldm.generate --from fox.png --seed 8        the same recipe with another seed
  python -m ldm.generate --from fox.png --num-images 4 --variation-strength 0.2
  python -m ldm.generate "a blue fox" --image fox.png --mask mask.png
  python -m ldm.generate "a red fox in snow" --image fox.png --extend 0 0 32 0
  python -m ldm.generate --prompts lines.jsonl --output many/

A line of a .jsonl is such as {"prompt": "a fox", "name": "fox", "seed": 7, "steps": 30, "width": 512}; its
keys are name, seed, and the options of what to draw and how that differ from picture to picture. Others hold
for all lines. A second run draws what is missing, and torchrun or accelerate launch share out the lines.

The path of the picture, or of the folder, is printed on standard output, everything else on standard error.
Exit status: 0 done, 1 the machine failed, 2 the request cannot be met (nothing was written), 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest option."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -"):
            wrong = message.split()[2]
            near = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
            message = f"unknown option {wrong}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Text to a number where it is one; what is not is left for the checks, which know what is expected."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return convert


def path_and_weight(text: str) -> tuple[str, float]:
    """PATH or PATH:WEIGHT; what follows a colon and is no number is of the path."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


WHOLE, REAL = {"type": _number(int), "metavar": "N"}, {"type": _number(float), "metavar": "X"}
PIXELS = {"type": _number(int), "metavar": "PIXELS"}
SWITCH = {"action": "store_true"}
Table = dict[str, dict[str, Any]]

WHAT: Table = {
    "from": {
        "dest": "source",
        "metavar": "PNG",
        "help": "prompt and options of a picture; those given here win",
    },
    "prompts": {
        "metavar": "FILE",
        "help": "draw each line of a .txt of prompts or .jsonl of objects into --output FOLDER; - is stdin",
    },
    "expand": {
        "metavar": "COMMAND",
        "help": "a program that reads the prompt on standard input and prints a longer one, which is drawn",
    },
    "class-label": {
        "metavar": "CLASS",
        "help": "name or number of a class: of the model, if it has classes, and of --classifier",
    },
    "negative-prompt": {"metavar": "TEXT", "help": "what the picture should not look like"},
    "width": {**PIXELS, "help": "a multiple of 8, at most 4096; the size the model was trained on is best"},
    "height": {**PIXELS, "help": "likewise"},
    "num-images": {**WHOLE, "help": "draw N, with seeds that follow each other, and a grid of them"},
    "seed": {
        **WHOLE,
        "help": "0 to 2**63 - 1; the same seed gives the same picture; drawn if left out. With --prompts "
        "line i has seed + i - 1, from 0 if left out",
    },
}
START: Table = {
    "image": {"metavar": "FILE", "help": "start from this picture, of its size unless --width or --height"},
    "mask": {"metavar": "FILE", "help": "repaint --image where this is white, and keep it where it is black"},
    "extend": {
        "nargs": 4,
        "type": _number(int),
        "metavar": ("LEFT", "TOP", "RIGHT", "BOTTOM"),
        "help": "paint on beyond the sides of --image, so many pixels at each",
    },
    "strength": {
        **REAL,
        "help": "above 0 to 1: how much of the run is done; else 0.8, and 1 with --mask or --extend",
    },
    "two-pass": {
        "type": _number(float),
        "metavar": "STRENGTH",
        "help": "draw at the model's own size first, enlarge that and redraw it by this; 0.3 to 0.6 is usual",
    },
    "variation-strength": {
        **REAL,
        "help": "0 to 1: how far to go from --seed to another; all of --num-images are like that of the seed",
    },
    "variation-seed": {**WHOLE, "help": "of the first variation; drawn if left out"},
}
HOW: Table = {
    "model": {
        "metavar": "MODEL",
        "help": "a Stable Diffusion 1 or 2 folder, .safetensors or hub id; else the bundled small model",
    },
    "lora": {
        "action": "append",
        "dest": "loras",
        "type": path_and_weight,
        "metavar": "PATH[:WEIGHT]",
        "help": "an adapter (.safetensors: LoRA, LoCon, LoHa, LoKr, DoRA), by 1 if no weight is given; "
        "several times for several",
    },
    "embedding": {
        "action": "append",
        "dest": "embeddings",
        "metavar": "PATH",
        "help": "a word learned by textual inversion (.safetensors), to be written in the prompt",
    },
    "variant": {"metavar": "NAME", "help": "weight files of that name, such as fp16"},
    "steps": {**WHOLE, "help": "1 to 1000: more is slower and, up to about 50, better"},
    "guidance-scale": {**REAL, "help": "1 to 100: how closely to follow the prompt; 1 is no guidance"},
    "guidance-rescale": {**REAL, "help": "0 to 1: tames the contrast of strong guidance; 0.7 is usual"},
    "guidance-interval": {
        "nargs": 2,
        "type": _number(float),
        "metavar": ("LOW", "HIGH"),
        "help": "guide between these log(alpha / sigma) alone, of about -3 (noise) to 3; all if left out",
    },
    "guidance": {
        "metavar": "NAME",
        "help": "cfg, or apg: adaptive projected, which does not oversaturate where the scale is large",
    },
    "threshold": {
        **REAL,
        "help": "bring latents back to so many deviations (dynamic thresholding): 3 is usual",
    },
    "worse": {
        "metavar": "FOLDER",
        "help": "guide away from this smaller or less trained UNet (autoguidance): of a pipeline or a run",
    },
    "classifier": {
        "metavar": "FOLDER",
        "help": "of train/train_classifier.py: leads the picture to --class-label",
    },
    "classifier-scale": {**REAL, "help": "0 to 100: how far; 1 if left out, which is Bayes' rule"},
    "classifier-form": {
        "metavar": "NAME",
        "help": "score (if left out), for every sampler, or mean, for those that add noise",
    },
    "sampler": {
        "metavar": "NAME",
        "help": "the solver, as ddim, euler_a, dpmpp_2m, or lcm of distilled models: see --list-samplers",
    },
    "clip-skip": {**WHOLE, "help": "leave out the last N layers of the text encoder"},
    "prompt-weighting": {
        "metavar": "NAME",
        "help": "a1111 or comfy: read (word:1.3), [word] and BREAK in prompts; literal if left out",
    },
    "chunks": {
        **WHOLE,
        "help": "read prompts up to N times as long as the text encoder; as it was trained if left out",
    },
    "upscale": {
        "nargs": "?",
        "const": "bundled",
        "dest": "upscaler",
        "metavar": "FOLDER",
        "help": "then enlarge the picture by this upscaler: a folder or hub id; the bundled one if left out",
    },
    "upscale-noise": {
        **WHOLE,
        "help": "noise on the picture to enlarge, 0 to what the upscaler knows: more repairs more, and "
        f"invents more; {options.NOISE_LEVEL} if left out",
    },
    "strict": {
        **SWITCH,
        "help": "refuse what would have no effect, such as the end of a prompt that is too long",
    },
    "dtype": {
        "choices": ["auto", *DTYPES],
        "help": "precision; auto is bf16 where the hardware has it, else fp32",
    },
    "batch-size": {
        **WHOLE,
        "help": "pictures drawn together with --prompts; what suits the device if left out",
    },
    "optimize": {
        "action": argparse.BooleanOptionalAction,
        "help": "first compile what is then faster; on a CPU large models are, where there is g++",
    },
    "quantize": {
        "metavar": "NAME",
        "help": "int8, or on GPUs fp8: optimize with 8 bits; faster still, the picture differs a little",
    },
    "device": {"metavar": "NAME", "help": "cpu, cuda, cuda:1 or mps; the fastest if left out"},
}
WHERE: Table = {
    "output": {
        "metavar": "PATH",
        "help": "a .png, or a folder; else here, named by the prompt and a counter",
    },
    "overwrite": {
        **SWITCH,
        "help": "write over a picture that is there; with --prompts over those made by another recipe",
    },
    "show-steps": {**SWITCH, "help": "also write NAME-steps.png: how the picture came out of the noise"},
    "show-attention": {
        **SWITCH,
        "help": "also write NAME-attention.png: where the picture looked at each word",
    },
    "no-metadata": {**SWITCH, "help": "do not write the recipe into the picture"},
    "progress": {"choices": ["bar", "json", "none"], "help": "on standard error; else a bar on a terminal"},
}

# Options of --from's picture that one given now excludes.
INSTEAD = {
    "image": ("two_pass", "first_size"),
    "mask": ("extend",),
    "extend": ("mask",),
    "two_pass": ("image", "mask", "extend", "strength"),
}


def make_parser() -> Parser:
    """The options. None stands for what the picture of --from has, and then for the model's own default."""
    parser = Parser(
        prog="python -m ldm.generate",
        usage="python -m ldm.generate PROMPT [options]",
        description="Draws the picture that a prompt describes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help='what to draw, such as "a red fox in snow"')
    parser.add_argument(
        "--list-samplers", action="store_true", help="print the names of the samplers and end"
    )
    for title, table in (
        ("what to draw", WHAT),
        ("what to start from", START),
        ("how to draw it", HOW),
        ("where it goes", WHERE),
    ):
        group = parser.add_argument_group(title)
        for name, settings in table.items():
            group.add_argument(f"--{name}", **settings)
    return parser


def forget(settled: dict[str, Any], args: argparse.Namespace) -> None:
    """Drops what a picture was made with, where what is asked for anew takes its place or decides it."""
    if args.image is not None or args.extend is not None or (args.mask is not None and settled.get("extend")):
        for name in ("width", "height"):
            settled.pop(name, None)
    if any(value is not None for value in (args.width, args.height, args.model)):
        settled.pop("first_size", None)
    for name, others in INSTEAD.items():
        for other in others if getattr(args, name) is not None else ():
            settled.pop(other, None)


def settle_files(settled: dict[str, Any], args: argparse.Namespace) -> Start:
    """The pictures of the files that args or the recipe name, whose options are noted and settled.

    Raises ValueError for those that cannot be read, and for options that do not go together.
    """
    from ldm.recipes.starts import noted, settle_start, start_of

    if args.variation_seed is None and not settled.get("variation_strength"):
        settled.pop("variation_seed", None)  # of a picture whose variation is switched off
    options.check_together(settled)
    if settled.get("two_pass") and args.show_attention:
        raise ValueError("--show-attention shows one pass: leave it out, or --two-pass")
    for name in ("image", "mask"):
        if getattr(args, name) is not None:
            settled[name] = getattr(args, name)
    settled["extend"] = settled.get("extend") and tuple(settled["extend"])
    start = start_of(settled)
    settle_start(settled, start.image)
    for name in ("image", "mask"):
        if getattr(args, name) is not None:
            settled[name] = noted(settled[name])
    return start


def settle(args: argparse.Namespace) -> tuple[dict[str, Any], Recipe | None, Start]:
    """The options by Recipe's names, from the command line, else from --from; that picture's recipe; and the
    pictures to start from, which are read once.

    Raises ValueError for what cannot be.
    """
    recipe, settled = None, {}
    if args.batch_size is not None:
        raise ValueError("--batch-size has no effect without --prompts: leave it out")
    if args.source is not None:
        from ldm.recipes.picture import read_recipe

        found = read_recipe(Path(args.source))
        if isinstance(found, Recipe):
            recipe, settled = found, dataclasses.asdict(found)
            settled |= find_noted(found, Path(args.source), args)
            if args.model is not None:
                del settled["variant"]  # of the model that the picture was made by
            forget(settled, args)
        else:
            settled = {name: value for name, value in found.items() if not name.startswith("model")}
            forget(settled, args)
            log.warning("%s is from another program: this picture will differ from it", args.source)
    late = ("dtype", "device")  # settled once torch is there
    ours = {field.name for field in dataclasses.fields(Recipe) if field.name not in late}
    settled |= {name: value for name, value in vars(args).items() if name in ours and value is not None}
    if settled.get("prompt") is None:
        raise ValueError('no prompt: python -m ldm.generate "a red fox in snow"')
    settled.setdefault("num_images", 1)
    if settled.get("upscaler") is not None and settled.get("upscale_noise") is None:
        settled["upscale_noise"] = options.NOISE_LEVEL
    if args.prompt is not None:
        settled["expanded_from"] = None
    check_led(settled, args)
    options.check_request(settled)
    start = settle_files(settled, args)
    if args.expand is not None:
        from ldm.recipes.expansion import by_command

        settled["expanded_from"] = settled.get("expanded_from") or settled["prompt"]
        settled["prompt"] = by_command(args.expand)(settled["expanded_from"])
    return settled, recipe, start


def check_led(settled: dict[str, Any], args: argparse.Namespace) -> None:
    """Raises ValueError for options of a classifier without one, and for a classifier without a class."""
    if settled.get("classifier") is None:
        for name in ("classifier_scale", "classifier_form"):
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has no effect without --classifier: leave it out")
    elif settled.get("class_label") is None:
        raise ValueError("--classifier leads to a class: name it by --class-label")
