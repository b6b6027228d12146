"""The upscaler: stock diffusers' pictures, noise that is told and counted, and a training that resumes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from autoencoder.vae import AutoencoderKL, rescaled
from ldm.diffusion.scheduler import Scheduler
from ldm.drawing.given import rows_of
from ldm.drawing.outputs import to_pil
from ldm.files.checkpoint import load_model, save_model
from ldm.formats.kinds import KINDS
from ldm.model.unet import UNet
from ldm.pipeline import BUNDLED, LatentDiffusionPipeline
from ldm.recipes.picture import read_recipe
from ldm.upscaling import STOCK_SCALE, LatentUpscalePipeline, coloured_as, noised
from tests.tiny import FACTOR, tiny_pipeline
from train.batches.plan import Plan
from train.data.captions import every
from train.data.pictures import to_images, to_tensor
from train.data.sources import DataConfig, open_source

PROMPT, NEGATIVE = "a red fox in snow", "two blue cats"
SMALL = {"num_inference_steps": 2, "output_type": "pt"}
HELD_OUT = DataConfig(source="pictograms", subjects="few", size=256, split="held_out", length=4, scene_seed=1)
LOW_RES = Scheduler.from_config(KINDS["sd2-x4"].low_res_scheduler)


def tiny_upscaler() -> LatentUpscalePipeline:
    """The tiny pipeline's parts, with a UNet that is shown three channels more: it enlarges by 2."""
    small = tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet(replace(small.unet.config, in_channels=7, num_class_embeds=60)).eval()
    return LatentUpscalePipeline(
        rescaled(small.vae, STOCK_SCALE),
        small.text_encoder,
        small.tokenizer,
        unet,
        LOW_RES,
        small.scheduler,
        max_noise_level=50,
    )


@pytest.fixture(scope="module")
def pipe() -> LatentUpscalePipeline:
    pipe = tiny_upscaler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def pictures(count: int = 1, height: int = 12, width: int = 20) -> torch.Tensor:
    """(B, 3, h, w) in [0, 1], always the same."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


# The same pictures as diffusers


def test_pictures_are_those_of_stock_diffusers(pipe):
    """From one generator, which draws the small picture's noise first, with and without guidance."""
    stock = pipe.to_diffusers()
    stock.set_progress_bar_config(disable=True)
    for scale, negative in ((1.0, None), (6.0, NEGATIVE)):
        options = {**SMALL, "guidance_scale": scale, "noise_level": 30, "negative_prompt": negative}
        theirs = stock(PROMPT, image=pictures(), generator=torch.Generator().manual_seed(7), **options).images
        ours = pipe(PROMPT, pictures(), generator=torch.Generator().manual_seed(7), **options).images
        theirs = torch.as_tensor(theirs).reshape(ours.shape)
        assert ours.shape == (1, 3, 24, 40)
        assert theirs.std() > 0.05  # not a grey sheet
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    other = pipe(
        PROMPT, pictures(), generator=torch.Generator().manual_seed(7), **options | {"noise_level": 3}
    )
    assert (other.images - ours).abs().max() > 0.01  # the level is heard


@pytest.mark.slow
def test_folders_and_twins(pipe, tmp_path):
    """Stock diffusers reads what we write, and its parts make our pipeline again."""
    from diffusers import StableDiffusionUpscalePipeline

    pipe.save_pretrained(tmp_path / "upscaler")
    again = LatentUpscalePipeline.from_pretrained(tmp_path / "upscaler", dtype=torch.float32)
    stock = StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "upscaler")
    assert stock.config.max_noise_level == again.max_noise_level == 50
    assert stock.vae.config.scaling_factor == STOCK_SCALE
    assert stock.low_res_scheduler.config.beta_end == LOW_RES.config["beta_end"]
    want = pipe(PROMPT, pictures(), seed=1, **SMALL).images
    for one in (again, LatentUpscalePipeline.from_diffusers(stock)):
        torch.testing.assert_close(one(PROMPT, pictures(), seed=1, **SMALL).images, want, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="LatentUpscalePipeline reads it"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "upscaler")


def test_a_folder_of_text_to_image_is_no_upscaler(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"expected StableDiffusionUpscalePipeline; LatentDiffusionPipeline"):
        LatentUpscalePipeline.from_pretrained(tmp_path / "tiny")


# Laws


