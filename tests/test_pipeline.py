"""The pipeline: stock diffusers' pictures, independent of each other, and clear words for what cannot be."""

import json
import logging
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.guidance import apg, autoguidance, classifier_free, conditional, thresholded, within
from ldm.diffusion.scheduler import Scheduler
from ldm.files.hub import choose_weights, find_folder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.recipes.options import Defaults
from tests.test_guidance import CONTEXT, UNCOND, Unet, level_at
from tests.tiny import SCHEDULER, tiny_pipeline

PROMPT, NEGATIVE = "a red fox in snow", "two blue cats"
SMALL = {"num_inference_steps": 2, "output_type": "pt"}
ODD = {"height": 24, "width": 40}


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved pipeline to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def stock_pipeline(saved):
    """What stock diffusers makes of our folder."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def stock(stock_pipeline):
    """The same, with its own scheduler, whatever another test gave it."""
    from diffusers import DDIMScheduler

    stock_pipeline.scheduler = DDIMScheduler.from_config(SCHEDULER)
    return stock_pipeline


def picture(pipe: LatentDiffusionPipeline, seed: int = 3, **options: object) -> torch.Tensor:
    return pipe(PROMPT, seed=seed, **SMALL | ODD | options).images


# The same pictures as diffusers


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pictures_are_those_of_stock_diffusers(pipe, stock, name, prediction):
    import diffusers

    config = SCHEDULER | {"_class_name": name, "prediction_type": prediction}
    stock.scheduler = getattr(diffusers, name).from_config(config)
    ours = LatentDiffusionPipeline(**pipe.components | {"scheduler": Scheduler.from_config(config)})
    options = {
        "num_inference_steps": 5,
        "guidance_scale": 5.0,
        "output_type": "pt",
        "negative_prompt": NEGATIVE,
        "height": 40,
        "width": 56,
    }
    theirs = stock(PROMPT, generator=torch.Generator().manual_seed(5), **options).images
    assert theirs.std() > 0.05  # not a grey sheet
    assert (ours(PROMPT, seed=5, **options).images - theirs).abs().max() < 2 / 255


def test_a_generator_draws_the_first_noise_as_in_diffusers(pipe, stock):
    for make in (
        lambda: torch.Generator().manual_seed(5),
        lambda: [torch.Generator().manual_seed(seed) for seed in (5, 2, 9)],
    ):
        theirs = stock([PROMPT] * 3, generator=make(), guidance_scale=1.0, **SMALL, **ODD).images
        result = pipe([PROMPT] * 3, generator=make(), guidance_scale=1.0, sampler="ddim", **SMALL, **ODD)
        assert result.seeds is None
        torch.testing.assert_close(result.images, theirs, atol=1e-4, rtol=0)


def test_guidance_rescale_is_that_of_diffusers(pipe, stock):
    options = {"guidance_scale": 9.0, "guidance_rescale": 0.7, **SMALL, **ODD}
    theirs = stock(PROMPT, generator=torch.Generator().manual_seed(1), **options).images
    torch.testing.assert_close(pipe(PROMPT, seed=1, **options).images, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("eta", "momentum", "norm"), [(0.0, -0.5, 15.0), (0.4, 0.3, 2.0)])
def test_apg_is_that_of_diffusers(eta, momentum, norm):
    """Theirs takes what the model predicts, and the paper x0: here it is given x0."""
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    xt = torch.randn(3, 4, 5, 7)
    buffer, unet, asked = MomentumBuffer(momentum), Unet(), {"eta": eta, "norm_threshold": norm}
    with_text, without = (conditional(unet, text, "v") for text in (CONTEXT, UNCOND))
    ours = apg(unet, CONTEXT, UNCOND, 5.0, "v", eta=eta, momentum=momentum, norm=norm)
    for t in (800, 500, 200):
        level = level_at(t)
        told = (with_text(xt, level), without(xt, level), 4.0, buffer)
        theirs = normalized_guidance(*told, **asked, use_original_formulation=True)
        torch.testing.assert_close(ours(xt, level), theirs, atol=1e-4, rtol=1e-4)
        xt = 0.9 * xt


def test_thresholding_is_that_of_diffusers():
    """Of one channel: theirs takes all together; in pixels, where the limit is 1."""
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    level, unet = level_at(500), lambda xt, t, context: 1.5 * xt
    ours = thresholded(classifier_free, 1.0, 0.9)(unet, CONTEXT, UNCOND, 1.0, "x0")
    x = torch.randn(3, 1, 5, 7)
    torch.testing.assert_close(ours(x, level), reference._threshold_sample(1.5 * x))


def test_what_stock_diffusers_saves_loads_here(pipe, stock, tmp_path):
    stock.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(picture(loaded), picture(pipe), atol=1e-5, rtol=0)
    shutil.rmtree(tmp_path / "text_encoder")
    type(stock.text_encoder)(stock.text_encoder.config).save_pretrained(
        tmp_path / "text_encoder"
    )  # without a prefix
    picture(LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32))


def test_diffusers_knows_the_folder_by_itself(saved):
    from diffusers import DiffusionPipeline

    assert type(DiffusionPipeline.from_pretrained(saved)).__name__ == "StableDiffusionPipeline"


def test_twins_share_their_weights(pipe):
    twin = pipe.to_diffusers()
    twin.set_progress_bar_config(disable=True)
    back = LatentDiffusionPipeline.from_diffusers(twin)
    for name in ("unet", "vae", "text_encoder"):
        pointers = [
            {tensor.data_ptr() for tensor in getattr(each, name).state_dict().values()}
            for each in (pipe, twin, back)
        ]
        assert pointers[0] == pointers[1] == pointers[2]
    assert torch.equal(picture(back), picture(pipe))
    theirs = twin(PROMPT, generator=torch.Generator().manual_seed(3), **SMALL, **ODD).images
    torch.testing.assert_close(theirs, picture(pipe), atol=1e-4, rtol=0)


def test_a_folder_comes_back(pipe, folder):
    loaded = LatentDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    torch.testing.assert_close(picture(loaded), picture(pipe), atol=1e-5, rtol=0)
    with_defaults = LatentDiffusionPipeline(
        **pipe.components,
        defaults=Defaults(num_inference_steps=2, guidance_scale=1.0, sampler="euler", height=24, width=32),
    )
    with_defaults.save_pretrained(folder)
    again = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert again.defaults == with_defaults.defaults
    assert again(PROMPT).images[0].size == (32, 24)
    (folder / "generation.json").write_text('{"steps": 3}')
    with pytest.raises(ValueError, match=r"generation\.json: unknown key steps=3; known are"):
        LatentDiffusionPipeline.from_pretrained(folder)


# Pictures do not depend on each other


def test_a_picture_does_not_depend_on_its_batch(pipe):
    prompts = [PROMPT, "a boat on a beach", "a blue cat at night"]
    options = {"sampler": "euler_a", **SMALL, **ODD}  # draws noise in its steps too
    batch = pipe(prompts, seed=[4, 9, 2], **options).images
    turned = pipe(prompts[::-1], seed=[2, 9, 4], **options).images
    for index, seed in enumerate([4, 9, 2]):
        alone = pipe(prompts[index], seed=seed, **options).images[0]
        torch.testing.assert_close(alone, batch[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone, turned[2 - index], atol=1e-5, rtol=0)


def test_the_first_noise_is_bit_equal(pipe):
    from ldm.drawing.inputs import first_noise

    batch, _, seeds = first_noise(3, (4, 5, 7), 7, None, None)
    assert seeds == [7, 8, 9]
    for row, seed in zip(batch, seeds, strict=True):
        assert torch.equal(row[None], first_noise(1, (4, 5, 7), seed, None, None)[0])
        assert torch.equal(
            row[None], torch.randn(1, 4, 5, 7, generator=torch.Generator("cpu").manual_seed(seed))
        )


def test_images_of_a_prompt_have_seeds_that_follow(pipe):
    both = pipe(PROMPT, seed=6, num_images_per_prompt=2, **SMALL, **ODD)
    assert both.seeds == [6, 7]
    torch.testing.assert_close(both.images[1:], picture(pipe, seed=7), atol=1e-5, rtol=0)
    drawn = pipe(PROMPT, **SMALL, **ODD)
    assert torch.equal(picture(pipe, seed=drawn.seeds[0]), drawn.images)


def test_threads_share_a_pipeline(pipe):
    """Each thread gets the pictures that it gets alone, whatever the others ask for."""
    asked = [
        {"seed": 1, "sampler": "ddim", "num_inference_steps": 3},
        {"seed": 2, "sampler": "unipc", "num_inference_steps": 4, "clip_skip": 1},
        {"seed": 3, "sampler": "euler_a", "num_inference_steps": 3, "guidance_scale": 1.0},
    ]
    alone = [picture(pipe, **options) for options in asked]
    together: list[torch.Tensor | None] = [None] * len(asked)

    def run(index: int) -> None:
        for _ in range(2):
            together[index] = picture(pipe, **asked[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


# What a call gives and takes


def test_outputs(pipe):
    tensor = picture(pipe)
    assert tensor.shape == (1, 3, 24, 40)
    assert tensor.min() >= 0
    assert tensor.max() <= 1
    result = pipe(PROMPT, seed=3, num_inference_steps=2, **ODD)
    assert result[0] is result.images
    assert result.images[0].size == (40, 24)
    np.testing.assert_array_equal(
        np.asarray(result.images[0]), (tensor[0].permute(1, 2, 0) * 255).round().numpy()
    )
    assert picture(pipe, output_type="np").shape == (1, 24, 40, 3)
    latents = picture(pipe, output_type="latent")
    assert latents.shape == (1, 4, 12, 20)
    assert torch.equal(pipe.decode(latents), tensor)
    images, flags = pipe(PROMPT, seed=3, return_dict=False, **SMALL, **ODD)
    assert torch.equal(images, tensor)
    assert flags is None


def test_embeddings_and_latents_in_the_place_of_prompts_and_seeds(pipe):
    context, uncond = pipe.encode_prompts([PROMPT]), pipe.encode_prompts([NEGATIVE])
    noise = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(3))
    result = pipe(prompt_embeds=context, negative_prompt_embeds=uncond, latents=noise, **SMALL)
    assert torch.equal(result.images, picture(pipe, negative_prompt=NEGATIVE))
    assert result.cut == []


def test_callbacks_see_and_change_the_run(pipe):
    seen = []

    def watch(_, step, t, tensors):
        seen.append((step, t, sorted(tensors), tensors["x0"].shape))

    options = {"callback_on_step_end_tensor_inputs": ["latents", "x0"], "callback_on_step_end": watch}
    assert torch.equal(picture(pipe, **options), picture(pipe))
    assert seen == [(index, t, ["latents", "x0"], (1, 4, 12, 20)) for index, t in enumerate([501, 1])]
    zero = lambda _, step, t, tensors: {"latents": torch.zeros_like(tensors["latents"])}
    assert not picture(pipe, callback_on_step_end=zero, output_type="latent").any()


def test_what_is_cut_of_a_prompt_is_told(pipe, caplog):
    long = PROMPT + " and many more words" * 20
    with caplog.at_level(logging.WARNING):
        result = pipe(long, seed=1, **SMALL)
    assert result.cut[0]
    assert long.endswith(result.cut[0])
    assert "has no effect" in caplog.text
    assert pipe(PROMPT, seed=1, **SMALL).cut == [""]


@pytest.mark.parametrize("prompt", ["", "!?,.", "\x00\x07\n", "((a", "狐狸 🦊", "word " * 10_000])
def test_any_text_makes_a_picture(pipe, prompt):
    assert pipe(prompt, seed=1, num_inference_steps=1, output_type="pt").images.isfinite().all()


def test_a_negative_prompt_without_guidance_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        picture(pipe, negative_prompt=NEGATIVE, guidance_scale=1)
    assert "has no effect without guidance" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "steps=0: expected a whole number from 1 to 1000"),
        ({"num_inference_steps": -1}, "steps=-1: expected"),
        ({"num_inference_steps": 10_000}, "steps=10000: expected"),
        ({"num_inference_steps": 2.5}, "steps=2.5: expected"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: expected a number from 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
        ({"guidance_rescale": 2}, "guidance_rescale=2: expected a number from 0"),
        ({"guidance_interval": (1, 1)}, r"guidance_interval=\(1, 1\): expected \(low, high\)"),
        ({"guidance_interval": (float("nan"), 1)}, r"guidance_interval=\(nan, 1\): expected"),
        (
            {"callback_on_step_end": lambda *_: torch.zeros(1)},
            r"callback_on_step_end returned Tensor: expected None",
        ),
        (
            {"callback_on_step_end": lambda *_: {"prompt_embeds": None}},
            r"callback_on_step_end returned \['prompt_embeds'\]: expected None",
        ),
        (
            {"callback_on_step_end": lambda *_: {"latents": torch.zeros(1, 4, 2, 2)}, **SMALL, **ODD},
            r"returned latents \(1, 4, 2, 2\): expected \(1, 4, 12, 20\)",
        ),
        ({"seed": -1}, "seed=-1: expected a whole number from 0 to 2"),
        ({"seed": 2**64}, "seed=18446744073709551616: expected"),
        ({"seed": "abc"}, "seed='abc': expected"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"height": 0}, "height=0: expected a whole number of pixels from 8 to 4096"),
        ({"width": 7}, "width=7: expected"),
        ({"width": 100_000}, "width=100000: expected"),
        ({"width": 51}, "width=51 is not a multiple of 2: use 50 or 52"),
        ({"num_images_per_prompt": 0}, "num_images=0: expected 1 to 256 images"),
        ({"num_images_per_prompt": 10**6}, "num_images=1000000: expected"),
        ({"sampler": "eular"}, "sampler='eular' is unknown: expected one of ddim"),
        ({"output_type": "jpg"}, "output_type='jpg' is unknown: expected one of pil, np, pt, latent"),
        ({"clip_skip": 2}, r"clip_skip=2: .* 0 to 1"),
        ({"clip_skip": -1}, "clip_skip=-1"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt": []}, r"prompt=\[\]: expected a string or a list"),
        ({"prompt": ["a", 1]}, "prompt is a int: expected a string"),
        ({"prompt": "\ud800"}, "prompt is not valid Unicode at character 0"),
        ({"negative_prompt": ["a", "b"]}, "2 of negative_prompt for 1 prompts: give one, or one for each"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 8)}, r"\(1, 16, 8\): expected \(B, N, 24\)"),
        ({"negative_prompt_embeds": torch.zeros(1, 3, 24)}, r"\(1, 3, 24\): expected \(1, 16, 24\)"),
        ({"latents": torch.zeros(2, 4, 20, 28)}, r"expected the first noise, \(1, 4, 20, 28\) of floats"),
        ({"seed": 1, "generator": torch.Generator()}, "give either seed or generator"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise_pred"]},
            "'noise_pred' is unknown: expected one of latents, x0",
        ),
    ],
)
def test_what_cannot_be(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, **options})


@pytest.mark.parametrize("name", ["cuda:7", "cuda:-1", "tpu", "gpu"])
def test_a_device_that_is_not_here(name):
    if name == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    with pytest.raises(ValueError, match=f"device='{name}'"):
        tiny_pipeline().to(name)


def test_an_interval_without_ends_is_no_interval(pipe):
    everywhere = (-float("inf"), float("inf"))
    assert torch.equal(picture(pipe, guidance_interval=everywhere), picture(pipe))


def test_guidance_may_be_another(pipe):
    """Any maker of ldm.diffusion.guidance, as such or with its options bound."""
    rescaled = picture(pipe, guidance_rescale=0.7)
    assert torch.equal(picture(pipe, guidance=partial(classifier_free, rescale=0.7)), rescaled)
    plain = picture(pipe, guidance_scale=1.0)
    assert torch.equal(picture(pipe, guidance_scale=0, guidance=apg), plain)
    assert torch.equal(picture(pipe, guidance=within(apg, 90.0, 99.0)), plain)
    assert not torch.equal(picture(pipe, guidance=apg), picture(pipe))
    itself = partial(autoguidance, worse=pipe.unet)
    torch.testing.assert_close(picture(pipe, guidance=itself), plain, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"guidance_rescale=0.7 beside guidance"):
        picture(pipe, guidance=apg, guidance_rescale=0.7)


def test_clip_skip_leaves_the_negative_prompt_whole(pipe):
    """As in diffusers."""
    skipped = {"prompt_embeds": pipe.encode_prompts([PROMPT], clip_skip=1), "prompt": None}
    both = {"negative_prompt": NEGATIVE, **SMALL, **ODD, "seed": 3}
    assert torch.equal(picture(pipe, clip_skip=1, negative_prompt=NEGATIVE), pipe(**skipped | both).images)


def test_zero_and_one_are_no_guidance(pipe):
    assert torch.equal(picture(pipe, guidance_scale=0), picture(pipe, guidance_scale=1))


# Decoding


class Overflowing(torch.nn.Module):
    """An autoencoder that overflows in float16."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.config, self.downsample_factor = vae.config, vae.downsample_factor

    @property
    def dtype(self):
        return self.vae.dtype

    def decode(self, latents):
        if self.dtype == torch.float16:
            return torch.full((len(latents), 3, 4, 4), float("inf"))
        return self.vae.decode(latents)


