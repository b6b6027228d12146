"""A judge of drawn scenes: does a picture show the place, colour, subject and count that its caption names?

A small classifier learns them from scenes of all combinations: it judges what a model makes of those that
training held out, and must know them as well as the others, or it would find fault with these alone. Its own
accuracy is measured on other scenes of held-out ones. What is taught here is read by ldm/metrics/judges.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.files.config import read_json
from ldm.metrics import judges
from ldm.metrics.judges import Asked, Judge, Network, save_judge, seen
from train.data.painting import PLACES
from train.data.pictures import to_tensor
from train.data.scenes import Scene, SceneSource, Split
from train.data.sources import STYLES, DataConfig
from train.data.sprites import COLOURS

SEED_JUDGE, SEED_TEST, SEED_ASKED = 101, 102, 103  # of scene books; training of the model reads book 0
SPLITS: dict[str, Split] = {"held_out": "held_out", "seen": "train"}  # of judges.SPLITS, by scenes' names
LEAST = 64  # scenes that teach: a batch
SEES = 64  # pixels a side: there its subjects are told apart

Book = Callable[[int, Split], SceneSource]  # scenes by seed and split, alike in all else


def book_of(data: DataConfig) -> Book:
    """The scenes that data describes, of any seed and split. Raises ValueError for data that is not drawn."""
    if data.source not in STYLES:
        raise ValueError(f"data.source={data.source!r}: a judge knows drawn scenes, {' or '.join(STYLES)}")

    def book(seed: int, split: Split) -> SceneSource:
        return SceneSource(seed, data.size, data.source, data.subjects, data.font, split)  # type: ignore[arg-type]

    return book


def answers_of(scene: Scene) -> dict[str, str | None]:
    """What the judge should say of a scene; None: of one coloured as by nature."""
    return {
        "place": scene.place,
        "colour": scene.colour,
        "subject": scene.subject,
        "count": str(scene.count),
    }


def known(source: SceneSource) -> dict[str, list[str]]:
    """All answers to each question."""
    counts = ["1", "2", "3"]
    return {
        "place": list(PLACES),
        "colour": list(COLOURS),
        "subject": list(source.subjects),
        "count": counts,
    }


def asked_of(source: SceneSource, count: int) -> list[Asked]:
    """The plainest captions of the first `count` scenes of a source, and the answers."""
    scenes = (source.describe(index) for index in range(count))
    return [Asked(scene.caption, answers_of(scene)) for scene in scenes]


def untaught(source: SceneSource, sees: int) -> Judge:
    """A judge of the source's scenes with new weights. sees: pixels a side that it shrinks them to."""
    torch.manual_seed(0)
    answers = known(source)
    network = Network({name: len(values) for name, values in answers.items()})
    return Judge(network, answers, source.size, min(sees, source.size), {})


def scene_batches(
    judge: Judge, source: SceneSource, count: int, size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """`count` scenes of the source in batches of `size`, with the right answers as the judge numbers them."""
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        scenes = [Asked("", answers_of(source.describe(index))) for index in indices]
        yield torch.stack([to_tensor(source[index][0]) for index in indices]), judge.places(scenes)


def blemish(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images blurred a little, all with a little noise: what an autoencoder does to a picture."""
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    amount = torch.rand(len(images), 1, 1, 1, generator=generator) * (
        torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    )
    return images.lerp(blurred, amount) + 0.05 * torch.randn(images.shape, generator=generator)


@torch.enable_grad()
def train_judge(source: SceneSource, scenes: int, sees: int, batch: int = 64) -> Judge:
    """A judge taught on `scenes` scenes of the source, each seen once."""
    judge, generator = untaught(source, sees), torch.Generator().manual_seed(0)
    network = judge.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    steps = -(-scenes // batch)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = scene_batches(judge, source, scenes, batch)
    for images, truth in tqdm(
        batches, total=steps, desc="teaching the judge", disable=not sys.stderr.isatty()
    ):
        answers = network(blemish(seen(images, judge.sees), generator))
        loss = sum((F.cross_entropy(answers[name], truth[name]) for name in truth), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.step()
    network.eval()
    return judge


def lesson(source: SceneSource, sees: int, scenes: int, asked: int, tested: int) -> dict[str, Any]:
    """All that a judge is a function of: the code, the scenes and the code that draws them."""
    code = Path(__file__).read_bytes() + Path(judges.__file__).read_bytes()
    return {
        "style": source.style,
        "subjects": len(source.subjects),
        "names_sha256": hashlib.sha256(",".join(source.subjects).encode()).hexdigest()[:12],
        "size": source.size,
        "sees": min(sees, source.size),
        "scenes": scenes,
        "seed": source.seed,
        "drawing": source.drawing,
        "code_sha256": hashlib.sha256(code).hexdigest()[:12],
        "asked": asked,
        "tested": tested,
    }


def split_of(book: Book, seed: int, split: str) -> SceneSource | None:
    """Scenes of a split of judges.SPLITS; None where the subjects leave it empty."""
    try:
        return book(seed, SPLITS[split])
    except ValueError:
        return None


def kept_judge(folder: Path, book: Book, *, scenes: int, asked: int, tested: int, sees: int = SEES) -> Path:
    """The folder with the judge of these scenes: there already, or taught now and written there.

    scenes: that teach it. asked: captions of each split that it asks for. tested: drawn scenes on which it is
    judged itself, of held-out combinations where there are any.
    """
    source = book(SEED_JUDGE, "all")
    taught = lesson(source, sees, scenes, asked, tested)
    note = folder / "judge.json"
    if note.is_file() and read_json(note).get("taught") == taught:
        return folder
    judge = train_judge(source, scenes, sees)
    books = {split: split_of(book, SEED_ASKED, split) for split in SPLITS}
    unseen = split_of(book, SEED_TEST, "held_out") or book(SEED_TEST, "train")
    (shown,) = scene_batches(judge, unseen, tested, tested)
    questions = {split: asked_of(each, asked) for split, each in books.items() if each is not None}
    note.unlink(missing_ok=True)  # what is there goes with another judge
    save_judge(folder, dataclasses.replace(judge, taught=taught), questions, *shown)
    return folder
