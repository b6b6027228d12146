"""Going on from another's weights: the folder that stock diffusers wrote gives UNet, text encoder and all."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import save_model
from tests.test_fit import OPTIM, VAE, diffusion_recipe, latents, losses, state, stop_at
from train.batches.encoding import compute_latents
from train.batches.latents import autoencoder_folder
from train.batches.plan import Draw
from train.config import from_mapping, to_mapping
from train.data.sources import DataConfig
from train.fit.loop import fit
from train.tasks.diffusion import DiffusionRecipe, LatentDiffusion, start_folder
from train.tasks.text import TextConfig


@pytest.fixture
def stock(tmp_path: Path, tiny_pipeline) -> Path:
    """A folder that stock diffusers and transformers wrote."""
    tiny_pipeline.to_diffusers().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def fine_tuning(stock: Path, tiny_pipeline, **options) -> DiffusionRecipe:
    recipe = diffusion_recipe(
        stock.parent / "run",
        start=str(stock),
        unet=tiny_pipeline.unet.config,
        text_encoder=TextConfig(path=str(stock), train=False),
    )
    return replace(recipe, **options)


@pytest.mark.slow
def test_unet_and_text_encoder_of_a_stock_folder_are_trained_further(stock, tiny_pipeline):
    """The task starts as the pipeline is: its weights, its tokens, its loss; and it learns from there."""
    text = TextConfig(path=str(stock), train=True)
    recipe = fine_tuning(
        stock, tiny_pipeline, text_encoder=text, steps=2, optim=replace(OPTIM, warmup_steps=1)
    )
    task = LatentDiffusion(recipe, autoencoder_folder(stock), latents())
    for mine, theirs in ((task.unet, tiny_pipeline.unet), (task.text_encoder, tiny_pipeline.text_encoder)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value)
    prompt = ["a red fox in snow"]
    encoded = tiny_pipeline.encode_prompts(prompt)
    torch.testing.assert_close(task.text_encoder(task.tokenizer(prompt)), encoded)
    stock_tokens = tiny_pipeline.to_diffusers().tokenizer(prompt, padding="max_length", return_tensors="pt")
    assert torch.equal(task.tokenizer(prompt), stock_tokens.input_ids)
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    assert fit(task, recipe).finished
    moved = [name for name, value in task.module.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}


def test_a_run_starts_from_the_export_of_another(stock, tiny_pipeline):
    """As 512 pixels from 256: other latents, and the size that the export notes is the recipe's."""
    larger = replace(tiny_pipeline.unet.config, sample_size=99, attention_head_dim=(2, 2))
    stock.rename(stock.parent / "model")
    recipe = fine_tuning(stock, tiny_pipeline, start=str(stock.parent), unet=larger)
    assert start_folder(recipe) == stock.parent / "model/unet"
    recipe = replace(recipe, text_encoder=TextConfig(path=str(stock.parent / "model"), train=False))
    task = LatentDiffusion(recipe, autoencoder_folder(stock.parent), latents())
    assert task.unet.config.sample_size == 99
    assert torch.equal(task.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight)
    assert not any(p.is_meta for p in task.unet.parameters())


class Killed(BaseException):
    """As kill -9: nothing is saved for it."""


def train(recipe: DiffusionRecipe, autoencoder: Path, stop_after: int = 0, killed: str | int = "") -> None:
    """One process of a stage. killed: in the step of that number, or in the export, when all is written."""
    folder = autoencoder.parent / f"latents-{recipe.data.size}"
    task = LatentDiffusion(recipe, autoencoder, compute_latents(recipe.data, autoencoder, folder))
    stop_at(task, stop_after)
    batch, export = task.batch, task.export

    def killing_batch(draws: list[Draw]) -> dict[str, torch.Tensor]:
        if draws[0].step + 1 == killed:
            raise Killed
        return batch(draws)

    def killing_export(folder: Path) -> None:
        export(folder)
        if killed == "export":
            raise Killed

    task.batch, task.export = killing_batch, killing_export
    fit(task, recipe)


@pytest.mark.slow
def test_two_resolutions_in_pieces_are_the_two_in_one(tmp_path):
    """The second goes on from the first at twice the pixels a side; both are stopped, and killed between."""
    save_model(AutoencoderKL(VAE), tmp_path / "autoencoder")

    def stages(name: str) -> tuple[DiffusionRecipe, DiffusionRecipe]:
        run = tmp_path / name
        first = diffusion_recipe(run / "first", steps=6, data=DataConfig(size=16, length=6))
        second = replace(
            first,
            output=str(run / "second"),
            start=str(run / "first"),
            text_encoder=TextConfig(path=str(run / "first/model"), train=False),
            data=DataConfig(size=32, length=6),
            unet=replace(first.unet, sample_size=16),
            steps=9,
            save_every=3,
        )
        return first, second

    for recipe in stages("whole"):
        train(recipe, tmp_path / "autoencoder")
    first, second = stages("pieces")
    train(first, tmp_path / "autoencoder", stop_after=4)
    with pytest.raises(Killed):
        train(first, tmp_path / "autoencoder", killed="export")
    with pytest.raises(ValueError, match=r"start='.*first' is a run that has not come to its end: give its"):
        train(second, tmp_path / "autoencoder")
    train(first, tmp_path / "autoencoder")
    with pytest.raises(Killed):
        train(second, tmp_path / "autoencoder", killed=5)
    train(second, tmp_path / "autoencoder", stop_after=7)
    train(second, tmp_path / "autoencoder")
    for name, steps in (("first", 6), ("second", 9)):
        whole, pieces = tmp_path / "whole" / name, tmp_path / "pieces" / name
        assert state(pieces, steps) == state(whole, steps)
        assert losses(pieces) == losses(whole)
        assert weights(pieces) == weights(whole)
    assert weights(tmp_path / "whole/first") != weights(tmp_path / "whole/second")


def weights(run: Path) -> list[bytes]:
    """Of the UNet that a run exported."""
    return [path.read_bytes() for path in sorted((run / "model/unet").glob("*.safetensors"))]


def test_another_unet_or_none_is_refused_before_its_weights_are_read(stock, tiny_pipeline, caplog):
    with pytest.raises(ValueError, match=r"start='.*nothing' holds no UNet: name a pipeline folder"):
        start_folder(fine_tuning(stock, tiny_pipeline, start=str(stock / "nothing")))
    other = replace(tiny_pipeline.unet.config, layers_per_block=2)
    with pytest.raises(ValueError, match=r"is not of the recipe's unet: layers_per_block=1, not 2"):
        start_folder(fine_tuning(stock, tiny_pipeline, unet=other))
    objective = replace(diffusion_recipe(stock).objective, prediction="eps", zero_terminal_snr=False)
    with caplog.at_level(logging.WARNING, "train"):
        start_folder(fine_tuning(stock, tiny_pipeline, objective=objective))
    assert "predicts v, but objective.prediction=eps" in caplog.text


def test_older_recipes_start_from_nothing(tmp_path):
    values = to_mapping(diffusion_recipe(tmp_path))
    del values["start"]
    assert from_mapping(DiffusionRecipe, values).start is None
