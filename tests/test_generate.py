"""The command line: pictures that can be made again bit for bit, and a line of advice for what cannot be."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm import generate
from ldm.recipes import options
from ldm.recipes.picture import check_output, free_path, grid, read_recipe, save_picture
from ldm.recipes.recipe import Recipe, parse_parameters
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
PROMPT = "a red fox in snow"
RECIPE = Recipe(
    prompt=PROMPT,
    negative_prompt="blurry, low: quality",
    steps=20,
    guidance_scale=7.5,
    sampler="dpmpp_2m",
    seed=123,
    width=24,
    height=32,
    model="/some/where/fox, big",
    model_hash="0123456789",
    version="0.1.0",
)


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder; returns its status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.pipeline.BUNDLED", model)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            status = generate.main(["--width=24", "--height=16", "--steps=2", *arguments])
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def again(*arguments: str) -> int:
    """A run that takes its size and steps from a picture."""
    return generate.main(list(arguments))


def plain(path: Path, **texts: str) -> Path:
    """A PNG with these text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


# Drawing


def test_a_picture_and_its_repetition(run, tmp_path):
    asked = ["--guidance-rescale=0.7", "--guidance-interval", "-2.5", "3", "--sampler=euler_a"]
    status, out, err = run(PROMPT, "--negative-prompt=blurry", *asked)
    assert (status, out, err) == (0, "a-red-fox-in-snow-0001.png\n", "")
    first = tmp_path / out.strip()
    assert Image.open(first).size == (24, 16)
    recipe = read_recipe(first)
    assert (recipe.prompt, recipe.sampler, recipe.steps, recipe.model) == (PROMPT, "euler_a", 2, "bundled")
    assert recipe.guidance_interval == (-2.5, 3.0)
    assert (
        Image.open(first)
        .info["parameters"]
        .startswith(f"{PROMPT}\nNegative prompt: blurry\nSteps: 2, Sampler: Euler a")
    )
    assert again("--from", out.strip(), "--output=again.png") == 0
    assert first.read_bytes() == (tmp_path / "again.png").read_bytes()
    assert again("--from", out.strip(), "--seed=1") == 0
    assert sorted(os.listdir(tmp_path)) == [
        "a-red-fox-in-snow-0001.png",
        "a-red-fox-in-snow-0002.png",
        "again.png",
    ]
    other = read_recipe(tmp_path / "a-red-fox-in-snow-0002.png")
    assert other == dataclasses.replace(recipe, seed=1)


def test_several_pictures_a_grid_and_the_steps(run, tmp_path):
    status, out, _ = run(PROMPT, "--num-images=3", "--seed=5", "--show-steps", "--output=new/folder/fox.png")
    assert (status, out) == (0, "new/folder/fox.png\n")
    folder = tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["fox-1.png", "fox-2.png", "fox-3.png", "fox-steps.png", "fox.png"]
    assert Image.open(folder / "fox.png").size == (24 * 2 + 4, 16 * 2 + 4)
    assert Image.open(folder / "fox-steps.png").size == (24 * 2 + 4, 16 * 3 + 8)
    assert [read_recipe(folder / f"fox-{i}.png").seed for i in (1, 2, 3)] == [5, 6, 7]
    assert again("--from", "new/folder/fox-2.png", "--output=alone.png") == 0
    assert (tmp_path / "alone.png").read_bytes() == (folder / "fox-2.png").read_bytes()
    assert again("--from", "new/folder/fox.png", "--output=grid.png") == 0
    assert (tmp_path / "grid.png").read_bytes() == (folder / "fox.png").read_bytes()


