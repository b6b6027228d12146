"""Prompts with weights: what is read of any text, and what a weight does to the states of its words."""

import logging
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.recipes import options
from tests.tiny import tiny_pipeline
from text_encoder import prompt as prompts
from text_encoder.prompt import (
    WEIGHTINGS,
    Part,
    chunks_of,
    encode,
    literal,
    read_weights,
    what_is_cut,
    words_of,
)

PROMPT = "a red fox in snow"
SMALL = {"num_inference_steps": 1, "output_type": "pt", "height": 24, "width": 40, "seed": 3}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def tokenizer(pipe):
    """Of 14 tokens a chunk; how many there are may be changed."""
    yield pipe.tokenizer
    pipe.tokenizer.chunks = 1


# Reading


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox", [("a fox", 1)]),
        ("", []),
        ("a (fox)", [("a ", 1), ("fox", 1.1)]),
        ("((fox))", [("fox", 1.21)]),
        ("a [fox] [[in]]", [("a ", 1), ("fox", 0.909091), (" ", 1), ("in", 0.826446)]),
        ("(red fox:1.3)", [("red fox", 1.3)]),
        ("(fox: .5 ) (in:-1) (snow:2.)", [("fox", 0.5), (" ", 1), ("in", -1), (" ", 1), ("snow", 2)]),
        ("(a (red:2) fox:0.5)", [("a ", 0.5), ("red", 1), (" fox", 0.5)]),
        (r"a \(red\) \[fox\] \\ in\ snow\\", [("a (red) [fox] \\ in snow\\", 1)]),
        (r"(\(:1.5)", [("(", 1.5)]),
        ("[(fox)]", [("fox", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.909091)]),  # crossing
        ("a: b, c:d", [("a: b, c:d", 1)]),
        ("[fox:1.3]", [("fox:1.3", 0.909091)]),  # a number belongs to round brackets
        ("(fox:1.2.3)", [("fox:1.2.3", 1.1)]),
        ("(fox:1.3", [("fox:1.3", 1.1)]),
        ("a (red [fox", [("a ", 1), ("red ", 1.1), ("fox", 1)]),
        ("a) fox:2)]", [("a) fox:2)]", 1)]),
        (  # the example of AUTOMATIC1111's own documentation
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_what_is_read(text, expected):
    assert read_weights(text).passages == [[Part(*part) for part in expected]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("(a BREAK b:2)", [[("a ", 2)], [(" b", 2)]]),
        ("a BREAK", [[("a ", 1)]]),
        ("BREAK BREAK b", [[], [(" ", 1)], [(" b", 1)]]),
        ("BREAKS break", [[("BREAKS break", 1)]]),
    ],
)
def test_break_begins_a_passage(text, expected):
    assert read_weights(text).passages == [[Part(*part) for part in passage] for passage in expected]


@pytest.mark.parametrize(
    ("text", "notices"),
    [
        (r"a (red) [fox] \( :", []),
        ("((a [b", ["3 brackets are not closed: their weight holds to the end"]),
        ("a) :2) ]", ["3 brackets close nothing: they are read as signs"]),
    ],
)
def test_odd_brackets_are_told(text, notices):
    assert read_weights(text).notices == notices


@given(st.text(max_size=60).filter(lambda text: "BREAK" not in text))
@settings(max_examples=30, deadline=None)
def test_escaped_text_is_read_as_it_is(text):
    escaped = "".join("\\" + sign if sign in "()[]\\" else sign for sign in text)
    assert read_weights(escaped).texts == [text]


