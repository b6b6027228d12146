"""Textual inversion: new rows of a table learn, the others stay bit for bit, and diffusers reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.adapters.words import USUAL
from ldm.pipeline import LatentDiffusionPipeline
from tests.test_fit import OPTIM, latents, losses, state, stop_at
from tests.tiny import tiny_pipeline
from train.batches.latents import Latents
from train.data.sources import DataConfig
from train.fit.loop import fit
from train.tasks.embedding import Embedding, EmbeddingRecipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


def captioned(text: str = "a <moon> in snow") -> Latents:
    made = latents()
    made.captions = {index: [text] for index in made.captions}
    return made


def recipe_of(output: Path, model: Path, **options: Any) -> EmbeddingRecipe:
    optim = replace(OPTIM, lr=0.1, weight_decay=0.0)
    base = EmbeddingRecipe(
        output=str(output),
        model=str(model),
        steps=6,
        batch_size=2,
        optim=optim,
        token="<moon>",
        initializer="red fox",
    )
    return replace(
        base, **{"sample_every": 0, "precision": "fp32", "ema_decay": 0.0, "vectors": 2, **options}
    )


def run(recipe: EmbeddingRecipe, model: Path, stop_after: int = 0) -> Embedding:
    task = Embedding(recipe, model, captioned())
    stop_at(task, stop_after)
    assert fit(task, recipe).step == (stop_after or recipe.steps)
    return task


@pytest.mark.slow
def test_new_rows_learn_and_nothing_else(tmp_path, model):
    """The word starts as the mean of known ones, and its file holds what it became."""
    recipe = recipe_of(tmp_path / "whole", model)
    plain = tiny_pipeline()
    table = plain.text_encoder.embeddings.token_embedding.weight
    ids = plain.tokenizer(["red fox"])[0, 1:3]
    start = Embedding(recipe, model, captioned()).rows.weight
    torch.testing.assert_close(start.detach(), table[ids].mean(0).expand(2, -1))
    task = run(recipe, model)
    grown = task.text_encoder.state_dict()
    for name, value in plain.text_encoder.state_dict().items():
        assert torch.equal(grown[name][: len(value)], value), name
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(task.unet.state_dict()[name], value), name
    assert [name for name, _ in task.module.named_parameters()] == ["tokens.weight"]
    assert (task.rows.weight - start).abs().amin() > 0
    learned = load_file(tmp_path / "whole/model" / USUAL[0])
    assert learned.keys() == {"<moon>"}
    assert torch.equal(learned["<moon>"], task.rows.weight)


@pytest.mark.slow
def test_a_run_in_pieces_is_the_run(tmp_path, model):
    run(recipe_of(tmp_path / "whole", model), model)
    run(recipe_of(tmp_path / "halves", model), model, stop_after=4)
    run(recipe_of(tmp_path / "halves", model), model)
    assert state(tmp_path / "halves", 6) == state(tmp_path / "whole", 6)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_stock_diffusers_reads_the_word(tmp_path, model):
    recipe, plain = recipe_of(tmp_path / "whole", model), tiny_pipeline()
    task = run(recipe, model)
    stock = LatentDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to_diffusers()
    stock.load_textual_inversion(tmp_path / "whole/model")
    theirs = stock.encode_prompt("a <moon> in snow", "cpu", 1, False)[0]
    ours = task.pipeline().encode_prompts([recipe.written_out("a <moon> in snow")])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - plain.encode_prompts(["a red fox in snow"])).abs().max() > 0.1


def test_what_a_recipe_refuses(tmp_path, model):
    with pytest.raises(ValueError, match=r"token='a b': expected 2 to 60 signs without a space"):
        recipe_of(tmp_path, model, token="a b")
    with pytest.raises(ValueError, match=r"vectors=0: expected 1 or more"):
        recipe_of(tmp_path, model, vectors=0)
    with pytest.raises(ValueError, match=r"data.caption='a fox' does not hold the token '<moon>'"):
        recipe_of(tmp_path, model, data=DataConfig(caption="a fox"))
    with pytest.raises(
        ValueError, match=r"12 of 12 pictures have no caption with the token '<moon>', one has"
    ):
        Embedding(recipe_of(tmp_path, model), model, captioned("a fox"))
    with pytest.raises(ValueError, match=r"a new token 'fox</w>': expected a name that no token has yet"):
        Embedding(recipe_of(tmp_path, model, token="fox</w>"), model, captioned("a fox</w>"))
    with pytest.raises(ValueError, match=r"initializer='' is no word"):
        Embedding(recipe_of(tmp_path, model, initializer=""), model, captioned())