def test_a_rescaled_autoencoder_is_the_same():
    vae = tiny_pipeline().vae
    twin = rescaled(vae, 0.05)
    image = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    one, other = vae.encode(image), twin.encode(image)
    latents = vae.to_latents(one.mean)
    torch.testing.assert_close(twin.to_latents(other.mean), latents, atol=1e-4, rtol=1e-4)
    ratio = vae.config.scaling_factor / 0.05
    torch.testing.assert_close(other.std, ratio * one.std, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twin.decode(latents), vae.decode(latents), atol=1e-4, rtol=1e-4)
    assert twin.config.scaling_factor == 0.05


def test_noise_on_the_small_picture_has_the_moments_of_its_level():
    """Mean alpha * x and deviation sigma, a level a row; at 0 of Stable Diffusion's schedule a hundredth."""
    levels = torch.tensor([0, 20, 100, 349])
    small = torch.full((4, 3, 64, 64), 0.5)
    seen = noised(small, torch.randn(4, 3, 64, 64), levels, LOW_RES.schedule)
    for row, level in zip(seen, levels.tolist(), strict=True):
        alpha, sigma = (float(table[level]) for table in (LOW_RES.schedule.alpha, LOW_RES.schedule.sigma))
        assert row.mean().item() == pytest.approx(0.5 * alpha, abs=4 * sigma / math.sqrt(row.numel()))
        assert row.std().item() == pytest.approx(sigma, rel=0.04)
    assert float(LOW_RES.schedule.sigma[0]) == pytest.approx(0.01)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    """Noise of the small picture included; one picture or one prompt stands for all."""
    few = pictures(3)
    prompts = [PROMPT, NEGATIVE, "a boat"]
    together = pipe(prompts, few, seed=4, noise_level=40, **SMALL).images
    for row in range(3):
        alone = pipe(prompts[row], few[row : row + 1], seed=4 + row, noise_level=40, **SMALL).images
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)
    shared = pipe(PROMPT, few, seed=4, noise_level=40, **SMALL).images
    torch.testing.assert_close(shared[:1], together[:1], atol=1e-4, rtol=0)
    several = pipe(PROMPT, few[:1], seed=[4, 9], num_images_per_prompt=2, noise_level=40, **SMALL).images
    torch.testing.assert_close(several[:1], together[:1], atol=1e-4, rtol=0)
    assert (several[1] - several[0]).abs().max() > 0.01


