"""The faults that data can have: a table of the tests that say what each leads to, and the missing ones.

"Clear" means: what is wrong, how often, which are the first, and what to do; a run never ends in mid-epoch.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import struct
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import save_model
from tests.test_buckets import VAE
from tests.test_data import picture, write_jsonl
from tests.test_fit import OPTIM, losses, state, stop_at
from tests.test_tars import png, write_tar
from train.batches import encoding
from train.batches.buckets import Size, frame
from train.batches.encoding import compute_latents, encoder_sha256
from train.data.pictures import open_checked
from train.data.sizes import find_sizes
from train.data.sources import DataConfig, open_source, sort_source
from train.fit.loop import fit
from train.fit.record import minutes
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding
from train.tasks.text import TextConfig, build_text_encoder

FAULTS = {
    "empty data set": (
        "test_data.test_unusable_folders",
        "test_tars.test_what_cannot_be_used_is_told_and_too_much_of_it_refused",
        "test_data_faults.test_nothing_left_is_told_by_reason",
    ),
    "all pictures filtered": (
        "test_buckets.test_extreme_and_tiny_pictures_have_a_policy_and_are_counted",
        "test_data_faults.test_nothing_left_is_told_by_reason",
    ),
    "fewer than one batch": ("test_data_faults.test_a_bucket_smaller_than_a_batch_is_told",),
    "corrupt, cut, empty or other file": (
        "test_data.test_bad_pictures_are_left_out_up_to_a_limit",
        "test_data.test_a_cut_picture_is_named",
        "test_buckets.test_a_picture_that_cannot_be_decoded_is_set_aside",
    ),
    "decompression bomb": ("test_data_faults.test_a_bomb_is_refused_by_its_header",),
    "kinds of files": (
        "test_data.test_every_mode_becomes_upright_rgb",
        "test_data_faults.test_files_of_every_kind_become_upright_rgb",
        "test_buckets.test_the_size_of_a_file_is_that_of_the_upright_picture",
    ),
    "extreme aspect ratios": (
        "test_buckets.test_extreme_and_tiny_pictures_have_a_policy_and_are_counted",
        "test_data_faults.test_a_line_of_pixels_fills_its_bucket",
    ),
    "captions of every kind": (
        "test_data.test_captions_are_cleaned",
        "test_data_faults.test_any_caption_is_cleaned_or_refused_at_the_start",
        "test_chunks.test_how_long_captions_are_is_told",
    ),
    "captions and files disagree": (
        "test_data.test_captions_and_files_that_disagree_are_listed",
        "test_data_faults.test_hostile_names_are_refused_and_the_first_ten_listed",
        "test_data_faults.test_pictures_without_a_row_are_told",
    ),
    "latents of something else": (
        "test_fit.test_latents_are_read_back_and_a_stale_cache_is_refused",
        "test_data_faults.test_a_stale_cache_is_refused_with_both_hashes",
        "test_data_faults.test_a_cut_shard_is_named_and_it_alone_is_computed_again",
    ),
    "changed data set": (
        "test_data_faults.test_a_run_does_not_go_on_with_a_changed_data_set",
        "test_data_faults.test_new_data_is_accepted_by_name_and_exact_from_there",
        "test_data_faults.test_latents_of_other_data_are_computed_anew_if_asked",
        "test_run.test_all_stages_go_on_with_new_data",
    ),
    "remote shard": (
        "test_tars.test_a_remote_place_is_asked_again_and_then_named",
        "test_tars.test_encoding_that_a_remote_place_ended_goes_on",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_tests(fault):
    for name in FAULTS[fault]:
        module, _, test = name.partition(".")
        assert hasattr(importlib.import_module(f"tests.{module}"), test), name


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def folder(tmp_path):
    """Five pictures with captions."""
    (tmp_path / "data").mkdir()
    for k in range(5):
        picture(tmp_path / f"data/{k}.png", size=(20 + k, 10))
        (tmp_path / f"data/{k}.txt").write_text(f"picture {k}")
    return tmp_path / "data"


def test_nothing_left_is_told_by_reason(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").write_text("<html>")
    write_jsonl(tmp_path, [{"file_name": f"{name}.png", "text": name} for name in "abc"])
    reasons = r"3 of 3 pictures .*, all; (.|\n)*In all: 2 times the file is empty; 1 times not a picture"
    with pytest.raises(ValueError, match=reasons):
        open_source(DataConfig(source=str(tmp_path), max_bad_fraction=1.0))

    class Unreadable:
        """A source whose pictures turn out to have no size."""

        description = "none"

        def __len__(self) -> int:
            return 3

        def size(self, index: int) -> Size:
            raise ValueError(f"row {index} cannot be decoded: it is null")

    config = DataConfig(source="x", max_aspect=2.0, size=512, max_bad_fraction=1.0)
    with pytest.raises(
        ValueError, match=r"3 of 3 pictures in x cannot be used, all; (.|\n)*3 times it is null"
    ):
        sort_source(Unreadable(), config)


def test_a_bucket_smaller_than_a_batch_is_told(folder, tmp_path, caplog):
    recipe = AutoencoderRecipe(
        output=str(tmp_path / "run"),
        steps=1,
        batch_size=8,
        data=DataConfig(source=str(folder), size=16),
        model=VAE,
        optim=replace(OPTIM, warmup_steps=1),
        measured=1,
        sample_every=0,
    )
    with caplog.at_level(logging.INFO, logger="train"):
        fit(Autoencoding(recipe), recipe)
    assert "a bucket has 5 samples, less than a batch: it holds some of them twice" in caplog.text


def header(width: int, height: int) -> bytes:
    """A PNG of that size that holds no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "message"), [(8001, "8001x8001 is more than 64"), (30000, "900000000")])
