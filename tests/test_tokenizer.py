"""Our CLIP tokenizer against transformers' CLIPTokenizer, on any text; and training one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from text_encoder.tokenizer import BYTES, END, LAST, START, Tokenizer

ROOT = Path(__file__).parents[1]
CAPTIONS = [
    f"{count} {size} {colour} {subject} {place}"
    for count in ("a", "two", "three")
    for size in ("small", "big")
    for colour in ("red", "blue", "orange")
    for subject in ("fox", "foxes", "cat", "boat")
    for place in ("in snow", "on a beach", "at night", "under the sea, far away", "that isn't here!")
]
NASTY = [
    "",
    " ",
    "...!?!---",
    "a\x00b\x07\x1b[31m\x7f",
    "\t\n\r\x0b\x0c\u2028\u00a0\u3000tab",
    "ﬁne CAFÉ café cafe\u0301 İstanbul STRASSE ẞ ΣΑΣ",
    "🦊❄️ 👩‍👩‍👧‍👦 🇨🇭 \U0010ffff",
    "赤い狐 في الثلج лиса снег हिन्दी",
    "it's we're I'VE don't ''s 'LL 'd'm",
    "1234567890 3.14 ²½Ⅷ",
    "((a, [b:1.3]) {c|d} \\( __x__",
    "<|startoftext|> <|ENDOFTEXT|><|endoftext|>x </w> <cat-toy>",
    "snow! SNOW!!",
    "x" * 3000,
    "\ufeff\ufffd\ue000\u200b\u200d",
]
text = st.one_of(
    st.text(max_size=60),
    st.text(st.sampled_from("aAxé'stve 1!<|>/w\u0301\n🦊.ß"), max_size=60),
    st.lists(st.sampled_from([*CAPTIONS[0].split(), "it's", START, END, "!", "<cat-toy>", "\u00a0"])).map(
        " ".join
    ),
)
FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def stock_tokens(stock: transformers.CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """What diffusers' StableDiffusionPipeline does with a prompt."""
    length = stock.model_max_length
    return stock(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=576)


def rewrite(folder: Path, kind: str) -> None:
    """A folder as Tokenizer.save writes it, made into one as others write it."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocab_size = len(json.loads((folder / "vocab.json").read_text()))
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    special = {role: {"content": name, **FLAGS} for role, name in special.items()}
    del config["added_tokens_decoder"]
    if kind == "SD 1":  # transformers 4.2x, its tokenizer in Python
        (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": END}))
        config |= {role: entry | {"__type": "AddedToken"} for role, entry in special.items()}
    if kind == "SD 2":  # the same, but the two files disagree about the padding
        (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "!"}))
    if kind == "textual inversion":
        (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": END}))
        (folder / "added_tokens.json").write_text(
            json.dumps({"<cat-toy>": vocab_size, "<My-Style>": vocab_size + 1})
        )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if kind.startswith("transformers 5"):
        stock = transformers.CLIPTokenizer.from_pretrained(folder)
        if kind.endswith("inversion"):
            stock.add_tokens(["<cat-toy>"])
        for file in folder.iterdir():
            file.unlink()
        stock.save_pretrained(folder)


KINDS = ["ours", "SD 1", "SD 2", "textual inversion", "transformers 5", "transformers 5, textual inversion"]
ODD_LENGTH = 41


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> tuple[Tokenizer, transformers.CLIPTokenizer]:
    """Ours and transformers', of the same folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(CAPTIONS, vocab_size=576, max_length=ODD_LENGTH).save(folder)
    if request.param != "ours":
        rewrite(folder, request.param)
    return Tokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder)


# Parity


def test_special_tokens_and_size_are_those_of_transformers(pair):
    ours, stock = pair
    ids = (ours.start_id, ours.end_id, ours.pad_id, len(ours), ours.max_length)
    assert ids == (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id, len(stock), ODD_LENGTH)


def test_nasty_prompts_have_the_tokens_of_transformers(pair):
    ours, stock = pair
    tokens = ours(NASTY)
    assert tokens.shape == (len(NASTY), ODD_LENGTH)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, stock_tokens(stock, NASTY))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=text)
def test_any_prompt_has_the_tokens_of_transformers(pair, prompt):
    ours, stock = pair
    assert torch.equal(ours([prompt]), stock_tokens(stock, [prompt]))


