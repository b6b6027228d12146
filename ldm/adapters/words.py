"""Textual inversion: words learned as vectors of the text encoder's table (Gal et al. 2023).

A word of several vectors is written as one and read as several tokens: word, word_1, word_2, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.adapters.applied import follow, parameter_of
from ldm.adapters.files import find_file
from ldm.files.checkpoint import read_tensors
from ldm.files.config import replacing
from text_encoder.clip import CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer

A1111 = "emb_params"  # the key of AUTOMATIC1111's files, which are named by their word
USUAL = ("learned_embeds.safetensors",)  # of diffusers
Source = str | Path | Tensor | Mapping[str, Tensor]


def read_words(source: Source, token: str | None = None, weight_name: str | None = None) -> dict[str, Tensor]:
    """Words and their vectors, (k, D), of a file, a folder or tensors.

    token: what to call the word; else as the file has it, or in AUTOMATIC1111's files the file's name.
    Raises ValueError unless they are words with finite vectors.
    """
    if isinstance(source, Tensor):
        if token is None:
            raise ValueError("a textual inversion as one tensor has no name: give token")
        tensors, where, stem = {token: source}, "the tensor", token
    elif isinstance(source, Mapping):
        tensors, where, stem = dict(source), "the tensors", A1111
    else:
        path = find_file(source, weight_name, USUAL)
        tensors, where, stem = read_tensors(path), str(path), path.stem
    if {"clip_l", "clip_g"} & tensors.keys():
        raise ValueError(f"{where} looks made for SDXL: it has vectors for two text encoders")
    if token is not None and len(tensors) != 1:
        raise ValueError(
            f"{where} holds {len(tensors)} words, so token={token!r} cannot name them: leave it out"
        )
    words = {token or (stem if name == A1111 else name): value for name, value in tensors.items()}
    if not words:
        raise ValueError(f"{where} holds no word")
    for name, value in words.items():
        if value.ndim not in (1, 2) or not value.is_floating_point() or not value.numel():
            raise ValueError(
                f"{where}: {name} is {tuple(value.shape)} of {value.dtype}: expected vectors (k, D)"
            )
        if not value.isfinite().all():
            raise ValueError(f"{where}: {name} is not finite: get the file again")
    return {name: value.reshape(-1, value.shape[-1]) for name, value in words.items()}


def write_words(words: Mapping[str, Tensor], path: Path) -> None:
    """Writes words and their vectors, (k, D), as diffusers does, whole or not at all."""
    plain = {word: vectors.detach().cpu().contiguous() for word, vectors in words.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, {"format": "pt"})


class Words:
    """Learned words in a text encoder and its tokenizer, both as they were when the last word goes."""

    def __init__(self, encoder: CLIPTextEncoder, tokenizer: Tokenizer) -> None:
        self.encoder, self.original = encoder, tokenizer
        self.words: dict[str, Tensor] = {}
        self._table, self._config = parameter_of(encoder.embeddings.token_embedding), encoder.config
        self._placed = self._table

    def become(self, words: Mapping[str, Tensor], tokenizer: Tokenizer) -> Tokenizer:
        """Has exactly these words in the encoder; the tokenizer that reads them.

        tokenizer: the one in use. Raises ValueError, with all as it was, for a word that is there already and
        for vectors of another width.
        """
        layer = self.encoder.embeddings.token_embedding
        if not self.words:  # whatever was loaded or moved since
            self.original, self._table, self._config = tokenizer, parameter_of(layer), self.encoder.config
        elif layer.weight is not self._placed:
            raise ValueError(
                "the text encoder's vectors were replaced after words were loaded: load the model anew"
            )
        live = parameter_of(layer)
        if not words:
            self._place(follow(self._table, live) if self.words else live, {})
            self.encoder.config = self._config
            return self.original
        width = self._table.shape[1]
        for word, vectors in words.items():
            if vectors.shape[1] != width:
                raise ValueError(
                    f"the word {word!r} has vectors of {vectors.shape[1]} numbers, this text encoder's have "
                    f"{width}: it is for another model{FAMILIES.get(vectors.shape[1], '')}"
                )
        tokens = [name for word, vectors in words.items() for name in spread(word, len(vectors))]
        tokenizer = self.original.with_tokens(tokens)
        rows = torch.cat(list(words.values()))
        table = self._table.detach().to(live.device, live.dtype)
        grown = torch.zeros(max(len(table), len(tokenizer)), width, dtype=live.dtype, device=live.device)
        grown[: len(table)] = table
        grown[[tokenizer.token_id(name) for name in tokens]] = rows.to(live.device, live.dtype)
        self._place(nn.Parameter(grown, requires_grad=live.requires_grad), words)
        self.encoder.config = replace(self._config, vocab_size=len(grown))
        return tokenizer

    def _place(self, table: nn.Parameter, words: Mapping[str, Tensor]) -> None:
        layer = self.encoder.embeddings.token_embedding
        layer.weight, layer.num_embeddings = table, len(table)
        self._placed, self.words = table, dict(words)


FAMILIES = {
    768: ", as Stable Diffusion 1",
    1024: ", as Stable Diffusion 2",
    1280: ", as SDXL's second encoder",
}


def spread(word: str, count: int) -> list[str]:
    """The tokens of a word of so many vectors, named as in diffusers."""
    return [word, *(f"{word}_{index}" for index in range(1, count))]