def test_where_a_picture_looked(run, tmp_path):
    """The sheets of --show-... lie beside the pictures and change no bit of them."""
    assert run(PROMPT, "--seed=5", "--output=alone.png")[0] == 0
    options = ("--seed=5", "--num-images=2", "--show-steps", "--show-attention", "--output=fox.png")
    assert run(PROMPT, *options)[1] == "fox.png\n"
    shown = {path.name for path in tmp_path.iterdir()} - {"alone.png", "fox.png", "fox-1.png", "fox-2.png"}
    assert shown == {"fox-steps.png", "fox-attention.png"}
    assert (tmp_path / "fox-1.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    assert Image.open(tmp_path / "fox-attention.png").size == (6 * 172 - 4, 2 * (112 + 23 + 4) - 4)
    assert Image.open(tmp_path / "fox-steps.png").size == (24 * 2 + 4, 16 * 2 + 4)


def test_a_prompt_with_weights_and_its_repetition(run, tmp_path):
    text = "a (red:1.4) fox BREAK in [snow"
    weights = ("--prompt-weighting=a1111", "--chunks=2", "--seed=5")
    status, _, err = run(text, *weights, "--output=x.png")
    assert (status, err) == (
        0,
        f"WARNING: 1 brackets are not closed: their weight holds to the end: {text}\n" * bool(err),
    )
    recipe = read_recipe(tmp_path / "x.png")
    assert (recipe.prompt, recipe.prompt_weighting, recipe.chunks) == (text, "a1111", 2)
    assert again("--from=x.png", "--output=y.png") == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    assert run(text, "--seed=5", "--chunks=2", "--strict", "--output=z.png")[0] == 0  # literal
    assert Image.open(tmp_path / "z.png").tobytes() != Image.open(tmp_path / "x.png").tobytes()


def test_progress_and_metadata(run, tmp_path):
    status, _, err = run(PROMPT, "--no-metadata", "--progress=json", "--output=.")
    assert status == 0
    assert [json.loads(line) for line in err.splitlines()] == [
        {"image": 1, "images": 1, "step": step, "steps": 2} for step in (1, 2)
    ]
    assert not Image.open(tmp_path / "a-red-fox-in-snow-0001.png").info


def test_a_model_by_its_folder(run, model, tmp_path):
    assert run(PROMPT, f"--model={model}", "--output=x.png")[0] == 0
    assert read_recipe(tmp_path / "x.png").model == str(model)
    tiny_pipeline(seed=1).save_pretrained(model)
    try:
        status, _, err = run("--from=x.png", "--output=y.png")
        assert status == 2
        assert "made by" in err
        assert not (tmp_path / "y.png").exists()
        assert run("--from=x.png", f"--model={model}", "--output=y.png")[0] == 0  # asked for: a warning
    finally:
        tiny_pipeline().save_pretrained(model)


def test_what_a_picture_names_is_never_fetched(run, tmp_path, monkeypatch):
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    save_picture(
        Image.new("RGB", (8, 8)), tmp_path / "x.png", dataclasses.replace(RECIPE, model="some/model")
    )
    status, _, err = run("--from=x.png")
    assert status == 2
    assert "only a name given with --model is fetched" in err


def test_another_model_has_its_own_variant(run, model, tmp_path):
    recipe = dataclasses.replace(RECIPE, model="some/model", variant="fp8")
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe)
    assert run("--from=x.png", f"--model={model}", "--output=y.png")[0] == 0
    assert read_recipe(tmp_path / "y.png").variant is None


def test_a_counter_that_another_process_took(run, tmp_path, monkeypatch):
    """The picture gets the next one; a name that was asked for is not written over."""
    slow = generate.draw

    def draw(*arguments: object, **options: object) -> object:
        (tmp_path / "a-red-fox-in-snow-0001.png").write_text("precious")
        return slow(*arguments, **options)

    monkeypatch.setattr(generate, "draw", draw)
    assert run(PROMPT)[:2] == (0, "a-red-fox-in-snow-0002.png\n")
    (tmp_path / "a-red-fox-in-snow-0001.png").unlink()
    status, _, err = run(PROMPT, "--output=a-red-fox-in-snow-0001.png")
    assert (status, "exists" in err) == (2, True)
    assert (tmp_path / "a-red-fox-in-snow-0001.png").read_text() == "precious"


def test_a_picture_of_another_program(run, tmp_path):
    pairs = "Steps: 3, Sampler: Euler a, CFG scale: 5, Seed: 9, Size: 24x16, Model: v1-5"
    text = f"a boat\nat sea\nNegative prompt: fog\n{pairs}"
    plain(tmp_path / "theirs.png", parameters=text)
    assert again("--from=theirs.png", "--output=ours.png") == 0
    recipe = read_recipe(tmp_path / "ours.png")
    assert (recipe.prompt, recipe.negative_prompt, recipe.seed) == ("a boat\nat sea", "fog", 9)
    assert (recipe.sampler, recipe.steps, recipe.model) == ("euler_a", 3, "bundled")


