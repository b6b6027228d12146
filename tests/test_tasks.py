"""From a picture to a picture: image to image, inpainting, outpainting, variations, larger pictures."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.noise import slerp, start_noise, step_noise
from ldm.diffusion.sample import sample
from ldm.diffusion.scheduler import Scheduler
from ldm.diffusion.solvers import SOLVERS
from ldm.drawing.canvas import Blended
from ldm.drawing.outputs import to_pil
from ldm.model.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.starts import extended
from tests.tiny import SCHEDULER, tiny_pipeline, tiny_xl_pipeline

PROMPT = "a red fox in snow"
HEIGHT, WIDTH = 24, 40
TENSORS = {"num_inference_steps": 2, "output_type": "pt"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny_pipeline()


def painter(make=tiny_pipeline, **scheduler: object) -> LatentDiffusionPipeline:
    """A tiny model that was trained for inpainting: 9 channels."""
    tiny = make(**scheduler)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet(replace(tiny.unet.config, in_channels=9)).eval()
    pipe = LatentDiffusionPipeline(**tiny.components | {"unet": unet})
    return pipe.to(memory_format=torch.channels_last)  # as it is read: other layouts round otherwise


def given_picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def right_half(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A mask that is white, to be repainted, on its right."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] / 255


PICTURE, MASK = given_picture(), right_half()
KEPT = np.s_[:, : WIDTH // 2]
WHITE = Image.new("L", PICTURE.size, 255)


# Image to image


def test_all_of_the_strength_is_text_to_image():
    """Where the schedule begins at pure noise; others begin with what little of the picture is left there."""
    pipe = tiny_pipeline(**ZERO_SNR)
    plain = pipe(PROMPT, HEIGHT, WIDTH, seed=3, **TENSORS).images
    assert torch.equal(pipe(PROMPT, image=PICTURE, strength=1.0, seed=3, **TENSORS).images, plain)


def test_little_strength_gives_the_picture_back(pipe):
    """To the autoencoder's error and to what is left of the noise."""
    call = {"num_inference_steps": 500, "strength": 0.002, "output_type": "latent", "seed": 1}
    x0 = pipe.encode(tensor(PICTURE))
    latents = pipe(PROMPT, image=PICTURE, guidance_scale=1.0, **call).images
    sigma = float(pipe.tableau(500, strength=0.002).steps.sigma[0])
    assert (latents - x0).std() < 2 * sigma < 0.1


def test_strength_is_how_much_of_the_run_is_done(pipe):
    seen = []

    def watch(_, step, t, tensors):
        seen.append(t)

    call = {"num_inference_steps": 5, "image": PICTURE, "callback_on_step_end": watch, "guidance_scale": 1}
    pipe(PROMPT, strength=0.45, **call)
    assert seen == pipe.tableau(5).steps.t[3:].int().tolist()
    seen.clear()
    pipe(PROMPT, **call)
    assert len(seen) == 4  # of 5, by 0.8 as in diffusers
    seen.clear()
    pipe(PROMPT, mask_image=MASK, **call)
    assert len(seen) == 5


def test_a_picture_does_not_depend_on_its_batch(pipe):
    pictures = [given_picture(seed) for seed in (1, 2)]
    call = {"sampler": "euler_a", "guidance_scale": 1, **TENSORS}
    both = pipe([PROMPT, "two blue cats"], image=pictures, mask_image=MASK, seed=[4, 9], **call).images
    alone = pipe("two blue cats", image=pictures[1], mask_image=MASK, seed=9, **call).images
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    one_for_all = pipe([PROMPT] * 2, image=pictures[0], mask_image=MASK, seed=4, **call).images
    torch.testing.assert_close(one_for_all[0], both[0], atol=1e-5, rtol=0)


def test_sizes(pipe):
    """Its own counts, else it is scaled; tensors of [0, 1] do as well, and transparency is white."""
    small = {"num_inference_steps": 2, "seed": 1}
    assert pipe(PROMPT, image=PICTURE, **small).images[0].size == (WIDTH, HEIGHT)
    assert pipe(PROMPT, height=16, width=32, image=PICTURE, **small).images[0].size == (32, 16)
    by_pil = pipe(PROMPT, image=PICTURE, **small).images[0]
    for other in (tensor(PICTURE), [tensor(PICTURE)[0]], PICTURE.convert("RGBA")):
        assert np.array_equal(pipe(PROMPT, image=other, **small).images[0], by_pil)
    with pytest.raises(ValueError, match="width=23 is not a multiple of 2: use 22 or 24"):
        pipe(PROMPT, image=given_picture().resize((23, 16)), **small)
    with pytest.raises(ValueError, match="the images are 16x16, 40x24: give height and width"):
        pipe([PROMPT] * 2, image=[PICTURE, PICTURE.resize((16, 16))], **small)


