"""Learnt by heart, or not: what chance makes near, copies that are found, and new pictures that are not."""

import io
import json
import math

import pytest
import torch
from PIL import Image, ImageOps

from ldm.metrics import extractors
from ldm.metrics.copies import Neighbours, chance_of, judge, nearness
from tests.test_audit import scene
from tests.test_tars import write_tar
from tests.tiny import tiny_pipeline
from train import audit_data, audit_model
from train.batches.plan import spread
from train.data.pictures import to_images, to_tensor
from train.data.sources import DataConfig, open_source
from train.measure import memory
from train.measure.memory import PIXELS, look_for_copies

random_conv = extractors.RandomConv(torch.device("cpu"))


def test_neighbours_do_not_depend_on_the_parts_that_come_by():
    rows, queries = torch.randn(60, 7), torch.randn(9, 7)
    exact = torch.cdist(queries.double(), rows.double()).sort(1)
    for size in (1, 11, 60):
        near = Neighbours(queries, 5)
        for places in torch.arange(60).split(size):
            near.add(rows[places], places)
        assert torch.equal(near.places, exact.indices[:, :5])
        torch.testing.assert_close(near.squares.sqrt().double(), exact.values[:, :5], rtol=1e-4, atol=1e-4)


def test_no_picture_is_its_own_neighbour():
    rows = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    near = Neighbours(rows[:2], 4)
    near.add(rows, torch.arange(4))
    apart = nearness(near, slice(None), own=torch.arange(2))
    assert apart.place.tolist() == [1, 0]
    assert apart.ratio.tolist() == pytest.approx([1 / (11 / 3), 1 / (9 / 3)])
    assert nearness(near, slice(None)).place.tolist() == [0, 1]
    few = Neighbours(rows, 4)
    few.add(rows[:2], torch.arange(2))
    with pytest.raises(ValueError, match="2 training pictures are too few"):
        nearness(few, slice(None))


def test_chance():
    """That the least of all values is a new one, or that all of the least are; and what random draws show."""
    assert chance_of(0, 7, 2, 30) == pytest.approx(1)
    for count, known in ((1, 1), (5, 20), (40, 3)):
        assert chance_of(1, count, 1, known) == pytest.approx(count / (count + known))
        every = 1 / math.comb(count + known, count)  # they all come first
        assert chance_of(count, count, 1, known) == pytest.approx(every)
    old, new = torch.rand(20_000, 30), torch.rand(20_000, 12)
    below = (new < old.sort(1).values[:, 2:3]).sum(1)
    for copies in (1, 2, 4):
        found = (below >= copies).double().mean().item()
        assert chance_of(copies, 12, 3, 30) == pytest.approx(found, abs=0.012)


def test_new_pictures_are_told_as_often_as_chance_says():
    """Whatever the pictures are: here each of several clusters, as scenes of one combination are."""
    middles = 3 * torch.randn(20, 6)
    rows, new = (middles.repeat(25, 1) + torch.randn(500, 6) for _ in range(2))
    own = torch.arange(0, 500, 2)
    near = Neighbours(torch.cat([new, rows[own]]), 51)
    near.add(rows, torch.arange(500))
    verdict = judge(near, own, 0.1)
    assert (verdict.rank, verdict.known, verdict.found) == (25, 250, 1)
    assert verdict.copies(range(500)) == pytest.approx(50, abs=25)
    assert verdict.chance(range(500)) > 0.01


def test_copies_are_found_and_new_scenes_are_not(monkeypatch):
    """Also behind worker processes' batches, softened as by an autoencoder."""
    monkeypatch.setattr(memory, "BATCH", 37)
    soft = lambda image: torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    monkeypatch.setattr(memory, "through", lambda vae, image: soft(image))
    data = DataConfig(source="shapes", size=32, length=150)
    source, other = open_source(data), open_source(DataConfig(source="shapes", size=32, scene_seed=9))
    learnt = [3, 50, 149]
    drawn = [source[place][0] for place in learnt] + [other[place][0] for place in range(20)]
    drawn = to_images(soft(torch.stack([to_tensor(image) for image in drawn])))
    found = look_for_copies(drawn, source, None, random_conv, size=32, known=60, quantile=0.02, workers=0)
    assert found.trained == 150
    verdict = found.verdicts[PIXELS]
    assert verdict.nearness.place[:3].tolist() == learnt
    assert verdict.copies(range(3)) == 3
    assert verdict.found > 0.9
    assert verdict.chance(range(3)) < 0.01 < verdict.chance(range(3, 23))


