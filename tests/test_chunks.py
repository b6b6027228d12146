"""Prompts longer than the text encoder, in chunks: the same in training and in the pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import save_model
from ldm.pipeline import LatentDiffusionPipeline
from tests.test_contrastive import RECIPE, pairs
from tests.test_fit import TEXT, VAE, diffusion_recipe, latents
from tests.tiny import CAPTIONS
from text_encoder.tokenizer import Tokenizer
from train.fit.loop import fit
from train.tasks.contrastive import Contrastive
from train.tasks.diffusion import LatentDiffusion
from train.tasks.text import TextConfig, build_text_encoder, length_table, text_facts

SHORT, LONG = "a red fox", "a small green boat on a beach two blue cats at night a red fox in snow"
SMALL = {"height": 16, "width": 16, "num_inference_steps": 1}


def split(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """The parts of a prompt of which each fills one chunk."""
    tail = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=tokenizer.max_length).cut(prompt)
    return [prompt] if not tail else [prompt[: -len(tail)], *split(tokenizer, tail)]


@torch.no_grad()
def test_every_chunk_has_the_states_that_its_part_has_alone(tiny_pipeline):
    """Of a short caption in a batch with a long one the first chunk, and those of the long one too."""
    tokenizer, encoder = tiny_pipeline.tokenizer, tiny_pipeline.text_encoder
    parts = split(tokenizer, LONG)
    assert len(parts) == 2
    alone = [encoder(tokenizer([prompt])) for prompt in (SHORT, *parts, "")]
    tokenizer.chunks = 3
    tokens = tokenizer([SHORT, LONG])
    assert tokens.shape == (2, 3, 16)
    short, long = encoder(tokens).unflatten(1, (3, 16))
    assert torch.equal(tokenizer([SHORT]), tokens[:1])  # whatever else is in the batch
    for chunk, want in zip([*short, *long], [alone[0], alone[3], alone[3], *alone[1:]], strict=True):
        torch.testing.assert_close(chunk[None], want)
    assert tokenizer.cut(LONG) == ""
    tokenizer.chunks = 1
    assert torch.equal(tokenizer([LONG]), tokens[1:, 0])
    assert parts[1] == tokenizer.cut(LONG)


def test_the_pipeline_reads_as_many_chunks_as_its_model_says(tiny_pipeline, tmp_path, caplog):
    alone = [tiny_pipeline.encode_prompts([part]) for part in split(tiny_pipeline.tokenizer, LONG)]
    plain = tiny_pipeline(LONG, seed=3, output_type="np", **SMALL)
    assert plain.cut[0]
    tiny_pipeline.tokenizer.chunks = 2
    torch.testing.assert_close(tiny_pipeline.encode_prompts([LONG]), torch.cat(alone, dim=1))
    tiny_pipeline.save_pretrained(tmp_path)
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert pipe.tokenizer.chunks == 2
    caplog.clear()
    whole = pipe([LONG, SHORT], negative_prompt="blue", seed=3, output_type="np", **SMALL)
    assert whole.cut == ["", ""]
    assert not caplog.text
    assert abs(whole.images[0] - plain.images[0]).max() > 1e-4
    alone = pipe(SHORT, negative_prompt="blue", seed=4, output_type="np", **SMALL)
    assert whole.images[1] == pytest.approx(alone.images[0], abs=1e-5)  # whatever its batch


@pytest.mark.slow
def test_a_model_trained_with_chunks_says_so(tmp_path):
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "autoencoder")
    text = replace(TEXT, chunks=2)
    recipe = diffusion_recipe(tmp_path / "run", steps=4, text_encoder=text)
    task = LatentDiffusion(recipe, tmp_path / "autoencoder", latents())
    fit(task, recipe)
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    assert pipe.tokenizer.chunks == 2
    assert pipe.encode_prompts([SHORT]).shape == (1, 32, 24)
    encoder, tokenizer = build_text_encoder(TextConfig(path=str(tmp_path / "run/model")), [])
    assert tokenizer.chunks == 2  # what the folder says, unless the recipe says another
    one, two = (text_facts(TEXT, encoder, tokenizer) for tokenizer.chunks in (1, 2))
    assert one["tokenizer"] != two["tokenizer"]  # so a run is not gone on with
    contrastive = replace(RECIPE, text_encoder=text)
    with pytest.raises(ValueError, match=r"text_encoder\.chunks=2: captions are compared by one chunk"):
        Contrastive(contrastive, tmp_path / "autoencoder", pairs())


def test_how_long_captions_are_is_told():
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=600, max_length=16)
    captions = ["", *[SHORT] * 3, CAPTIONS[2], LONG, " ".join([LONG] * 4)]
    assert tokenizer.lengths(captions) == [0, 3, 3, 3, 7, 17, 68]
    table = length_table(tokenizer, captions).split("\n")
    assert [line.split()[-1] for line in table[1:-1]] == ["5", "0", "0", "1", "0", "1"]
    assert [line.split()[0] for line in table[1:-1]] == ["8", "14", "16", "32", "64", "128"]
    assert "2 of 7 captions (28.6%) are longer than the 14 tokens" in table[-1]
    assert "text_encoder.chunks=5 would hold the longest" in table[-1]
    tokenizer.chunks = 5
    assert "0 of 7 captions (0.0%) are longer than the 70 tokens that are read" in length_table(
        tokenizer, captions
    )


@pytest.mark.parametrize("chunks", [0, -1, 1.5, True, "2"])
def test_numbers_of_chunks_that_cannot_be(chunks):
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=600)
    with pytest.raises(ValueError, match=r"chunks=.*: expected a whole number from 1"):
        tokenizer.chunks = chunks