def test_a_decoder_that_overflows_runs_again_in_float32(caplog):
    pipe = tiny_pipeline()
    latents = torch.randn(2, 4, 5, 7)
    pipe.vae.half().float()  # what float16 keeps of the weights
    want = pipe.decode(latents)
    pipe.vae = Overflowing(pipe.vae.half())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(pipe.decode(latents), want)
    assert caplog.text.count("it runs again in float32") == 1
    assert pipe.vae.dtype == torch.float16
    with pytest.raises(ValueError, match="not finite"):
        pipe.decode(latents * float("nan"))


# Loading


def test_parts_that_do_not_fit_each_other(pipe):
    other = tiny_pipeline().text_encoder
    wide = type(other)(type(other.config)(**vars(other.config) | {"hidden_size": 32}))
    with pytest.raises(ValueError, match=r"cross_attention_dim and .*hidden_size differ: 24 and 32"):
        LatentDiffusionPipeline(**pipe.components | {"text_encoder": wide})
    short = type(other)(type(other.config)(**vars(other.config) | {"max_position_embeddings": 9}))
    with pytest.raises(ValueError, match="16 tokens a prompt, the text encoder has 9 positions"):
        LatentDiffusionPipeline(**pipe.components | {"text_encoder": short})
    grey = type(pipe.vae)(type(pipe.vae.config)(**vars(pipe.vae.config) | {"out_channels": 1}))
    with pytest.raises(ValueError, match=r"vae.out_channels=1"):
        LatentDiffusionPipeline(**pipe.components | {"vae": grey})


