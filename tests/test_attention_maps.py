"""Heat of words: the formula of attention, beside the picture and not in it."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.drawing.attention_maps import Watcher, WordMap, attention_sheet, level_size, over, watched
from ldm.model.attention import CrossAttention, SelfAttention
from ldm.model.context import Context
from tests.tiny import tiny_pipeline

PROMPTS = ["a red fox in snow", "two blue cats at night"]
SMALL = {"num_inference_steps": 2, "output_type": "pt", "height": 20, "width": 28, "seed": 3}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_the_pictures_are_the_same_and_the_heats_sum_to_one(pipe):
    images = pipe(PROMPTS[0], negative_prompt=PROMPTS[1], **SMALL).images
    twin, watcher = watched(pipe)
    assert torch.equal(twin(PROMPTS[0], negative_prompt=PROMPTS[1], **SMALL).images, images)
    heats = watcher.heat(0, [[row] for row in range(16)], 20, 28)
    assert heats.shape == (16, 20, 28)
    assert heats.min() >= 0
    torch.testing.assert_close(heats.sum(0), torch.ones(20, 28))
    assert heats.std((1, 2)).max() > 1e-4  # not the same everywhere
    assert watcher.layers == 2 * 4  # steps, layers: one down, one in the middle, two up
    (words,) = pipe.attention_maps(PROMPTS[0], negative_prompt=PROMPTS[1], **SMALL).maps
    assert [word for word, _ in words] == PROMPTS[0].split()
    torch.testing.assert_close(torch.stack([heat for _, heat in words[:2]]), heats[1:3], atol=1e-6, rtol=0)


def test_heat_is_the_formula_of_the_prompts_alone():
    """Of a layer with two texts for each latent the last ones: softmax(q k^T / sqrt(D)) in every head."""
    layer, own = CrossAttention(24, 10, heads=3), SelfAttention(24, heads=3)
    xt, text = torch.randn(2, 24, 5, 3), torch.randn(4, 7, 10)
    tokens = xt.flatten(2).mT

    def unet(xt, t, context):
        assert torch.equal(own(tokens, context), own(tokens, None))
        return layer(tokens, context)

    watcher, run = Watcher(unet), Context(text)
    with torch.no_grad():
        answers = [watcher(xt, torch.zeros(2), run) for _ in range(2)]
        assert all(torch.equal(answer, layer(tokens, text)) for answer in answers)
        q, k = layer.to_q(tokens).double(), layer.to_k(text[2:]).double()
        scores = [a @ b.mT / 8**0.5 for a, b in zip(q.chunk(3, -1), k.chunk(3, -1), strict=True)]
        expected = torch.stack([score.softmax(-1) for score in scores]).mean(0)  # (2, 15, 7)
    assert watcher.layers == 2
    for image in range(2):
        heat = watcher.heat(image, [[0], [4, 6]], 5, 3)
        torch.testing.assert_close(heat[0], expected[image, :, 0].view(5, 3).float())
        torch.testing.assert_close(heat[1], expected[image, :, [4, 6]].sum(1).view(5, 3).float())


def test_heat_does_not_depend_on_the_batch(pipe):
    together = pipe.attention_maps(PROMPTS, **SMALL | {"seed": [3, 8]})
    for prompt, seed, image, words in zip(PROMPTS, (3, 8), *together[0][:1], together.maps, strict=True):
        alone = pipe.attention_maps(prompt, **SMALL | {"seed": seed})
        torch.testing.assert_close(alone.output.images[0], image, atol=1e-5, rtol=0)
        for (word, heat), (other, expected) in zip(words, alone.maps[0], strict=True):
            assert word == other
            torch.testing.assert_close(heat, expected, atol=1e-5, rtol=0)


def test_every_image_has_the_words_of_its_prompt(pipe):
    call = {
        "num_images_per_prompt": 2,
        "guidance_scale": 1,
        "prompt_weighting": "comfy",
        "sampler": "euler_a",
    }
    output, maps = pipe.attention_maps(["a (fox:1.3)", "", "the " * 9 + "end of a night"], **call, **SMALL)
    assert len(output.images) == len(maps) == 6
    assert [[word for word, _ in words] for words in maps[:4]] == [["a", "fox"]] * 2 + [[]] * 2
    assert {heat.shape for words in maps for _, heat in words} == {(20, 28)}


def test_a_pipeline_is_not_changed_by_being_watched(pipe):
    before = dict(vars(pipe))
    twin, watcher = watched(pipe)
    twin(PROMPTS[0], **SMALL)
    assert vars(pipe) == before
    watcher.forget()
    with pytest.raises(ValueError, match="no layer of this UNet looks at the tokens"):
        watcher.heat(0, [[1]], 20, 28)
    other = copy.copy(twin)
    assert other.unet is pipe.unet


@pytest.mark.parametrize(
    ("pixels", "size", "expected"),
    [
        (63, (9, 7), (9, 7)),
        (20, (9, 7), (5, 4)),
        (12, (9, 7), (4, 3)),
        (6, (9, 7), (3, 2)),
        (1, (9, 7), (1, 1)),
    ],
)
def test_sizes_of_levels(pixels, size, expected):
    assert level_size(pixels, *size) == expected


def test_sheets():
    image = Image.new("RGB", (200, 100), "white")
    heat = torch.zeros(100, 200)
    heat[:, 150:] = 0.3
    shown = np.asarray(over(image, heat), int)
    assert shown[50, 20].tolist() == [115] * 3  # cold: a dark grey
    assert shown[50, 180].tolist() == [255] * 3  # hot: white
    words = [WordMap(word, heat) for word in ("fox", "a-very-long-word-that-has-no-room", "狐狸", "\n")]
    assert attention_sheet([image], [words]).size == (3 * 204 - 4, 2 * 132 - 4)
    assert attention_sheet([image] * 2, [words] * 2).size == (5 * 204 - 4, 2 * 132 - 4)
    assert attention_sheet([image], [[]]).size == (200, 128)
    small = Image.new("RGB", (24, 16))
    assert attention_sheet([small], [[]]).width == 24 * 7
