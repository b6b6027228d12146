"""An autoencoder that grows: what it starts as, what it learns, how it goes on, what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoencoder.equivariance import shrink
from autoencoder.growth import distance, grown, widened
from autoencoder.loss import ReconstructionConfig
from autoencoder.vae import AutoencoderKL, Posterior
from ldm.files.checkpoint import load_model, save_model
from tests.test_fit import OPTIM, VAE, losses, state, stop_at
from train import stages, train_autoencoder
from train.config import to_yaml
from train.data.sources import DataConfig
from train.fit.loop import fit
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding

LARGE = replace(
    VAE,
    block_out_channels=(VAE.block_out_channels[0], *VAE.block_out_channels),
    down_block_types=(*VAE.down_block_types, "DownEncoderBlock2D"),
    up_block_types=(*VAE.up_block_types, "UpDecoderBlock2D"),
)


TALL = replace(
    VAE,
    block_out_channels=(8,) * 4,
    down_block_types=VAE.down_block_types * 2,
    up_block_types=VAE.up_block_types * 2,
)
WIDE = replace(VAE, block_out_channels=(8, 32))


@pytest.fixture
def small(tmp_path) -> Path:
    torch.manual_seed(3)
    save_model(AutoencoderKL(replace(VAE, scaling_factor=0.5)), tmp_path / "small")
    return tmp_path / "small"


def growing(output: Path, small: Path | str, **options: Any) -> AutoencoderRecipe:
    base = AutoencoderRecipe(
        output=str(output),
        grow=str(small),
        steps=12,
        batch_size=2,
        model=LARGE,
        data=DataConfig(size=32, length=4),
        optim=OPTIM,
        loss=ReconstructionConfig(kl=0.0),
        sample_every=0,
        measured=4,
        precision="fp32",
    )
    return replace(base, **options)


def smooth(side: int) -> torch.Tensor:
    """Pictures (2, 3, side, side) without fine detail."""
    return torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4), (side, side), mode="bicubic") / 2


def test_it_starts_as_the_small_one_of_half_the_size(small):
    """But for their last and first convolution the decoder repeats pixels and the encoder averages them."""
    little = load_model(AutoencoderKL, small)
    vae = grown(little, LARGE)
    assert vae.downsample_factor == 2 * little.downsample_factor
    assert vae.config.scaling_factor == 0.5
    image = smooth(64)
    with torch.no_grad():
        z = little.encode(shrink(image, (32, 32))).mean
        assert (vae.encode(image).mean - z).square().mean() < 0.2 * z.var()
        torch.nn.init.dirac_(little.decoder.conv_out.weight)
        torch.nn.init.dirac_(vae.decoder.conv_out.weight)
        repeated = little.decode(z).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(vae.decode(z), repeated, atol=1e-4, rtol=1e-4)


def test_in_multiples_of_its_widths_it_computes_the_same(small):
    """Also where a level's resnet gets a shortcut that it did not need before, and with attention."""
    little = load_model(AutoencoderKL, small)
    same = replace(VAE, block_out_channels=(8, 8), mid_block_add_attention=True)
    for one, widths in ((little, WIDE.block_out_channels), (AutoencoderKL(same), (16, 24))):
        for p in one.parameters():
            torch.nn.init.normal_(p, std=0.3)
        vae = grown(one, replace(one.config, block_out_channels=widths))
        shortcuts = sum("conv_shortcut" in name for name in vae.state_dict())
        image, latents = torch.randn(2, 3, 20, 28), torch.randn(2, VAE.latent_channels, 5, 7)
        with torch.no_grad():
            torch.testing.assert_close(vae.encode(image).mean, one.encode(image).mean, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(vae.decode(latents), one.decode(latents), atol=1e-5, rtol=1e-4)
    assert shortcuts > sum("conv_shortcut" in name for name in AutoencoderKL(same).state_dict())


def test_copies_of_a_channel_are_read_with_uneven_weights_that_sum_to_the_old_one():
    old = torch.randn(2, 3, 3, 3)
    new = widened(old, torch.Size((4, 9, 3, 3)))
    torch.testing.assert_close(new.unflatten(1, (3, 3)).sum(2), old.repeat_interleave(2, 0))
    assert (new[:, 0] - new[:, 1]).abs().min() > 0
    assert torch.equal(widened(old[:, 0, 0, 0], torch.Size((4,))), old[:, 0, 0, 0].repeat_interleave(2))


def test_a_decoder_may_grow_alone(small, tmp_path):
    """Latents are made as before, to the last bits, and each copy of a channel learns something else."""
    data = DataConfig(size=16, length=4)
    recipe = growing(tmp_path / "run", small, model=WIDE, train_encoder=False, latent_noise=0.1, data=data)
    task = Autoencoding(recipe)
    little = load_model(AutoencoderKL, small)
    image = task.squares.stack(range(4))
    assert fit(task, recipe).finished
    vae = load_model(AutoencoderKL, tmp_path / "run" / "model")
    assert vae.config.scaling_factor == 0.5
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(image).mean, little.encode(image).mean, atol=1e-5, rtol=1e-4)
    bias = vae.decoder.mid_block.resnets[0].conv1.bias.unflatten(0, (-1, 2))
    assert (bias[:, 0] - bias[:, 1]).abs().min() > 0
    loss = losses(tmp_path / "run")
    assert loss[-1]["l1"] < loss[0]["l1"]


