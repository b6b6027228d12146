"""Tars are read where they lie, by an index that is made once; what is wrong in one is said."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import save_model
from tests.test_buckets import VAE
from train.batches import encoding
from train.batches.encoding import compute_latents
from train.data import tars
from train.data.pictures import upright
from train.data.sources import DataConfig, open_source
from train.data.tars import Tars, expand_braces


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ldm"


def png(shade: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, (shade,) * len(mode)).save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, files: dict[str, bytes | str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(first: int, count: int = 3) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {}
    for k in range(first, first + count):
        files[f"{k:06}.png"] = png(10 * k, (6 + k, 4))
        files[f"{k:06}.txt"] = f"picture {k}"
    return files


def test_many_tars_are_one_source(tmp_path):
    for part in range(3):
        write_tar(tmp_path / f"part-{part:03}.tar", samples(3 * part))
    config = DataConfig(source=str(tmp_path / "part-{000..002}.tar"))
    source = open_source(config)
    assert len(source) == 9
    for k in range(9):
        image, captions = source[k]
        assert captions == {"text": [f"picture {k}"]}
        assert image.getpixel((0, 0)) == (10 * k,) * 3
        assert image.size == source.size(k) == (6 + k, 4)
        assert source.mask(k).getextrema() == (255, 255)
    for same in (str(tmp_path), str(tmp_path / "*.tar"), str(tmp_path / "part-{000,001,002}.tar")):
        assert open_source(DataConfig(source=same)).description == source.description


def test_members_may_come_in_any_order_and_captions_in_any_form(tmp_path):
    files = {
        "a/1.json": json.dumps({"text": ["first", "second"], "width": 6}),
        "a/2.v1.jpg": b"other endings are not ours",
        "b/1.caption": "another one",
        "a/1.jpg": png(50),  # what a file is called is not what it is
        "b/1.webp": png(90, mode="RGBA"),
        "notes.txt": "of no picture",
    }
    write_tar(tmp_path / "x.tar", files)
    source = Tars(str(tmp_path / "x.tar"), ["text"], 0.5)
    assert [source[k][1] for k in range(2)] == [
        {"text": texts} for texts in (["first", "second"], ["another one"])
    ]
    assert source.mask(1).getextrema() == (90, 90)


def test_the_index_is_made_once_and_again_when_the_tar_changes(tmp_path, cache, monkeypatch):
    write_tar(tmp_path / "x.tar", samples(0))
    made = []
    build = tars.build_index
    monkeypatch.setattr(tars, "build_index", lambda *args: made.append(1) or build(*args))
    first = Tars(str(tmp_path / "x.tar"), ["text"], 0)
    again = Tars(str(tmp_path / "x.tar"), ["text"], 0)
    assert (len(made), again.entries, again.description) == (1, first.entries, first.description)
    write_tar(tmp_path / "x.tar", samples(0, count=5))
    assert len(Tars(str(tmp_path / "x.tar"), ["text"], 0)) == 5
    (index,) = cache.glob("tar-*.json")
    index.write_text(index.read_text()[:30])
    assert len(Tars(str(tmp_path / "x.tar"), ["text"], 0)) == 5
    assert len(made) == 3


def test_what_cannot_be_used_is_told_and_too_much_of_it_refused(tmp_path, caplog):
    files = samples(0) | {"3.png": b"<html>", "4.png": png(1), "5.png": b"", "3.txt": "t", "5.txt": "t"}
    write_tar(tmp_path / "x.tar", files)
    assert len(Tars(str(tmp_path / "x.tar"), ["text"], 0.5)) == 3
    for reason in ("3: not a picture", "4: it has no caption", "5: the file is empty"):
        assert reason in caplog.text
    with pytest.raises(ValueError, match=r"3 of 6 pictures in .* cannot be used, more than"):
        Tars(str(tmp_path / "x.tar"), ["text"], 0.1)
    write_tar(tmp_path / "none.tar", {"a.txt": "alone"})
    with pytest.raises(ValueError, match=r"none\.tar holds no captioned picture"):
        Tars(str(tmp_path / "none.tar"), ["text"], 1.0)
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(OSError, match=r"bad\.tar cannot be read"):
        Tars(str(tmp_path / "bad.tar"), ["text"], 1.0)
    with pytest.raises(OSError, match=r"absent\.tar cannot be read"):
        Tars(str(tmp_path / "absent.tar"), ["text"], 1.0)
    with pytest.raises(ValueError, match="names no tar"):
        Tars(str(tmp_path / "absent-*.tar"), ["text"], 1.0)


def test_a_tar_that_is_cut_after_its_index_was_made(tmp_path):
    write_tar(tmp_path / "x.tar", samples(0))
    source = Tars(str(tmp_path / "x.tar"), ["text"], 0)
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[: source.entries[2][1].offset + 10])
    with pytest.raises(OSError, match=r"x\.tar cannot be read: .* within a sample"):
        source[2]


class PayloadError(Exception):
    """As aiohttp's: no OSError."""