def test_what_is_read_and_saved_again_stays_the_same(pair, tmp_path):
    ours, _ = pair
    ours.save(tmp_path)
    again, stock = Tokenizer.from_folder(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again(NASTY), ours(NASTY))
    assert torch.equal(stock_tokens(stock, NASTY), ours(NASTY))


def test_transformers_reads_the_first_chunk_of_a_tokenizer_of_several(pair, tmp_path):
    ours = Tokenizer(pair[0].vocab, pair[0].merges, chunks=2)
    ours.save(tmp_path)
    again, stock = Tokenizer.from_folder(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert again.chunks == 2
    assert torch.equal(stock_tokens(stock, NASTY), again(NASTY)[:, 0])
    stock.save_pretrained(tmp_path / "stock")
    assert torch.equal(Tokenizer.from_folder(tmp_path / "stock")(NASTY)[:, 0], again(NASTY)[:, 0])


@pytest.mark.skipif(
    "LDM_CLIP_VOCAB" not in os.environ, reason="LDM_CLIP_VOCAB does not name CLIP's vocabulary"
)
def test_the_vocabulary_of_clip():
    folder = os.environ["LDM_CLIP_VOCAB"]
    ours, stock = Tokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    assert ours(["a red fox in snow"])[0, :7].tolist() == [49406, 320, 736, 3240, 530, 2583, 49407]
    assert len(ours) == 49408
    assert torch.equal(ours(NASTY + CAPTIONS), stock_tokens(stock, NASTY + CAPTIONS))


# Behaviour


def test_a_prompt_is_start_text_end_and_padding(tokenizer):
    tokens = tokenizer(["a red fox in snow", ""])
    assert tokens.shape == (2, 77)
    assert tokens[0, 0] == tokens[1, 0] == tokenizer.start_id == len(tokenizer) - 2
    assert (tokens[1, 1:] == tokenizer.end_id).all()
    words = [f"{word}{LAST}" for word in ("a", "red", "fox", "in", "snow")]
    assert tokens[0, 1:6].tolist() == [tokenizer.vocab[word] for word in words]


def test_no_prompts_are_no_tokens(tokenizer):
    assert tokenizer([]).shape == (0, 77)


@given(prompt=text)
@example("x" * 400)
@example("🦊" * 80)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_tail_is_cut_from_the_prompt_as_written(tokenizer, prompt):
    prompt = f"{prompt} {prompt}"
    tail = tokenizer.cut(prompt)
    assert prompt.endswith(tail)
    shorter = prompt.removesuffix(tail)
    assert tokenizer.cut(shorter) == ""
    if not tail:
        assert (tokenizer([prompt])[0, -1] == tokenizer.end_id).all()


def test_ten_thousand_words_are_cut_after_75_tokens_in_a_moment(tokenizer):
    prompt = "Red fox " * 5000
    start = time.process_time()  # of this process alone: the machine may be busy
    assert tokenizer.cut(prompt) == prompt[75 // 2 * 8 + 4 :]
    tokens = tokenizer([prompt])[0]
    assert time.process_time() - start < 2
    assert tokens[-1] == tokenizer.end_id
    assert (tokens[:-1] != tokenizer.end_id).all()


@given(prompt=st.text(max_size=40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_is_unknown_and_none_is_lost(tokenizer, prompt):
    """Every byte has a token, so the tokens spell the normalised text, white space aside."""
    names = {i: name for name, i in tokenizer.vocab.items()}
    spelled = "".join(names[i] for i in tokenizer._encode(prompt).ids).replace(LAST, "")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    text = bytes(order[BYTES.index(letter)] for letter in spelled).decode()
    assert text == tokenizer._backend.normalizer.normalize_str(prompt).replace(" ", "")


def test_a_tokenizer_crosses_to_another_process(tokenizer):
    import pickle

    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(NASTY), tokenizer(NASTY))


# Training


def test_training_gives_the_vocabulary_asked_for_in_the_order_of_clip(tokenizer):
    assert len(tokenizer) == 576 == len(set(tokenizer.vocab.values()))
    ids = [tokenizer.vocab[name] for name in ("!", "~", f"!{LAST}", START, END)]
    assert ids == [0, 93, 256, 574, 575]
    assert [tokenizer.vocab["".join(pair)] for pair in tokenizer.merges] == list(range(512, 574))


def test_frequent_words_become_one_token(tokenizer):
    ids = tokenizer._encode("two big orange foxes at night").ids
    assert len(ids) == 6


def test_training_keeps_to_the_size_asked_for_and_merges_the_most_frequent_first(tokenizer):
    smaller = Tokenizer.train(CAPTIONS, vocab_size=530)
    assert len(smaller) == 530
    assert smaller.merges == tokenizer.merges[:16]


def test_training_stops_when_no_pair_comes_twice():
    assert len(Tokenizer.train(["fox"], vocab_size=576)) == 514
    assert len(Tokenizer.train([], vocab_size=514)) == 514
    assert Tokenizer.train(["fox", "Fox"], vocab_size=576).merges == [("f", "o"), ("fo", f"x{LAST}")]


@pytest.mark.slow
def test_the_same_captions_give_the_same_files_in_any_order_and_process(tmp_path):
    """The other process shows, too, that no slow library is imported."""
    code = (
        "import sys, json; from text_encoder.tokenizer import Tokenizer\n"
        "Tokenizer.train(json.load(sys.stdin), vocab_size=800).save(sys.argv[1])\n"
        "assert not {'transformers', 'diffusers', 'huggingface_hub'} & sys.modules.keys()"
    )
    # Many pairs of equal frequency, so that the order of ties decides.
    captions = [f"{a}{b}{c} {c}{a}" for a in "abcdefgh" for b in "mnopqé" for c in "xyz🦊"]
    Tokenizer.train(captions, vocab_size=800).save(tmp_path / "here")
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    subprocess.run(command, input=json.dumps(captions[::-1]), text=True, check=True, cwd=ROOT)
    files = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert files == ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    for name in files:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


# Errors


def test_one_string_for_a_list_of_prompts(tokenizer):
    with pytest.raises(ValueError, match="prompts='a fox' is one string: pass a list"):
        tokenizer("a fox")


@pytest.mark.parametrize("prompt", ["caf\udce9", 5, None, b"fox"])
def test_prompts_that_are_no_text(tokenizer, prompt):
    with pytest.raises(ValueError, match="is not a string of valid Unicode"):
        tokenizer([prompt])
    with pytest.raises(ValueError, match="is not a string of valid Unicode"):
        tokenizer.cut(prompt)


def test_a_vocabulary_without_room_for_the_bytes():
    with pytest.raises(ValueError, match="vocab_size=513: bytes and special tokens are 514"):
        Tokenizer.train(CAPTIONS, vocab_size=513)


def test_a_length_without_room_for_start_and_end(tokenizer):
    with pytest.raises(ValueError, match="max_length=1"):
        Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=1)


def test_a_special_token_that_the_vocabulary_lacks(tokenizer):
    with pytest.raises(ValueError, match="the pad_token '<pad>' is not in the vocabulary"):
        Tokenizer(tokenizer.vocab, tokenizer.merges, pad="<pad>")
    assert (
        Tokenizer(tokenizer.vocab, tokenizer.merges, pad="<pad>", added=[AddedToken("<pad>")]).pad_id == 576
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", None, "no tokenizer in .*: expected vocab.json and merges.txt, or tokenizer.json"),
        ("vocab.json", "{broken", "vocab.json is not JSON"),
        ("vocab.json", "[]", "vocab.json holds a list, expected an object"),
        ("vocab.json", "{}", "vocab.json.* do not fit"),
        ("vocab.json", '{"a": "b"}', "vocab.json.* do not fit"),
        ("merges.txt", "f o o\n", "the merge 'f o o' is not a pair of tokens"),
        ("merges.txt", "q zzz\n", "vocab.json.* do not fit"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', None),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"576": {}}}',
            "settings file beside it: 'content'",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"700": {"content": "<x>"}}}',
            "'<x>' cannot have the id 700",
        ),
        ("tokenizer_config.json", '{"model_max_length": "long"}', "settings file beside it"),
        ("special_tokens_map.json", '{"bos_token": "<s>"}', None),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "tokenizer.json is not a CLIP tokenizer's"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}',
            "tokenizer.json.* cannot have the id",
        ),
    ],
)
def test_broken_folders_are_refused_by_file(tokenizer, tmp_path, file, content, message):
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    if message:
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(tmp_path)
    else:  # the other settings file, of more weight, is whole
        assert len(Tokenizer.from_folder(tmp_path)) == 576


def test_a_full_disk_leaves_the_tokenizer_that_was_there(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full(path, text, **options):
        if "merges" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        Tokenizer.train(CAPTIONS, vocab_size=560).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
