"""SDXL: the pictures of stock diffusers on the same weights, in and out of a folder, and what it refuses."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.model.context import Context
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Framing
from ldm.recipes.requests import Request
from tests.tiny import tiny_pipeline, tiny_xl_pipeline
from text_encoder.tokenizer import Tokenizer

PROMPT, NEGATIVE = "a red fox in snow", "two blue cats"
ODD = {"num_inference_steps": 3, "height": 24, "width": 40}
MODELS = ("vae", "text_encoder", "text_encoder_2", "unet")


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny_xl_pipeline()


@pytest.fixture(scope="module")
def plain() -> LatentDiffusionPipeline:
    """Not an SDXL."""
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny-xl"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(saved):
    """What stock diffusers makes of our folder, by the folder's own word."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(saved)
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: LatentDiffusionPipeline, **options: object) -> torch.Tensor:
    return pipe(**{"prompt": PROMPT, "seed": 3, "output_type": "pt", **ODD, **options}).images


@pytest.mark.parametrize(
    "options",
    [
        {},  # the negative prompt is zeros
        {"negative_prompt": NEGATIVE, "num_images_per_prompt": 2},
        {"negative_prompt": "", "prompt": [PROMPT, NEGATIVE], "guidance_scale": 3.0, "clip_skip": 1},
        {"original_size": (9, 99), "crops_coords_top_left": (4, 2), "target_size": (32, 16), "height": 32},
        {"guidance_scale": 1.0},
    ],
    ids=["nothing against", "two images", "two prompts", "framed", "unguided"],
)
def test_pictures_are_those_of_stock_diffusers(pipe, stock, options):
    options = {"prompt": PROMPT, **ODD, **options}
    count = options.get("num_images_per_prompt", 1) * (2 if isinstance(options["prompt"], list) else 1)
    latents: list[torch.Tensor] = []

    def watch(pipeline, step, t, tensors):
        latents.append(tensors["latents"].clone())
        return {}

    generators = [torch.Generator().manual_seed(5 + i) for i in range(count)]
    theirs = stock(**options, generator=generators, output_type="pt", callback_on_step_end=watch).images
    ours = picture(pipe, **options, seed=5, callback_on_step_end=watch)
    assert theirs.std() > 0.05  # not a grey sheet
    assert (ours - theirs).abs().max() < 1 / 255
    expected, found = latents[2], latents[-1]  # at the data both count in the same units
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
def test_what_stock_diffusers_saves_loads_here(pipe, stock, saved, tmp_path):
    stock.save_pretrained(tmp_path)
    for folder in (tmp_path, saved):
        loaded = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        assert loaded.defaults == pipe.defaults
        assert loaded.defaults.guidance_scale == 5.0
        torch.testing.assert_close(picture(loaded), picture(pipe), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_twins_share_their_weights(pipe):
    twin = pipe.to_diffusers()
    twin.set_progress_bar_config(disable=True)
    back = LatentDiffusionPipeline.from_diffusers(twin)
    for name in MODELS:
        pointers = [
            {tensor.data_ptr() for tensor in getattr(each, name).state_dict().values()}
            for each in (pipe, twin, back)
        ]
        assert pointers[0] == pointers[1] == pointers[2]
    assert torch.equal(picture(back), picture(pipe))
    theirs = twin(PROMPT, generator=torch.Generator().manual_seed(3), output_type="pt", **ODD).images
    torch.testing.assert_close(theirs, picture(pipe), atol=1e-4, rtol=0)


def test_the_empty_prompt_is_told_as_it_was_in_training(pipe, tmp_path):
    """Zeros stand for no prompt, not for the empty one; a model that was not trained so says it."""
    nothing, empty = (pipe.encode_prompts([prompt]) for prompt in (None, ""))
    assert not any(part.any() for part in (nothing.embeddings, nothing.pooled))
    assert empty.embeddings.any()
    other = LatentDiffusionPipeline(**pipe.components | {"force_zeros_for_empty_prompt": False})
    assert torch.equal(other.encode_prompts([None]).pooled, empty.pooled)
    assert torch.equal(picture(other), picture(pipe, negative_prompt=""))
    other.save_pretrained(tmp_path)
    assert not LatentDiffusionPipeline.from_pretrained(tmp_path).force_zeros_for_empty_prompt
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": "no"}))
    with pytest.raises(ValueError, match="force_zeros_for_empty_prompt='no': expected true or false"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    """Nor on whether its mates have a negative prompt."""
    requests = [
        Request(prompt=PROMPT, seed=3, steps=3, width=40, height=24, negative_prompt=negative)
        for negative in (None, NEGATIVE)
    ]
    together = [drawn for _, drawn in pipe.each(requests, batch_size=2)]
    for request, drawn in zip(requests, together, strict=True):
        alone = picture(pipe, negative_prompt=request.negative_prompt, output_type="pil")[0]
        difference = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).int()
        difference -= torch.frombuffer(bytearray(alone.tobytes()), dtype=torch.uint8)
        assert difference.abs().max() <= 1


def test_what_is_encoded_stands_for_prompts(pipe):
    told = {
        "prompt": None,
        "prompt_embeds": pipe.encode_prompts([PROMPT], clip_skip=1),
        "negative_prompt_embeds": pipe.encode_prompts([NEGATIVE]),
    }
    expected = picture(pipe, negative_prompt=NEGATIVE, clip_skip=1)
    assert torch.equal(picture(pipe, **told), expected)
    with pytest.raises(ValueError, match=r"of 20 channels .*, and here none: give what encode_prompts gives"):
        picture(pipe, **told | {"prompt_embeds": told["prompt_embeds"].embeddings})


def test_a_long_prompt_in_chunks_is_pooled_by_its_first(pipe):
    tokenizers = {
        name: Tokenizer(each.vocab, each.merges, pad=each.special["pad_token"], max_length=16, chunks=2)
        for name, each in (("tokenizer", pipe.tokenizer), ("tokenizer_2", pipe.tokenizer_2))
    }
    longer = LatentDiffusionPipeline(**pipe.components | tokenizers)
    one, two = (each.encode_prompts([PROMPT]) for each in (pipe, longer))
    assert two.embeddings.shape == (1, 32, 56)
    torch.testing.assert_close(two.embeddings[:, :16], one.embeddings)
    torch.testing.assert_close(two.pooled, one.pooled)
    longer.tokenizer_2.chunks = 1
    with pytest.raises(ValueError, match="tokenizer gives 32 tokens a prompt and tokenizer_2 16"):
        picture(longer)


def test_every_model_moves(pipe):
    moved = copy.deepcopy(pipe).to(torch.float64)
    for name in MODELS:
        assert {weight.dtype for weight in getattr(moved, name).parameters()} == {torch.float64}


def test_parts_that_do_not_fit_each_other(pipe, plain):
    second = pipe.text_encoder_2
    wide = type(second)(replace(second.config, hidden_size=34))
    with pytest.raises(
        ValueError, match=r"text_encoder.hidden_size \+ text_encoder_2.hidden_size differ: 56"
    ):
        LatentDiffusionPipeline(**pipe.components | {"text_encoder_2": wide})
    narrow = type(second)(replace(second.config, projection_dim=19))
    with pytest.raises(ValueError, match=r"pooled channels that unet takes .* differ: 20 and 19"):
        LatentDiffusionPipeline(**pipe.components | {"text_encoder_2": narrow})
    with pytest.raises(ValueError, match=r"text_encoder_2 and tokenizer_2 are CLIPTextEncoder, NoneType"):
        LatentDiffusionPipeline(
            **pipe.components | {"text_encoder_2": pipe.text_encoder, "tokenizer_2": None}
        )
    with pytest.raises(ValueError, match="differ: 20 and 0"):
        LatentDiffusionPipeline(**plain.components | {"unet": wide_context(pipe)})
    with pytest.raises(ValueError, match="projection_dim=None"):
        type(second)(replace(second.config, projection_dim=None))


def wide_context(pipe):
    """Its UNet as for the one text encoder of tiny_pipeline."""
    return type(pipe.unet)(replace(pipe.unet.config, cross_attention_dim=24))


def test_what_cannot_be(pipe, plain):
    with pytest.raises(ValueError, match=r"clip_skip=2: text encoders of 2 layers take 0 to 1"):
        picture(pipe, clip_skip=2)
    with pytest.raises(ValueError, match=r"original_size=\(3, 4\) is for SDXL"):
        picture(plain, original_size=(3, 4))
    for value in ((3,), (3.5, 2), (-1, 2), 7):
        with pytest.raises(ValueError, match=r"target_size=.*expected two whole numbers of pixels"):
            Framing(target_size=value)
    pooled_of_another = Context(torch.randn(1, 16, 56), torch.randn(1, 21))
    with pytest.raises(ValueError, match="and here one of 21 channels"):
        picture(pipe, prompt=None, prompt_embeds=pooled_of_another)
