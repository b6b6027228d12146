"""The drawn scenes: pure, truthful, in good English, and without what is held out."""

import colorsys
import hashlib
import re
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from train.data import sprites
from train.data.painting import PLACES, paint
from train.data.scenes import (
    DRAWING,
    SETTING,
    SIDES,
    SUBJECTS,
    WHERE,
    Scene,
    SceneSource,
    Split,
    captions,
    combinations,
    describe,
    draw,
    draw_mask,
    held_out,
    layout,
    main,
    noun_phrase,
    plural,
    rng_of,
    sheet,
)
from train.data.sprites import COLOURS, FEW, PICTOGRAMS, SHAPES, find_font, sprite

EVERY = tuple(PICTOGRAMS) + SHAPES


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64) / 255


def body_colour(subject: str, colour: str) -> tuple[float, float, float]:
    """Hue, saturation and value of the subject's mean visible colour."""
    rgba = pixels(sprite(subject, colour))
    red, green, blue = rgba[rgba[..., 3] > 0.5][:, :3].mean(0).tolist()
    return colorsys.rgb_to_hsv(red, green, blue)


# ---- laws


def test_a_scene_depends_on_its_seed_and_index_alone():
    forward = SceneSource(seed=3, size=24)
    there = [forward[k] for k in range(6)]
    sprite.cache_clear()
    backward = SceneSource(seed=3, size=24)
    back = [backward[k] for k in reversed(range(6))][::-1]
    for (image, words), (again, same_words) in zip(there, back):
        assert image.tobytes() == again.tobytes()
        assert words == same_words
    assert SceneSource(seed=4, size=24).describe(0) != forward.describe(0)
    assert len({image.tobytes() for image, _ in there}) == 6


def test_what_was_computed_from_scenes_knows_the_code_that_drew_them():
    """If this fails, scenes look or read otherwise than before: raise DRAWING, then write `digest` here."""
    digest = hashlib.sha256()
    for k in range(24):
        image, words = SceneSource(seed=0, size=24)[k]
        coarse = np.asarray(image.reduce(3)).astype(int) // 8  # Pillow's last bits may differ
        digest.update(coarse.tobytes() + repr(words).encode())
    assert (DRAWING, digest.hexdigest()[:16]) == (3, "d61f9ebcf3c4e737")
    assert SceneSource(seed=0).drawing == f"drawing {DRAWING}"


def test_numpy_numbers_index_like_ints():
    source = SceneSource(seed=3, size=24)
    assert source[np.int64(5)][0].tobytes() == source[5][0].tobytes()


def test_a_twentieth_is_held_out_for_ever():
    assert held_out("fox", "red", "snow")
    every = [(s, c, p) for s in EVERY for c in (None, *COLOURS) for p in PLACES]
    assert np.mean([held_out(*one) for one in every]) == pytest.approx(0.05, abs=0.005)
    few = combinations(FEW, "held_out")  # a change of these makes trained models see what they are judged on
    assert len(few) == 64
    assert set(few) <= set(combinations(tuple(PICTOGRAMS), "held_out"))
    assert {place for _, _, place in few} == set(PLACES)
    assert {colour for _, colour, _ in few} == {None, *COLOURS}


@pytest.mark.parametrize("split", get_args(Split))
def test_a_split_yields_its_own_combinations_only(split):
    kinds = {"train": {False}, "held_out": {True}, "all": {False, True}}[split]
    scenes = [describe(0, k, FEW, split) for k in range(1200)]
    assert {held_out(s.subject, s.colour, s.place) for s in scenes} == kinds
    seen = {(s.subject, s.colour, s.place) for s in scenes}
    assert len(seen) > 0.5 * len(combinations(FEW, split))
    assert {s.size for s in scenes} == set(SIDES)
    singles = np.mean([s.count == 1 for s in scenes])
    assert singles == pytest.approx(0.7, abs=0.05)


def test_training_sees_a_figure_no_less_often_for_the_places_held_out():
    """Of dogs of no colour four of seven places are held out, and of red cars none."""
    assert sum(held_out("dog", None, place) for place in PLACES) == 4
    scenes = [describe(0, k, FEW) for k in range(9600)]  # 50 of each subject in each colour
    dogs = [s.place for s in scenes if (s.subject, s.colour) == ("dog", None)]
    cars = [s.place for s in scenes if (s.subject, s.colour) == ("car", "red")]
    assert len(dogs) == pytest.approx(50, abs=20)
    assert len(cars) == pytest.approx(50, abs=20)
    assert (len(set(dogs)), len(set(cars))) == (3, 7)