@given(st.text(alphabet="ab()[]\\:.1 BREAK-", max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_is_read(text):
    prompt = read_weights(text)
    assert len("".join(prompt.texts)) <= len(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (fox:101)", "the weight of 'fox' is 101: expected -100 to 100; 0.5 to 1.5 is usual"),
        ("((fox:90):90)", "the weight of 'fox' is 8100"),
        (f"(fox:{'9' * 400})", "the weight of 'fox' is inf"),
        ("(" * 65, "more than 64 brackets \\( inside each other"),
        ("[" * 70_000, "more than 64 brackets \\[ inside each other"),
    ],
)
def test_weights_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        read_weights(text)


def test_hostile_texts_take_no_time():
    started = time.process_time()
    for part in (" ", ":", "1", "(a)", "a BREAK ", "[(", ":1", "\\", "(:1)"):
        text = part * (10_000 // len(part))
        for each in (text, "(a:" + text):
            try:
                read_weights(each)
            except ValueError:
                continue
    assert time.process_time() - started < 2


# Tokens


def test_text_without_signs_has_the_tokens_of_any_caption(tokenizer):
    for chunks in (1, 3):
        tokenizer.chunks = chunks
        for text in ("", PROMPT, "Two  blue CATS, at night. " * 4):
            filled = [[piece.token for piece in pieces] for _, pieces in chunks_of(literal(text), tokenizer)]
            assert torch.equal(tokenizer.rows(filled[:chunks])[None], tokenizer([text]).view(1, chunks, 16))
            assert what_is_cut(literal(text), tokenizer) == tokenizer.cut(text)


@torch.no_grad()
def test_every_passage_has_chunks_of_its_own(pipe, tokenizer):
    tokenizer.chunks = 4
    long = "a small green boat on a beach two blue cats at night a red fox in snow"  # two chunks
    found = pipe.encode_prompts([f"{long} BREAK a (red fox:1)"], prompt_weighting="a1111").unflatten(
        1, (4, 16)
    )
    tokenizer.chunks = 2
    assert torch.equal(found[:, :2].flatten(1, 2), pipe.encode_prompts([long]))
    expected = pipe.encode_prompts(["a red fox"]).unflatten(1, (2, 16))
    torch.testing.assert_close(found[:, 2:], expected, atol=1e-6, rtol=0)


def test_what_does_not_fit(tokenizer):
    cut = lambda text: what_is_cut(read_weights(text), tokenizer)
    assert cut("a (fox) BREAK in (snow:1.2) BREAK a boat") == "in snow BREAK a boat"
    assert cut("a (fox)" + " (red)" * 14) == "red red"
    assert cut("a fox BREAK BREAK") == "BREAK"
    assert cut("a fox BREAK") == ""


def test_words_and_their_rows(tokenizer):
    tokenizer.chunks = 2
    prompt = read_weights("a (red:1.2), zebra fox. BREAK it's snow-white")
    words = words_of(prompt, tokenizer)
    assert [word for word, _ in words] == ["a", "red", "zebra", "fox", "it's", "snow-white"]
    tokens = tokenizer.rows([[piece.token for piece in pieces] for _, pieces in chunks_of(prompt, tokenizer)])
    vocabulary = {token: name for name, token in tokenizer.vocab.items()}
    for word, rows in words:
        spelled = "".join(vocabulary[int(tokens.flatten()[row])] for row in rows)
        assert spelled.replace("</w>", "") == word
    assert len(dict(words)["zebra"]) > 1  # of several tokens
    tokenizer.chunks = 1
    assert [word for word, _ in words_of(prompt, tokenizer)] == ["a", "red", "zebra", "fox"]  # others are cut


# Weights


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_one_change_no_bit(pipe, weighting):
    plain = pipe(PROMPT, negative_prompt="blue (cat)", **SMALL).images
    same = {"negative_prompt": r"blue \(cat\)", "prompt_weighting": weighting}
    assert torch.equal(pipe("a (red:1) [(fox)] in snow", **same, **SMALL).images, plain)
    other = pipe("a (red:1.6) fox in snow", **same, **SMALL).images
    assert not torch.equal(other, plain)
    assert other.isfinite().all()


def test_the_weightings_are_their_formulas():
    states, empty = torch.randn(2, 5, 8) + 0.5, torch.randn(5, 8)
    weights = torch.ones(2, 5, 1)
    weights[1, 2], weights[1, 3] = 1.5, 0.0
    scaled, moved = (WEIGHTINGS[name](states, weights, empty) for name in ("a1111", "comfy"))
    torch.testing.assert_close(scaled.mean((1, 2)), states.mean((1, 2)))  # of each chunk
    ratio = scaled[1] / states[1]
    torch.testing.assert_close(ratio[2] / ratio[0], torch.full((8,), 1.5))
    torch.testing.assert_close(moved[1, 2], empty[2] + 1.5 * (states[1, 2] - empty[2]))
    assert torch.equal(moved[1, 3], empty[3])
    for weighted in (scaled, moved):  # a chunk without weights is not touched
        torch.testing.assert_close(weighted[0], states[0], rtol=1e-6, atol=1e-6)
    centred = states - states.mean((1, 2), keepdim=True)
    torch.testing.assert_close(WEIGHTINGS["a1111"](centred, weights, empty), centred * weights)


@torch.no_grad()
def test_a_weight_acts_on_the_tokens_of_its_words_alone(pipe, tokenizer):
    tokenizer.chunks = 2
    run = lambda text: encode(pipe.text_encoder, tokenizer, text, "comfy")[0]
    weighted, plain = run("a red fox BREAK in (snow:0)"), run("a red fox BREAK in snow")
    _, (row,) = words_of(read_weights("a red fox BREAK in snow"), tokenizer)[-1]
    differ = (weighted != plain).any(1).nonzero().flatten()
    assert differ.tolist() == [row] == [16 + 2]
    assert torch.equal(weighted[row], run("")[2])


def test_the_names_are_known_without_torch():
    assert list(WEIGHTINGS) == list(options.WEIGHTINGS)
    with pytest.raises(
        ValueError, match="prompt_weighting='compel' is unknown: expected one of a1111, comfy"
    ):
        options.check_weighting("compel")
    with pytest.raises(ValueError, match="chunks=0: expected 1 to 64 times what the text encoder reads"):
        options.check_chunks(0)


# What is told of prompts, and contexts in their place


def test_what_has_no_effect_is_returned_and_told_once(caplog):
    pipe = tiny_pipeline()
    asked = {"negative_prompt": "fog " * 20, "prompt_weighting": "a1111", **SMALL}
    with caplog.at_level(logging.WARNING):
        first = pipe([PROMPT, "a ((fox"], **asked)
        told = len(caplog.records)
        again = pipe([PROMPT, "a ((fox"], **asked)
    assert first.notices == again.notices == [record.getMessage() for record in caplog.records]
    assert told == len(caplog.records) == 2
    assert first.notices[0] == "2 brackets are not closed: their weight holds to the end: a ((fox"
    assert "the negative prompt is too long; this end of it has no effect: fog fog" in first.notices[1]
    assert first.cut == ["", ""]
    assert pipe(PROMPT, **SMALL).notices == []
    for prompt, call, message in (
        ("fox " * 20, {}, "the prompt is too long; this end of it has no effect: fox"),
        ("a (fox", {"prompt_weighting": "a1111"}, "1 brackets are not closed"),
        (
            PROMPT,
            {"negative_prompt": "fog", "guidance_scale": 1},
            "the negative prompt has no effect without",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(prompt, strict=True, **call, **SMALL)
    assert pipe("a (fox", strict=True, **SMALL).notices == []  # literal


def test_contexts_in_the_place_of_prompts_make_the_same_picture(pipe):
    asked = [PROMPT, "a (blue:1.4) cat"], {"negative_prompt": "fog", "prompt_weighting": "comfy"}
    embeds, negative = pipe.encode_prompt(asked[0], num_images_per_prompt=2, **asked[1])
    assert embeds.shape == negative.shape == (4, 16, 24)
    images = pipe(asked[0], num_images_per_prompt=2, **asked[1], **SMALL).images
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(pipe(**given, **SMALL).images, images)
    assert torch.equal(pipe.encode_prompt(**given)[0], embeds)
    embeds, negative = pipe.encode_prompt("a cat", "cpu", 1, False, clip_skip=1)
    assert negative is None
    assert torch.equal(embeds, pipe.encode_prompts(["a cat"], clip_skip=1))
    longer = torch.randn(1, 40, 24)  # of another program, such as compel, for as many tokens as it likes
    assert pipe(prompt_embeds=longer, negative_prompt_embeds=longer, **SMALL).images.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": PROMPT, "prompt_embeds": torch.zeros(1, 16, 24)}, "give either prompt or prompt_embeds"),
        (
            {"prompt": PROMPT, "negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 16, 24)},
            "give either negative_prompt or negative_prompt_embeds",
        ),
        (
            {"prompt_embeds": torch.zeros(2, 16, 23)},
            r"prompt_embeds has shape \(2, 16, 23\): expected \(B, N, 24\)",
        ),
        (
            {"prompt_embeds": torch.zeros(2, 16, 24), "negative_prompt_embeds": torch.zeros(3, 16, 24)},
            r"negative_prompt_embeds has shape \(3, 16, 24\): expected \(2, 16, 24\)",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 40, 24)},
            "negative_prompt has 16 tokens, the other embeddings 40: give negative_prompt_embeds",
        ),
        ({"prompt": PROMPT, "prompt_weighting": "A1111"}, "prompt_weighting='A1111' is unknown"),
    ],
)
def test_contexts_that_cannot_be(pipe, call, message):
    for use in (pipe, pipe.encode_prompt):
        with pytest.raises(ValueError, match=message):
            use(**call)


def test_the_syntax_is_that_of_the_docstring():
    for sign in ("(word)", "(some words:1.3)", "[word]", "BREAK"):
        assert sign in prompts.__doc__
