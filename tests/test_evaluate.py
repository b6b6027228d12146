"""`python -m ldm.evaluate`: pictures to figures; what is refused, what is kept, what a second run does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ldm import evaluate
from ldm.metrics import extractors, folders
from ldm.metrics.blocks import share_out
from ldm.metrics.collection import collect, load, save
from ldm.metrics.drawing import wait_for
from ldm.metrics.extractors import FID, RandomConv, find_extractor, label
from ldm.metrics.folders import Folder, bicubic, tf_bilinear
from ldm.metrics.inception import InceptionV3
from ldm.metrics.moments import frechet_distance
from tests.tiny import tiny_pipeline

CPU = torch.device("cpu")
random_conv = RandomConv(CPU)


def paint(folder: Path, count: int = 24, size: tuple[int, int] = (32, 24), seed: int = 0) -> Path:
    """Pictures of coloured discs in colour."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        place, radius = draw.uniform(6, 20, 2), draw.uniform(3, 9)
        inside = ((x - place[0]) ** 2 + (y - place[1]) ** 2 < radius**2)[..., None]
        pixels = np.where(inside, draw.uniform(0, 255, 3), draw.uniform(0, 255, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs the command in a folder of its own; returns status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.pipeline.BUNDLED", model)

    def call(*words: str) -> tuple[int, str, str]:
        try:
            status = evaluate.main(words)
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def figures(output: Path) -> dict[str, float]:
    return {
        each["name"]: each["value"] for each in json.loads((output / "figures.json").read_text())["figures"]
    }


@pytest.mark.slow
def test_two_folders(run, tmp_path):
    """Of a folder and itself all is best, and nothing is called FID; the report tells how it was measured."""
    paint(tmp_path / "real")
    status, out, _ = run("--pictures=real", "--reference=real", "--output=same")
    assert (status, out) == (0, "same/report.md\n")
    same = figures(tmp_path / "same")
    assert same["FD-random-conv"] < 1e-6
    assert same["precision-random-conv"] == same["coverage-random-conv"] == 1
    assert not {"FID", "sFID", "KID"} & same.keys()
    report = (tmp_path / "same/report.md").read_text()
    for told in ("FD-random-conv", "pictures_sha256", "bicubic", "weights_sha256", "sheet.png"):
        assert told in report


def test_worse_pictures_are_farther(tmp_path):
    """The more blur or noise, the larger the distance."""
    real = paint(tmp_path / "real", 12)
    true = collect(Folder(real), random_conv).pooled
    draw = np.random.default_rng(1)
    blur = lambda image, amount: image.filter(ImageFilter.GaussianBlur(amount / 8))
    shake = lambda image, amount: Image.fromarray(
        (np.asarray(image) + draw.normal(0, amount, (24, 32, 3))).clip(0, 255).astype(np.uint8)
    )
    for spoil in (blur, shake):
        distances = []
        for amount in (4, 8, 16):
            worse = tmp_path / f"{spoil is blur}-{amount}"
            worse.mkdir()
            for path in real.iterdir():
                spoil(Image.open(path), amount).save(worse / path.name)
            distances.append(frechet_distance(collect(Folder(worse), random_conv).pooled, true))
        assert 0 < distances[0] < distances[1] < distances[2]


def test_features_do_not_depend_on_batches(tmp_path):
    pictures = Folder(paint(tmp_path / "x", 13))
    one, many = (collect(pictures, random_conv, batch_size=size, keep=5) for size in (1, 13))
    assert one.stamp == many.stamp
    assert one.features.shape == many.features.shape == (5, 176)
    torch.testing.assert_close(one.features, many.features)
    torch.testing.assert_close(one.pooled.covariance, many.pooled.covariance, rtol=1e-4, atol=1e-5)
    save(one, tmp_path / "kept.safetensors")
    again = load(tmp_path / "kept.safetensors")
    assert again.stamp == one.stamp
    assert torch.equal(again.pooled.scatter, one.pooled.scatter)
    assert torch.equal(again.features, one.features)


@pytest.mark.slow
def test_a_model_is_drawn_and_measured(run, tmp_path):
    """Lines come again with other seeds; a second run draws nothing; a kept reference serves as well."""
    paint(tmp_path / "real", 8, (32, 32))
    (tmp_path / "x.txt").write_text("a red fox in snow\ntwo blue cats at night\na green boat\n")
    words = ["--prompts=x.txt", "--count=7", "--steps=1", "--seed=3", "--sampler=ddim", "--output=out"]
    status, out, err = run(*words, "--reference=real", "--save-reference=kept")
    assert (status, out) == (0, "out/report.md\n"), err
    lines = [json.loads(line) for line in (tmp_path / "out/requests.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(3, 10))
    assert lines[3]["prompt"] == lines[0]["prompt"]
    first = figures(tmp_path / "out")
    protocol = json.loads((tmp_path / "out/figures.json").read_text())["figures"][0]["protocol"]
    assert protocol["drawn"]["seeds"] == "3 to 9"
    assert (protocol["drawn"]["steps"], protocol["drawn"]["sampler"]) == (1, "ddim")
    assert protocol["reference"]["pictures"] == 8
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/pictures").iterdir()}
    assert len(made) == 7
    status, _, err = run(*words, "--reference=kept")
    assert status == 0, err
    assert "7 were there" in err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/pictures").iterdir()} == made
    assert figures(tmp_path / "out") == pytest.approx(first)
    status, _, err = run(*words, "--reference=kept", "--resize=tf-bilinear")
    assert status == 2
    assert "kept-random-conv.safetensors was made with filter='bicubic'" in err


def test_ranks_share_the_features(tmp_path, monkeypatch):
    """What two ranks have computed, one after the other, is to the last bit what one process computes."""
    monkeypatch.setattr("ldm.metrics.blocks.BLOCK", 4)
    pictures, kept = Folder(paint(tmp_path / "x", 14)), tmp_path / "kept"
    alone = collect(pictures, random_conv, keep=5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert sum(path.is_file() for path in share_out(pictures, random_conv, kept)) == 2
    monkeypatch.setenv("RANK", "0")
    shared = collect(pictures, random_conv, keep=5, kept=kept)
    assert len(list(kept.iterdir())) == 4
    assert shared.stamp == alone.stamp
    for name in ("mean", "scatter"):
        for of in ("pooled", "spatial"):
            assert torch.equal(getattr(getattr(shared, of), name), getattr(getattr(alone, of), name))
    assert torch.equal(shared.features, alone.features)


@pytest.mark.slow
def test_figures_on_ranks(run, tmp_path, monkeypatch):
    """One rank after the other, as they talk by files alone: the figures of one process, to the last bit.

    A second run computes nothing; what changed of the pictures is computed again.
    """
    monkeypatch.setattr("ldm.metrics.blocks.BLOCK", 4)
    paint(tmp_path / "x", 14)
    real = paint(tmp_path / "real", 9, seed=1)
    words = ["--pictures=x", "--reference=real"]
    assert run(*words, "--output=alone")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(*words, "--output=out")[:2] == (0, "")
    assert len(list((tmp_path / "out/features").iterdir())) == 2 + 1, "the second of both sets' every two"
    monkeypatch.setenv("RANK", "0")
    assert run(*words, "--output=out")[:2] == (0, "out/report.md\n")
    assert len(list((tmp_path / "out/features").iterdir())) == 4 + 3
    assert figures(tmp_path / "out") == figures(tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "1")
    seen: list[int] = []
    known = RandomConv.__call__
    monkeypatch.setattr(RandomConv, "__call__", lambda self, x: (seen.append(len(x)), known(self, x))[1])
    assert run(*words, "--output=out")[0] == 0
    assert seen == []
    Image.new("RGB", (32, 24)).save(real / "008.png")
    assert run(*words, "--output=out")[0] == 0
    assert seen == [1], "the last block of the reference alone"
    with pytest.raises(ValueError, match="1 of 1 files are not there, the first nowhere"):
        wait_for([Path("nowhere.png")], patience=0)


@pytest.mark.slow
def test_two_ranks_draw_and_measure(run, model, tmp_path):
    """Two processes at once, on a model that has noted its average: the figures of one."""
    from ldm.metrics.drawing import averaged

    paint(tmp_path / "real", 8, (32, 32))
    (tmp_path / "x.txt").write_text("a red fox in snow\ntwo blue cats at night\n")
    noted = shutil.copytree(model, tmp_path / "noted")
    (noted / "training.json").write_text('{"step": 7, "ema": "average of decay 0.9"}')
    assert averaged(str(model)) == "not told"
    words = ["--model=noted", "--prompts=x.txt", "--count=6", "--steps=1", "--reference=real"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ldm.evaluate", *words, "--output=out"],
            env={**environment, "WORLD_SIZE": "2", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert told == ["out/report.md\n", ""]
    assert len(list((tmp_path / "out/pictures").iterdir())) == 6
    assert run(*words, "--output=alone")[0] == 0
    assert figures(tmp_path / "out") == pytest.approx(figures(tmp_path / "alone"), rel=1e-9)
    assert (
        "average of decay 0.9, step 7, as its training.json says" in (tmp_path / "out/report.md").read_text()
    )


@pytest.mark.slow
def test_reconstruction(run, tmp_path):
    paint(tmp_path / "real", 6)
    status, out, err = run("--reconstruction", "--reference=real", "--output=out")
    assert (status, out) == (0, "out/report.md\n"), err
    found = figures(tmp_path / "out")
    assert found["PSNR"] < 20
    assert found["rFD-random-conv"] > 0
    paint(tmp_path / "odd", 6, (31, 24))
    status, _, err = run("--reconstruction", "--reference=odd", "--output=out")
    assert status == 2
    assert "31x24 pixels: the autoencoder takes multiples of 2; give --size" in err


def test_what_cannot_be_is_told(run, tmp_path):
    paint(tmp_path / "real", 6)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("a red fox")
    mixed = paint(tmp_path / "mixed", 4)
    Image.new("RGB", (9, 9)).save(mixed / "other.png")
    broken = paint(tmp_path / "broken", 4)
    (broken / "001.png").write_bytes((broken / "001.png").read_bytes()[:-30])
    (broken / "no.png").write_bytes(b"<html>")
    cases = {
        (): "nothing to measure: give one of --prompts",
        ("--pictures=real",): "no --reference: give a folder",
        ("--pictures=real", "--prompts=x.txt", "--reference=real"): "--prompts and --pictures: give one of",
        ("--pictures=nowhere", "--reference=real"): "no such folder nowhere",
        ("--pictures=real", "--reference=nowhere"): "neither a folder of pictures nor a file",
        ("--pictures=empty", "--reference=real"): "empty holds 0 pictures: expected 2 or more",
        ("--pictures=real", "--reference=real", "--count=9"): "real holds 6 pictures: expected 9",
        ("--pictures=real", "--reference=real", "--count=x"): "--count x: expected a whole number from 2",
        ("--pictures=mixed", "--reference=real"): "2 sizes (4 of 32x24, 1 of 9x9): give --size PIXELS",
        ("--pictures=broken", "--reference=real"): "'no.png': not a picture",
        ("--pictures=real", "--reference=real", "--steps=9"): "--steps has no effect without --prompts",
        ("--reconstruction", "--reference=real", "--count=9"): "leave it out; use --reference-count",
        ("--pictures=real", "--reference=real", "--output=x.txt/a"): "x.txt is not a folder",
        ("--pictures=real", "--reference=real", "--extractor=vgg"): "extractor='vgg' is unknown",
        ("--pictures=real", "--reference=real", "--extractor=clip"): "has no weights: give clip=PATH",
        (
            "--pictures=real",
            "--reference=real",
            "--sizes=2",
        ): "did you mean --size? (see python -m ldm.evaluate",
    }
    for words, told in cases.items():
        status, out, err = run(*words)
        assert (status, out) == (2, ""), words
        assert told in err, (words, err)
        assert len(err.splitlines()) <= 3
    (broken / "no.png").unlink()
    _, _, err = run("--pictures=broken", "--reference=real")
    assert "1 of 4 pictures in broken cannot be read" in err
    assert "'001.png'" in err
    with pytest.raises(ValueError, match="width=32, the pictures 9"):
        _compare_sizes(tmp_path)
    assert run("--pictures=mixed", "--reference=real", "--size=16", "--output=out")[0] == 0


def _compare_sizes(folder: Path) -> None:
    from ldm.metrics.collection import check_alike

    small, large = (collect(Folder(paint(folder / str(w), 6, (w, 9))), random_conv) for w in (9, 32))
    check_alike(small, large, "the reference")


def test_scaling():
    """Flat stays flat; bicubic is Pillow's, antialiased; TensorFlow's takes pixel i at i * scale."""
    flat = Image.new("RGB", (30, 20), (10, 200, 77))
    for scale in folders.FILTERS.values():
        torch.testing.assert_close(
            scale(flat, 7), torch.tensor([10.0, 200, 77]).view(3, 1, 1).expand(3, 7, 7)
        )
    ramp = Image.fromarray(np.arange(8, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2))
    assert tf_bilinear(ramp, 16)[0, 0].tolist() == [min(i / 2, 7) for i in range(16)]
    assert tf_bilinear(ramp, 4)[0, 0].tolist() == [0, 2, 4, 6]
    assert bicubic(ramp, 4)[0, 0].tolist() == pytest.approx([0.5, 2.5, 4.5, 6.5], abs=0.1)


def test_only_the_fid_file_makes_the_fid():
    class Known:
        name, digest = "inception", FID

    assert [label(name, Known) for name in ("FD", "sFD", "KD", "precision")] == [
        *("FID", "sFID", "KID", "precision")
    ]
    Known.digest = "0" * 64
    assert label("FD", Known) == "FD-inception-00000000"


def test_inception_file(tmp_path):
    """The names and shapes that the file is known by; other files, and other hashes, are refused."""
    with torch.device("meta"):
        names = InceptionV3().state_dict()
    assert len(names) == 566
    assert names["Mixed_6d.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert names["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert names["fc.weight"].shape == (1008, 2048)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth differs from the FID's InceptionV3 in 472"):
        find_extractor(f"inception={tmp_path}/x.pth", CPU)
    with pytest.raises(ValueError, match="takes no weights"):
        find_extractor("random-conv=x", CPU)


@pytest.mark.slow
def test_inception_answers(tmp_path):
    """Shapes; a picture does not depend on its mates; probabilities are such; the hash names the figure."""
    torch.save(InceptionV3().state_dict(), tmp_path / "x.pth")
    extractor = find_extractor(f"inception={tmp_path}/x.pth", CPU)
    assert label("FD", extractor) == f"FD-inception-{extractor.digest[:8]}"
    with pytest.raises(ValueError, match=r"expected 12345678\. Get it again"):
        find_extractor(f"inception={tmp_path}/x.pth@12345678", CPU)
    pixels = torch.rand(2, 3, 299, 299) * 255
    both, one = extractor(pixels), extractor(pixels[1:])
    assert [tuple(each.shape) for each in both] == [(2, 2048), (2, 7 * 17 * 17), (2, 1008)]
    torch.testing.assert_close(both.pooled[1:], one.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.probabilities.sum(1), torch.ones(2))


@pytest.mark.slow
def test_transformers_folders(tmp_path, run, model):
    """DINOv2 and CLIP of random weights: figures, CMMD and CLIP score by their names; cut folders refused."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dino")
    tokenizer = tiny_pipeline().tokenizer
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}
    vision = {**small, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
        tmp_path / "clip"
    )
    tokenizer.save(tmp_path / "clip")
    paint(tmp_path / "real", 8, (32, 32))
    (tmp_path / "x.txt").write_text("a red fox in snow\ntwo blue cats at night\n")
    status, _, err = run(
        *("--prompts=x.txt", "--count=12", "--steps=1", "--reference=real", "--output=out"),
        *("--extractor=dinov2=dino", "--extractor=clip=clip"),
    )
    assert status == 0, err
    names = {name.rpartition("-")[0] for name in figures(tmp_path / "out")}
    assert {"FD-dinov2", "KD-dinov2", "FD-clip", "CMMD-clip", "CLIP score-clip"} <= names
    clip = find_extractor(f"clip={tmp_path}/clip", CPU)
    assert clip.embed(["a red fox " * 30, "x"]).shape == (2, 16)
    with pytest.raises(ValueError, match="holds a model of type 'clip': expected dinov2"):
        extractors.find_extractor(f"dinov2={tmp_path}/clip", CPU)