@pytest.mark.parametrize("aspect", [0.4, 1.0, 1.7])
def test_subjects_stand_inside_the_picture_and_apart(aspect):
    shared = []
    for k in range(200):
        size, count = (None, "small", "big")[k % 3], 1 + k % 4 % 3
        scene = Scene(0, k, "fox", "red", size, count, list(PLACES)[k % 7])
        boxes = layout(scene, aspect, rng_of(k))
        assert len(boxes) == count
        for left, top, width, height in boxes:
            assert min(left, top) >= 0
            assert max(left + width, top + height) <= 1
            assert width / height == pytest.approx(aspect)
        for a, b in pairwise(boxes):
            across = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
            along = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
            shared.append(max(across, 0) * max(along, 0) / (a.width * a.height))
    assert max(shared) < 1e-9


@pytest.mark.parametrize("place", PLACES)
def test_a_place_looks_the_same_at_every_size(place):
    small, large = pixels(paint(place, 48, rng_of(place))), pixels(paint(place, 96, rng_of(place)).reduce(2))
    assert small.shape == (48, 48, 3)
    assert np.abs(small - large).mean() < 0.02


def test_a_scene_looks_the_same_at_every_size():
    scene = Scene(0, 7, "heart", "purple", "big", 1, "beach")
    small, large = pixels(draw(scene, 48)), pixels(draw(scene, 96).reduce(2))
    assert np.abs(small - large).mean() < 0.03


def test_places_are_far_apart():
    means = {place: np.mean([pixels(paint(place, 12, rng_of(k))) for k in range(8)], 0) for place in PLACES}
    for place in PLACES:
        for k in range(8, 14):
            image = pixels(paint(place, 12, rng_of(k)))
            assert min(means, key=lambda other: np.abs(means[other] - image).mean()) == place


# ---- colours


def check_colours(subjects: tuple[str, ...]) -> None:
    """Each tinted subject has its colour's hue and is neither pale nor dark. A pale red would be a pink."""
    least = dict.fromkeys(COLOURS, 0.4) | {"red": 0.55, "pink": 0.25}
    for subject in subjects:
        for colour, (want, _, _) in COLOURS.items():
            hue, saturation, value = body_colour(subject, colour)
            assert abs((hue - want + 0.5) % 1 - 0.5) < 0.012, f"{colour} {subject}: hue {hue:.3f}"
            assert saturation > least[colour], f"{colour} {subject} is pale"
            assert value > 0.35, f"{colour} {subject} is dark"


def test_shapes_have_the_colour_of_their_name():
    check_colours(SHAPES)


def test_pictograms_have_the_colour_of_their_name(font):
    check_colours(FEW)


@pytest.mark.slow
def test_all_pictograms_have_the_colour_of_their_name(font):
    check_colours(tuple(PICTOGRAMS))


def test_a_tint_keeps_the_outline_and_the_shading(font):
    fox, red = pixels(sprite("fox")), pixels(sprite("fox", "red"))
    assert np.array_equal(fox[..., 3], red[..., 3])
    luma = [image[fox[..., 3] > 0.5][:, :3] @ (0.299, 0.587, 0.114) for image in (fox, red)]
    assert np.corrcoef(*luma)[0, 1] > 0.8
    assert np.mean(red[fox[..., 3] > 0.5][:, :3].min(-1) > 0.7) > 0.05  # its cheeks stay white


@pytest.mark.parametrize("place", PLACES)
def test_a_red_fox_is_red_wherever_it_is(font, place):
    scene = Scene(0, 1, "fox", "red", None, 1, place)
    image = pixels(draw(scene, 64, font))
    empty = pixels(draw(Scene(0, 1, "fox", "blue", None, 1, place), 64, font))
    changed = np.abs(image - empty).max(-1) > 0.3
    red, green, blue = image[changed].mean(0)
    assert changed.mean() > 0.05
    assert red > 2 * green
    assert red > 2 * blue


# ---- words


def test_plurals_and_articles():
    names = ("fox", "mouse", "fish", "sheep", "butterfly", "bus", "deer", "octopus", "monkey", "cross")
    many = ["foxes", "mice", "fish", "sheep", "butterflies", "buses", "deer", "octopuses", "monkeys"]
    assert [plural(name) for name in names] == [*many, "crosses"]
    assert [plural(name) for name in ("palm tree", "snowman", "cactus")] == ["palm trees", "snowmen", "cacti"]
    assert noun_phrase("fox", 1, None, "orange") == "an orange fox"
    assert noun_phrase("owl", 1, "big", "yellow") == "a big yellow owl"
    assert noun_phrase("owl", 1) == "an owl"
    assert noun_phrase("unicorn", 1) == "a unicorn"
    assert noun_phrase("mouse", 2, "small", None) == "two small mice"


