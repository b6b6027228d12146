"""CLIP's tokenizer (Radford et al. 2021, section 2.4): lower-case byte-pair encoding, for any text.

Text -> NFC, white space to single spaces, lower case -> words, digits, runs of signs -> bytes, the last of
each piece marked `</w>` -> merges. Files and ids are those of transformers' CLIPTokenizer. Only the library
`tokenizers` is imported: transformers takes seconds to start, this takes hundredths.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"  # marks the last byte of a piece
MAX_LENGTH = 77  # tokens, start and end included: CLIP's text transformer has that many positions
VERSION = "#version: 0.2"  # first line of merges.txt; nobody reads it, everybody writes it
# CLIP's split: English contractions, words, single digits, runs of other signs.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The 256 bytes as printable characters, in the order of their code points: CLIP's ids 0 to 255.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


class Tokenizer:
    """Prompts to tokens: start, the text, end, then padding up to max_length.

    pad: SD 1 pads with the end token (the default), SD 2 with "!", which is id 0.
    chunks: of max_length tokens that a prompt may fill, each with start and end; what does not fit is cut.
    added: tokens to find in a prompt before it is split, such as textual inversion's; new ones get new ids.
    Raises ValueError if the vocabulary lacks what the merges or the special tokens name.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        start: str = START,
        end: str = END,
        pad: str = END,
        added: Sequence[AddedToken] = (),
        max_length: int = MAX_LENGTH,
        chunks: int = 1,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: the start and end token alone are 2")
        self.chunks = chunks
        self.vocab, self.merges, self.max_length = dict(vocab), list(merges), max_length
        self.special = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}
        self._backend = _byte_pairs(self.vocab, self.merges, unknown=end)
        self._backend.add_tokens(list(added))
        for role, name in self.special.items():
            if self._backend.token_to_id(name) is None:
                raise ValueError(f"the {role} {name!r} is not in the vocabulary")
        # Prompts are searched for these, too. With SD 2 that makes "!" padding, in transformers as here,
        # though OpenCLIP, which trained that encoder, read it as a sign.
        named = {token.content for token in added}
        unnamed = [name for name in self.special.values() if name not in named]
        self._backend.add_tokens([AddedToken(name, special=True) for name in dict.fromkeys(unnamed)])
        self._size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.start_id, self.end_id, self.pad_id = (self.token_id(name) for name in (start, end, pad))

    def __len__(self) -> int:
        """One more than the highest id: vocab_size of the text encoder that reads them."""
        return self._size

    @property
    def chunks(self) -> int:
        """Of a prompt. A model says how many it was trained with; more may be set for long prompts."""
        return self._chunks

    @chunks.setter
    def chunks(self, count: int) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"chunks={count!r}: expected a whole number from 1")
        self._chunks = count

    @property
    def room(self) -> int:
        """Tokens of a prompt that are read, without start and end: 75 in one of CLIP's chunks."""
        return self.chunks * (self.max_length - 2)

    def token_id(self, name: str) -> int:
        """The id of a token. Raises ValueError if there is none of that name."""
        found = self._backend.token_to_id(name)
        if found is None:
            raise ValueError(f"no token {name!r} in this vocabulary of {len(self)}")
        return found

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Tokens of the prompts, without the tails that do not fit (see cut): (B, max_length) int64.

        Of several chunks (B, chunks, max_length): those that a prompt does not fill are of the empty prompt.
        Raises ValueError if prompts is one string, or holds something that is not valid Unicode.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r} is one string: pass a list of prompts")
        tokens = torch.full((len(prompts), self.chunks, self.max_length), self.pad_id)
        for row, prompt in zip(tokens, prompts, strict=True):
            ids, width = self._encode(prompt).ids[: self.room], self.max_length - 2
            for place, chunk in enumerate(row):
                part = [self.start_id, *ids[place * width : (place + 1) * width], self.end_id]
                chunk[: len(part)] = torch.tensor(part)
        return tokens if self.chunks > 1 else tokens[:, 0]

    def cut(self, prompt: str) -> str:
        """The end of the prompt that does not fit into the chunks, as written; "" if all of it does."""
        tail = self._encode(prompt).offsets[self.room :]
        return prompt[tail[0][0] :] if tail else ""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as a whole, without start and end."""
        return [
            len(each) for each in self._backend.encode_batch_fast(list(prompts), add_special_tokens=False)
        ]

    def with_tokens(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer with more tokens, at new ids after the last, which it finds in prompts as they are.

        Raises ValueError for a name that is empty or a token already.
        """
        for name in names:
            if not name.strip() or self._backend.token_to_id(name) is not None or names.count(name) > 1:
                raise ValueError(f"a new token {name!r}: expected a name that no token has yet")
        old = [token for _, token in sorted(self._backend.get_added_tokens_decoder().items())]
        return Tokenizer(
            self.vocab,
            self.merges,
            start=self.special["bos_token"],
            end=self.special["eos_token"],
            pad=self.special["pad_token"],
            added=[*old, *(AddedToken(name) for name in names)],
            max_length=self.max_length,
            chunks=self.chunks,
        )

    def _encode(self, prompt: str) -> tokenizers.Encoding:
        try:
            return self._backend.encode(prompt, add_special_tokens=False)
        except TypeError as error:  # no string, or half a surrogate pair in it: bytes that were not UTF-8
            raise ValueError(f"prompt {prompt!a} is not a string of valid Unicode") from error

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int = MAX_LENGTH) -> Tokenizer:
        """Byte-pair encoding (Sennrich et al. 2016, algorithm 1) of the captions: most frequent pairs first.

        Pairs seen once are not merged, so the vocabulary may stay below vocab_size. It holds each byte as a
        last and as another byte, so any text has tokens; the ids are in CLIP's order. The same captions, in
        any order, give the same tokenizer. Raises ValueError if vocab_size has no room for the bytes.
        """
        singles = BYTES + [byte + LAST for byte in BYTES]
        if vocab_size < len(singles) + 2:
            raise ValueError(f"vocab_size={vocab_size}: bytes and special tokens are {len(singles) + 2}")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=BYTES,
            special_tokens=singles,  # fixes their ids, by which the trainer orders pairs of equal frequency
            end_of_word_suffix=LAST,
        )
        backend = _byte_pairs({}, [], unknown=None)
        backend.train_from_iterator(captions, trainer)
        merges = [_pair(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
        names = dict.fromkeys([*singles, *("".join(pair) for pair in merges), START, END])
        return cls({name: i for i, name in enumerate(names)}, merges, max_length=max_length)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a folder that we wrote, or transformers in the files of its version 4 or 5.

        Raises ValueError, naming the file, if one is missing, cannot be read or is not a CLIP tokenizer's.
        """
        folder = Path(folder)
        whole: dict[str, Any] = {}
        if (folder / "tokenizer.json").exists():
            source = folder / "tokenizer.json"
            whole = _read_json(source)
            model = whole.get("model")
            model = model if isinstance(model, dict) else {}
            if model.get("type") != "BPE" or model.get("end_of_word_suffix") != LAST:
                raise ValueError(f"{source} is not a CLIP tokenizer's: expected BPE with suffix {LAST!r}")
            vocab, lines = model.get("vocab", {}), model.get("merges", [])
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            source = folder / "vocab.json"
            vocab, lines = _read_json(source), _read_text(folder / "merges.txt").split("\n")
            lines = [line for line in lines if line.strip() and not line.startswith("#version")]
        else:
            raise ValueError(
                f"no tokenizer in {folder}: expected vocab.json and merges.txt, or tokenizer.json"
            )
        try:
            merges = [_pair(line) for line in lines]
            special, added, ids, (length, chunks) = _read_settings(folder, whole.get("added_tokens", []))
            tokenizer = cls(vocab, merges, **special, added=added, max_length=length, chunks=chunks)
            for name, token_id in ids.items():
                if tokenizer.token_id(name) != token_id:
                    raise ValueError(f"the added token {name!r} cannot have the id {token_id}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # or JSON of another form
            raise ValueError(f"{source}, or a settings file beside it: {error!s}") from error
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Writes the files that CLIPTokenizer of transformers 4 and 5 reads, with the same ids.

        All are written beside before the first takes its place: a full disk leaves what was there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        lines = [VERSION, *(f"{left} {right}" for left, right in self.merges)]
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = sorted(self._backend.get_added_tokens_decoder().items())
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            **({"chunks": self.chunks} if self.chunks > 1 else {}),  # others cut prompts after the first
            "do_lower_case": True,
            "errors": "replace",
            "add_prefix_space": False,
            **self.special,
            "added_tokens_decoder": {
                str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added
            },
        }
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "\n".join(lines) + "\n",
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
            "special_tokens_map.json": json.dumps(self.special, indent=2, ensure_ascii=False) + "\n",
        }
        beside = {name: folder / f".{name}.tmp" for name in files}
        try:
            for name, text in files.items():
                beside[name].write_text(text, encoding="utf-8")
            for name in ("tokenizer.json", "added_tokens.json"):  # another tokenizer's, which readers prefer
                (folder / name).unlink(missing_ok=True)
            for name, temporary in beside.items():
                temporary.replace(folder / name)
        finally:
            for temporary in beside.values():
                temporary.unlink(missing_ok=True)


def _byte_pairs(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: str | None
) -> tokenizers.Tokenizer:
    """CLIP's steps from text to ids, without the special tokens."""
    try:
        model = models.BPE(dict(vocab), list(merges), end_of_word_suffix=LAST, unk_token=unknown)
    except Exception as error:  # the library raises no class of its own
        raise ValueError(f"vocabulary and merges do not fit: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two parts of a merge: a string with a space in old files, a list in new ones."""
    match merge.split() if isinstance(merge, str) else merge:
        case [str(left), str(right)]:
            return left, right
    raise ValueError(f"the merge {merge!r} is not a pair of tokens")


def _read_settings(
    folder: Path, whole: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, str], list[AddedToken], dict[str, int], tuple[int, int]]:
    """Arguments of Tokenizer: the special tokens by name, added, the ids that it should have, both lengths.

    whole: the added tokens of tokenizer.json. Lengths: max_length and chunks.
    Which of the files counts is decided as transformers 5 does.
    """
    paths = [folder / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map", "added_tokens")]
    settings, special, more = (_read_json(path) if path.exists() else {} for path in paths)
    if "added_tokens_decoder" in settings:
        by_id = {int(i): _token(entry) for i, entry in settings["added_tokens_decoder"].items()}
    else:
        settings |= special  # which is right where the folder of SD 2 disagrees with itself on the padding
        by_id = {i: AddedToken(name, normalized=True) for name, i in more.items()}
        by_id |= {entry["id"]: _token(entry) for entry in whole}
    roles = {"start": ("bos_token", START), "end": ("eos_token", END), "pad": ("pad_token", END)}
    named = {role: _token(settings.get(key) or usual) for role, (key, usual) in roles.items()}
    added = {token.content: token for _, token in sorted(by_id.items())}
    added |= {token.content: token for token in named.values() if token.content not in added}
    ids = {token.content: i for i, token in by_id.items()}
    max_length = settings.get("model_max_length", MAX_LENGTH)
    if max_length > 10**9:  # transformers writes 1e30 where nobody told it
        max_length = MAX_LENGTH
    lengths = max_length, settings.get("chunks", 1)
    return {role: token.content for role, token in named.items()}, list(added.values()), ids, lengths


def _token(entry: str | Mapping[str, Any]) -> AddedToken:
    """A token of a settings file, where it is its text alone or with how to find it in a prompt."""
    fields = {"content": entry} if isinstance(entry, str) else entry
    names = ("lstrip", "rstrip", "single_word", "normalized")
    flags = {name: fields[name] for name in names if name in fields}
    return AddedToken(fields["content"], special=fields.get("special", True), **flags)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content
