"""A judge of drawn scenes: does a picture show the place, colour, subject and count that its caption names?

A small classifier learns them from scenes of combinations that training shows; its own accuracy is measured
on scenes of held-out ones, as they are drawn and as they come out of the model's autoencoder.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import replacing
from ldm.pipeline import LatentDiffusionPipeline
from train.data.painting import PLACES
from train.data.pictures import to_tensor
from train.data.scenes import Scene, SceneSource, Split
from train.data.sprites import COLOURS

NO_COLOUR = -100  # as by nature: neither taught nor counted, ignored by cross_entropy
SEED_JUDGE, SEED_TEST, SEED_ASKED = 101, 102, 103  # of scene books; training of the model reads book 0


def labels(scene: Scene, subjects: tuple[str, ...]) -> dict[str, int]:
    """What the judge should say of a scene."""
    colours = list(COLOURS)
    return {
        "place": list(PLACES).index(scene.place),
        "colour": NO_COLOUR if scene.colour is None else colours.index(scene.colour),
        "subject": subjects.index(scene.subject),
        "count": scene.count - 1,
    }


class Judge(nn.Module):
    """A small classifier: (B, 3, H, W) in [-1, 1] to logits of place, colour, subject and count."""

    def __init__(self, subjects: int, width: int = 24) -> None:
        super().__init__()
        w = width
        sizes = [
            (3, w, 2),
            (w, 2 * w, 1),
            (2 * w, 2 * w, 2),
            (2 * w, 4 * w, 1),
            (4 * w, 4 * w, 2),
            (4 * w, 8 * w, 1),
        ]
        layers: list[nn.Module] = []
        for inside, outside, stride in sizes:
            layers += [
                nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        counts = {"place": len(PLACES), "colour": len(COLOURS), "subject": subjects, "count": 3}
        self.heads = nn.ModuleDict({name: nn.Linear(16 * w, count) for name, count in counts.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        h = self.features(image)
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)  # what is everywhere, and what is somewhere
        return {name: head(h) for name, head in self.heads.items()}


def scene_batches(source: SceneSource, count: int, size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """`count` scenes of the source in batches of `size`, with their labels."""
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        truth = [labels(source.describe(i), source.subjects) for i in indices]
        images = torch.stack([to_tensor(source[i][0]) for i in indices])
        yield images, {name: torch.tensor([row[name] for row in truth]) for name in truth[0]}


def blemish(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images blurred a little, all with a little noise: what an autoencoder does to a picture."""
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    amount = torch.rand(len(images), 1, 1, 1, generator=generator) * (
        torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    )
    return images.lerp(blurred, amount) + 0.05 * torch.randn(images.shape, generator=generator)


@torch.enable_grad()
def train_judge(source: SceneSource, scenes: int, batch: int = 64) -> Judge:
    """A judge taught on `scenes` scenes of the source, each seen once."""
    torch.manual_seed(0)
    judge, generator = Judge(len(source.subjects)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    steps = -(-scenes // batch)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = scene_batches(source, scenes, batch)
    for images, truth in tqdm(
        batches, total=steps, desc="teaching the judge", disable=not sys.stderr.isatty()
    ):
        answers = judge(blemish(images, generator))
        loss = sum((F.cross_entropy(answers[name], truth[name]) for name in truth), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.step()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, batches: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, float]:
    """Fraction of right answers a head, over those where there is something to say."""
    right: dict[str, list[bool]] = {}
    for images, truth in batches:
        for name, logits in judge(images).items():
            told = truth[name] != NO_COLOUR
            right.setdefault(name, []).extend((logits.argmax(1) == truth[name])[told].tolist())
    return {name: sum(values) / len(values) for name, values in right.items()}


def kept_judge(folder: Path, source: SceneSource, scenes: int) -> Judge:
    """The judge for these scenes: read from `folder`, or taught now and kept there.

    Its file is named by all that it is a function of: this code, the scenes and the code that draws them.
    """
    asked = {
        "size": source.size,
        "subjects": source.subjects,
        "scenes": scenes,
        "seed": source.seed,
        "drawing": source.drawing,
    }
    digest = hashlib.sha256(json.dumps(asked).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    path = folder / f"judge-{digest}.safetensors"
    if path.exists():
        judge = Judge(len(source.subjects))
        judge.load_state_dict(load_file(path))
        return judge.eval()
    judge = train_judge(source, scenes)
    with replacing(path) as temporary:
        save_file(judge.state_dict(), temporary)
    return judge


@torch.no_grad()
def reconstructed_batches(
    pipe: LatentDiffusionPipeline, source: SceneSource, count: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Drawn scenes through the autoencoder: the best that any UNet could do with it."""
    vae, device = pipe.vae, next(pipe.vae.parameters()).device
    for images, truth in scene_batches(source, count, 50):
        decoded = vae.decode(vae.to_latents(vae.encode(images.to(device)).mean))
        yield decoded.clamp(-1, 1).cpu(), truth


def drawn_batches(
    pipe: LatentDiffusionPipeline, source: SceneSource, count: int, keep: Callable[[Image.Image], None]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """What the model draws of the captions of `count` scenes, picture i from seed i, with their labels."""
    size, side = 25, source.size
    for start in tqdm(range(0, count, size), desc="drawing", disable=not sys.stderr.isatty()):
        part = [source.describe(i) for i in range(start, min(start + size, count))]
        seeds = list(range(start, start + len(part)))
        images = pipe([scene.caption for scene in part], height=side, width=side, seed=seeds).images
        for image in images:
            keep(image)
        truth = [labels(scene, source.subjects) for scene in part]
        yield (
            torch.stack([to_tensor(image) for image in images]),
            {name: torch.tensor([row[name] for row in truth]) for name in truth[0]},
        )


class Verdict(NamedTuple):
    """What the judge said, by head, and of which pictures."""

    rows: dict[str, dict[str, float]]  # what was judged -> head -> fraction of right answers
    pictures: list[Image.Image]  # that the model drew

    def __str__(self) -> str:
        """A table in Markdown."""
        lines = ["| | place | colour | subject | count |", "|---|---|---|---|---|"]
        for title, row in self.rows.items():
            cells = (f"{row[name]:.1%} |" for name in ("place", "colour", "subject", "count"))
            lines.append(" ".join([f"| {title} |", *cells]))
        return "\n".join(lines)


Book = Callable[[int, Split], SceneSource]  # scenes by seed and split, alike in all else


def judge_scenes(
    pipe: LatentDiffusionPipeline,
    book: Book,
    folder: Path,
    *,
    captions: int,
    scenes: int,
    split: Split = "held_out",
    tested: int = 1000,
) -> Verdict:
    """How often the model draws what `captions` captions of the split ask for, by a judge kept in `folder`.

    scenes: that teach the judge. tested: drawn scenes on which it is itself judged.
    """
    judge = kept_judge(folder, book(SEED_JUDGE, "train"), scenes)
    shown, pictures = book(SEED_TEST, "held_out"), list[Image.Image]()
    drawn = drawn_batches(pipe, book(SEED_ASKED, split), captions, pictures.append)
    rows = {
        f"judge, on {tested:,} drawn scenes": accuracy(judge, scene_batches(shown, tested, 50)),
        "the same through the autoencoder": accuracy(judge, reconstructed_batches(pipe, shown, tested)),
        f"model, on {captions:,} captions": accuracy(judge, drawn),
    }
    return Verdict(rows, pictures)
