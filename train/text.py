"""The text encoder of a recipe: a new small CLIP with its own tokenizer, or one that was trained before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint import load_model
from text_encoder.clip import CLIPTextConfig, CLIPTextEncoder
from text_encoder.tokenizer import BYTES, Tokenizer
from train.checkpoint import weights_sha256


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
        if self.max_length < 3:
            raise ValueError(f"text_encoder.max_length={self.max_length}: start, end and a word are 3 tokens")


def text_facts(config: TextConfig, encoder: CLIPTextEncoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a resumed run must share: the tokens, and the sizes of a new encoder or the weights of another."""
    tokens = json.dumps([tokenizer.vocab, tokenizer.merges, tokenizer.max_length])
    facts: dict[str, Any] = {"tokenizer": hashlib.sha256(tokens.encode()).hexdigest(), "train": config.train}
    if config.path is None:
        return facts | {name: getattr(config, name) for name in ("width", "layers", "heads")}
    return facts | {"weights": weights_sha256(encoder.state_dict())}


def build_text_encoder(
    config: TextConfig, captions: Iterable[list[str]]
) -> tuple[CLIPTextEncoder, Tokenizer]:
    """The text encoder and its tokenizer, read or new; a new tokenizer learns the captions."""
    if config.path is not None:
        folder = Path(config.path)
        encoder = load_model(CLIPTextEncoder, folder / "text_encoder")
        return encoder, Tokenizer.from_folder(folder / "tokenizer")
    every = (caption for texts in captions for caption in texts)
    tokenizer = Tokenizer.train(every, config.vocab_size, config.max_length)
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