def test_with_other_widths_it_has_more_to_learn(small):
    """Then it starts with new weights but for the maps of z, and its latents are still the small one's."""
    little = load_model(AutoencoderKL, small)
    vae = grown(little, replace(LARGE, block_out_channels=(8, 16, 24), norm_num_groups=4, layers_per_block=2))
    assert vae.config.scaling_factor == 0.5
    assert torch.equal(vae.post_quant_conv.weight, little.post_quant_conv.weight)
    assert vae.decode(vae.encode(smooth(32)).mean).shape == (2, 3, 32, 32)


def test_the_distance_is_that_of_the_optimal_map():
    """In one dimension the optimal map takes each quantile to its own: x -> mean + std * z on both sides."""
    one, other = (Posterior(torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()) for _ in "ab")
    z = torch.randn(4000, 1, 1, 1, 1).double()
    z = (z - z.mean()) / z.std(correction=0)
    gaps = (one.mean + one.std * z) - (other.mean + other.std * z)
    torch.testing.assert_close(distance(one, other), gaps.square().mean(dim=(0, 2, 3, 4)))
    assert distance(one, one).abs().max() == 0


def test_latents_stay_and_the_encoder_comes_to_give_them(small, tmp_path):
    """The decoder learns from the small one's latents, so that no step moves what latents mean."""
    recipe = growing(tmp_path / "run", small, steps=40, latent_noise=0.1)
    task = Autoencoding(recipe)
    little = load_model(AutoencoderKL, small)
    image = task.squares.stack(range(4))
    with torch.no_grad():
        z = little.encode(shrink(image, (16, 16))).mean
        before = (task.vae.encode(image).mean - z).square().mean()
    assert fit(task, recipe).finished
    vae = load_model(AutoencoderKL, tmp_path / "run" / "model")
    assert vae.config.scaling_factor == 0.5
    with torch.no_grad():
        assert (vae.encode(image).mean - z).square().mean() < 0.5 * before
    loss = losses(tmp_path / "run")
    assert loss[-1]["l1"] < 0.9 * loss[0]["l1"]


@pytest.mark.slow
def test_12_steps_equal_8_and_4(small, tmp_path):
    for folder, stops in (("whole", (0,)), ("parts", (8, 0))):
        for stop in stops:
            recipe = growing(tmp_path / folder, small, latent_noise=0.1)
            task = Autoencoding(recipe)
            stop_at(task, stop)
            fit(task, recipe)
    assert state(tmp_path / "whole", 12) == state(tmp_path / "parts", 12)


