"""Pictures to start from on the command line, in recipes and lines: made again bit for bit, or told why."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import generate
from ldm.recipes.picture import read_recipe
from ldm.recipes.recipe import parse_parameters
from ldm.recipes.requests import Request
from ldm.recipes.starts import extended, first_size, read_picture
from tests.test_generate import RECIPE
from tests.test_tasks import KEPT, MASK, PICTURE, PROMPT
from tests.tiny import tiny_pipeline


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder with a picture and a mask; its status and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.pipeline.BUNDLED", model)
    PICTURE.save("cat.png")
    MASK.save("mask.png")

    def call(*arguments: str) -> tuple[int, str]:
        try:
            status = generate.main(list(arguments))
        except SystemExit as ended:
            status = ended.code
        return status, capsys.readouterr().err

    return call


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def repeats(run, name: str) -> bool:
    """Whether --from makes the same file again."""
    assert run(f"--from={name}", "--output=again.png", "--overwrite") == (0, "")
    return Path("again.png").read_bytes() == Path(name).read_bytes()


@pytest.mark.slow
def test_a_picture_of_a_picture_and_its_repetition(run, tmp_path):
    assert run(PROMPT, "--image=cat.png", "--steps=4", "--seed=1", "--output=x.png") == (0, "")
    recipe = read_recipe(tmp_path / "x.png")
    assert (recipe.width, recipe.height, recipe.strength) == (*PICTURE.size, 0.8)
    assert recipe.image[0] == "cat.png"
    assert "Denoising strength: 0.8" in Image.open("x.png").info["parameters"]
    assert repeats(run, "x.png")
    Image.new("RGB", PICTURE.size).save("cat.png")
    status, err = run("--from=x.png", "--output=y.png")
    assert status == 2
    assert "x.png was made with cat.png of hash" in err
    Path("cat.png").unlink()
    assert "or name another by --image" in run("--from=x.png", "--output=y.png")[1]
    assert not Path("y.png").exists()


@pytest.mark.slow
def test_a_masked_picture_and_its_repetition(run, tmp_path):
    asked = ["--image=cat.png", "--mask=mask.png", "--steps=2", "--seed=1", "--num-images=2"]
    assert run(PROMPT, *asked, "--output=x.png") == (0, "")
    assert read_recipe(tmp_path / "x.png").strength == 1.0
    for name in ("x-1.png", "x-2.png"):
        assert np.array_equal(pixels(name)[KEPT], np.asarray(PICTURE)[KEPT])
        assert repeats(run, name)


def test_pictures_are_decoded_once(run, monkeypatch):
    """Of many lines twice: all are looked at before a model is loaded, and none is held until it is drawn."""
    seen: Counter[str] = Counter()

    def counting(path: str, name: str = "image") -> Image.Image:
        seen[path] += 1
        return read_picture(path, name)

    monkeypatch.setattr("ldm.recipes.starts.read_picture", counting)
    asked = ["--image=cat.png", "--mask=mask.png", "--steps=1", "--seed=1", "--output=x.png"]
    assert run(PROMPT, *asked) == (0, "")
    assert seen == {"cat.png": 1, "mask.png": 1}
    Path("x.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": "cat.png", "mask": "mask.png"}))
    assert run("--prompts=x.jsonl", "--output=out", "--steps=1", "--seed=1", "--progress=none")[0] == 0
    assert seen == {"cat.png": 3, "mask.png": 3}


def test_painting_on_beyond_the_sides(run, tmp_path):
    asked = ["--image=cat.png", "--extend", "4", "0", "8", "2", "--steps=1", "--seed=1"]
    assert run(PROMPT, *asked, "--output=x.png") == (0, "")
    given, made = np.asarray(PICTURE), pixels("x.png")
    assert made.shape == (given.shape[0] + 2, given.shape[1] + 12, 3)
    assert np.array_equal(made[:-2, 4:-8], given)
    assert repeats(run, "x.png")


def test_what_is_extended_continues_the_edge():
    image, mask = extended(PICTURE, (2, 0, 0, 4))
    assert image.size == mask.size == (PICTURE.width + 2, PICTURE.height + 4)
    assert np.array_equal(np.asarray(image)[:, 0], np.asarray(image)[:, 2])
    assert np.array_equal(np.asarray(image)[-1], np.asarray(image)[-5])
    assert np.asarray(mask).sum() == 255 * (mask.width * mask.height - PICTURE.width * PICTURE.height)


@pytest.mark.slow
def test_variations_are_like_the_picture(run, tmp_path):
    usual = ["--steps=2", "--width=24", "--height=16"]
    assert run(PROMPT, *usual, "--seed=7", "--output=x.png") == (0, "")
    varied = ["--from=x.png", "--num-images=3", "--variation-strength=0.2", "--output=many.png"]
    assert run(*varied) == (0, "")
    recipes = [read_recipe(tmp_path / f"many-{index}.png") for index in (1, 2, 3)]
    first = recipes[0].variation_seed
    assert [(each.seed, each.variation_seed) for each in recipes] == [
        (7, first + index) for index in range(3)
    ]
    assert repeats(run, "many-2.png")
    assert repeats(run, "many.png")
    assert not np.array_equal(pixels("many-1.png"), pixels("many-2.png"))
    same = ["--from=many-2.png", "--variation-strength=0", "--output=same.png"]
    assert run(*same) == (0, "")
    assert np.array_equal(pixels("same.png"), pixels("x.png"))


@pytest.mark.slow
def test_two_passes(run, tmp_path):
    """The same as two calls: the second starts from the first's picture, enlarged."""
    usual = ["--seed=2", "--width=48", "--height=48", "--steps=4", "--two-pass=0.5", "--progress=json"]
    status, err = run(PROMPT, *usual, "--output=x.png", "--show-steps")
    assert status == 0
    assert [json.loads(line)["step"] for line in err.splitlines()] == [1, 2, 3, 4, 5, 6]
    assert Image.open("x-steps.png").size == (48 * 2 + 4, 48)
    recipe = read_recipe(tmp_path / "x.png")
    assert (recipe.first_size, recipe.two_pass, recipe.strength) == ((32, 32), 0.5, None)
    assert repeats(run, "x.png")
    pipe, call = tiny_pipeline(), {"num_inference_steps": 4, "seed": 2}
    small = pipe(PROMPT, output_type="pt", **call).images
    large = pipe(PROMPT, 48, 48, image=small, strength=0.5, **call).images[0]
    assert np.abs(np.asarray(large, int) - pixels("x.png").astype(int)).max() <= 1


