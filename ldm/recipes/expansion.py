"""A prompt written out by a program of the user's choice, such as a language model.

DALL-E 3 (Betker et al. 2023) was trained on long captions and draws best what is described as long, so its
users' prompts are written out first. In Python any function of strings does: pipe(expand(prompt)).
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable

from ldm.recipes import options

Expand = Callable[[str], str]  # a prompt -> a longer one
PATIENCE = 600.0  # seconds for an answer; a language model on a CPU takes some


def by_command(command: str, patience: float = PATIENCE) -> Expand:
    """Prompts as a program writes them out: it reads one on standard input, and prints the longer one.

    command: as in a shell, without pipes. The white space around an answer is left out, and a line break
    within is a space.
    Raises ValueError, when a prompt is given, if the program fails, takes too long or says nothing.
    """

    def expand(prompt: str) -> str:
        said = f"--expand {command!r}"
        try:
            words = shlex.split(command)
            if not words:
                raise ValueError("it is empty")
            done = subprocess.run(
                words, input=prompt.encode(), capture_output=True, timeout=patience, check=False
            )
            answer = " ".join(done.stdout.decode().split())
        except subprocess.TimeoutExpired:
            raise ValueError(f"{said} gave no answer within {patience:g} s") from None
        except OSError as error:
            raise ValueError(f"{said} cannot be run: {error.strerror}") from None
        except ValueError as error:  # quotes that do not close, an answer that is not UTF-8
            raise ValueError(f"{said}: {error}") from None
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise ValueError(f"{said} ended with status {done.returncode}: {last[:200] or 'it said nothing'}")
        if not answer:
            raise ValueError(f"{said} printed nothing: expected the longer prompt on standard output")
        options.check_prompt(answer, "the longer prompt")
        return answer

    return expand
