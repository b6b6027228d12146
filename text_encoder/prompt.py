r"""Prompts with weights, in AUTOMATIC1111's syntax, and what a weight does to the text's embeddings.

    (word)            weight 1.1, and ((word)) 1.1 * 1.1: brackets nest, their weights multiply
    (some words:1.3)  weight 1.3
    [word]            weight 1 / 1.1
    \( \) \[ \] \\    the signs themselves
    BREAK             what follows begins a new chunk of the text encoder

Brackets of the two kinds may cross. One that is never closed holds to the end of the prompt, one that closes
nothing is a sign like any other, and both are told. AUTOMATIC1111's `[from:to:when]`, `[a|b]` and `AND` are
not read. Unlike there BREAK works inside of brackets, and a full chunk is not ended early at a comma.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from text_encoder.tokenizer import Tokenizer

UP, DOWN = 1.1, 1 / 1.1  # of one pair of brackets, round and square
MAX_WEIGHT = 100.0
MAX_DEPTH = 64  # brackets of a kind inside each other
MEAN = 0.01  # CLIP of Stable Diffusion 1 has about 0.1; a final layer norm without bias has none
SIGNS = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"  # a backslash before another sign is dropped
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<stop>\bBREAK\b)"
)
WORD = re.compile(r"\w+(?:[-'’]\w+)*")


class Part(NamedTuple):
    """A stretch of a prompt's text, without signs, and its weight."""

    text: str
    weight: float = 1.0


class Prompt(NamedTuple):
    """A prompt as it is read: passages, of which each begins a chunk, and what was odd about its signs."""

    passages: list[list[Part]]
    notices: list[str]

    @property
    def texts(self) -> list[str]:
        """The passages without signs."""
        return ["".join(part.text for part in passage) for passage in self.passages]


class Piece(NamedTuple):
    """A token of a prompt."""

    token: int
    weight: float
    start: int  # where it begins in the text of its passage


class Chunk(NamedTuple):
    """What fills one chunk of the text encoder, between its start and its end token."""

    passage: int
    pieces: list[Piece]


# Reading


def literal(text: str) -> Prompt:
    """The text as it stands: every sign is a sign."""
    return Prompt([[Part(text)]], [])


def read_weights(text: str) -> Prompt:
    """The prompt that the text describes in AUTOMATIC1111's syntax: see the head of this file.

    Raises ValueError for a weight beyond MAX_WEIGHT and for more than MAX_DEPTH brackets in each other.
    """
    parts: list[tuple[str | None, float]] = []  # None: BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the parts that brackets begin at
    stray = 0

    def close(start: int, weight: float) -> None:
        parts[start:] = [(words, was * weight) for words, was in parts[start:]]

    for words, sign in _split(text):
        parts.append((words, 1.0))
        if sign is None:
            continue
        if sign["stop"]:
            parts.append((None, 1.0))
        elif sign["bracket"] in ("(", "["):
            begun = opened[sign["bracket"]]
            if len(begun) == MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} brackets {sign['bracket']} inside each other")
            begun.append(len(parts))
        elif sign["bracket"] == "]" and opened["["]:
            close(opened["["].pop(), DOWN)
        elif (sign["weight"] or sign["bracket"] == ")") and opened["("]:
            close(opened["("].pop(), float(sign["weight"] or UP))
        elif sign["escaped"] is not None:
            parts.append((sign["escaped"], 1.0))
        else:
            parts.append((sign[0], 1.0))
            stray += 1
    notices = [f"{stray} brackets close nothing: they are read as signs"] if stray else []
    if unclosed := sum(map(len, opened.values())):
        notices.append(f"{unclosed} brackets are not closed: their weight holds to the end")
    for bracket, weight in (("(", UP), ("[", DOWN)):
        for start in reversed(opened[bracket]):
            close(start, weight)
    return Prompt(_passages(parts), notices)