# Inpainting


@pytest.mark.parametrize("sampler", SOLVERS)
def test_what_is_kept_is_kept_bit_for_bit(pipe, sampler):
    call = {"sampler": sampler, "num_inference_steps": 3, "guidance_scale": 1, "seed": 1}
    image = np.asarray(pipe(PROMPT, image=PICTURE, mask_image=MASK, **call).images[0])
    given = np.asarray(PICTURE)
    assert np.array_equal(image[KEPT], given[KEPT])
    assert not np.array_equal(image, given)


def test_a_white_mask_is_text_to_image(pipe):
    plain = pipe(PROMPT, HEIGHT, WIDTH, seed=3, **TENSORS).images
    assert torch.equal(pipe(PROMPT, image=PICTURE, mask_image=WHITE, seed=3, **TENSORS).images, plain)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_known_latents_keep_the_noise_of_their_level(sampler):
    """Where x0 is known, xt is alpha * x0 + sigma * noise at every level, though nothing is replaced."""
    scheduler, shape = Scheduler.from_config(SCHEDULER), (4, 40, 40)
    x0, noise = torch.full((1, *shape), 2.0), start_noise([1], shape)
    canvas, tableau = Blended(x0, True, torch.zeros(1, 1, 40, 40)), scheduler.tableau(6, sampler)
    seen = []

    def unknown(xt, level):
        seen.append(((xt - level.alpha * x0) / level.sigma).std())
        return torch.randn_like(xt)

    xt = canvas.begin(noise, next(iter(tableau.steps)))
    end = sample(canvas.kept(unknown), xt, tableau, step_noise([1], shape))
    torch.testing.assert_close(torch.stack(seen), torch.ones(len(seen)), atol=0.05, rtol=0)
    alpha, sigma = float(tableau.steps.alpha[-1]), float(tableau.steps.sigma[-1])
    assert abs((end - alpha * x0).std() - sigma) < 0.05


def test_grey_blends(pipe):
    call = {"image": PICTURE, "seed": 1, **TENSORS}
    half = Image.new("L", PICTURE.size, 128)
    halves = pipe(PROMPT, mask_image=half, **call).images
    latents = pipe(PROMPT, mask_image=half, **call | {"output_type": "latent"}).images
    mixed = tensor(PICTURE).lerp(pipe.decode(latents), 128 / 255)
    torch.testing.assert_close(halves, mixed)


def test_a_black_mask_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        result = pipe(PROMPT, image=PICTURE, mask_image=Image.new("L", PICTURE.size), num_inference_steps=1)
    assert "the mask is black everywhere" in caplog.text
    assert len(result.notices) == 1
    with pytest.raises(ValueError, match="the mask is black everywhere"):
        pipe(PROMPT, image=PICTURE, mask_image=Image.new("L", PICTURE.size), strict=True)
    assert np.array_equal(result.images[0], PICTURE)


def test_a_strength_without_effect_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        tiny_pipeline(**ZERO_SNR)(PROMPT, image=PICTURE, strength=1, num_inference_steps=2)
    assert "the image has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_image": MASK}, "mask_image has no effect without a picture"),
        ({"strength": 0.5}, "strength has no effect without a picture"),
        ({"image": PICTURE, "strength": 0}, "strength=0: expected above 0"),
        ({"image": PICTURE, "strength": 1.5}, "strength=1.5: expected"),
        ({"image": PICTURE, "strength": 0.2}, "strength=0.2 leaves none of 4 steps: use 0.25 or more"),
        ({"image": "fox.png"}, "image is 'fox.png': expected a PIL image, a tensor or a list"),
        ({"image": []}, r"image is \[\]: expected"),
        ({"image": [1]}, "image holds a int: expected PIL images or tensors"),
        (
            {"image": torch.zeros(4, 24, 40)},
            r"image is a tensor \(4, 24, 40\) .*expected floats, \(3, H, W\)",
        ),
        ({"image": torch.zeros(0, 3, 24, 40)}, r"image is a tensor \(0, 3, 24, 40\)"),
        ({"image": torch.full((3, 24, 40), -1.0)}, "image has values from -1 to -1: expected 0 to 1"),
        ({"image": [PICTURE] * 2}, "2 of image for 1 pictures: give one, or one for each"),
        ({"image": PICTURE, "mask_image": [MASK] * 3}, "3 of mask_image for 1 pictures"),
        (
            {"image": PICTURE, "mask_image": MASK.resize((8, 32))},
            "the mask is 8x32 and the image",
        ),
        ({"variation": (1, 2.0)}, "variation_strength=2.0: expected 0"),
        ({"variation": (-1, 0.5)}, "seed=-1: expected"),
        ({"variation": 0.5}, r"variation=0.5: expected \(seed, strength\)"),
    ],
)
def test_what_cannot_be(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **{"num_inference_steps": 4, **options})


