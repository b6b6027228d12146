"""Textual inversion as a task of `fit`: pictures of a new word in, its vectors out (Gal et al. 2023)."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters.words import USUAL, write_words
from text_encoder.clip import CLIPTextEncoder
from text_encoder.tokenizer import Tokenizer
from train.batches.latents import Latents
from train.tasks.tuning import Tuned, Tuning, TuningRecipe


@dataclass(frozen=True, kw_only=True)
class EmbeddingRecipe(TuningRecipe):
    """Training of a new word of the text encoder, which stays as it is, as does the UNet."""

    token: str  # the new word, as "<moon>"; captions of the data hold it, or data.caption does
    initializer: str  # a known word from whose vector the new one starts
    vectors: int = 1  # of the new word, each read as a token

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\S{2,60}", self.token):
            raise ValueError(f"token={self.token!r}: expected 2 to 60 signs without a space, as <moon>")
        if self.vectors < 1:
            raise ValueError(f"vectors={self.vectors}: expected 1 or more; 1 to 8 are usual")
        if self.data.caption is not None and self.token not in self.data.caption:
            raise ValueError(f"data.caption={self.data.caption!r} does not hold the token {self.token!r}")

    @property
    def names(self) -> list[str]:
        """Of the tokens that stand for the word within a run; its file knows the word alone."""
        return [self.token, *(f"{self.token}#{number}" for number in range(1, self.vectors))]

    def written_out(self, text: str) -> str:
        """A prompt with all tokens of the word in its place."""
        return text.replace(self.token, " ".join(self.names))


class Rows(nn.Module):
    """The vectors of new tokens, in the place of the last rows of a table: all that learns."""

    def __init__(self, first: int, start: Tensor) -> None:
        """first: id of the first new token. start: (n, D)."""
        super().__init__()
        self.first, self.weight = first, nn.Parameter(start.clone())

    def attach(self, table: nn.Embedding) -> None:
        """From now on the table answers with these vectors where a token is a new one."""

        def swap(layer: nn.Module, given: tuple[Tensor], answer: Tensor) -> Tensor:
            row = given[0] - self.first
            new = self.weight[row.clamp(min=0)].to(answer.dtype)
            return torch.where((row >= 0)[..., None], new, answer)

        table.register_forward_hook(swap)


def first_vectors(encoder: CLIPTextEncoder, tokenizer: Tokenizer, recipe: EmbeddingRecipe) -> Tensor:
    """The mean of the initializer's vectors, for each new token: (n, D). Raises ValueError if it is empty."""
    count = tokenizer.lengths([recipe.initializer])[0]
    if not count:
        raise ValueError(f"initializer={recipe.initializer!r} is no word: name one that is like the new one")
    ids = tokenizer([recipe.initializer]).flatten()[1 : 1 + count]
    return encoder.embeddings.token_embedding.weight[ids].mean(0, keepdim=True).repeat(recipe.vectors, 1)


def enlarge(encoder: CLIPTextEncoder, first: int, rows: Tensor) -> None:
    """Give the table of tokens these rows from id `first` on; what it has before stays bit for bit."""
    table = encoder.embeddings.token_embedding.weight.detach()
    table = torch.cat([table[:first], rows, table[first + len(rows) :]])
    encoder.embeddings.token_embedding = nn.Embedding.from_pretrained(table)
    encoder.config = replace(encoder.config, vocab_size=len(table))


class Embedding(Tuning):
    """Trains the vectors of a new word."""

    def __init__(self, recipe: EmbeddingRecipe, folder: Path, latents: Latents) -> None:
        super().__init__(recipe, folder, latents)
        self.settings, captions = recipe, latents.captions
        missing = [texts for texts in captions.values() if not any(recipe.token in one for one in texts)]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(latents)} pictures have no caption with the token {recipe.token!r}, "
                f"one has {missing[0][:1]}: set data.caption, as 'a photo of {recipe.token}'"
            )
        start = first_vectors(self.text_encoder, self.tokenizer, recipe).detach()
        first = len(self.tokenizer)
        self.tokenizer = self.tokenizer.with_tokens(recipe.names)
        enlarge(self.text_encoder, first, start)
        self.rows = Rows(first, start)
        self.rows.attach(self.text_encoder.embeddings.token_embedding)
        self.latents = copy.copy(latents)
        self.latents.captions = {
            index: [recipe.written_out(text) for text in texts] for index, texts in captions.items()
        }
        prompts = tuple(recipe.written_out(prompt) for prompt in recipe.prompts)
        self.recipe = replace(self.recipe, prompts=prompts)
        self.module = Tuned(self.loss_model(through_text=True), {"tokens": self.rows})
        self.facts = {**self.facts, "tokens": recipe.names}

    def export(self, folder: Path) -> None:
        """The vectors under the word, which load_textual_inversion finds in the folder."""
        write_words({self.settings.token: self.rows.weight}, folder / USUAL[0])
