"""Textual inversion: train the vectors of a new word, and nothing else, on a few pictures.

  python train/train_embedding.py --config configs/embedding.yaml
  accelerate launch train/train_embedding.py --config configs/embedding.yaml --model my_sd15
      --token "<cat-toy>" --initializer toy --data.source my_pictures --data.caption "a photo of a <cat-toy>"

The run folder gets checkpoints (of the vectors alone), metrics.jsonl, samples/ and, at the end, model/ with
one small file: `pipe.load_textual_inversion("RUN/model")` in diffusers. The same command goes on where it
stopped, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the packages lie one folder above this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.command import carry_out, command
from train.config import parse
from train.tasks.embedding import Embedding, EmbeddingRecipe
from train.tasks.tuning import latents_of, model_folder

DEFAULT = "configs/embedding.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code, 75 when stopped early and resumable."""
    recipe = parse(EmbeddingRecipe, sys.argv[1:] if argv is None else argv, DEFAULT, __doc__ or "")
    folder = model_folder(recipe)
    return carry_out("embedding", Embedding(recipe, folder, latents_of(recipe, folder)), recipe)


if __name__ == "__main__":
    command(main)