def change_index(folder: Path, **values: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "StableDiffusion3Pipeline"}, "the pipeline is 'StableDiffusion3Pipeline': expected"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "text_encoder_2 is None: expected"),
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
            "SDXL's refiner is not there",
        ),
        ({"_class_name": ["evil", "Pipeline"]}, "no other code is run"),
        (
            {"unet": ["os", "system"]},
            r"unet is \['os', 'system'\]: expected \['diffusers', 'UNet2DConditionModel'\]",
        ),
        ({"unet": ["evil.py", "Evil"]}, "no other code is run"),
        ({"vae": None}, "vae is None: expected"),
        ({"scheduler": ["subprocess", "run"]}, r"scheduler is .*: expected"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet is no part of"),
    ],
)
def test_folders_of_another_kind(folder, values, message):
    change_index(folder, **values)
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ValueError, match=message):
        LatentDiffusionPipeline.from_pretrained(folder)


def test_a_folder_with_a_safety_checker_loads(folder):
    entry = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change_index(folder, safety_checker=entry, feature_extractor=["transformers", "CLIPImageProcessor"])
    LatentDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def test_folders_that_are_not_whole(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "os.system"}')
    with pytest.raises(ValueError, match=r"os\.system"):
        LatentDiffusionPipeline.from_pretrained(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=r"no such folder .*vae"):
        LatentDiffusionPipeline.from_pretrained(folder)
    for content, message in (("{", "not valid JSON"), (None, r"has no model_index\.json")):
        (folder / "model_index.json").unlink()
        if content:
            (folder / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            LatentDiffusionPipeline.from_pretrained(folder)


def test_variants_are_used_where_there_are_some(pipe, folder):
    tiny_pipeline(seed=1).to(torch.float16).save_pretrained(folder, variant="fp16")
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae" / "keep")
    (
        folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    ).unlink()  # such as non_ema, of the UNet alone
    loaded = LatentDiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    key = "conv_in.weight"
    assert torch.equal(
        loaded.unet.state_dict()[key], tiny_pipeline(seed=1).unet.half().float().state_dict()[key]
    )
    assert torch.equal(loaded.vae.quant_conv.weight, pipe.vae.quant_conv.weight)
    with pytest.raises(ValueError, match="no variant 'fp8' of any part"):
        LatentDiffusionPipeline.from_pretrained(folder, variant="fp8")


def test_names_that_are_no_folder(tmp_path):
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, message in (
        (tmp_path / "nothing", "no such folder"),
        ("nothing", r"no such folder .*owner/name"),
        ("../../etc/passwd.d", "no such folder"),
        (pickle, r"is a file: expected a folder .*never opened"),
        (tmp_path / "model.safetensors", "is a single file"),
        ("owner/name", r"cannot load owner/name: .*HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            find_folder(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="never opened"):
        LatentDiffusionPipeline.from_pretrained(tmp_path, use_safetensors=False)


def test_only_safetensors_are_fetched():
    plain, half = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    names = [
        f"unet/{plain}",
        f"unet/{half}",
        f"vae/{plain}",
        "unet/diffusion_pytorch_model.bin",
        "v1.safetensors",
    ]
    names += ["text_encoder/model-00001-of-00002.safetensors", "text_encoder/pytorch_model.bin", "evil.py"]
    shard = "text_encoder/model-00001-of-00002.safetensors"
    assert choose_weights(names, None) == [f"unet/{plain}", f"vae/{plain}", shard]
    assert choose_weights(names, "fp16") == [f"unet/{half}", f"vae/{plain}", shard]


# Where it runs


def test_moving(pipe):
    moved = tiny_pipeline().to("cpu", torch.float64)
    assert moved.dtype == moved.vae.dtype == torch.float64
    assert moved.device == torch.device("cpu")
    torch.testing.assert_close(picture(moved), picture(pipe), atol=1e-3, rtol=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' is not here: this machine has"):
            moved.to("cuda")
        with pytest.raises(ValueError, match=r"xformers.*CUDA"):
            moved.enable_xformers_memory_efficient_attention()


def test_methods_of_diffusers_say_what_they_do(pipe):
    pipe.enable_vae_slicing()
    pipe.disable_xformers_memory_efficient_attention()
    assert not hasattr(pipe, "enable_attention_slicing")
    with pytest.raises(AttributeError, match=r"enable_freeu: .*to_diffusers"):
        pipe.enable_freeu()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = pipe.no_such_thing


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_draws_what_the_cpu_draws(pipe, saved, dtype):
    moved = LatentDiffusionPipeline.from_pretrained(saved, dtype=dtype).to("cuda")
    tolerance = 2 / 255 if dtype == torch.float32 else 0.1
    assert (
        picture(moved, guidance_scale=2.0).cpu() - picture(pipe, guidance_scale=2.0)
    ).abs().max() < tolerance
    moved.enable_vae_slicing()
    assert LatentDiffusionPipeline.from_pretrained(saved).to("cuda").dtype in (torch.bfloat16, torch.float32)
