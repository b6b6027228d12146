"""Sources of captioned pictures, good and bad."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.captions import clean_captions
from train.data.pictures import grid, opacity, open_checked, to_images, to_tensor, upright, upright_size
from train.data.sources import DataConfig, open_source


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (20, 10)) -> None:
    Image.new("RGB", size, colour).save(path)


def write_jsonl(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder_source(folder: Path, **options):
    return open_source(DataConfig(source=str(folder), size=16, **options))


def test_scenes_are_counted():
    config = DataConfig(source="shapes", size=16, length=5)
    source = open_source(config)
    image, captions = source[3]
    assert (len(source), image.size, image.mode) == (5, (16, 16), "RGB")
    assert captions
    assert open_source(config)[3][0].tobytes() == image.tobytes()
    other = open_source(DataConfig(source="shapes", size=16, length=5, scene_seed=1))
    assert other.description != source.description


def test_captions_in_jsonl_csv_and_text_files(tmp_path):
    for kind in ("jsonl", "csv", "txt"):
        folder = tmp_path / kind
        folder.mkdir()
        picture(folder / "a.png")
        picture(folder / "b.jpg", "blue")
        if kind == "jsonl":
            rows = [{"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "b.jpg", "text": "three "}]
            write_jsonl(folder, rows)
        elif kind == "csv":
            with (folder / "metadata.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["file_name", "text"], ["a.png", "one"], ["b.jpg", "three"]])
        else:
            (folder / "a.txt").write_text("one")
            (folder / "b.txt").write_text("three\n")
        source = folder_source(folder)
        assert len(source) == 2
        assert source[0][1] == {"text": ["one", "two"] if kind == "jsonl" else ["one"]}
        image, captions = source[1]
        assert captions == {"text": ["three"]}
        assert image.getpixel((3, 3))[2] > 200


def test_the_description_changes_with_the_content(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    before = folder_source(tmp_path).description
    (tmp_path / "a.txt").write_text("two")
    assert folder_source(tmp_path).description != before


def test_captions_and_files_that_disagree_are_listed(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path.parent / "outside.png")
    rows = [
        {"file_name": "a.png", "text": "fine"},
        {"file_name": "a.png", "text": "again"},
        {"file_name": "b.png", "text": "not there"},
        {"file_name": "../outside.png", "text": "out"},
        {"file_name": str(tmp_path.parent / "outside.png"), "text": "out"},
        {"file_name": "a.png", "text": "\x00 "},
        {"text": "no name"},
    ]
    write_jsonl(tmp_path, rows)
    with pytest.raises(ValueError) as error:
        folder_source(tmp_path)
    for part in ("6 of 7", "a.png again", "b.png is missing", "leads out", "has no text", "has no file_name"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no captioned picture"),
        ({"metadata.jsonl": ""}, "list of captions is empty"),
        ({"metadata.jsonl": "{\n"}, "line 1 is not JSON"),
        ({"metadata.jsonl": "3\n"}, "line 1 is no JSON object"),
    ],
)
def test_unusable_folders(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        folder_source(tmp_path)


def test_no_such_folder():
    with pytest.raises(ValueError, match=r"no such folder \./typo"):
        open_source(DataConfig(source="./typo"))


def bomb(path: Path) -> None:
    """A PNG whose header says 30000 x 30000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_bad_pictures_are_left_out_up_to_a_limit(tmp_path):
    names = {"good.png": "fine"}
    picture(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>")
    bomb(tmp_path / "bomb.png")
    names |= dict.fromkeys(("empty.png", "page.jpg", "bomb.png"), "bad")
    write_jsonl(tmp_path, [{"file_name": name, "text": text} for name, text in names.items()])
    with pytest.raises(ValueError, match="3 of 4 pictures"):
        folder_source(tmp_path)
    source = folder_source(tmp_path, max_bad_fraction=0.8)
    assert len(source) == 1
    assert source.rejected["empty.png"] == "the file is empty"
    assert "not a picture" in source.rejected["page.jpg"]
    assert "900000000 pixels" in source.rejected["bomb.png"]


def test_a_cut_picture_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "a.txt").write_text("half a picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        folder_source(tmp_path)[0]


def test_every_mode_becomes_upright_rgb(tmp_path):
    clear = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    assert upright(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 3))
    palette.info["transparency"] = 0
    assert upright(palette).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((3, 4), 257 * 100, np.uint16))
    assert upright(deep).getpixel((0, 0)) == (100, 100, 100)
    for mode in ("L", "1", "CMYK", "LA", "RGB"):
        assert upright(Image.new(mode, (4, 3))).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    with open_checked(tmp_path / "turned.jpg") as image:
        assert upright_size(image) == upright(image).size == opacity(image).size == (10, 20)


def test_the_alpha_channel_of_a_file_is_its_mask(tmp_path):
    figure = Image.new("RGBA", (4, 2), "red")
    figure.putpixel((3, 1), (255, 0, 0, 51))
    figure.save(tmp_path / "a.png")
    Image.new("L", (3, 5), 7).save(tmp_path / "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a figure")
    source = folder_source(tmp_path)
    assert source.mask(0).mode == "L"
    assert list(source.mask(0).get_flattened_data()) == [255] * 7 + [51]
    assert source.mask(1).getcolors() == [(15, 255)]


def test_tensors_and_pictures_round_trip():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.float32
    assert np.array_equal(np.asarray(to_images(tensor[None] * 1.0)[0]), pixels)
    assert grid([Image.new("RGB", (4, 6))] * 5, columns=3).size == (16, 14)


def test_captions_are_cleaned():
    assert clean_captions(["  a\nfox\x00 ", "", 3, "\U0001f98a"]) == ["a fox", "\U0001f98a"]
    assert len(clean_captions("x" * 100_000)[0]) == 20_000
    assert clean_captions(None) == []


@pytest.mark.slow
def test_datasets_from_disk(tmp_path):
    """Importing `datasets` takes seconds."""
    import datasets

    table = {"image": [Image.new("RGB", (20, 10), "blue")] * 3, "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "d"))
    source = folder_source(tmp_path / "d")
    image, captions = source[1]
    assert (len(source), image.mode, captions) == (3, "RGB", {"text": ["b"]})
    with pytest.raises(ValueError, match="no column 'caption'; it has image, text"):
        folder_source(tmp_path / "d", caption_column="caption")


def test_metadata_in_parquet(tmp_path, caplog):
    import pyarrow
    import pyarrow.parquet

    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    table = {"file_name": ["a.png", "b.png"], "text": [["a caption", "another"], ["b"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "metadata.parquet")
    assert [texts for _, texts in map(folder_source(tmp_path).__getitem__, range(2))] == [
        {"text": ["a caption", "another"]},
        {"text": ["b"]},
    ]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,from csv\n")
    assert folder_source(tmp_path)[0][1] == {"text": ["from csv"]}
    assert "read from metadata.csv, not from metadata.parquet" in caplog.text
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"metadata\.parquet cannot be read as parquet"):
        folder_source(tmp_path)