# Models that were trained for it


def test_a_model_for_inpainting():
    pipe, call = painter(), {"num_inference_steps": 2, "seed": 1}
    image = pipe(PROMPT, image=PICTURE, mask_image=MASK, **call).images[0]
    assert np.array_equal(np.asarray(image)[KEPT], np.asarray(PICTURE)[KEPT])
    for options, missing in (({}, "image and mask_image"), ({"image": PICTURE}, "mask_image")):
        with pytest.raises(ValueError, match=f"was trained for inpainting: give {missing}; white"):
            pipe(PROMPT, **call, **options)


@pytest.mark.slow
def test_folders_and_files_of_a_model_for_inpainting(tmp_path):
    pipe, call = painter(), {"image": PICTURE, "mask_image": MASK, "num_inference_steps": 2, "seed": 1}
    image = pipe(PROMPT, **call).images[0]
    pipe.save_pretrained(tmp_path / "folder")
    assert '"StableDiffusionInpaintPipeline"' in (tmp_path / "folder/model_index.json").read_text()
    pipe.save_single_file(tmp_path / "one.safetensors")
    for back in (
        LatentDiffusionPipeline.from_pretrained(tmp_path / "folder", dtype=torch.float32),
        LatentDiffusionPipeline.from_single_file(tmp_path / "one.safetensors", dtype=torch.float32),
    ):
        assert np.array_equal(back(PROMPT, **call).images[0], image)


# Variations


def test_slerp_ends_at_both_noises_and_is_as_loud_between():
    first, last = start_noise([1, 2], (4, 40, 40)), start_noise([3, 4], (4, 40, 40))
    assert torch.equal(slerp(first, last, 0.0), first)
    assert torch.equal(slerp(first, last, 1.0), last)
    torch.testing.assert_close(slerp(first, first, 0.3), first)
    for part in (0.2, 0.5, 0.9):
        between = slerp(first, last, part)
        assert abs(between.std() - 1) < 0.02
        torch.testing.assert_close(slerp(first[1:], last[1:], part), between[1:])
        angles = [
            torch.cosine_similarity(between[0].flatten(), end[0].flatten(), 0).acos() for end in (first, last)
        ]
        torch.testing.assert_close(
            angles[0] / sum(angles), torch.tensor(part), atol=0.01, rtol=0
        )  # lengths differ a little


def test_variations_of_a_seed(pipe):
    call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "output_type": "pt"}
    plain = pipe(PROMPT, seed=7, **call).images
    none = pipe(PROMPT, seed=7, variation=(50, 0.0), num_images_per_prompt=2, **call)
    assert none.seeds == [7, 7]
    torch.testing.assert_close(none.images, plain.expand(2, -1, -1, -1), atol=1e-5, rtol=0)
    all_of_it = pipe(PROMPT, seed=7, variation=(50, 1.0), **call).images
    assert torch.equal(all_of_it, pipe(PROMPT, seed=50, **call).images)
    three = pipe(PROMPT, seed=7, variation=(50, 0.2), num_images_per_prompt=3, **call).images
    second = pipe(PROMPT, seed=7, variation=(51, 0.2), **call).images
    torch.testing.assert_close(three[1:2], second, atol=1e-5, rtol=0)
    listed = pipe([PROMPT] * 2, seed=[7, 7], variation=([51, 50], 0.2), **call).images
    torch.testing.assert_close(listed, three[[1, 0]], atol=1e-5, rtol=0)


# The same as in diffusers


