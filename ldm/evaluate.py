"""The command line: `python -m ldm.evaluate` measures pictures, or a model by the pictures it draws.

torch is imported once the arguments are known to be good, so help and errors come at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.metrics import arguments, subcommands


def run_sweep(words: Sequence[str]) -> Path | None:
    args = subcommands.make_sweep_parser().parse_args(words)
    settings = subcommands.settings_of(args)
    from ldm.metrics.sweep import sweep

    return sweep(args, settings)


def run_scenes(words: Sequence[str]) -> Path | None:
    args = subcommands.make_scenes_parser().parse_args(words)
    subcommands.check_scenes(args)
    from ldm.metrics.scenes import examine

    return examine(args)


def run_losses(words: Sequence[str]) -> Path:
    args = subcommands.make_losses_parser().parse_args(words)
    arguments.check_numbers(args)
    from ldm.metrics.losses import show_losses

    return show_losses(args)


def run_audit(words: Sequence[str]) -> Path:
    args = subcommands.make_audit_parser().parse_args(words)
    subcommands.check_audit(args)
    from ldm.metrics.audit import audit

    return audit(args)


def run_measure(words: Sequence[str]) -> Path | None:
    args = arguments.make_parser().parse_args(words)
    arguments.check(args)
    from ldm.metrics.measurement import measure, measure_reconstruction

    return measure_reconstruction(args) if args.reconstruction else measure(args)


RUNS = {"sweep": run_sweep, "scenes": run_scenes, "losses": run_losses, "audit": run_audit}


def run(words: Sequence[str]) -> Path | None:
    """Does what the words of a command line ask for: the path of the report; None on ranks that only help.

    Raises ValueError for what cannot be.
    """
    if words and words[0] in RUNS:
        return RUNS[words[0]](words[1:])
    return run_measure(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, or 1 where the machine fails, 2 where the request does, 130 on Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        path = run(list(sys.argv[1:] if argv is None else argv))
        if path is not None:
            print(path)
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted; run it again to go on", 130  # pictures are whole or not there
    except ValueError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # such as a full disk
        message, status = f"error: {error.filename or ''}: {error.strerror or error}", 1
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