def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch, side, message):
    """In a folder and in a tar, above our limit and above Pillow's; nothing of that size is ever held."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    picture(tmp_path / "data/a.png")
    (tmp_path / "data/b.png").write_bytes(header(side, side))
    write_jsonl(tmp_path / "data", [{"file_name": f"{name}.png", "text": name} for name in "ab"])
    files = {"a.png": png(1), "a.txt": "a", "b.png": header(side, side), "b.txt": "b"}
    write_tar(tmp_path / "x.tar", files)
    for source in ("data", "x.tar"):
        tracemalloc.start()
        opened = open_source(DataConfig(source=str(tmp_path / source), max_bad_fraction=0.5))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(opened) == 1
        assert message in next(iter(opened.rejected.values()))
        assert peak < 20e6  # bytes; the picture has 192 MB and more


def test_files_of_every_kind_become_upright_rgb(tmp_path):
    """As files, since what Pillow makes of a mode depends on the format."""
    red = Image.new("RGB", (12, 6), (200, 30, 30))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    palette = Image.new("P", (12, 6), 0)
    palette.putpalette([200, 30, 30, 0, 0, 0])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "transparent.png", transparency=bytes([51]))  # a fifth of the colour on white
    Image.fromarray(np.full((6, 12), 257 * 90, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (12, 6), 90).save(tmp_path / "grey.png")
    Image.new("LA", (12, 6), (90, 0)).save(tmp_path / "clear.png")
    blue = Image.new("RGB", (12, 6), "blue")
    red.quantize(4).save(tmp_path / "animated.gif", save_all=True, append_images=[blue.quantize(4)])
    exif = Image.Exif()
    exif[0x0112] = 8
    red.save(tmp_path / "turned.webp", exif=exif, quality=95)
    reds, greys = (200, 30, 30), (90,) * 3
    colours = {"cmyk.jpg": reds, "palette.png": reds, "transparent.png": (244, 210, 210), "deep.png": greys}
    colours |= {"grey.png": greys, "clear.png": (255,) * 3, "animated.gif": reds, "turned.webp": reds}
    write_jsonl(tmp_path, [{"file_name": name, "text": name} for name in colours])
    source = open_source(DataConfig(source=str(tmp_path)))
    assert len(source) == len(colours)
    for index in range(len(source)):
        image, captions = source[index]
        (name,) = captions["text"]
        assert image.mode == "RGB"
        assert image.size == source.size(index) == ((6, 12) if name == "turned.webp" else (12, 6)), name
        np.testing.assert_allclose(image.getpixel((3, 3)), colours[name], atol=6, err_msg=name)


def test_a_line_of_pixels_fills_its_bucket(tmp_path):
    for size in ((1, 4000), (4000, 1), (1, 1)):
        Image.new("RGB", size, "red").save(tmp_path / "a.png")
        with open_checked(tmp_path / "a.png") as image:
            assert frame(image, Size(40, 24)).getcolors() == [(40 * 24, (255, 0, 0))]


def test_any_caption_is_cleaned_or_refused_at_the_start(tmp_path):
    """What is left is valid text without control characters, which a tokenizer reads."""
    texts = {
        "long": "word " * 20_000,
        "nul": "a\x00fox\x1b[2J\u202e end",
        "emoji": "a \U0001f98a in \u2744\ufe0f",
        "half": "half of a pair \ud83e",
        "rows": ["", None, 3, " one ", {"text": "x"}],
    }
    for name in texts:
        picture(tmp_path / f"{name}.png")
    write_jsonl(tmp_path, [{"file_name": f"{name}.png", "text": text} for name, text in texts.items()])
    source = open_source(DataConfig(source=str(tmp_path)))
    found = {captions["text"][0][:60]: captions["text"] for _, captions in map(source.__getitem__, range(5))}
    every = [text for captions in found.values() for text in captions]
    assert sorted(map(len, every)) == [3, 9, 14, 14, 20_000 - 1]
    assert {"a fox [2J  end", "a \U0001f98a in \u2744\ufe0f", "half of a pair", "one"} < set(every)
    _, tokenizer = build_text_encoder(TextConfig(width=6, heads=1, layers=1), [every])
    assert max(tokenizer.lengths(every)) > tokenizer.room
    assert tokenizer(every).shape == (5, 77)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "nul.txt").write_bytes(b"bytes that are \xff\xfe no UTF-8")
    (replaced,) = open_source(DataConfig(source=str(tmp_path)))[0][1]["text"]
    assert replaced == "bytes that are \ufffd\ufffd no UTF-8"
    for empty in ("", " \n", "\x00"):
        (tmp_path / "nul.txt").write_text(empty)
        with pytest.raises(ValueError, match=r"row 1 \(nul\.png\) has no text in 'text'"):
            open_source(DataConfig(source=str(tmp_path)))


def test_hostile_names_are_refused_and_the_first_ten_listed(tmp_path):
    (tmp_path / "data").mkdir()
    picture(tmp_path / "outside.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "data/loop.png").symlink_to(tmp_path / "data/loop.png")
    names = ["link.png", "a\x00.png", "x" * 5000, "\x1b[2Jb.png", "../outside.png", "loop.png", 7, ""]
    write_jsonl(tmp_path / "data", [{"file_name": name, "text": "t"} for name in [*names, *"abcdef"]])
    with pytest.raises(ValueError) as error:
        open_source(DataConfig(source=str(tmp_path / "data")))
    lines = str(error.value).split("\n")
    assert lines[0].endswith("14 of 14 captions are wrong:")
    assert len(lines) == 11
    assert "row 1: link.png leads out of the folder" in lines[1]
    assert "row 2: 'a\\x00.png' is no name of a file" in lines[2]
    assert "is no name of a file" in lines[3]
    assert "row 4: '\\x1b[2Jb.png' is missing" in lines[4]
    assert "row 5: ../outside.png leads out of the folder" in lines[5]
    assert [line.split()[-1] for line in lines[7:9]] == ["file_name"] * 2


def test_pictures_without_a_row_are_told(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for name in "abc":
        picture(tmp_path / f"images/{name}.png")
    write_jsonl(tmp_path, [{"file_name": "images/a.png", "text": "t"}])
    assert len(open_source(DataConfig(source=str(tmp_path)))) == 1
    assert "2 pictures in" in caplog.text
    assert "have no row in metadata.jsonl: left out" in caplog.text


def test_a_stale_cache_is_refused_with_both_hashes(folder, vae, tmp_path):
    data = DataConfig(source=str(folder), size=16)
    compute_latents(data, vae, tmp_path / "latents")
    key = json.loads((tmp_path / "latents/cache.json").read_text())
    other = AutoencoderKL(VAE)
    save_model(other, vae)
    with pytest.raises(ValueError) as error:
        compute_latents(data, vae, tmp_path / "latents")
    assert f"there  {key['autoencoder']}\n  wanted {encoder_sha256(other)}\nDelete" in str(error.value)
    shapes = replace(data, max_aspect=2.0, side_multiple=8)
    for changed in (replace(data, size=24), shapes):
        with pytest.raises(ValueError, match="holds the latents of another"):
            compute_latents(changed, vae, tmp_path / "latents")


def test_a_cut_shard_is_named_and_it_alone_is_computed_again(folder, vae, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "SHARD", 2)
    data = DataConfig(source=str(folder), size=16)
    whole = compute_latents(data, vae, tmp_path / "latents")
    shards = sorted((tmp_path / "latents").glob("latents-*"))
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    (tmp_path / "latents/.latents-00001.safetensors.9-aa.tmp").write_text("of a process that was killed")
    with pytest.raises(ValueError, match=r"latents-00001.safetensors is damaged .*: delete it"):
        compute_latents(data, vae, tmp_path / "latents")
    shards[1].unlink()
    with caplog.at_level(logging.INFO, logger="train"):
        again = compute_latents(data, vae, tmp_path / "latents")
    assert "encoding 2 pictures" in caplog.text
    torch.testing.assert_close(again.buckets[0].mean, whole.buckets[0].mean)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_a_changed_data_set(folder, tmp_path):
    data = DataConfig(source=str(folder), size=16)
    recipe = AutoencoderRecipe(
        output=str(tmp_path / "run"),
        steps=4,
        batch_size=2,
        data=data,
        model=VAE,
        optim=OPTIM,
        measured=1,
        sample_every=0,
    )
    fit(Autoencoding(recipe), recipe)
    for change in ("a new picture", "another caption", "a picture less"):
        if change == "a new picture":
            picture(folder / "new.png")
            (folder / "new.txt").write_text("new")
        elif change == "another caption":
            (folder / "new.png").unlink()
            (folder / "new.txt").unlink()
            (folder / "0.txt").write_text(change)
        else:
            (folder / "0.png").unlink()
        with pytest.raises(
            ValueError, match=r"is of another run; (.|\n)* data: 5 pictures.* then, \d pictures"
        ):
            fit(Autoencoding(recipe), recipe)


@pytest.mark.slow
def test_new_data_is_accepted_by_name_and_exact_from_there(folder, tmp_path, caplog):
    """What changed is told, an epoch of what there is now begins, and a run in two parts is one."""
    base = AutoencoderRecipe(
        output="later",
        steps=10,
        batch_size=2,
        data=DataConfig(source=str(folder), size=16),
        model=VAE,
        optim=OPTIM,
        measured=1,
        sample_every=0,
    )

    def train(name: str, stop_after: int = 0, **options: Any) -> list[int]:
        """The samples of the steps of this process."""
        recipe, seen = replace(base, output=str(tmp_path / name), **options), []
        task = Autoencoding(recipe)
        stop_at(task, stop_after)
        plain = task.batch
        task.batch = lambda draws: seen.extend(draw.index for draw in draws) or plain(draws)
        fit(task, recipe)
        return seen

    train("run", stop_after=3)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    (folder / "0.png").unlink()
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_text("another caption")
    for name in ("new", "other"):
        picture(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    with pytest.raises(ValueError, match=r"is of another run; (.|\n)*there are now: --accept-new-data"):
        train("run")
    with pytest.raises(
        ValueError, match=r"batch_size: 2 then, 4 now\n(.|\n)*lets buckets, data, samples differ"
    ):
        train("run", batch_size=4, accept_new_data=True)
    with caplog.at_level(logging.INFO, logger="train"):
        seen = train("whole", accept_new_data=True)
    assert sorted(seen[:6]) == list(range(6))
    assert "goes on from step 3 with new data" in caplog.text
    for line in ("2 added: new.png, other.png", "1 removed: 0.png", "1 with another file or caption: 1.png"):
        assert f"\n  {line}\n" in caplog.text
    train("run", stop_after=6, accept_new_data=True)
    train("run")
    assert state(tmp_path / "run", 10) == state(tmp_path / "whole", 10)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_latents_of_other_data_are_computed_anew_if_asked(folder, vae, tmp_path):
    data, cache = DataConfig(source=str(folder), size=16), tmp_path / "latents"
    compute_latents(data, vae, cache)
    (folder / "0.png").unlink()
    (folder / "0.txt").unlink()
    with pytest.raises(ValueError, match="holds the latents of another data"):
        compute_latents(data, vae, cache)
    anew = compute_latents(data, vae, cache, accept_new_data=True)
    assert set(anew.contents()) == {f"{k}.png" for k in range(1, 5)}
    assert torch.equal(anew.buckets[0].mean, compute_latents(data, vae, tmp_path / "fresh").buckets[0].mean)
    before = sorted(path.stat().st_mtime_ns for path in cache.iterdir())
    compute_latents(data, vae, cache, accept_new_data=True)
    assert sorted(path.stat().st_mtime_ns for path in cache.iterdir()) == before
    save_model(AutoencoderKL(VAE), vae)
    with pytest.raises(ValueError, match="holds the latents of another autoencoder"):
        compute_latents(data, vae, cache, accept_new_data=True)


def test_sizes_are_read_once(folder, tmp_path):
    source, kept = open_source(DataConfig(source=str(folder))), tmp_path / "sizes.safetensors"

    class Counting:
        description, asked = source.description, 0

        def __len__(self) -> int:
            return 5

        def size(self, index: int) -> Size:
            Counting.asked += 1
            if index == 3:
                raise ValueError("it is null")
            return source.size(index)

    first = find_sizes(Counting(), kept)
    assert first[0] == {k: source.size(k) for k in (0, 1, 2, 4)}
    assert first[1] == {3: "it is null"}
    assert find_sizes(Counting(), kept) == first
    assert Counting.asked == 5
    kept.write_bytes(kept.read_bytes()[:-1])
    assert find_sizes(Counting(), kept) == first
    Counting.description = "others"
    find_sizes(Counting(), kept)
    assert Counting.asked == 15


def test_encoding_tells_how_far_it_is_and_the_buckets_once(folder, vae, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "SHARD", 1)
    monkeypatch.setattr(encoding, "TELL_EVERY", 0)
    data = DataConfig(source=str(folder), size=32, max_aspect=2.0, side_multiple=8)
    with caplog.at_level(logging.INFO, logger="train"):
        compute_latents(data, vae, tmp_path / "latents")
    lines = [record.message for record in caplog.records]
    assert sum("5 pictures go into 1 buckets" in line for line in lines) == 1
    told = [line for line in lines if line.startswith("encoded ")]
    assert [line.split()[1] for line in told] == ["1", "2", "3", "4", "5", "5"]
    assert told[0].startswith("encoded 1 of 5 pictures, ")
    assert told[0].endswith(" left")
    assert told[-1].endswith("/s")
    assert (tmp_path / "latents/sizes.safetensors").exists()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="train"):
        compute_latents(data, vae, tmp_path / "latents")
    assert not [record for record in caplog.records if record.message.startswith("encod")]
    assert minutes(120) == "2 min"
