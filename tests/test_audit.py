"""Near-duplicates: found however they were disguised, each told once, and nothing else told."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ldm import evaluate
from ldm.metrics.audit import BITS, nearest_features, perceptual_hash


def scene(seed: int, size: int = 48) -> Image.Image:
    """A smooth random picture."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def test_perceptual_hash():
    """It does not mind size, compression of values or brightness, and differs in half of its bits else."""
    one = perceptual_hash(scene(0))
    for other in (scene(0, 96), scene(0).point(lambda v: v // 2 + 40)):
        assert (one != perceptual_hash(other)).sum() <= 4
    apart = [(one != perceptual_hash(scene(seed))).sum().item() for seed in range(1, 9)]
    assert np.mean(apart) == pytest.approx(BITS / 2, abs=6)


def test_nearest_features():
    """No picture is its own neighbour, also where there are copies."""
    x = torch.tensor([[0.0], [1.0], [1.0], [5.0]])
    distances, means, places = nearest_features(x, x, same=True)
    assert distances.tolist() == [1, 0, 0, 4]
    assert places[1:3].tolist() == [2, 1]
    assert means.tolist() == pytest.approx([7 / 3, 5 / 3, 5 / 3, 13 / 3])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        status = evaluate.main(["audit", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_audit(run, tmp_path):
    for name, count in (("train", range(20)), ("drawn", range(100, 108))):
        (tmp_path / name).mkdir()
        for seed in count:
            scene(seed).save(tmp_path / name / f"{seed:03}.png")
    (tmp_path / "train/same.png").write_bytes((tmp_path / "train/003.png").read_bytes())
    scene(7, 80).save(tmp_path / "train/large.jpg", quality=60)
    ImageOps.mirror(scene(5)).save(tmp_path / "train/mirrored.png")
    assert run("train", "--output=out", "--pairs=5") == (0, "out/report.md\n", "")
    pairs = json.loads((tmp_path / "out/pairs.json").read_text())["pairs"]
    by_hash = {frozenset((pair["picture"], pair["other"])): pair["why"] for pair in pairs}
    found = {tuple(sorted(names)): why for names, why in by_hash.items() if why != "features"}
    assert found == {
        ("003.png", "same.png"): "identical",
        ("007.png", "large.jpg"): "hash",
        ("005.png", "mirrored.png"): "hash",
    }
    assert pairs[0]["why"] == "identical"
    assert "differ in at most 6 of 63 bits" in (tmp_path / "out/report.md").read_text()
    scene(11).save(tmp_path / "drawn/learnt.png")
    assert run("drawn", "--against=train", "--output=seen", "--ratio=0.01")[0] == 0
    pairs = json.loads((tmp_path / "seen/pairs.json").read_text())["pairs"]
    assert [(pair["picture"], pair["other"]) for pair in pairs] == [("learnt.png", "011.png")]
    status, _, err = run("drawn", "--bits=64")
    assert (status, err) == (2, "error: --bits 64: expected a whole number from 0 to 63\n")
    assert "no such folder" in run("nowhere")[2]
