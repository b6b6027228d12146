"""Train adapters (LoRA, LoCon, LoHa, LoKr, DoRA) beside a model, which stays as it is; DreamBooth, too.

  python train/train_lora.py                                  the bundled model learns a style, in minutes
  accelerate launch train/train_lora.py --config configs/dreambooth.yaml
  accelerate launch train/train_lora.py --model my_sd15 --data.source my_pictures --data.size 512
  python train/train_lora.py --adapter dora --rank 16 --train-text-encoder --text-encoder-lr 5e-5

The run folder gets checkpoints (of the adapters alone), metrics.jsonl, samples/ and, at the end, model/ with
one small file: `python -m ldm.generate PROMPT --lora RUN/model/pytorch_lora_weights.safetensors`, or, ours
and diffusers', `pipe.load_lora_weights("RUN/model")`. The same command goes on where it stopped, bit for
bit. With prior.prompt the model first draws pictures of that class, and goes on learning them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import carry_out, command
from train.config import parse
from train.tasks.lora import Lora, LoraRecipe
from train.tasks.prior import prior_latents
from train.tasks.tuning import latents_of, model_folder

DEFAULT = "configs/lora.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(LoraRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    folder = model_folder(recipe)
    latents, prior = latents_of(recipe, folder), prior_latents(recipe, folder)
    return carry_out("adapters", Lora(recipe, folder, latents, prior), recipe)


if __name__ == "__main__":
    command(main)