def test_pictures_of_pillow_of_odd_sides_and_pictures_of_a_pipeline(pipe):
    """A cascade: what the first stage gives goes in as it is."""
    image = Image.new("RGB", (11, 9), "red")
    assert [each.size for each in pipe(PROMPT, [image] * 2, 2, noise_level=0).images] == [(22, 18)] * 2
    first = tiny_pipeline()(PROMPT, height=12, width=20, seed=1, **SMALL).images
    assert pipe(PROMPT, first, seed=1, **SMALL).images.shape == (1, 3, 24, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "image is None: expected a PIL image"),
        ({"image": torch.zeros(4, 8, 8)}, r"image is a tensor \(4, 8, 8\)"),
        ({"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]}, "are of one size"),
        ({"image": ["a.png"]}, "image holds a str"),
        ({"noise_level": 51}, "noise_level=51: expected a whole number from 0 to 50"),
        ({"noise_level": -1}, "noise_level=-1"),
        ({"prompt": [PROMPT] * 2, "image": pictures(3)}, "2 prompts and 3 images"),
        ({"image": pictures(1, 8, 2100)}, "width=4200"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
    ],
)
def test_what_cannot_be(pipe, options, message):
    call: dict[str, Any] = {"prompt": PROMPT, "image": pictures(), **SMALL, **options}
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_parts_that_do_not_fit(pipe):
    parts = pipe.components
    plain = UNet(replace(pipe.unet.config, in_channels=4))
    with pytest.raises(ValueError, match=re.escape("vae.latent_channels + 3 differ: 4 and 7")):
        LatentUpscalePipeline(**parts | {"unet": plain})
    untold = UNet(replace(pipe.unet.config, num_class_embeds=None))
    with pytest.raises(ValueError, match="num_class_embeds is null"):
        LatentUpscalePipeline(**parts | {"unet": untold})
    with pytest.raises(ValueError, match="max_noise_level=61: expected 0 to 60"):
        LatentUpscalePipeline(**parts | {"max_noise_level": 61})
    short = Scheduler.from_config({**LOW_RES.config, "num_train_timesteps": 40})
    with pytest.raises(ValueError, match="max_noise_level=41: expected 0 to 40"):
        LatentUpscalePipeline(**parts | {"low_res_scheduler": short, "max_noise_level": 41})
    all_of_it = LatentUpscalePipeline(**parts | {"low_res_scheduler": short, "max_noise_level": 40})
    assert all_of_it.noisiest == 39  # the last that its schedule has
    other = LatentUpscalePipeline(**parts | {"vae": tiny_pipeline().vae})
    with pytest.raises(ValueError, match="rescaled"):
        other.to_diffusers()


@pytest.mark.slow
def test_a_single_file_of_an_upscaler(pipe, tmp_path):
    """As convert writes it, and reads the published one; and one of text to image is refused."""
    from ldm.convert import main as convert

    pipe.save_pretrained(tmp_path / "upscaler")
    assert convert([str(tmp_path / "upscaler"), str(tmp_path / "upscaler.safetensors")]) == 0
    again = LatentUpscalePipeline.from_single_file(tmp_path / "upscaler.safetensors", dtype=torch.float32)
    want = pipe(PROMPT, pictures(), seed=1, **SMALL).images
    torch.testing.assert_close(again(PROMPT, pictures(), seed=1, **SMALL).images, want, atol=1e-4, rtol=0)
    again.save_single_file(tmp_path / "again.safetensors")
    once_more = LatentUpscalePipeline.from_single_file(tmp_path / "again.safetensors", dtype=torch.float32)
    assert once_more.max_noise_level == pipe.max_noise_level
    assert once_more.low_res_scheduler.config["beta_end"] == LOW_RES.config["beta_end"]
    tiny_pipeline().save_single_file(tmp_path / "tiny.safetensors")
    with pytest.raises(
        ValueError, match=r"from text to image .*: load it by LatentDiffusionPipeline\.from_single"
    ):
        LatentUpscalePipeline.from_single_file(tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"load it by LatentUpscalePipeline\.from_single_file"):
        LatentDiffusionPipeline.from_single_file(tmp_path / "upscaler.safetensors")


# On the command line


@pytest.fixture
def command(pipe, first_stage, tmp_path, monkeypatch, capsys):
    """Draws by the tiny model in an empty folder that holds an upscaler; status and standard error."""
    from ldm.generate import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.pipeline.BUNDLED", first_stage)
    pipe.save_pretrained("upscaler")

    def call(*arguments: str) -> tuple[int, str]:
        status = main([*arguments, "--dtype=fp32", "--device=cpu"])
        return status, capsys.readouterr().err

    return call


@pytest.mark.slow
def test_a_cascade_on_the_command_line_and_its_repetition(command, tmp_path):
    """The picture of a call of the one and then the other, with a recipe that makes it again."""
    size = ["--width=24", "--height=16", "--steps=2"]
    assert command(PROMPT, *size, "--seed=3", "--upscale=upscaler", "--output=a.png") == (0, "")
    recipe = read_recipe(tmp_path / "a.png")
    assert (recipe.upscaler, recipe.upscale_noise, recipe.width) == ("upscaler", 20, 24)
    assert len(recipe.upscaler_hash) == 10
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (48, 32)
    small = LatentDiffusionPipeline.bundled(dtype=torch.float32)(PROMPT, 16, 24, 2, seed=3).images
    upscaler = LatentUpscalePipeline.from_pretrained("upscaler", dtype=torch.float32)
    told = torch.stack(rows_of(small, "image", "RGB"))
    large = coloured_as(upscaler(PROMPT, told, seed=3, output_type="pt").images, told)
    assert picture.tobytes() == to_pil(large)[0].tobytes()
    assert command("--from=a.png", "--output=b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert command("--from=a.png", "--upscale-noise=45", "--output=c.png")[0] == 0
    assert Image.open("c.png").tobytes() != picture.tobytes()
    Path("upscaler").rename("elsewhere")
    status, err = command("--from=a.png", "--output=d.png")
    assert status == 2
    assert "no such folder upscaler" in err
    assert "has it moved? Say by --upscale where it is" in err
    assert command("--from=a.png", "--upscale=elsewhere", "--output=d.png")[0] == 0
    assert Image.open("d.png").tobytes() == picture.tobytes()


@pytest.mark.slow
def test_what_cannot_be_on_the_command_line(command, tmp_path):
    for arguments, message in (
        (["--upscale=nowhere"], "no such folder nowhere"),
        (["--upscale"], "carries no bundled upscaler"),
        (["--upscale-noise=20"], "no effect without an upscaler"),
        (["--upscale=upscaler", "--upscale-noise=51"], "expected a whole number from 0 to 50"),
    ):
        status, err = command(PROMPT, "--width=16", "--height=16", "--steps=1", *arguments)
        assert status == 2
        assert message in err
    (tmp_path / "lines.txt").write_text("a fox")
    assert (
        "--upscale is of one prompt" in command("--prompts=lines.txt", "--output=x/", "--upscale=upscaler")[1]
    )


def test_broad_colours_are_the_small_pictures():
    """A shift that is the same all over is taken back; fine detail and right colours stay."""
    large = torch.rand(2, 3, 64, 96) * 0.4 + 0.3
    small = F.avg_pool2d(large, 4)
    torch.testing.assert_close(coloured_as(large, small), large, rtol=0, atol=1e-6)
    shift = torch.tensor([0.1, -0.2, 0.05]).view(3, 1, 1)
    torch.testing.assert_close(coloured_as(large + shift, small), large, rtol=0, atol=1e-6)
    means = F.avg_pool2d(coloured_as(torch.rand(2, 3, 64, 96) * 0.1 + 0.45, small), 32)
    torch.testing.assert_close(means, F.avg_pool2d(small, 8), rtol=0, atol=0.02)


# The one that comes with the package


def grains(image: Image.Image, deviation: float) -> Image.Image:
    """The picture with noise of this deviation on each pixel, where colours are -1 to 1."""
    noise = torch.randn(3, image.height, image.width, generator=torch.Generator().manual_seed(1))
    return to_images((to_tensor(image) + deviation * noise)[None])[0]


def error_at(
    upscaler: LatentUpscalePipeline, plant: Callable[[Image.Image], Image.Image], noise_level: int
) -> float:
    """The mean squared error, in [-1, 1], of small scenes with something planted in them, enlarged."""
    source, factor, total, count = open_source(HELD_OUT), upscaler.vae.downsample_factor, 0.0, HELD_OUT.length
    for index in range(count):
        image, captions = source[index]
        small = plant(image.resize((256 // factor,) * 2, Image.Resampling.BOX))
        told = torch.stack(rows_of(small, "image", "RGB"))
        call = {"noise_level": noise_level, "seed": index, "output_type": "pt"}
        enlarged = coloured_as(upscaler(every(captions)[0], told, **call).images, told)[0]
        total += F.mse_loss(2 * enlarged - 1, to_tensor(image)).item() / count
    return total


@pytest.mark.slow
@pytest.mark.font
def test_the_bundled_upscaler_repairs_planted_artefacts():
    """Of small scenes with grains on them a level of noise makes better large ones than level 0, the higher
    the coarser the grains are; of scenes without any, level 0 is the best.

    That is what conditioning augmentation is for (CDM, section 4.2). Training never saw these combinations.
    """
    if not (BUNDLED / "upscaler").is_dir():
        pytest.skip("no upscaler is bundled")
    upscaler = LatentUpscalePipeline.bundled(dtype=torch.float32)
    upscaler.set_progress_bar_config(disable=True)
    for deviation, best, other in ((0.0, 0, 100), (0.35, 100, 0), (0.5, 200, 0)):
        plant = partial(grains, deviation=deviation)
        good, bad = (error_at(upscaler, plant, level) for level in (best, other))
        assert good < 0.9 * bad, (deviation, good, bad)


# Training


def upscaler_recipe(output: Path, model: Path, **options: Any) -> Any:
    from tests.test_fit import OPTIM
    from train.tasks.upscaling import UpscalerRecipe

    base = UpscalerRecipe(
        output=str(output),
        steps=8,
        batch_size=2,
        model=str(model),
        data=DataConfig(size=24, length=12, flip=True),
        crop=16,
        max_noise_level=50,
        unet=tiny_upscaler().unet.config,
        optim=OPTIM,
        sample_every=0,
        precision="fp32",
    )
    return replace(base, **options)


@pytest.mark.slow
def test_8_steps_equal_5_and_resume_and_3(tmp_path, first_stage):
    """Bit for bit, and what it writes is a pipeline of ours and of stock diffusers, in half precision."""
    from tests.test_fit import losses, state, stop_at
    from train.fit.loop import fit
    from train.tasks.upscaling import Upscaling

    def train(name: str, stop_after: int = 0, **options: Any) -> Upscaling:
        recipe = upscaler_recipe(tmp_path / name, first_stage, export_dtype="float16", **options)
        task = Upscaling(recipe)
        stop_at(task, stop_after)
        fit(task, recipe)
        return task

    train("whole", workers=1, validation_samples=2, validate_every=8)
    train("parts", stop_after=5, workers=0, validation_samples=2, validate_every=8)
    task = train("parts", workers=1, validation_samples=2, validate_every=8)
    assert state(tmp_path / "parts", 8) == state(tmp_path / "whole", 8)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    pipe = LatentUpscalePipeline.from_pretrained(tmp_path / "whole/model", dtype=torch.float32)
    assert pipe.defaults == task.recipe.sampling
    assert task.preview().size == (4 * 24 + 6, 3 * 24 + 4)
    assert pipe(PROMPT, pictures(), **SMALL).images.shape == (1, 3, 24, 40)


def test_a_step_is_a_function_of_its_draws(tmp_path, first_stage):
    """Crops lie on the grid of latents, levels are below the largest, and a sample does not see its batch."""
    from train.batches.plan import Plan
    from train.tasks.upscaling import Upscaling, shrunk

    task = Upscaling(upscaler_recipe(tmp_path, first_stage))
    draws = Plan(task.buckets, 4, seed=1).batch(3)
    batch, alone = task.batch(draws), task.batch(draws[2:3])
    for name, value in alone.items():
        assert torch.equal(value[0], batch[name][2]), name
    assert batch["image"].shape == (4, 3, 16, 16)
    assert int(batch["noise_level"].max()) < 50
    whole = task.squares.image(draws[0].index)
    places = [(x, y) for x in range(0, 9, FACTOR) for y in range(0, 9, FACTOR)]
    cuts = [whole[:, y : y + 16, x : x + 16] for x, y in places]
    assert any(torch.equal(batch["image"][0], each) for cut in cuts for each in (cut, cut.flip(2)))
    torch.testing.assert_close(shrunk(batch["image"], 2), F.interpolate(batch["image"], (8, 8), mode="area"))


@pytest.mark.slow
def test_it_learns_one_batch(tmp_path, first_stage):
    """The loss falls on two pictures."""
    from tests.test_fit import losses
    from train.fit.loop import fit
    from train.tasks.upscaling import Upscaling

    recipe = upscaler_recipe(
        tmp_path, first_stage, steps=60, data=DataConfig(size=16, length=2), caption_dropout=0.0
    )
    fit(Upscaling(recipe), recipe)
    values = [line["loss"] for line in losses(tmp_path)]
    assert sum(values[-15:]) < 0.75 * sum(values[:15])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 32}, "crop=32: expected 1 to data.size=24"),
        ({"max_noise_level": 61}, "num_class_embeds=60: expected max_noise_level=61"),
        ({"prediction": "eps"}, "pure noise tells nothing"),
        ({"weight": "min_snrr"}, "is not one of"),
        ({"caption_dropout": 2.0}, "caption_dropout"),
        (
            {"data": DataConfig(size=24, crops=2)},
            r"data.crops=2 has no effect: an upscaler sees another crop",
        ),
        ({"data": DataConfig(size=24, max_aspect=2.0)}, r"max_aspect=2.0 has no effect: an upscaler learns"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        upscaler_recipe(tmp_path, tmp_path, **options)


def test_a_crop_off_the_grid_of_latents(tmp_path, first_stage):
    from train.tasks.upscaling import Upscaling

    with pytest.raises(ValueError, match="crop=15 is not a multiple of 2"):
        Upscaling(upscaler_recipe(tmp_path, first_stage, crop=15))


def test_the_autoencoder_may_be_another_than_the_models(tmp_path, first_stage):
    """A model whose cells are larger than what its upscaler enlarges by."""
    from train.tasks.upscaling import Upscaling

    config = load_model(AutoencoderKL, first_stage / "vae").config
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    widths = (config.block_out_channels[0], *config.block_out_channels)
    save_model(AutoencoderKL(replace(config, **kinds, block_out_channels=widths)), tmp_path / "vae")
    task = Upscaling(upscaler_recipe(tmp_path / "run", first_stage, autoencoder=str(tmp_path / "vae")))
    batch = task.batch(Plan(task.buckets, 2, 0).batch(0))
    assert (task.factor, batch["low_res_noise"].shape, batch["noise"].shape[2:]) == (4, (2, 3, 4, 4), (4, 4))
    loss, _ = task.module(**batch)
    assert loss.isfinite().all()
    small = Upscaling(upscaler_recipe(tmp_path / "run", first_stage))
    assert small.facts["model"] != task.facts["model"]
    with pytest.raises(ValueError, match="holds no autoencoder: name a folder"):
        Upscaling(upscaler_recipe(tmp_path / "run", first_stage, autoencoder=str(tmp_path / "no")))
