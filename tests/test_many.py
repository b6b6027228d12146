"""Many pictures: each as it is alone, in whatever company; a folder that a second run completes."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import generate
from ldm.drawing import many
from ldm.recipes.picture import read_recipe
from ldm.recipes.requests import Request
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red fox in snow", "two blue cats at night", "a small green boat on a beach"]
LINES = [
    {"prompt": PROMPTS[0], "seed": 5},
    {"prompt": PROMPTS[1], "width": 16, "name": "cats"},
    {"prompt": PROMPTS[2], "negative_prompt": "fog"},
    {"prompt": PROMPTS[1], "sampler": "euler_a"},
    {"prompt": PROMPTS[1], "seed": 0},
]
NAMES = ["00001.png", "00003.png", "00004.png", "00005.png", "cats.png"]


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Draws lines into the folder `out`; returns status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.pipeline.BUNDLED", model)

    def call(*arguments: str, lines: list[dict[str, object]] = LINES) -> tuple[int, str, str]:
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
        usual = ["--prompts=x.jsonl", "--output=out", "--width=24", "--height=16", "--steps=1"]
        try:
            status = generate.main([*usual, *arguments])
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# From Python


def test_each_picture_is_that_of_a_call_of_its_own():
    pipe = tiny_pipeline()
    requests = [
        Request(prompt=prompt, seed=seed, steps=2, height=24, width=16 * (1 + index % 2), sampler="euler_a")
        for index, (prompt, seed) in enumerate(zip(PROMPTS, (4, 9, 2), strict=True))
    ]
    alone = [
        pipe(each.prompt, 24, each.width, 2, seed=each.seed, sampler="euler_a").images[0] for each in requests
    ]
    for size, places, step in ((1, [0, 1, 2], 0), (2, [0, 2, 1], 1)):
        drawn = list(pipe.each(requests, batch_size=size))
        assert [request.seed for request, _ in drawn] == [requests[place].seed for place in places]
        for place, (_, image) in zip(places, drawn, strict=True):
            assert np.abs(np.asarray(image, int) - np.asarray(alone[place], int)).max() <= step


def test_batch_mates_change_no_bit():
    pipe = tiny_pipeline()
    first, *others = [Request(prompt=prompt, seed=7, steps=1, height=24, width=16) for prompt in PROMPTS]
    drawn = [
        np.asarray(image)
        for mates in ([first, others[0]], [others[1], first])
        for request, image in pipe.each(mates)
        if request.prompt == first.prompt
    ]
    assert np.array_equal(*drawn)


def test_what_is_left_open_is_settled_and_told():
    pipe = tiny_pipeline()
    ((request, image),) = pipe.each([Request(prompt="a fox", steps=1)])
    assert image.size == (32, 32)
    assert (request.guidance_scale, request.sampler, request.height) == (7.5, "ddim", 32)
    assert np.array_equal(image, pipe("a fox", num_inference_steps=1, seed=request.seed).images[0])
    for request, message in (
        (Request(prompt="a", width=25), "request 0: width=25 is not a multiple of 2"),
        (Request(prompt="a", clip_skip=2), "request 0: clip_skip=2"),
        (Request(prompt="a", sampler="eular"), "request 0: sampler='eular' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.each([request])
    with pytest.raises(ValueError, match="batch_size=0: expected 1 to 256"):
        pipe.each([], batch_size=0)


def test_a_thread_works_one_ahead_and_stops_when_asked():
    made, stopped = [], threading.Event()

    def make():
        for item in range(9):
            made.append(item)
            yield item

    items = many.ahead(make(), stopped)
    assert [next(items), next(items)] == [0, 1]
    assert len(made) <= 3
    items.close()
    assert stopped.is_set()
    assert list(many.ahead(iter(range(3)), threading.Event())) == [0, 1, 2]

    def fail():
        yield 0
        raise OSError("no space")

    items = many.ahead(fail(), threading.Event())
    assert next(items) == 0
    with pytest.raises(OSError, match="no space"):
        next(items)


def test_the_thread_changes_no_picture(monkeypatch):
    pipe = tiny_pipeline()
    requests = [Request(prompt=prompt, seed=1, steps=1, height=24, width=16) for prompt in PROMPTS]
    alone = [np.asarray(image) for _, image in pipe.each(requests, batch_size=2)]
    monkeypatch.setattr(many, "overlaps", lambda pipe: True)
    threaded = [np.asarray(image) for _, image in pipe.each(requests, batch_size=2)]
    assert all(np.array_equal(one, other) for one, other in zip(alone, threaded, strict=True))


# A folder


@pytest.mark.slow
def test_a_folder_and_its_completion(run, tmp_path):
    status, out, err = run("--progress=json")
    assert (status, out) == (0, "out\n")
    *states, summary = err.splitlines()
    assert [json.loads(state)["picture"] for state in states] == [1, 2, 3, 4, 5]
    assert summary.startswith("drew 5 pictures in ")
    whole = files(tmp_path / "out")
    assert sorted(whole) == NAMES
    recipe = read_recipe(tmp_path / "out/00003.png")
    assert (recipe.prompt, recipe.negative_prompt, recipe.seed) == (PROMPTS[2], "fog", 2)
    assert (recipe.width, recipe.steps, recipe.model) == (24, 1, "bundled")
    assert Image.open(tmp_path / "out/cats.png").size == (16, 16)
    for name in ("00001.png", "cats.png"):
        (tmp_path / "out" / name).unlink()
    assert "drew 2 pictures" in run()[2]
    assert "; 5 were there" in run()[2]
    assert files(tmp_path / "out") == whole  # the same bytes as without an interruption


@pytest.mark.slow
def test_a_changed_line_is_refused_or_drawn_anew(run, tmp_path):
    run(lines=LINES[:3])
    before = files(tmp_path / "out")
    changed = [{**LINES[0], "prompt": "a cat"}, *LINES[1:3]]
    status, _, err = run(lines=changed)
    assert status == 2
    assert (
        "out/00001.png is there and is another picture (prompt was 'a red fox in snow' and is 'a cat')" in err
    )
    assert files(tmp_path / "out") == before
    assert "drew 1 pictures" in run("--overwrite", lines=changed)[2]
    after = files(tmp_path / "out")
    assert [name for name in before if after[name] != before[name]] == ["00001.png"]
    (tmp_path / "out/cats.png").write_text("precious")
    assert "not a PNG" in run(lines=changed)[2]
    assert "1 pictures" not in run("--no-metadata", lines=changed)[2]  # known by its name alone


def test_ranks_deal_the_batches_out(run, tmp_path, monkeypatch):
    """Each draws its own, whatever the others do, and together they draw what one draws."""
    run("--batch-size=2")
    whole = files(tmp_path / "out")
    parts = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        status, _, err = run("--batch-size=2", f"--output=rank-{rank}")
        assert (status, err[:13]) == (0, f"rank {rank} of 2: ")
        parts.append(files(tmp_path / f"rank-{rank}"))
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == whole
    monkeypatch.setenv("RANK", "2")
    assert "RANK, WORLD_SIZE and LOCAL_RANK are 2, 2, 2: expected" in run()[2]
    monkeypatch.setenv("RANK", "0")
    assert "standard input goes to one process" in run("--prompts=-")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a fox"], "--prompts draws one picture a line: leave out a prompt"),
        (["--num-images=2"], "leave out --num-images"),
        (["--show-steps"], "--show-steps is of one prompt, and does not go with --prompts"),
        (["--show-attention"], "--show-attention is of one prompt"),
        (["--upscale"], "--upscale is of one prompt"),
        (["--guidance=apg"], "--guidance is of one prompt"),
        (["--threshold=3"], "--threshold is of one prompt"),
        (["--worse=."], "--worse is of one prompt"),
        (["--chunks=0"], "chunks=0: expected 1 to 64"),
        (["--prompt-weighting=compel"], "prompt_weighting='compel' is unknown"),
        (["--from=x.png"], "leave out --from"),
        (["--output=fox.png"], "give --output FOLDER"),
        (["--output=x.jsonl"], "x.jsonl is not a folder"),
        (["--batch-size=0"], "batch_size=0: expected 1 to 256"),
        (["--steps=0"], "steps=0: expected"),
        (["--sampler=eular"], "x.jsonl:1: sampler='eular' is unknown"),
        (["--width=25"], "x.jsonl:1: width=25 is not a multiple of 2"),
        (["--prompts=no.txt"], "no.txt: No such file"),
    ],
)
def test_what_cannot_be(run, tmp_path, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert os.listdir(tmp_path) == ["x.jsonl"]


@pytest.mark.slow
def test_lines_have_weights_of_their_own(run, tmp_path):
    lines = [{"prompt": "a (fox:1.4"}, {"prompt": "a (fox:1.4", "prompt_weighting": "comfy"}]
    status, out, err = run("--strict", lines=lines)
    assert (status, out) == (2, "")
    assert "x.jsonl:2: 1 brackets are not closed" in err
    assert not (tmp_path / "out").exists()
    assert run(lines=lines)[0] == 0
    literal, weighted = (read_recipe(tmp_path / "out" / name) for name in ("00001.png", "00002.png"))
    assert (literal.prompt_weighting, weighted.prompt_weighting) == (None, "comfy")


def test_a_full_disk_leaves_whole_pictures(run, tmp_path, monkeypatch):
    save, calls = Image.Image.save, []

    def fail(image, *arguments, **options):
        calls.append(image)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", "x.png")
        save(image, *arguments, **options)

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    assert run()[::2] == (1, "error: x.png: No space left on device\n")
    assert len(os.listdir(tmp_path / "out")) == 2
    assert run()[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == NAMES


# As processes of their own


def command(model: Path, folder: Path, *launcher: str) -> list[str]:
    options = [
        f"--model={model}",
        f"--prompts={folder}/x.jsonl",
        "--width=24",
        "--height=16",
        "--batch-size=2",
    ]
    return [sys.executable, *launcher, "-m", "ldm.generate", *options]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        # --multi_gpu, or it starts one process where there is no GPU; a port of 0 is any that is free
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_draw_what_one_draws(model, tmp_path, launcher):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for how, folder in (([], "one"), (launcher, "two")):
        arguments = [*command(model, tmp_path, *how), "--steps=2", f"--output={tmp_path / folder}"]
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    assert sorted(files(tmp_path / "one")) == NAMES
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert "rank 1 of 2: drew " in done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_whole_pictures(model, tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"prompt": PROMPTS[0]}) for _ in range(1000)))
    process = subprocess.Popen(
        [*command(model, tmp_path), "--steps=2", "--progress=json", f"--output={tmp_path}/out"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert json.loads(process.stderr.readline())["picture"] == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "interrupted")
    for path in (tmp_path / "out").iterdir():
        Image.open(path).load()