def _split(text: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """The words before each sign, and the sign; after the last words None."""
    place = 0
    for sign in SIGNS.finditer(text):
        yield text[place : sign.start()], sign
        place = sign.end()
    yield text[place:], None


def _passages(parts: list[tuple[str | None, float]]) -> list[list[Part]]:
    """Parts between BREAKs, neighbours of one weight together; without an empty passage at the end."""
    passages: list[list[Part]] = [[]]
    for words, weight in parts:
        weight = round(weight, 6)  # so that [(word)] has the weight 1
        if words is None:
            passages.append([])
        elif words and not abs(weight) <= MAX_WEIGHT:
            raise ValueError(
                f"the weight of {words[:40]!r} is {weight:g}: expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}; "
                "0.5 to 1.5 is usual"
            )
        elif words and passages[-1] and passages[-1][-1].weight == weight:
            passages[-1][-1] = Part(passages[-1][-1].text + words, weight)
        elif words:
            passages[-1].append(Part(words, weight))
    if len(passages) > 1 and not passages[-1]:
        passages.pop()
    return passages


# Tokens


def chunks_of(prompt: Prompt, tokenizer: Tokenizer) -> list[Chunk]:
    """The chunks that the whole prompt fills, also those that the tokenizer has no room for."""
    width, chunks = tokenizer.max_length - 2, []
    for place, passage in enumerate(prompt.passages):
        pieces, start = [], 0
        for text, weight in passage:
            pieces += [Piece(token, weight, start + at) for token, at in tokenizer.pieces(text)]
            start += len(text)
        ends = range(0, max(len(pieces), 1), width)
        chunks += [Chunk(place, pieces[end : end + width]) for end in ends]
    return chunks


def what_is_cut(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """The end of the prompt, without signs, that does not fit into the tokenizer's chunks; "" if all does."""
    tail = chunks_of(prompt, tokenizer)[tokenizer.chunks :]
    if not tail:
        return ""
    first, *others = prompt.texts[tail[0].passage :]
    cut = "BREAK".join([first[tail[0].pieces[0].start if tail[0].pieces else 0 :], *others])
    return cut if cut.strip() else "BREAK"


def words_of(prompt: Prompt, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Each word that is not cut, in the prompt's order, and the rows of its tokens; signs are no words.

    A row is one of the context (N, D): the chunks one after the other, each with its start and end token.
    """
    rows = [
        (passage, piece.start, index * tokenizer.max_length + 1 + place)
        for index, (passage, pieces) in enumerate(chunks_of(prompt, tokenizer)[: tokenizer.chunks])
        for place, piece in enumerate(pieces)
    ]
    words = [
        (word[0], [row for at, start, row in rows if at == passage and word.start() <= start < word.end()])
        for passage, text in enumerate(prompt.texts)
        for word in WORD.finditer(text)
    ]
    return [(word, found) for word, found in words if found]


# Weights

Encode = Callable[[Tensor], Tensor]  # tokens (1, K, N) -> states (1, K * N, D)
# (states (K, N, D), weights (K, N, 1), states of the empty prompt (N, D)) -> weighted states, in float32
Weighting = Callable[[Tensor, Tensor, Tensor], Tensor]


def scaled(states: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """Each state times its weight, then each chunk times what gives it its mean back: AUTOMATIC1111's way.

    There (modules/sd_emphasis.py, "Original") the mean is that of the batch; here of the prompt's own chunk.
    A mean below MEAN deviations is noise, and so would be what gives it back: such a chunk keeps its size.
    """
    weighted = states * weights
    mean, deviation = states.mean((1, 2), keepdim=True), states.std((1, 2), keepdim=True)
    ratio = mean / weighted.mean((1, 2), keepdim=True)
    return torch.where(mean.abs() < MEAN * deviation, weighted, weighted * ratio)


def from_empty(states: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """Each state as far from that of the empty prompt, at its place, as its weight says: ComfyUI's way.

    empty + weight * (state - empty), (comfy/sd1_clip.py); so does compel with weights above 1.
    """
    return empty.lerp(states, weights)


WEIGHTINGS: dict[str, Weighting] = {"a1111": scaled, "comfy": from_empty}


def read(text: str, weighting: str | None) -> Prompt:
    """The prompt: literal without a weighting, else with weights; see read_weights for what is raised."""
    return literal(text) if weighting is None else read_weights(text)


def encode(encode: Encode, tokenizer: Tokenizer, text: str, weighting: str | None) -> Tensor:
    """The context of a prompt, (1, N, D), with its weights worked in by WEIGHTINGS[weighting].

    Where all weights are 1 it is, bit for bit, what the encoder answers.
    """
    if weighting is None:
        return encode(tokenizer([text]))
    chunks = [pieces for _, pieces in chunks_of(read_weights(text), tokenizer)[: tokenizer.chunks]]
    tokens = tokenizer.rows([[piece.token for piece in pieces] for pieces in chunks])
    states = encode(tokens[None])
    weights = torch.ones(tokens.shape)
    for row, pieces in zip(weights, chunks, strict=False):
        row[1 : 1 + len(pieces)] = torch.tensor([piece.weight for piece in pieces])
    if (weights == 1).all():
        return states
    empty = encode(tokenizer.rows([])[None])[0, : tokenizer.max_length]
    apart = states[0].float().unflatten(0, tokens.shape)
    weighted = WEIGHTINGS[weighting](apart, weights[..., None].to(states.device), empty.float())
    return weighted.flatten(0, 1)[None].to(states.dtype)