class Far(LocalFileSystem):
    """Files here as if they were far away: it fails as often as `failures` says, each time in another way."""

    protocol = ("far",)
    failures: ClassVar[list[Exception | int]] = []  # an int: the file is cut after so many bytes

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("far://"))

    def unstrip_protocol(self, name):
        return f"far://{name}"

    def _open(self, path, mode="rb", **options):
        if not self.failures:
            return super()._open(path, mode, **options)
        match self.failures.pop(0):
            case int(length):
                return io.BytesIO(Path(path).read_bytes()[:length])
            case error:
                raise error


@pytest.fixture
def pauses(monkeypatch):
    """Where the pauses between attempts are noted instead of made; the files are reached as far://."""
    noted: list[float] = []
    monkeypatch.setattr(tars.time, "sleep", noted.append)
    monkeypatch.setattr(Far, "failures", [])
    fsspec.register_implementation("far", Far, clobber=True)
    return noted


def test_a_remote_place_is_asked_again_and_then_named(tmp_path, pauses):
    write_tar(tmp_path / "x.tar", samples(0))
    Far.failures[:] = [700, ConnectionResetError("reset")]  # while the index is made
    source = Tars(f"far://{tmp_path}/*.tar", ["text"], 0)
    assert pauses == [0.5, 2.0]
    assert source[1][1] == {"text": ["picture 1"]}
    for failures in ([TimeoutError()], [FileNotFoundError("404"), PayloadError("half of it")], [9, 9, 9]):
        pauses.clear()
        Far.failures[:] = failures
        assert np.array_equal(source[1][0], upright(Image.open(io.BytesIO(png(10, (7, 4))))))
        assert pauses == [0.5, 2.0, 8.0][: len(failures)]
    Far.failures[:] = [TimeoutError()] * 99
    with pytest.raises(OSError, match=r"far://.*x\.tar cannot be read after 4 attempts: TimeoutError"):
        source[1]
    assert len(Far.failures) == 95
    pauses.clear()
    Far.failures[:] = [ImportError("install farfs")]
    with pytest.raises(OSError, match=r"x\.tar cannot be read: install farfs"):
        source[1]
    assert not pauses


def test_encoding_that_a_remote_place_ended_goes_on(tmp_path, pauses, monkeypatch):
    """What was encoded before stays, and the same call encodes the rest."""
    monkeypatch.setattr(encoding, "SHARD", 2)
    monkeypatch.setattr(encoding, "BATCH", 1)
    write_tar(tmp_path / "x.tar", samples(0, count=6))
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "vae")
    data = DataConfig(source=f"far://{tmp_path}/x.tar", size=16)
    whole = compute_latents(data, tmp_path / "vae", tmp_path / "whole")
    read = Tars.read
    opened: list[int] = []

    def ends(source, index, convert):
        opened.append(index)
        if opened == [0, 1, 2, 3]:
            Far.failures[:] = [TimeoutError("too slow")] * 4
        return read(source, index, convert)

    monkeypatch.setattr(Tars, "read", ends)
    with pytest.raises(OSError, match=r"far://.*x\.tar cannot be read after 4 attempts: too slow"):
        compute_latents(data, tmp_path / "vae", tmp_path / "latents")
    assert [path.name for path in (tmp_path / "latents").glob("*.safetensors")] == [
        "latents-00000.safetensors"
    ]
    again = compute_latents(data, tmp_path / "vae", tmp_path / "latents")
    assert opened == [0, 1, 2, 3, 2, 3, 4, 5]
    assert torch.equal(again.buckets[0].mean, whole.buckets[0].mean)


def test_braces():
    assert list(expand_braces("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(expand_braces("{x,y}/{0..1}")) == ["x/0", "x/1", "y/0", "y/1"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]