def test_list_samplers(run):
    status, out, _ = run("--list-samplers")
    assert status == 0
    assert "dpmpp_2m      DPM++ 2M\n" in out


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt: python -m ldm.generate"),
        ([PROMPT, "--steps=0"], "steps=0: expected a whole number from 1 to 1000"),
        ([PROMPT, "--steps=many"], "steps='many': expected"),
        ([PROMPT, "--guidance-scale=nan"], "guidance_scale=nan: expected"),
        ([PROMPT, "--seed=-1"], "seed=-1: expected a whole number from 0"),
        ([PROMPT, "--seed=abc"], "seed='abc': expected"),
        ([PROMPT, "--width=100000"], "width=100000: expected"),
        ([PROMPT, "--width=25"], "width=25 is not a multiple of 2: use 24 or 26"),
        ([PROMPT, "--num-images=1000000"], "num_images=1000000: expected 1 to 256"),
        ([PROMPT, "--clip-skip=-1"], "clip_skip=-1: expected"),
        ([PROMPT, "--prompt-weighting=compel"], "'compel' is unknown: expected one of a1111, comfy"),
        ([PROMPT, "--chunks=0"], "chunks=0: expected 1 to 64"),
        (["fox " * 20, "--strict"], "the prompt is too long; this end of it has no effect: fox"),
        (["(fox", "--strict", "--prompt-weighting=a1111"], "1 brackets are not closed"),
        ([PROMPT, "--sampler=eular"], "sampler='eular' is unknown: expected one of ddim"),
        ([PROMPT, "--device=tpu"], "device='tpu' is not here: this machine has cpu"),
        ([PROMPT, "--model=nothing"], "no such folder nothing"),
        ([PROMPT, "--model=some/where"], "cannot load some/where"),
        ([PROMPT, "--variant=fp8"], "no variant 'fp8'"),
        ([PROMPT, "--setps=3"], "unknown option --setps=3; did you mean --steps?"),
        ([PROMPT, "--dtype=fp8"], "invalid choice: 'fp8'"),
        ([PROMPT, "more"], "unrecognized arguments: more"),
        ([PROMPT, "--output=fox.jpg"], "give a name that ends in .png"),
        ([PROMPT, "--output=" + "x" * 300 + ".png"], "File name too long"),
        ([PROMPT, "--output=file.txt/fox.png"], "file.txt is not a folder"),
        ([PROMPT, "--output=/proc/fox/fox.png"], "/proc"),
        (["--from=nothing.png"], "no such file nothing.png"),
        (["--from=file.txt"], "file.txt is not a PNG"),
    ],
)
def test_what_cannot_be(run, tmp_path, arguments, message):
    (tmp_path / "file.txt").write_text("a file")
    status, out, err = run(*arguments)
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert os.listdir(tmp_path) == ["file.txt"]


def test_nothing_is_written_over(run, tmp_path):
    (tmp_path / "fox.png").write_text("precious")
    status, _, err = run(PROMPT, "--output=fox.png")
    assert status == 2
    assert "exists: give another name, or --overwrite" in err
    assert (tmp_path / "fox.png").read_text() == "precious"
    assert run(PROMPT, "--output=fox.png", "--overwrite")[0] == 0
    assert Image.open(tmp_path / "fox.png").size == (24, 16)
    (tmp_path / "cat-2.png").write_text("precious")
    assert run(PROMPT, "--output=cat.png", "--num-images=2")[0] == 2
    with pytest.raises(FileExistsError):  # it came in between
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "fox.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path / "folder.png", overwrite=True)


def test_without_a_bundled_model(run, monkeypatch, tmp_path):
    monkeypatch.setattr("ldm.pipeline.BUNDLED", tmp_path / "none")
    status, _, err = run(PROMPT)
    assert (status, "carries no bundled model" in err) == (2, True)


@pytest.mark.parametrize("sign", ["\U0001f98a", "\x07"])  # the second is six characters in JSON
def test_the_longest_prompt_can_be_read_back(tmp_path, sign):
    longest = sign * options.MAX_PROMPT
    recipe = dataclasses.replace(RECIPE, prompt=longest, negative_prompt=longest)
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe)
    assert read_recipe(tmp_path / "x.png") == recipe


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "fox.png"), 1, "error: fox.png: No space left on device"),
        (RuntimeError("CUDA out of memory. Tried to"), 1, "error: out of memory"),
    ],
)
def test_what_can_go_wrong(run, monkeypatch, tmp_path, error, status, message):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    assert run(PROMPT)[0] == status
    assert run(PROMPT)[2].startswith(message)
    assert not os.listdir(tmp_path)


# As a process of its own


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ldm.generate", *arguments]


def test_help_is_instant_and_imports_no_torch():
    code = "import sys, ldm.generate as g\ntry: g.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "examples:" in done.stdout
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "ldm" in loaded
    assert not loaded & {"torch", "numpy", "tokenizers", "safetensors"}