@pytest.mark.slow
def test_a_model_is_audited(tmp_path, monkeypatch, capsys):
    """Drawn once, in worker processes the same, with a verdict, a sheet and every picture's figures."""
    monkeypatch.setattr(memory, "BATCH", 16)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--data.source", "shapes", "--data.size", "32"]
    words += ["--data.length", "40", "--known", "20", "--quantile", "0.05", "--pairs", "4"]
    words += ["--extractor", "random-conv"]
    told = []
    for workers in ("0", "2"):
        more = ["--output", str(tmp_path / "out"), "--workers", workers, "--count", "3"]
        assert audit_model.main([*words, *more]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/out/report.md"
        told.append((tmp_path / "out/report.md").read_text())
    assert told[0] == told[1]
    assert "| captions of the training | pixels |" in told[0]
    assert "| combinations never shown | random-conv |" in told[0]
    assert len(json.loads((tmp_path / "out/copies.json").read_text())["pictures"]) == 6
    assert (tmp_path / "out/sheet.png").is_file()
    more = ["--drawn", str(tmp_path / "out/pictures"), "--output", str(tmp_path / "given"), "--workers", "0"]
    assert audit_model.main([*words, *more]) == 0
    assert "| as given | pixels |" in (tmp_path / "given/report.md").read_text()
    assert not (tmp_path / "given/pictures").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--count=1"], "count=1: expected 2 or more"),
        (["--quantile=0.5"], "quantile=0.5: expected above 0"),
        (["--drawn=x", "--seed=3"], "seed=3 with drawn='x': nothing is drawn, leave one out"),
    ],
)
def test_what_no_audit_can_be(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        audit_model.main(["--output", str(tmp_path), *options])


def test_duplicates_in_tars(tmp_path, monkeypatch):
    """The same pixels in two tars, and a mirror image, by the names that they have there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def packed(image: Image.Image, form: str = "PNG") -> bytes:
        file = io.BytesIO()
        image.save(file, form)
        return file.getvalue()

    files = {f"{seed}.{kind}": scene(seed) for seed in range(6) for kind in ("png", "txt")}
    first = {name: packed(image) if name.endswith("png") else name for name, image in files.items()}
    write_tar(tmp_path / "a.tar", first)
    again = {"x.bmp": packed(scene(2), "BMP"), "x.txt": "x", "y.png": packed(ImageOps.mirror(scene(4)))}
    write_tar(tmp_path / "b.tar", again | {"y.txt": "y"})
    words = ["--output", str(tmp_path / "out"), "--data.source", str(tmp_path / "{a,b}.tar"), "--ratio", "0"]
    assert audit_data.main(words) == 0
    pairs = json.loads((tmp_path / "out/pairs.json").read_text())["pairs"]
    told = {
        tuple(sorted(pair[name].split(": ")[-1] for name in ("picture", "other"))): pair["why"]
        for pair in pairs
    }
    assert told == {("2", "x"): "identical", ("4", "y"): "hash"}


def test_duplicates_in_scenes(tmp_path, capsys):
    """Scenes are pictures as those of a folder are; few of them are alike."""
    words = ["--output", str(tmp_path), "--data.source", "shapes", "--data.size", "32", "--data.length", "9"]
    assert audit_data.main([*words, "--pairs", "3", "--ratio", "0"]) == 0
    assert "9 pictures of shapes against each other: 0 near pairs" in (tmp_path / "report.md").read_text()
    for option, message in (
        ("--bits=64", "bits=64: expected 0 to 63"),
        ("--ratio=2", "ratio=2.0: expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            audit_data.main([*words, option])


class Damaged:
    """A source some of whose pictures cannot be decoded."""

    def __init__(self, source, good):
        self.source, self.good, self.description = source, good, "damaged"

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index not in self.good:
            raise ValueError(f"picture {index} is cut")
        return self.source[index]


def test_pictures_that_cannot_be_decoded_are_left_out(tmp_path):
    shapes = open_source(DataConfig(source="shapes", size=32, length=8))
    recipe = audit_model.ModelAuditRecipe(
        output=str(tmp_path), data=DataConfig(source="photos", size=32), count=8
    )
    asked = audit_model.prompts_of(recipe, Damaged(shapes, {1, 2, 5}))
    assert len(asked[audit_model.TRAINED]) == 3
    with pytest.raises(ValueError, match="no caption of the training can be read"):
        audit_model.prompts_of(recipe, Damaged(shapes, {}))
    known = spread(8, 2)
    for good in ({}, set(range(8)) - set(known)):
        with pytest.raises(ValueError, match=r"none of the 2 training pictures .* can be decoded"):
            look_for_copies(
                [shapes[0][0]], Damaged(shapes, good), None, size=32, known=2, quantile=0.1, workers=0
            )


def test_the_report_tells_the_threshold_that_there_was(tmp_path, monkeypatch):
    """Of 60 pictures the lowest thousandth is the lowest one: 1.7%, and not 0.1% of 1,000."""
    monkeypatch.setattr(memory, "through", lambda vae, image: image)
    source = open_source(DataConfig(source="shapes", size=32, length=60))
    found = look_for_copies([source[0][0]], source, None, size=32, known=1000, quantile=0.001, workers=0)
    told = audit_model.threshold_of(found.verdicts[PIXELS])
    assert told == "the lowest of the ratios of 60 training pictures"
    assert audit_model.threshold_of(found.verdicts[PIXELS]._replace(rank=3)).startswith("number 3 from below")
