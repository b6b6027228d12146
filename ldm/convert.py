"""The command line between formats: `python -m ldm.convert SOURCE TARGET` makes a folder of a single file,
a single file of a folder, or either in another precision; without TARGET it says what SOURCE is.

torch is imported once the arguments are known to be good, so help and errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.command.arguments import DTYPES, Parser

if TYPE_CHECKING:
    from ldm.formats.pieces import Pieces

EXAMPLES = """
examples:
  python -m ldm.convert model.safetensors                      what is it, and is it whole?
  python -m ldm.convert model.safetensors FOLDER               for diffusers, and for training
  python -m ldm.convert FOLDER model.safetensors --dtype fp16  one file for other programs, of half the size
  python -m ldm.convert old.ckpt new.safetensors --allow-pickle --ema

A folder is in diffusers' layout: model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/.
A single file, .safetensors, has the names of CompVis' and AUTOMATIC1111's programs. Stable Diffusion 1 and 2,
also for inpainting, and the x4 upscaler are recognised; other sizes by --config.
A pickle, .ckpt, can hold code. It is read as plain weights alone, by a process that can do nothing else, and
refused if it holds more.

What was recognised, and every tensor that was missing or not needed, is printed on standard output.
TARGET is written whole or not at all, and never over something.
Exit status: 0 done, 1 the machine failed, 2 the request cannot be met (nothing was written), 130 interrupted.
"""


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser(
        prog="python -m ldm.convert",
        usage="python -m ldm.convert SOURCE [TARGET] [options]",
        description="Makes a folder of a single file of weights, and a single file of a folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a folder, a .safetensors, or with --allow-pickle a .ckpt")
    parser.add_argument("target", nargs="?", help="a file .safetensors, else a folder, that is not there yet")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="precision of the weights; as they are if left out"
    )
    parser.add_argument(
        "--ema", action="store_true", help="of a single file, take the averaged UNet: model_ema.*"
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="of a folder, weight files of that name, such as fp16"
    )
    parser.add_argument(
        "--prediction",
        choices=["epsilon", "v_prediction"],
        help="what a single file's UNet predicts, where that is not found in it",
    )
    parser.add_argument(
        "--config", metavar="FOLDER", help="a folder whose configurations and tokenizer are the single file's"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read a .ckpt, .pt or .bin, as weights alone"
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write the names of all tensors that differ, as JSON"
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, before torch is imported."""
    from ldm.formats.unpickle import PICKLES

    source = Path(args.source)
    if source.is_file():
        if source.suffix in PICKLES and not args.allow_pickle:
            raise ValueError(
                f"{source} is a pickle, which can hold code: --allow-pickle reads it as weights alone, and "
                "refuses it if it holds more"
            )
        if source.suffix not in (*PICKLES, ".safetensors"):
            raise ValueError(f"{source}: expected a folder, a .safetensors or one of {', '.join(PICKLES)}")
        if args.variant:
            raise ValueError(f"--variant={args.variant} is of folders: {source} is a file")
    elif source.suffix in (*PICKLES, ".safetensors"):
        raise ValueError(f"no such file {source}")
    else:
        for name in ("ema", "prediction", "config"):
            if getattr(args, name):
                raise ValueError(f"--{name} is of single files: {source} is none")
    if args.target and Path(args.target).suffix in PICKLES:
        raise ValueError(f"{args.target}: pickles are not written here: name a .safetensors or a folder")
    if args.target is None and args.dtype:
        raise ValueError(f"--dtype={args.dtype} has no effect without TARGET")


@contextlib.contextmanager
def readable(source: Path, beside: Path) -> Iterator[Path]:
    """The source itself, or the safetensors that a child process makes of a pickle, while the block runs."""
    from ldm.formats.unpickle import PICKLES, unpickle

    if source.suffix not in PICKLES:
        yield source
        return
    with tempfile.TemporaryDirectory(dir=beside, prefix=".unpickled-") as folder:
        path = Path(folder) / f"{source.stem}.safetensors"
        unpickle(source, path)
        yield path


def read(args: argparse.Namespace, source: Path) -> Pieces:
    """The pieces of the source. Raises ValueError if it is not whole, or not known."""
    from ldm.files.hub import find_folder
    from ldm.formats.pieces import read_folder
    from ldm.formats.single_file import read_single

    if source.is_file():
        config = find_folder(args.config, None) if args.config else None
        return read_single(source, config=config, prediction=args.prediction, ema=args.ema)
    return read_folder(find_folder(args.source, args.variant), args.variant)


def read_and_report(args: argparse.Namespace, source: Path) -> Pieces:
    """The same, with the file of --report written, also where the source does not fit."""
    from ldm.formats.report import Misfit, write_reports

    reports = []
    try:
        pieces = read(args, source)
        reports = pieces.reports
        return pieces
    except Misfit as error:
        reports = [error.report]
        raise
    finally:
        if args.report and reports:
            write_reports(reports, Path(args.report))


def write(args: argparse.Namespace, pieces: Pieces) -> None:
    """Writes the target, with a bar on a terminal. Raises ValueError if it is there."""
    import torch
    from tqdm import tqdm

    from ldm.formats.pieces import write_folder
    from ldm.formats.single_file import write_single

    target = Path(os.path.expanduser(args.target))
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    total = sum(map(len, pieces.tensors.values()))
    with tqdm(total=total, unit=" tensors", disable=None, leave=False) as bar:
        writer = write_single if target.suffix == ".safetensors" else write_folder
        writer(pieces, target, dtype, bar.update)


def convert(args: argparse.Namespace) -> None:
    """Reads, reports and writes. Raises ValueError for what cannot be, before anything is written."""
    check(args)
    from ldm.formats.pieces import check_absent

    target = Path(os.path.expanduser(args.target)) if args.target else None
    beside = Path(tempfile.gettempdir())
    if target is not None:
        check_absent(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.parent
    with readable(Path(os.path.expanduser(args.source)), beside) as source:
        pieces = read_and_report(args, source)
        for note in (*pieces.notes, *(report.sentence() for report in pieces.reports)):
            print(note)
        if target is not None:
            write(args, pieces)
            print(target)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, or 1 where the machine fails, 2 where the request does, 130 on Ctrl-C."""
    try:
        convert(make_parser().parse_args(argv))
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except ValueError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # such as a full disk
        message, status = f"error: {error.filename or ''}: {error.strerror or error}", 1
    except MemoryError:
        message, status = "error: out of memory", 1
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
