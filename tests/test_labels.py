"""Where labels come from: drawn scenes, folders of folders, columns of metadata files and of datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_data import folder_source, picture, write_jsonl
from train.data.labels import of_table
from train.data.sources import DataConfig, open_source


def classes_of(source) -> list[str]:
    """Of each picture, by name."""
    return [source.labels.names[source.labels.number(index)] for index in range(len(source))]


def test_scenes_have_subjects_and_places():
    config = {"source": "shapes", "size": 16, "length": 6, "subjects": ("circle", "star")}
    source = open_source(DataConfig(**config, label="subject"))
    assert source.labels.names == ("circle", "star")
    assert classes_of(source) == [source.scenes.describe(index).subject for index in range(6)]
    assert set(classes_of(source)) == {"circle", "star"}
    assert set(classes_of(open_source(DataConfig(**config, label="place")))) <= {
        "snow",
        "beach",
        "night",
    } | set(open_source(DataConfig(**config, label="place")).labels.names)
    assert open_source(DataConfig(**config)).labels is None
    with pytest.raises(ValueError, match=r"data.label='colour': drawn scenes have subject and place"):
        open_source(DataConfig(**config, label="colour"))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, colour in (("fox/1.png", "red"), ("fox/2.jpg", "orange"), ("cat/1.png", "grey")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(tmp_path / name, colour)
    (tmp_path / "fox/1.txt").write_text("a red fox\n")
    return tmp_path


def test_subfolders_are_classes(folders):
    source = folder_source(folders, label="folder")
    assert source.labels.names == ("cat", "fox")
    assert classes_of(source) == ["cat", "fox", "fox"]
    assert [captions["text"] for _, captions in (source[index] for index in range(3))] == [
        [""],
        ["a red fox"],
        [""],
    ]
    said = folder_source(folders, label="folder", caption="an animal")
    assert classes_of(said) == ["cat", "fox", "fox"]
    assert said[0][1] == {"text": ["an animal"]}
    with pytest.raises(ValueError, match=r"has no subfolder with pictures"):
        folder_source(folders / "fox", label="folder")


def test_a_column_holds_classes(folders):
    names = ["cat/1.png", "fox/1.png", "fox/2.jpg"]
    rows = [{"file_name": name, "text": "an animal", "kind": 3 if "fox" in name else 4} for name in names]
    write_jsonl(folders, rows)
    source = folder_source(folders, label="kind")
    assert source.labels.names == ("3", "4")
    assert classes_of(source) == ["4", "3", "3"]
    assert classes_of(folder_source(folders, label="kind", caption="x")) == ["4", "3", "3"]
    assert classes_of(folder_source(folders, label="folder")) == ["cat", "fox", "fox"]
    plain, described = folder_source(folders).description, source.description
    rows[0]["kind"] = 3
    write_jsonl(folders, rows)
    assert folder_source(folders, label="kind").description != described  # what was trained is told apart
    assert folder_source(folders).description == plain
    del rows[2]["kind"]
    write_jsonl(folders, rows)
    with pytest.raises(
        ValueError, match=r"data.label='kind': 1 of 3 pictures .* have no 'kind', the first fox/2"
    ):
        folder_source(folders, label="kind")


def test_labels_that_are_nowhere(folders):
    with pytest.raises(
        ValueError, match=r"is a column of a metadata file, and .* has none of metadata.jsonl"
    ):
        folder_source(folders / "fox", label="kind", caption="x")
    write_jsonl(folders / "fox", [{"file_name": name, "text": "x"} for name in ("1.png", "2.jpg")])
    with pytest.raises(ValueError, match=r"data.label='folder': 2 of 2 pictures in .* lie in no subfolder"):
        folder_source(folders / "fox", label="folder")
    with pytest.raises(ValueError, match=r"pictures in tars have no labels here"):
        open_source(DataConfig(source="some.tar", label="kind"))


@pytest.mark.slow
def test_columns_of_datasets_are_classes():
    import datasets

    numbers = datasets.Features(
        {"kind": datasets.ClassLabel(names=["fox", "cat"]), "text": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict({"kind": [1, 0, 1], "text": ["b", "a", "b"]}, features=numbers)
    labels = of_table(table, "kind")
    assert (labels.names, [labels.number(i) for i in range(3)]) == (("fox", "cat"), [1, 0, 1])
    labels = of_table(table, "text")
    assert (labels.names, [labels.number(i) for i in range(3)]) == (("a", "b"), [1, 0, 1])
    kind = datasets.Features({"kind": numbers["kind"]})
    unlabelled = datasets.Dataset.from_dict({"kind": [1, -1, 0]}, features=kind)
    with pytest.raises(ValueError, match=r"data.label='kind': 1 of 3 rows have none"):
        of_table(unlabelled, "kind")
    with pytest.raises(ValueError, match=r"data.label='colour' is no column; there are kind, text"):
        of_table(table, "colour")