def test_the_first_of_two_sizes():
    assert first_size(128, 128, (64, 64), 4) == (64, 64)
    assert first_size(128, 96, (64, 64), 4) == (72, 56)
    assert first_size(1024, 512, (512, 512), 8) == (728, 360)
    with pytest.raises(ValueError, match="two_pass draws at 64x64 first: ask for a larger width and height"):
        first_size(64, 64, (64, 64), 4)


@pytest.mark.slow
def test_lines_start_from_pictures(run, tmp_path):
    lines = [
        {"prompt": PROMPT, "image": "cat.png", "strength": 0.5, "name": "a"},
        {"prompt": PROMPT, "image": "cat.png", "mask": "mask.png", "name": "b"},
        {"prompt": "a boat", "image": "mask.png", "mask": "mask.png", "name": "c"},
        {"prompt": PROMPT, "image": "cat.png", "extend": [0, 0, 4, 0], "name": "d"},
        {"prompt": PROMPT, "variation_strength": 0.2, "variation_seed": 5, "width": 24, "name": "e"},
        {"prompt": PROMPT, "two_pass": 0.5, "width": 48, "height": 48, "name": "f"},
    ]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, err = run("--prompts=x.jsonl", "--output=out", "--steps=2", "--seed=3", "--batch-size=1")
    assert (status, "drew 6 pictures" in err) == (0, True)
    assert np.array_equal(pixels("out/b.png")[KEPT], np.asarray(PICTURE)[KEPT])
    assert pixels("out/d.png").shape[1] == PICTURE.width + 4
    for name in "abcdef":  # each is what a command of its own makes
        assert run(f"--from=out/{name}.png", "--output=again.png", "--overwrite") == (0, "")
        assert np.array_equal(pixels("again.png"), pixels(f"out/{name}.png"))
    assert "; 6 were there" in run("--prompts=x.jsonl", "--output=out", "--steps=2", "--seed=3")[1]
    Path("x.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": "dog.png"}))
    status, err = run("--prompts=x.jsonl", "--output=out")
    assert (status, err) == (2, "error: x.jsonl:1: image: no such file dog.png\n")
    Image.new("L", (8, 32), 255).save("thin.png")
    Path("x.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": "cat.png", "mask": "thin.png"}))
    assert "error: x.jsonl:1: the mask is 8x32 and the image" in run("--prompts=x.jsonl", "--output=out")[1]


def test_lines_whose_start_has_no_effect_are_refused_where_that_is_asked(run):
    Image.new("L", PICTURE.size).save("black.png")
    Path("x.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": "cat.png", "mask": "black.png"}))
    status, err = run("--prompts=x.jsonl", "--output=out", "--steps=1", "--strict")
    assert status == 2
    assert "x.jsonl:1: the mask is black everywhere" in err
    assert not Path("out").exists()


