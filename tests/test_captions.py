"""Captions of several kinds, chosen by weights that may change; how long they are; and in chunks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from autoencoder.vae import AutoencoderKL
from ldm.files.checkpoint import save_model
from tests.test_buckets import VAE
from tests.test_data import picture, write_jsonl
from tests.test_tars import png, write_tar
from train.batches.encoding import compute_latents
from train.batches.latents import Latents
from train.batches.plan import Draw
from train.config import from_mapping, split_arguments, to_mapping
from train.data.captions import chances, every
from train.data.sources import DataConfig, open_source

BOTH = {"long": 0.95, "short": 0.05}


def draws(index: int, count: int) -> list[Draw]:
    return [Draw(index=index, step=step, position=0, count=1, seed=0) for step in range(count)]


def test_a_kind_has_its_weight_however_many_captions_it_has():
    captions = {"long": ["a", "b", "c"], "short": ["d"]}
    assert chances(captions, {"long": 3, "short": 1}) == pytest.approx([0.25, 0.5, 0.75, 1])
    assert chances({"short": ["d", "e"]}, {"long": 3, "short": 1}) == pytest.approx([0.5, 1])
    assert chances(captions, {"long": 0, "short": 1}) == pytest.approx([0, 0, 0, 1])
    assert chances({"long": ["a"]}, {"long": 0, "short": 1}) == [1]  # it has no other
    one_kind = Latents([], {0: every(captions)}, None)
    of_one = Latents([], one_kind.captions, None, {0: chances({"text": every(captions)}, {"text": 1})})
    assert one_kind.choose_captions(draws(0, 50)) == of_one.choose_captions(draws(0, 50))


def test_ratios_change_without_a_new_cache_and_kinds_do_not(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    rows = []
    for k in range(3):
        picture(tmp_path / f"data/{k}.png")
        rows.append({"file_name": f"{k}.png", "long": [f"a long one of {k}", f"another of {k}"]})
        rows[-1] |= {"short": f"{k}"} if k else {}
    write_jsonl(tmp_path / "data", rows)
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "vae")
    data = DataConfig(source=str(tmp_path / "data"), size=16, captions=BOTH)

    def shares(**weights: float) -> list[Counter[str]]:
        latents = compute_latents(replace(data, captions=weights), tmp_path / "vae", tmp_path / "latents")
        return [Counter(map(len, latents.choose_captions(draws(k, 400)))) for k in range(3)]

    first, second, _ = shares(**BOTH)
    shard = next((tmp_path / "latents").glob("latents-*"))
    written = shard.stat().st_mtime_ns
    assert first.keys() == {len("a long one of 0"), len("another of 0")}  # all the weight where one is absent
    assert 5 <= second[1] <= 40
    assert 150 < second[len("another of 1")] < 230
    assert 150 < shares(short=1, long=1)[1][1] < 250
    assert shares(long=1, short=0)[1].keys() == first.keys()
    assert shard.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="latents of another data"):
        compute_latents(replace(data, captions=None, caption_column="long"), tmp_path / "vae", shard.parent)
    open_source(replace(data, captions={**BOTH, "shrot": 1}))
    assert "has no captions of kind ['shrot']: their weight goes to the others" in caplog.text


def test_caches_from_before_there_were_kinds_are_read(tmp_path):
    """Their cache.json does not name any, and their shards hold lists."""
    data = DataConfig(source="shapes", size=16, length=3)
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "vae")
    latents = compute_latents(data, tmp_path / "vae", tmp_path / "latents")
    key = json.loads((tmp_path / "latents/cache.json").read_text())
    assert key.pop("captions") == ["text"]
    (tmp_path / "latents/cache.json").write_text(json.dumps(key))
    path = tmp_path / "latents/latents-00000.safetensors"
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        header = file.metadata()
    header["captions"] = json.dumps([one["text"] for one in json.loads(header["captions"])])
    save_file(load_file(path), path, header)
    assert compute_latents(data, tmp_path / "vae", tmp_path / "latents").captions == latents.captions


def test_kinds_in_text_files_and_tars(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "data/a.png")
    (tmp_path / "data/a.txt").write_text("beside it")
    config = DataConfig(source=str(tmp_path / "data"), captions={"long": 1, "txt": 1})
    assert open_source(config)[0][1] == {"txt": ["beside it"]}
    assert open_source(replace(config, captions=BOTH))[0][1] == {"long": ["beside it"]}
    files = {"1.txt": "alt text", "1.png": png(9), "1.json": json.dumps({"long": ["one", "two"], "short": 3})}
    write_tar(tmp_path / "x.tar", files)
    config = DataConfig(source=str(tmp_path / "x.tar"), captions={"long": 95, "txt": 5, "short": 1})
    for _ in range(2):  # the index is made, and read back
        assert open_source(config)[0][1] == {"long": ["one", "two"], "txt": ["alt text"]}
    assert open_source(replace(config, captions=None))[0][1] == {"text": ["alt text"]}


def test_weights_come_from_yaml_and_the_command_line():
    (long, short) = split_arguments(["--captions.long", "95", "--captions.short=5"])
    values = {long[0].split(".")[1]: long[1], short[0].split(".")[1]: short[1]}
    config = from_mapping(DataConfig, {"source": "x", "captions": values})
    assert config.captions == {"long": 95.0, "short": 5.0}
    assert from_mapping(DataConfig, to_mapping(config)) == config
    assert config.kinds == ["long", "short"]
    for captions, message in (
        ({}, "expected weights of 0 or more"),
        ({"long": -1.0}, "expected weights"),
        ({"long": 0.0}, "expected weights"),
        ({"long": "much"}, "expected float"),
        ("long", "expected keys and values"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mapping(DataConfig, {"source": "x", "captions": captions})
    with pytest.raises(ValueError, match="captions of scenes are of one kind"):
        DataConfig(captions=BOTH)