@pytest.mark.slow
def test_a_picture_imports_only_what_it_needs(model, tmp_path):
    """torch's compiler alone would cost seconds, diffusers and transformers each as much again."""
    arguments = [
        PROMPT,
        f"--model={model}",
        "--steps=1",
        f"--output={tmp_path}/",
        "--width=16",
        "--height=16",
        "--clip-skip=1",
    ]
    code = f"import sys, ldm.generate as g\nprint(g.main({arguments!r}))\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    path, status, modules = done.stdout.splitlines()
    assert (Path(path).exists(), status) == (True, "0"), done.stderr
    slow = {
        "diffusers",
        "transformers",
        "huggingface_hub",
        "accelerate",
        "datasets",
        "xformers",
        "torch._dynamo",
        "sympy",
    }
    assert not slow & set(modules.split())


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(model, tmp_path):
    arguments = command(
        PROMPT, f"--model={model}", "--steps=500", "--progress=json", f"--output={tmp_path}/new/"
    )
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert json.loads(process.stderr.readline())["step"] == 1  # it is sampling
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_hub_id_without_network_fails_soon():
    """A name server that does not answer has no time limit of its own; ours is 3 s."""
    code = (
        "import time, socket\n"
        "import huggingface_hub\n"
        "from ldm.files.hub import find_folder\n"
        "def hang(*_, **__): time.sleep(60)\n"
        "socket.getaddrinfo = hang\n"
        "start = time.monotonic()\n"
        "try: find_folder('some-owner/no-such-model')\n"
        "except ValueError as error: print(time.monotonic() - start, error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    seconds, _, message = done.stdout.strip().partition(" ")
    assert float(seconds) < 20
    assert "the hub does not answer" in message


# The recipe in a picture


def test_the_recipe_survives_as_a1111_text():
    text = RECIPE.parameters()
    assert text.splitlines()[-1].startswith(
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 123, Size: 24x32, Model hash"
    )
    found = parse_parameters(text)
    assert found["model"] == "fox, big"
    kept = {
        "prompt",
        "negative_prompt",
        "steps",
        "guidance_scale",
        "sampler",
        "seed",
        "width",
        "height",
        "model_hash",
    }
    assert {key: found[key] for key in kept} == {key: getattr(RECIPE, key) for key in kept}


@pytest.mark.parametrize(
    "prompt", ["plain", "狐狸 🦊 ñ", "Negative prompt: x\nSteps: 3, a: b, c: d", "\x00\n\r\t", '"{}']
)
def test_the_whole_recipe_comes_back_whatever_the_prompt(tmp_path, prompt):
    recipe = dataclasses.replace(RECIPE, prompt=prompt)
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe)
    assert read_recipe(tmp_path / "x.png") == recipe
    with Image.open(tmp_path / "x.png") as image:
        assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "holds no recipe"),
        ({"parameters": "just words"}, "do not end in a line like"),
        (
            {"parameters": "x\nSteps: 20, Sampler: Euler, Seed: $(rm -rf /)"},
            r"Seed: '\$\(rm -rf /\)' is not a int",
        ),
        ({"parameters": 'x\nSteps: 20, Sampler: Euler, Seed: "1'}, "do not end in a line like"),
        ({"parameters": "x\nSteps: 20, Sampler: Euler, Size: axb"}, "Size: 'axb' is not like 512x512"),
        ({"parameters": "x" * (1 << 20) + "\nSteps: 1, Seed: 1, Size: 8x8"}, "characters: expected at most"),
        ({"ldm": "{"}, "not valid JSON"),
        ({"ldm": "[1]"}, "JSON list, not an object"),
        ({"ldm": '{"prompt": "x"}'}, "not given"),
        ({"ldm": json.dumps(dataclasses.asdict(RECIPE) | {"steps": "20"})}, "steps='20' is not of type int"),
        ({"ldm": json.dumps(dataclasses.asdict(RECIPE) | {"exec": "x"})}, "unknown key exec"),
        ({"ldm": "[" * 100_000}, "not valid JSON"),
    ],
)
def test_hostile_recipes_are_data(tmp_path, texts, message):
    path = plain(tmp_path / "x.png", **texts)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(path)
    assert len(str(caught.value)) < 1000


@given(st.text(max_size=300))
@example("a\nSteps: 1, Sampler: x, Seed: 2, " + "y" * 200)
@example("\nSteps: 1, a: b, c: " + '"' * 100)
@settings(max_examples=200, deadline=None)
def test_any_text_is_parsed_or_refused(text):
    try:
        found = parse_parameters(text)
    except ValueError:
        return
    assert isinstance(found["prompt"], str)


def test_long_lines_take_no_time():
    started = time.monotonic()
    for line in ("a" * 10**6, "a: b, " * 10**5, "a " * 10**5, '"' * 10**5):
        with contextlib.suppress(ValueError):
            parse_parameters("x\n" + line)
    assert time.monotonic() - started < 5


def test_grids_and_names(tmp_path):
    images = [Image.new("RGB", (10, 6), colour) for colour in ("red", "green", "blue")]
    assert grid(images[:1]).size == (10, 6)
    assert grid(images).size == (24, 16)
    assert grid(images, columns=3).size == (38, 6)
    assert grid(images).getpixel((15, 1)) == (0, 128, 0)
    assert free_path(tmp_path, "../../etc/passwd $(rm)").name == "etc-passwd-rm-0001.png"
    assert free_path(tmp_path, "🦊").name == "picture-0001.png"
    (tmp_path / "picture-0041.png").touch()
    assert free_path(tmp_path, "").name == "picture-0042.png"
    assert len(free_path(tmp_path, "word " * 1000).name) < 60
