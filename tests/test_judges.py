"""`python -m ldm.evaluate scenes`: shares of right answers, their intervals, what fails, what cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm import evaluate
from ldm.metrics.judges import UNASKED, Asked, Judge, Network, open_judge, read_tested, right, save_judge
from ldm.metrics.scenes import Share, shares, table
from tests.tiny import CAPTIONS, tiny_pipeline

ANSWERS = {"colour": ["red", "blue", "green"], "count": ["1", "2"]}
ASKED = [
    Asked(text, {"colour": ("red", "blue", None)[i % 3], "count": "2"}) for i, text in enumerate(CAPTIONS)
]


@pytest.fixture
def home(tmp_path) -> Path:
    """A judge with random weights, that asks six things of what training showed, and four of the rest."""
    network = Network({name: len(known) for name, known in ANSWERS.items()}, width=24).eval()
    judge = Judge(network, ANSWERS, 32, 16, {"scenes": 0})
    image, answers = torch.rand(5, 3, 32, 32) * 2 - 1, judge.places(ASKED[:5])
    save_judge(tmp_path / "judge", judge, {"seen": ASKED, "held_out": ASKED[:4]}, image, answers)
    return tmp_path / "judge"


def test_what_is_right():
    """Of each question those that were asked; of all together those where nothing that was asked is wrong."""
    asked = {"a": torch.tensor([0, 1, UNASKED, 2]), "b": torch.tensor([1, 1, 1, 1])}
    said = {"a": torch.tensor([0, 2, 0, 2]), "b": torch.tensor([1, 1, 1, 0])}
    found = right(said, asked)
    assert found["a"].tolist() == [True, False, True]
    assert found["b"].tolist() == [True, True, True, False]
    assert found["all"].tolist() == [True, False, True, False]
    assert shares(said, asked) == {"a": Share(2, 3), "b": Share(3, 4), "all": Share(2, 4)}


def test_intervals():
    """Wilson's by what defines it, |share - p| = z sqrt(p (1 - p) / n); 95 of 100 hold the truth."""
    for hits, count in ((0, 10), (7, 12), (262, 300), (50, 50)):
        share = Share(hits, count)
        for p in share.interval:
            assert abs(share.value - p) == pytest.approx(1.959964 * (p * (1 - p) / count) ** 0.5, abs=2e-7)
    assert Share(0, 10).interval == pytest.approx((0, 0.27753), abs=1e-5)
    assert str(Share(0, 7)) == "0.0% (0.0 to 35.4)"  # and not -0.0
    draw = np.random.default_rng(0)
    held = [low <= 0.9 <= high for low, high in (Share(k, 80).interval for k in draw.binomial(80, 0.9, 2000))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)
    assert str(Share(262, 300)) == "87.3% (83.1 to 90.6)"
    assert str(Share(0, 0)) == "–"
    assert table({"x": {"all": Share(1, 2)}}).splitlines()[-1] == "| x | 50.0% (9.5 to 90.5) |"


def test_a_judge_comes_back_as_it_was(home):
    judge = open_judge(home)
    image, answers = read_tested(home)
    assert image.abs().max() <= 1
    assert answers["colour"].tolist() == [0, 1, UNASKED, 0, 1]
    assert {name: len(said) for name, said in judge(image).items()} == {"colour": 5, "count": 5}
    assert len(judge.taught["judge_hash"]) == 10
    with pytest.raises(ValueError, match="asks for the colour 'pink': the judge knows"):
        judge.places([Asked("x", {"colour": "pink"})])
    note = json.loads((home / "judge.json").read_text())
    (home / "judge.json").write_text(json.dumps(note | {"answers": {"colour": ["red"]}}))
    with pytest.raises(ValueError, match="is not of this judge"):
        open_judge(home)
    (home / "judge.json").unlink()
    with pytest.raises(ValueError, match=r"holds no judge: teach one by python -m train\.teach_judge"):
        open_judge(home)


def test_what_cannot_be_is_told(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (home / "held_out.jsonl").unlink()
    cases = {
        (): "no --judge: teach one by",
        ("--judge=nowhere",): "nowhere holds no judge",
        ("--judge=judge", "--count=1"): "--count 1: expected a whole number from 2",
        ("--judge=judge", "--count=7"): "--count 7: judge asks 6 of what training shows; ask for fewer",
        ("--judge=judge", "--split=held_out"): "judge asks for nothing of what training never showed",
    }
    for words, told in cases.items():
        assert evaluate.main(["scenes", *words]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_scenes(home, tmp_path, monkeypatch, capsys):
    """Both splits drawn once and judged; what is wrong is shown; a second run draws nothing."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    words = ["scenes", "--judge=judge", "--model=model", "--count=4", "--steps=1", "--output=out", "--seed=5"]
    assert evaluate.main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == "out/report.md\n"
    pictures = {path.name for path in (tmp_path / "out/pictures").iterdir()}
    assert pictures == {f"{split}-{i:05d}.png" for split in ("seen", "held_out") for i in range(1, 5)}
    report = (tmp_path / "out/report.md").read_text()
    for told in (
        "| | colour | count | all |",
        "| judge, on 5 drawn scenes |",
        "| model, on 4 captions of what training never showed |",
        "| model, on 4 captions of what training shows |",
        "pictures fail in something",
        "judge_hash",
    ):
        assert told in report
    found = json.loads((tmp_path / "out/figures.json").read_text())["figures"]
    one = next(
        each
        for each in found
        if each["name"] == "accuracy of count, model, on 4 captions of what training shows"
    )
    assert one["value"] == one["protocol"]["right"] / one["protocol"]["asked"]
    assert one["protocol"]["drawn"]["seeds"] == "5 to 8"
    assert (tmp_path / "out/failures.png").is_file()
    assert evaluate.main(words) == 0
    assert "8 were there" in capsys.readouterr().err
