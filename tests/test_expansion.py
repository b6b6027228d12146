"""Prompts that a program writes out: drawn as it says, noted as they were typed."""

from __future__ import annotations

import shlex
import sys

import pytest

from ldm import generate
from ldm.recipes.expansion import by_command
from ldm.recipes.picture import read_recipe
from tests.test_generate import run

__all__ = ["run"]  # a fixture


def program(code: str) -> str:
    return f"{shlex.quote(sys.executable)} -I -S -c {shlex.quote(code)}"


LONGER = program("import sys; print(sys.stdin.read(), 'in snow,\\n at night')")


def test_a_program_writes_a_prompt_out():
    assert by_command(LONGER)("a red fox") == "a red fox in snow, at night"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (program("raise SystemExit('no model here')"), "ended with status 1: no model here"),
        (program("raise SystemExit(3)"), "ended with status 3: it said nothing"),
        (program("pass"), "printed nothing: expected the longer prompt on standard output"),
        ("no-such-program --at all", "cannot be run: No such file or directory"),
        ("'open", "No closing quotation"),
        (" ", "it is empty"),
    ],
)
def test_programs_that_give_no_prompt(command, message):
    with pytest.raises(ValueError, match=message):
        by_command(command)("a red fox")


def test_a_program_that_takes_too_long():
    with pytest.raises(ValueError, match=r"gave no answer within 0\.2 s"):
        by_command(program("import time; time.sleep(60)"), patience=0.2)("a red fox")


def test_the_picture_is_that_of_the_longer_prompt_and_notes_both(run, tmp_path):
    status, *_ = run("a red fox", "--expand", LONGER, "--seed=1", "--output=a.png")
    assert status == 0
    recipe = read_recipe(tmp_path / "a.png")
    assert (recipe.prompt, recipe.expanded_from) == ("a red fox in snow, at night", "a red fox")
    assert run("a red fox in snow, at night", "--seed=1", "--output=b.png")[0] == 0
    pixels = [(tmp_path / name).read_bytes().partition(b"IDAT")[2] for name in ("a.png", "b.png")]
    assert pixels[0] == pixels[1]
    assert generate.main(["--from=a.png", "--output=c.png"]) == 0  # the longer prompt, without the program
    assert read_recipe(tmp_path / "c.png").expanded_from == "a red fox"
    assert generate.main(["two cats", "--from=a.png", "--output=d.png"]) == 0
    assert read_recipe(tmp_path / "d.png").expanded_from is None