def test_the_command_trains_the_smaller_ones_first(tmp_path, capsys):
    """On the same pictures, the first at half their size; a second call finds all done."""
    first = AutoencoderRecipe(
        output="x", steps=4, batch_size=2, model=VAE, data=DataConfig(size=64), optim=OPTIM, measured=4
    )
    (tmp_path / "small.yaml").write_text(to_yaml(replace(first, sample_every=0, precision="fp32")))
    (tmp_path / "large.yaml").write_text(to_yaml(growing(tmp_path / "x", tmp_path / "small.yaml", steps=4)))
    wider = replace(LARGE, block_out_channels=tuple(2 * width for width in LARGE.block_out_channels))
    recipe = growing(tmp_path / "run", tmp_path / "large.yaml", steps=4, model=wider, train_encoder=False)
    (tmp_path / "wide.yaml").write_text(to_yaml(recipe))
    assert train_autoencoder.main(["--config", str(tmp_path / "wide.yaml"), "--plan"]) == 0
    plan = capsys.readouterr().out
    for number in (1, 2, 3):
        assert f"autoencoder {number} of 3: " in plan
    assert train_autoencoder.main(["--config", str(tmp_path / "wide.yaml")]) == 0
    made = load_model(AutoencoderKL, tmp_path / "run" / "model")
    folder = tmp_path / "run" / "small" / "small" / "model"
    assert made.config.scaling_factor == load_model(AutoencoderKL, folder).config.scaling_factor
    written = (folder / "config.json").stat().st_mtime_ns
    assert train_autoencoder.main(["--config", str(tmp_path / "wide.yaml")]) == 0
    assert (folder / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "x"}, "leave out start='x'"),
        ({"train_encoder": False}, "Take multiples of these and the same layers_per_block"),
        ({"train_encoder": False, "model": replace(WIDE, norm_num_groups=2)}, "does not compute what"),
        ({"loss": ReconstructionConfig(equivariance=0.5)}, "have no effect, set them to 0"),
        (
            {"model": TALL},
            "cannot become the model: block_out_channels has 4 levels, not 2 or 3",
        ),
        ({"model": replace(LARGE, latent_channels=3)}, "latent_channels=3, not 4"),
    ],
)
def test_errors(small, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Autoencoding(growing(tmp_path / "run", small, **options))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": replace(VAE, latent_channels=3)}, "latent_channels=4, not 3"),
        ({"batch_size": 3}, "batch_size=2 is not divisible by 3 ranks"),
        ({"grow": "small.yaml"}, "grow='small.yaml' grows from itself"),
    ],
)
def test_what_does_not_fit_is_told_before_the_small_one_trains(tmp_path, monkeypatch, changed, message):
    if "ranks" in message:
        monkeypatch.setattr(stages, "PartialState", lambda cpu: SimpleNamespace(num_processes=3))
    first = AutoencoderRecipe(
        output="x", steps=4, batch_size=2, model=VAE, data=DataConfig(size=64), optim=OPTIM, measured=4
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(to_yaml(replace(first, sample_every=0, **changed)))
    recipe = growing(tmp_path / "run", tmp_path / "small.yaml")
    (tmp_path / "large.yaml").write_text(to_yaml(recipe))
    with pytest.raises(ValueError, match=message):
        train_autoencoder.main(["--config", str(tmp_path / "large.yaml")])
    assert not (tmp_path / "run").exists()


def test_a_folder_without_one_is_told_by_its_option(tmp_path):
    with pytest.raises(ValueError, match=r"^grow='.*nowhere' holds no autoencoder"):
        Autoencoding(growing(tmp_path / "run", tmp_path / "nowhere"))


def test_the_known_latents_are_not_rounded_by_autocast(small, tmp_path):
    """They are what the cache holds, which is filled in float32."""
    task = Autoencoding(growing(tmp_path / "run", small))
    image = smooth(32)
    plain = task.reconstruction.given(None, image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task.reconstruction.given(None, image).mean, plain.mean)