@pytest.mark.slow
def test_what_is_asked_anew_takes_the_place_of_what_it_excludes(run):
    def again(source: str, *anew: str):
        assert run(f"--from={source}", *anew, "--output=next.png", "--overwrite") == (0, "")
        return read_recipe(Path("next.png"))

    sides = ["--extend", "0", "0", "4", "0"]
    asked = ["--image=cat.png", *sides, "--steps=2", "--seed=1", "--output=next.png"]
    assert run(PROMPT, *asked) == (0, "")
    masked = again("next.png", "--mask=mask.png")
    assert (masked.extend, masked.width) == (None, PICTURE.width)
    extended = again("next.png", *sides)
    assert (extended.mask, extended.extend, extended.width) == (None, (0, 0, 4, 0), PICTURE.width + 4)
    twice = again("next.png", "--two-pass=0.5", "--width=64")
    assert (twice.image, twice.extend, twice.strength, twice.two_pass) == (None, None, None, 0.5)
    from_picture = again("next.png", "--image=cat.png")
    assert (from_picture.two_pass, from_picture.first_size, from_picture.strength) == (None, None, 0.8)
    assert run("--from=next.png", "--mask=mask.png", *sides, "--output=x.png")[0] == 2


def test_batches_of_pictures(run):
    """Different pictures in one batch: each as alone, to 1/255."""
    pipe, usual = tiny_pipeline(), {"steps": 2, "seed": 4, "strength": 0.5}
    requests = [Request(prompt=PROMPT, image=name, **usual) for name in ("cat.png", "mask.png")]
    assert requests[0].alike == requests[1].alike
    both = [np.asarray(image, int) for _, image in pipe.each(requests)]
    alone = [np.asarray(image, int) for _, image in pipe.each(requests, batch_size=1)]
    assert max(np.abs(one - other).max() for one, other in zip(both, alone, strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image=no.png"], "image: no such file no.png"),
        (["--image=text.png"], "image text.png: not a picture"),
        (["--mask=mask.png"], "mask has no effect without a picture to start from: give image"),
        (["--strength=0.5"], "strength has no effect without a picture"),
        (["--image=cat.png", "--strength=2"], "strength=2.0: expected above 0"),
        (["--two-pass=2"], "two_pass=2.0: expected above 0"),
        (["--image=cat.png", "--strength=0.1", "--steps=5"], "leaves none of 5 steps: use 0.2 or more"),
        (["--extend", "0", "0", "8", "0"], "extend needs the picture: give image"),
        (["--image=cat.png", "--extend", "0", "0", "0", "0"], "expected pixels to add at left, top"),
        (
            ["--image=cat.png", "--extend", "0", "0", "3", "0"],
            "width=43 is not a multiple of 2: use 42 or 44",
        ),
        (["--two-pass=0.5"], "two_pass draws at 32x32 first: ask for a larger width and height"),
        (["--two-pass=0.5", "--image=cat.png"], "two_pass draws its own picture"),
        (["--two-pass=0.5", "--width=64", "--show-attention"], "--show-attention shows one pass"),
        (["--variation-seed=1"], "variation_seed has no effect without variation_strength"),
        (["--variation-strength=2"], "variation_strength=2.0: expected 0"),
    ],
)
def test_what_cannot_be(run, arguments, message):
    Path("text.png").write_text("not a picture")
    status, err = run(PROMPT, *arguments, "--output=x.png")
    assert status == 2
    assert message in err
    assert not Path("x.png").exists()


def test_the_start_survives_as_a1111_text():
    started = dataclasses.replace(RECIPE, strength=0.75, variation_seed=9, variation_strength=0.25)
    found = parse_parameters(started.parameters())
    assert (found["strength"], found["variation_seed"], found["variation_strength"]) == (0.75, 9, 0.25)
    for width, words in ((48, "Size: 24x32, "), (50, "Hires resize: 50x64")):
        twice = dataclasses.replace(RECIPE, two_pass=0.6, first_size=(24, 32), width=width, height=64)
        text = twice.parameters()
        assert words in text
        found = parse_parameters(text)
        assert {name: found.get(name) for name in ("width", "height", "two_pass", "first_size")} == {
            "width": width,
            "height": 64,
            "two_pass": 0.6,
            "first_size": (24, 32),
        }
        assert "strength" not in found
    with pytest.raises(ValueError, match="Hires upscale: 0 is not between"):
        parse_parameters("x\nSteps: 1, Seed: 1, Size: 8x8, Hires upscale: 0")


def test_a_recipe_of_one_image():
    assert RECIPE.of_image(2) == dataclasses.replace(RECIPE, seed=125)
    varied = dataclasses.replace(RECIPE, variation_seed=5, variation_strength=0.1, num_images=3)
    assert varied.of_image(2) == dataclasses.replace(varied, variation_seed=7, num_images=1)
    assert (RECIPE.variation, varied.variation) == (None, (5, 0.1))
