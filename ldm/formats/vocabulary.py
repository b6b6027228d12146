"""CLIP's vocabulary, rebuilt from the list of merges that OpenAI published (MIT; see CLIP_LICENSE.txt)."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

from text_encoder.tokenizer import BYTES, END, LAST, START, Tokenizer

SOURCE = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49408  # tokens: the bytes, the bytes that end a piece, the merges, and two special ones
SD2_PAD = "!"  # id 0: OpenCLIP pads with zeros


@functools.cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """CLIP's merges, most frequent first. The published list goes on after the last that CLIP uses."""
    lines = gzip.decompress(SOURCE.read_bytes()).decode("utf-8").split("\n")
    count = SIZE - 2 * len(BYTES) - 2
    pairs = [line.split() for line in lines[1 : 1 + count]]  # the first line names the file
    return tuple((left, right) for left, right in pairs)


@functools.cache
def clip_vocab() -> dict[str, int]:
    """CLIP's 49,408 tokens and their ids."""
    names = [*BYTES, *(byte + LAST for byte in BYTES), *map("".join, clip_merges()), START, END]
    return {name: number for number, name in enumerate(names)}


def clip_tokenizer(pad: str = END) -> Tokenizer:
    """CLIP's tokenizer. pad: what fills a prompt; the end in SD 1, SD2_PAD in SD 2."""
    return Tokenizer(clip_vocab(), clip_merges(), pad=pad)