def test_captions_are_grammatical_and_true():
    number, colours = {1: "an?", 2: "two", 3: "three"}, "|".join(COLOURS)
    for k in range(300):
        scene = describe(1, k, EVERY)
        words = captions(scene, 6)
        assert words[0] == scene.caption
        for text in words:
            assert not re.search(r"\ba [aeio]|\ban [^aeiou]|  |\{|None", text), text
            assert text == text.strip(" ,")
            noun = scene.subject if scene.count == 1 else plural(scene.subject)
            assert re.search(rf"\b{number[scene.count]} (\w+ )*{noun}\b", text), text
            assert re.findall(rf"\b({colours})\b", text) == [scene.colour] * (scene.colour is not None), text
            assert bool(re.search("small|little|tiny|big|large|huge", text)) == (scene.size is not None), text
            places = [p for p in PLACES if any(text.count(w) for w in (*WHERE[p], SETTING[p][0]))]
            assert scene.place in places or (not places and len(text.split()) <= 5), text


def test_captions_vary_and_say_what_the_demo_says():
    scene = Scene(0, 0, "fox", "red", None, 1, "snow")
    texts = {text for k in range(200) for text in captions(replace(scene, index=k), 5)}
    assert len(texts) > 40
    assert {"a red fox in snow", "a red fox in the snow", "snow all around, and in it a fox, red"} <= texts
    assert captions(scene, 3) == captions(scene, 5)[:3]


@pytest.mark.parametrize("place", ["night", "snow", "water"])
def test_a_mask_is_where_the_figures_are(place):
    """Two scenes that differ in the figure alone differ in its mask, and in the soft edge around it."""
    scene = Scene(0, 3, "circle", "red", "small", 2, place)
    blue = replace(scene, colour="blue")
    mask = np.asarray(draw_mask(scene, 48), np.int64)
    differ = np.abs(np.asarray(draw(scene, 48), np.int64) - np.asarray(draw(blue, 48))).max(-1)
    assert (differ[mask == 0] == 0).all()
    assert (differ[mask == 255] > 0).mean() > 0.9  # flakes of snow lie before figures
    assert 0.05 < (mask == 255).mean() < 0.25
    np.testing.assert_array_equal(mask, np.asarray(draw_mask(blue, 48)))


# ---- sources and the sheet


def test_shapes_need_no_font(monkeypatch):
    monkeypatch.setattr(sprites, "FONT_FOLDERS", ())
    image, words = SceneSource(size=32, style="shapes")[0]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert len(words) > 1


def test_a_missing_font_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sprites, "FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(ValueError, match="apt-get install fonts-noto-color-emoji"):
        SceneSource(style="pictograms")
    with pytest.raises(ValueError, match=r"nowhere\.ttf.*apt-get install fonts-noto-color-emoji"):
        find_font(tmp_path / "nowhere.ttf")
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(b"not a font")
    with pytest.raises(ValueError, match="cannot be read at size 109"):
        SceneSource(style="pictograms")


def test_every_pictogram_is_in_the_font(font):
    assert len(PICTOGRAMS) >= 80
    assert len(FEW) == 24
    assert {"fox"} < set(FEW) < set(PICTOGRAMS)
    assert not set(PICTOGRAMS) & set(SHAPES)
    for name in PICTOGRAMS:
        assert min(sprites.pictogram(name, font).size) > 40, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "photos"}, "style='photos' is unknown: use one of shapes, pictograms"),
        ({"split": "test"}, "split='test' is unknown: use one of train, held_out, all"),
        ({"size": 8}, "size=8 pixels is too small"),
        ({"subjects": "most"}, "subjects='most' is unknown"),
        ({"subjects": ["circle", "fox"]}, "'fox' is none of the shapes"),
        ({"subjects": []}, "subjects is empty"),
        ({"subjects": ["EMPTY"], "split": "held_out"}, "no combination of .* name more"),
    ],
)
def test_errors_say_what_to_do(options, message, monkeypatch):
    if options.get("subjects") == ["EMPTY"]:
        monkeypatch.setattr("train.data.scenes.held_out", lambda *_: False)
        combinations.cache_clear()
        options = options | {"subjects": ["circle"]}
    try:
        with pytest.raises(ValueError, match=message):
            SceneSource(**{"style": "shapes"} | options)
    finally:
        combinations.cache_clear()


def test_subjects_can_be_named():
    source = SceneSource(size=16, subjects=("star", "ring"))
    assert {source.describe(k).subject for k in range(40)} == {"star", "ring"}
    assert SceneSource(subjects="all").subjects == SUBJECTS["shapes"]


def test_sheet(tmp_path, capsys):
    sheet(tmp_path / "sheet.png", SceneSource(size=24), count=9)
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.size == (8 * (192 + 8) + 8, 2 * (192 + 44) + 8)
    main(["--out", str(tmp_path / "main.png"), "--style", "shapes", "--size", "16", "--count", "2"])
    assert "main.png" in capsys.readouterr().out
    assert (tmp_path / "main.png").is_file()
    with pytest.raises(SystemExit):
        main(["--style", "shapes", "--size", "3", "--out", str(tmp_path / "no.png")])
    assert "too small" in capsys.readouterr().err
