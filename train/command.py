"""What training commands have in common: one line for what their user can mend, and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from train.fit.failure import RunFailed

if TYPE_CHECKING:
    from train.fit.state import FitConfig, Task


def command(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command line's main(argv) -> exit code.

    What the user got wrong, what the disk refuses and a RunFailed become one line on stderr.
    """
    logger, handler = logging.getLogger("train"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        code = main(sys.argv[1:])
    except (ValueError, OSError, SafetensorError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before or after the training itself, which finishes its step and saves
        print("interrupted; the same command goes on", file=sys.stderr)
        code = 130
    finally:
        logger.removeHandler(handler)
        leave_group()
    sys.exit(code)


def carry_out(name: str, task: Task, recipe: FitConfig) -> int:
    """Train a task as its recipe says, or with recipe.plan print what that will take; the exit code.

    name: of the task, in what is printed.
    """
    if recipe.plan:
        from train.fit.planning import Stage, show_plan  # which knows all tasks

        show_plan([Stage(name, task, recipe)], recipe.price)
        return 0
    from train.fit.loop import fit  # as below

    outcome = fit(task, recipe)
    return ended(outcome.model, outcome.exit_code)


def ended(model: Path, exit_code: int) -> int:
    """The exit code of a run, whose first rank prints where the model is if it came to its end."""
    import torch.distributed as distributed  # as below

    several = distributed.is_available() and distributed.is_initialized()
    if not exit_code and not (several and distributed.get_rank()):
        print(model)
    return exit_code


def leave_group() -> None:
    """Take leave of the other ranks, if there are any."""
    import torch.distributed as distributed  # whoever comes here with ranks has imported torch long ago

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
