"""From pictures to a finished and measured pipeline: every stage of a recipe, one after another.

  python -m train.run configs/pictograms.yaml
  python -m train.run configs/shapes.yaml --data.source my_pictures --output runs/mine
  accelerate launch -m train.run configs/pictograms.yaml

Autoencoder, latents, text encoder, UNet and export are those of train_ldm.py; then the pipeline is evaluated
and RUN/report.md written, with pictures. Each stage prints a line. One that is done is not done again, one
that was stopped (exit code 75) goes on: give the same command again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accelerate import PartialState

from train.command import command
from train.config import config_fields, parse
from train.fit.loop import cpu_only
from train.measure.evaluation import EvaluationConfig, evaluate
from train.stages import Passed, show_stages, train_stages
from train.tasks.diffusion import DiffusionRecipe

DEFAULT = "configs/shapes.yaml"


@dataclass(frozen=True, kw_only=True)
class RunRecipe(DiffusionRecipe):
    """Training of a latent diffusion model, and its evaluation."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def training(self) -> DiffusionRecipe:
        """What train_ldm.py reads: the run is the same by either command."""
        values = {name: getattr(self, name) for name in config_fields(DiffusionRecipe)}
        return DiffusionRecipe(**values)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate as the command line says; returns the exit code, 75 when stopped early."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--config")
    recipe = parse(RunRecipe, words, DEFAULT, __doc__ or "")
    if recipe.plan:
        show_stages(recipe.training)
        return 0
    passed: list[Passed] = []
    for stage in train_stages(recipe.training):
        tell(str(stage))
        passed.append(stage)
        if stage.exit_code:
            return stage.exit_code
    model = passed[-1].folder
    tell(str(evaluate(recipe.training, recipe.evaluation, model, passed)))
    tell(f"the model is in {model}")
    return 0


def tell(line: str) -> None:
    """A line on stdout, once whatever the number of ranks."""
    if PartialState(cpu=cpu_only()).is_main_process:
        print(line, flush=True)


if __name__ == "__main__":
    command(main)