def stock_of(pipe: LatentDiffusionPipeline, name: str, **changes: object):
    import diffusers

    twin = pipe.to_diffusers()
    twin = getattr(diffusers, name)(**twin.components | changes, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_image_to_image_is_that_of_diffusers(name):
    pipe = tiny_pipeline(_class_name=name, prediction_type="epsilon")
    stock = stock_of(pipe, "StableDiffusionImg2ImgPipeline")
    call = {"num_inference_steps": 6, "strength": 0.55, "guidance_scale": 5.0, "output_type": "pt"}
    latents = pipe.encode(tensor(PICTURE))  # of which stock would draw a sample
    theirs = stock(PROMPT, image=latents, generator=torch.Generator().manual_seed(5), **call).images
    ours = pipe(PROMPT, image=PICTURE, seed=5, **call).images
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() < 2 / 255


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("model", [tiny_pipeline, painter])
def test_inpainting_is_that_of_diffusers(model, strength):
    """At zero SNR: elsewhere stock starts by any model from noise alone, also where the picture is known."""
    pipe = model(**ZERO_SNR)
    stock = stock_of(pipe, "StableDiffusionInpaintPipeline")
    mask = tensor(MASK.convert("RGB"))[:, :1]
    hidden = torch.where(mask > 0.5, 0.5, tensor(PICTURE))
    call = {"num_inference_steps": 5, "strength": strength, "guidance_scale": 5.0, "output_type": "latent"}
    theirs = stock(
        PROMPT,
        image=pipe.encode(tensor(PICTURE)),
        mask_image=mask,
        masked_image_latents=pipe.encode(hidden),
        height=HEIGHT,
        width=WIDTH,
        generator=torch.Generator().manual_seed(5),
        **call,
    ).images
    ours = pipe(PROMPT, image=PICTURE, mask_image=MASK, seed=5, **call).images
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), [(tiny_pipeline, ""), (tiny_xl_pipeline, "XL")])
def test_models_for_inpainting_go_between_us_and_diffusers(make, name, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = painter(make)
    twin = pipe.to_diffusers()
    assert type(twin).__name__ == f"StableDiffusion{name}InpaintPipeline"
    twin.save_pretrained(tmp_path / "theirs")
    pipe.save_pretrained(tmp_path / "ours")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "ours")) is type(twin)
    call = {"image": PICTURE, "mask_image": MASK, "seed": 1, **TENSORS}
    want = pipe(PROMPT, **call).images
    assert torch.equal(LatentDiffusionPipeline.from_diffusers(twin)(PROMPT, **call).images, want)
    back = LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    torch.testing.assert_close(back(PROMPT, **call).images, want, atol=1e-5, rtol=0)


def test_two_calls_draw_a_larger_picture(pipe):
    """What --two-pass does: the first call's picture, enlarged, is where the second one starts."""
    call = {"num_inference_steps": 3, "seed": 2}
    small = pipe(PROMPT, 16, 24, **call).images
    large = pipe(PROMPT, 32, 48, image=small, strength=0.7, **call).images[0]
    enlarged = tensor(small[0].resize((48, 32), Image.Resampling.LANCZOS))
    by_hand = pipe(PROMPT, image=enlarged, strength=0.7, **call).images[0]
    assert np.abs(np.asarray(large, int) - np.asarray(by_hand, int)).max() <= 3  # whole pixel values between
    assert to_pil(pipe.decode(pipe.encode(enlarged)))[0].size == large.size


# The bundled model


@pytest.mark.slow
def test_the_bundled_model_does_every_task():
    """What is kept is kept, what is repainted has its colour, and less strength stays nearer."""
    pipe = LatentDiffusionPipeline.bundled(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, **call: Any) -> np.ndarray:
        return np.asarray(pipe(prompt, **call).images[0], np.float64)

    fox = pipe("a red fox in snow", seed=7).images[0]
    before, middle = np.asarray(fox, np.float64), np.s_[32:112, 32:96]
    mask = np.zeros((128, 128), np.uint8)
    mask[16:120, 16:112] = 255
    painted = draw("a blue cat in snow", image=fox, mask_image=Image.fromarray(mask), seed=3)
    assert (painted[mask == 0] == before[mask == 0]).all()
    redness = [(each[middle][..., 0] - each[middle][..., 2]).mean() for each in (before, painted)]
    assert redness[1] < 0 < redness[0]

    wider, mask_image = extended(fox, (0, 0, 64, 0))
    beyond = draw("two red foxes in snow", image=wider, mask_image=mask_image, seed=3)
    assert beyond.shape == (128, 192, 3)
    assert (beyond[:, :128] == before).all()
    assert np.abs(beyond[:, 128:] - np.asarray(wider)[:, 128:]).mean() > 1

    def distances(calls: list[dict[str, Any]]) -> list[float]:
        return [np.abs(draw("a red fox in snow", **call) - before).mean() for call in calls]

    near, far = distances([{"image": fox, "strength": strength, "seed": 3} for strength in (0.2, 0.8)])
    assert near < far
    like, other = distances([{"seed": 7, "variation": (100, amount)} for amount in (0.1, 1.0)])
    assert like < other
    small = draw("a red fox in snow", image=fox, height=256, width=256, strength=0.4, seed=7)
    enlarged = np.asarray(fox.resize((256, 256), Image.Resampling.LANCZOS), np.float64)
    assert small.shape == (256, 256, 3)
    assert np.abs(small - enlarged).mean() < 25
