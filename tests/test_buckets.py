"""Pictures of every shape go to the bucket nearest in aspect ratio, whole batches of one shape, none lost."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.vae import AutoencoderKL, AutoencoderKLConfig
from ldm.files.checkpoint import save_model
from train.batches.buckets import (
    Size,
    View,
    bucket_sizes,
    crop_corner,
    cropped,
    enlargement,
    frame,
    nearest,
    sort_into_buckets,
    views,
)
from train.batches.encoding import compute_latents
from train.batches.plan import Plan
from train.data.pictures import open_checked, to_tensor, upright, upright_size
from train.data.sources import DataConfig, open_source, sort_source
from train.fit.optim import OptimConfig
from train.tasks.autoencoding import AutoencoderRecipe, Autoencoding

VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_add_attention=False,
)


@pytest.mark.parametrize(
    ("size", "multiple", "max_aspect"),
    [(512, 64, 2.0), (512, 64, 4.0), (1024, 64, 2.0), (256, 32, 1.5), (64, 8, 3)],
)
def test_buckets_are_multiples_of_like_area_and_both_ways_up(size, multiple, max_aspect):
    sizes = bucket_sizes(size, multiple, max_aspect)
    assert len(sizes) == len(set(sizes)) >= 3
    assert (size, size) in sizes
    assert {Size(one.height, one.width) for one in sizes} == set(sizes)
    for one in sizes:
        assert one.width % multiple == one.height % multiple == 0
        assert 0.8 * size**2 <= one.width * one.height <= size**2
        assert max(one) / min(one) <= max_aspect
    assert [one.aspect for one in sizes] == sorted(one.aspect for one in sizes)


def test_the_square_alone_needs_no_multiple():
    assert bucket_sizes(200, 64, 1.0) == [(200, 200)]
    assert bucket_sizes(64, 64, 2.0) == [(64, 64)]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1, 4000), (512, 512), (700, 690)])
def test_the_nearest_bucket_is_so_on_a_logarithmic_scale(size):
    picture = Size(*size)
    sizes = bucket_sizes(512, 64, 2.0)
    chosen = sizes[nearest(picture, sizes)]
    error = [abs(math.log((one.width / one.height) / (picture.width / picture.height))) for one in sizes]
    assert error[sizes.index(chosen)] == min(error)
    turned = sizes[nearest(Size(picture.height, picture.width), sizes)]
    assert (turned.height, turned.width) == chosen or len({round(e, 9) for e in error}) < len(error)


@pytest.mark.parametrize("view", [View(), View((0.0, 1.0)), View((0.3, 0.9), mirrored=True)])
@pytest.mark.parametrize("picture", [Size(90, 40), Size(40, 90), Size(31, 33)])
def test_a_frame_is_the_part_that_its_corner_says(picture, view):
    """In a picture whose red says how far right it is, and whose green how far down."""
    x, y = np.meshgrid(np.arange(picture.width) + 0.5, np.arange(picture.height) + 0.5)
    places = np.stack([255 * x / picture.width, 255 * y / picture.height, 0 * x], -1)
    bucket = Size(24, 16)
    image = frame(Image.fromarray(places.round().astype(np.uint8)), bucket, view)
    assert image.size == bucket
    scale, (left, top) = enlargement(picture, bucket), crop_corner(picture, bucket, view)
    middle = np.asarray(image)[8, 12]
    across = left + 12.5  # of the resized picture, mirrored where the view is
    if view.mirrored:
        across = picture.width * scale - across
    assert abs(middle[0] / 255 * picture.width * scale - across) < 1.5
    assert abs(middle[1] / 255 * picture.height * scale - (top + 8.5)) < 1.5
    assert cropped(picture, bucket) == pytest.approx(
        1 - 24 * 16 / (picture.width * picture.height * scale**2), abs=1e-9
    )


def test_views_are_the_middle_first_and_a_function_of_the_index():
    assert views(3, 1, flip=False) == [View()]
    assert views(3, 1, flip=True) == [View(), View(mirrored=True)]
    several = views(3, 4, flip=True)
    assert several[:2] == [View(), View(mirrored=True)]
    assert len(set(several)) == 8
    assert several == views(3, 4, flip=True) != views(4, 4, flip=True)
    assert views(3, 2, flip=False)[1] == views(3, 4, flip=False)[1]


def test_extreme_and_tiny_pictures_have_a_policy_and_are_counted():
    pictures = [Size(500, 500), Size(1, 4000), Size(40, 40), Size(300, 200)]
    sizes = bucket_sizes(128, 32, 2.0)
    pictures = dict(enumerate(pictures))
    buckets = sort_into_buckets(pictures, sizes, max_enlargement=1.25)
    assert buckets.dropped == [1, 2]
    assert sorted(index for members in buckets.members for index in members) == [0, 3]
    assert "left out         2" in buckets.table()
    everything = sort_into_buckets(pictures, sizes, None)
    assert sorted(index for members in everything.members for index in members) == [0, 1, 2, 3]
    assert max(everything.lost) > 0.99  # of a line of pixels nearly all is cut off, and the table says so
    with pytest.raises(ValueError, match=r"all 4 pictures would be enlarged more than 0\.1 times"):
        sort_into_buckets(pictures, sizes, 0.1)


@pytest.fixture
def folder(tmp_path):
    """Nine pictures, wide, high and square, each of its own colours from left to right."""
    (tmp_path / "data").mkdir()
    for k, size in enumerate([(96, 48), (48, 96), (60, 60)] * 3):
        ramp = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).resize(size)
        image = Image.merge(
            "RGB", [ramp, Image.new("L", size, 28 * k), ramp.transpose(Image.Transpose.ROTATE_180)]
        )
        image.save(tmp_path / f"data/{k}.png")
        (tmp_path / f"data/{k}.txt").write_text(f"picture {k}")
    return tmp_path / "data"


def test_latents_of_a_bucket_share_a_shape_and_a_batch(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("train.batches.encoding.SHARD", 2)  # so that a bucket has two shards
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE)
    save_model(vae, tmp_path / "vae")
    data = DataConfig(source=str(folder), size=32, max_aspect=2.0, side_multiple=8, crops=2, flip=True)
    buckets = sort_source(open_source(data), data)
    assert [str(size) for size in buckets.sizes] == ["24x40", "32x32", "40x24"]
    assert list(map(len, buckets.members)) == [3, 3, 3]
    latents = compute_latents(data, tmp_path / "vae", tmp_path / "latents", masks=True)
    assert len(list((tmp_path / "latents").glob("latents-*.safetensors"))) == 6
    assert [tuple(one.mean.shape) for one in latents.buckets] == [
        (3, 4, 4, 20, 12),
        (3, 4, 4, 16, 16),
        (3, 4, 4, 12, 20),
    ]
    source = open_source(data)
    for size, bucket in zip(latents.sizes, latents.buckets, strict=True):
        for row, index in enumerate(bucket.indices):
            image, captions = source[index]
            assert {"text": latents.captions[index]} == captions
            seen = [np.asarray(frame(image, size, view), np.float32) for view in views(index, 2, flip=True)]
            pixels = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2) / 127.5 - 1
            torch.testing.assert_close(
                bucket.mean[row].float(), vae.encode(pixels).mean.detach(), rtol=2e-3, atol=2e-3
            )
    plan = Plan([bucket.indices for bucket in latents.buckets], batch_size=4, seed=0)
    shapes = {tuple(latents.sample(plan.batch(step)).shape) for step in range(9)}
    assert shapes == {(4, 4, 20, 12), (4, 4, 16, 16), (4, 4, 12, 20)}
    assert latents.mask(plan.batch(0)).eq(1).all()  # pictures without an alpha channel
    for crops, flip in ((1, True), (4, False)):  # the latter has as many views
        with pytest.raises(ValueError, match="latents of another crops"):
            compute_latents(replace(data, crops=crops, flip=flip), tmp_path / "vae", tmp_path / "latents")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_aspect": 0.5}, r"max_aspect=0\.5: expected 1"),
        ({"side_multiple": 12}, "side_multiple=12: expected a multiple of 8"),
        ({"max_enlargement": 0.0}, r"max_enlargement=0\.0: expected more than 0"),
        ({"crops": 0}, "crops=0: expected 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_a_picture_that_cannot_be_decoded_is_set_aside(folder, tmp_path, caplog):
    """Its header is whole, so only decoding finds it; of its bucket the others stay."""
    content = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(content[: len(content) // 2])
    torch.manual_seed(0)
    save_model(AutoencoderKL(VAE), tmp_path / "vae")
    data = DataConfig(source=str(folder), size=32, max_aspect=2.0, side_multiple=8)
    with pytest.raises(ValueError, match=r"1 of 9 pictures in .* cannot be used, more than(.|\n)*4\.png"):
        compute_latents(data, tmp_path / "vae", tmp_path / "latents", masks=True)
    data = replace(data, max_bad_fraction=0.2)
    for _ in range(2):  # encoded, and read back
        caplog.clear()
        latents = compute_latents(data, tmp_path / "vae", tmp_path / "latents", masks=True)
        assert [bucket.indices for bucket in latents.buckets] == [[1, 7], [2, 5, 8], [0, 3, 6]]
        assert [len(bucket.mask) for bucket in latents.buckets] == [2, 3, 3]
        assert latents.captions[7] == ["picture 7"]
        assert "cannot be used and are left out; the first are\n  picture 4: " in caplog.text
    rejected = (tmp_path / "latents/rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["picture"] for line in rejected] == ["picture 4"]


def test_an_autoencoder_sees_every_view(folder, tmp_path):
    data = DataConfig(source=str(folder), size=32, crops=2, flip=True)
    recipe = AutoencoderRecipe(
        output=str(tmp_path / "run"),
        steps=1,
        batch_size=64,
        data=data,
        model=VAE,
        optim=OptimConfig(warmup_steps=1),
    )
    task = Autoencoding(recipe)
    draws = [draw for draw in Plan(task.buckets, 400, 0).batch(0) if draw.index == 0]
    seen = {image.numpy().tobytes() for image in task.batch(draws)["image"]}
    image = task.squares.source[0][0]
    wanted = {
        to_tensor(frame(image, Size(32, 32), view)).numpy().tobytes() for view in views(0, 2, flip=True)
    }
    assert len(wanted) == 4
    assert seen == wanted


def test_an_autoencoder_takes_the_next_picture_where_one_cannot_be_decoded(folder, tmp_path, caplog):
    for name in ("4.png", "5.png"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    data = DataConfig(source=str(folder), size=32, max_bad_fraction=0.3)
    recipe = AutoencoderRecipe(output=str(tmp_path / "run"), steps=500, batch_size=2, data=data, model=VAE)
    task = Autoencoding(recipe)
    assert torch.equal(task.image(4), task.image(6))
    assert "2 of 9 pictures" in caplog.text
    strict = Autoencoding(replace(recipe, data=replace(data, max_bad_fraction=0.2)))
    with pytest.raises(ValueError, match=r"2 of 9 pictures in .* cannot be used"):
        strict.image(4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_file_is_that_of_the_upright_picture(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    Image.new("RGB", (20, 10)).save(path, kind, exif=exif)
    with open_checked(path) as image:
        size = upright_size(image)
    with open_checked(path) as image:
        assert size == upright(image).size == ((20, 10) if orientation < 5 else (10, 20))
