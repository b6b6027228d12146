"""The text encoder of a recipe: a new small CLIP with its own tokenizer, or one that was trained before."""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ldm.files.checkpoint import load_model
from text_encoder.clip import CLIPTextConfig, CLIPTextEncoder
from text_encoder.tokenizer import BYTES, Tokenizer
from train.batches.plan import spread
from train.fit.checkpoint import weights_sha256

log = logging.getLogger(__name__)
MEASURED = 100_000  # captions at most, evenly spread, of which the lengths are told


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder: a new small CLIP, or one that was trained before."""

    train: bool = True  # false: frozen
    path: str | None = None  # folder with text_encoder/ and tokenizer/, or the recipe (.yaml) that trains one
    width: int = 192  # channels of a new one; the UNet's cross_attention_dim
    layers: int = 4  # of a new one
    heads: int = 6  # of a new one
    vocab_size: int = 2048  # tokens at most, of a tokenizer trained on the captions
    max_length: int = 77  # tokens a prompt, start and end included, of a new one
    chunks: int | None = None  # of max_length tokens that a caption may fill; null: 1, or what path says

    def __post_init__(self) -> None:
        if not self.train and self.path is None:
            raise ValueError(
                "text_encoder.train=false needs text_encoder.path: a new encoder has learnt nothing"
            )
        for name in ("width", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"text_encoder.{name}={getattr(self, name)}: expected 1 or more")
        if self.width % self.heads:
            raise ValueError(f"text_encoder.width={self.width} is not a multiple of heads={self.heads}")
        least = 2 * len(BYTES) + 2
        if self.vocab_size < least:
            raise ValueError(
                f"text_encoder.vocab_size={self.vocab_size}: bytes and special tokens alone are {least}"
            )
        if self.chunks is not None and self.chunks < 1:
            raise ValueError(f"text_encoder.chunks={self.chunks}: expected 1 or more")
        if self.max_length < 3:
            raise ValueError(f"text_encoder.max_length={self.max_length}: start, end and a word are 3 tokens")


def text_facts(config: TextConfig, encoder: CLIPTextEncoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a resumed run must share: the tokens, and the sizes of a new encoder or the weights of another."""
    chunks = [tokenizer.chunks] if tokenizer.chunks > 1 else []
    tokens = json.dumps([tokenizer.vocab, tokenizer.merges, tokenizer.max_length, *chunks])
    facts: dict[str, Any] = {"tokenizer": hashlib.sha256(tokens.encode()).hexdigest(), "train": config.train}
    facts["chunks"] = tokenizer.chunks
    if config.path is None:
        return facts | {name: getattr(config, name) for name in ("width", "layers", "heads")}
    return facts | {"weights": weights_sha256(encoder.state_dict())}


def build_text_encoder(
    config: TextConfig, captions: Iterable[list[str]], learned: Path | None = None
) -> tuple[CLIPTextEncoder, Tokenizer]:
    """The text encoder and its tokenizer, read or new; a new tokenizer learns the captions.

    learned: folder of one that did so, where the captions have become others since.
    """
    if config.path is not None:
        folder = Path(config.path)
        encoder = load_model(CLIPTextEncoder, folder / "text_encoder")
        tokenizer = Tokenizer.from_folder(folder / "tokenizer")
        tokenizer.chunks = config.chunks or tokenizer.chunks
        return encoder, tokenizer
    every = (caption for texts in captions for caption in texts)
    tokenizer = (
        Tokenizer.from_folder(learned)
        if learned
        else Tokenizer.train(every, config.vocab_size, config.max_length)
    )
    tokenizer.chunks = config.chunks or 1
    encoder_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.max_length,
        projection_dim=config.width,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
    )
    return CLIPTextEncoder(encoder_config), tokenizer


def tell_lengths(tokenizer: Tokenizer, captions: Iterable[Sequence[str]]) -> None:
    """Says, once, how long the captions of the pictures are, and how many are cut."""
    if PartialState().is_main_process:
        every = [caption for texts in captions for caption in texts]
        log.info(length_table(tokenizer, [every[index] for index in spread(len(every), MEASURED)]))


def length_table(tokenizer: Tokenizer, captions: Sequence[str]) -> str:
    """How many captions have how many tokens, without start and end, and how many are cut."""
    lengths = tokenizer.lengths(captions)
    longest, room, cut = max(lengths), tokenizer.room, sum(length > tokenizer.room for length in lengths)
    edges = sorted({room, *(2**k for k in range(3, max(4, (longest - 1).bit_length() + 1)))})
    edges = edges[: bisect_left(edges, longest) + 1]
    counts = [0] * len(edges)
    for length in lengths:
        counts[bisect_left(edges, length)] += 1
    rows = [f"{'up to':>10}  {'captions':>8}"]
    rows += [f"{edge:>3} tokens  {count:>8}" for edge, count in zip(edges, counts, strict=True)]
    share = f"{cut} of {len(lengths)} captions ({cut / len(lengths):.1%})"
    chunks = -(-longest // (tokenizer.max_length - 2))
    advice = f"; text_encoder.chunks={chunks} would hold the longest" if cut else ""
    return "\n".join([*rows, f"{share} are longer than the {room} tokens that are read, and cut{advice}"])
