"""Does the bundled model draw what it is asked for? A judge trained on scenes counts.

  python bench/scene_accuracy.py                 the bundled model, 300 held-out captions
  python bench/scene_accuracy.py --model RUN/model --captions 100 --split train
  python bench/scene_accuracy.py --model runs/shapes/model --style shapes --scenes 20000

The judge is a small classifier. It learns place, colour, subject and count from drawn scenes of combinations
that training shows; its own accuracy is measured on scenes of held-out ones. It is kept beside the pictures,
so that another run only judges. Pictograms need the Noto Color Emoji font, as training does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.pipeline import LatentDiffusionPipeline
from train.painting import PLACES
from train.pictures import grid
from train.scenes import Scene, SceneSource
from train.sprites import COLOURS

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


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


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
        images = torch.stack([to_pixels(source[i][0]) for i in indices])
        yield images, {name: torch.tensor([row[name] for row in truth]) for name in truth[0]}


def blemish(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images blurred a little, all with a little noise: what an autoencoder does to a picture."""
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    amount = torch.rand(len(images), 1, 1, 1, generator=generator) * (
        torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    )
    return images.lerp(blurred, amount) + 0.05 * torch.randn(images.shape, generator=generator)


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
    """The judge for these scenes: read from `folder`, or taught now and kept there."""
    asked = {"size": source.size, "subjects": source.subjects, "scenes": scenes, "seed": source.seed}
    digest = hashlib.sha256(json.dumps(asked).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    path = folder / f"judge-{digest}.safetensors"
    if path.exists():
        judge = Judge(len(source.subjects))
        judge.load_state_dict(load_file(path))
        return judge.eval()
    judge = train_judge(source, scenes)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), path)
    return judge


@torch.no_grad()
def reconstructed_batches(
    pipe: LatentDiffusionPipeline, source: SceneSource, count: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Drawn scenes through the autoencoder: the best that any UNet could do with it."""
    for images, truth in scene_batches(source, count, 50):
        yield pipe.vae.decode(pipe.vae.to_latents(pipe.vae.encode(images).mean)).clamp(-1, 1), truth


def drawn_batches(
    pipe: LatentDiffusionPipeline,
    scenes: list[Scene],
    subjects: tuple[str, ...],
    keep: Callable[[Image.Image], None],
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """What the model draws of the scenes' captions, picture i from seed i, with the labels asked for."""
    size = 25
    for start in tqdm(range(0, len(scenes), size), desc="drawing", disable=not sys.stderr.isatty()):
        part = scenes[start : start + size]
        images = pipe([scene.caption for scene in part], seed=list(range(start, start + len(part)))).images
        for image in images:
            keep(image)
        truth = [labels(scene, subjects) for scene in part]
        yield (
            torch.stack([to_pixels(image) for image in images]),
            {name: torch.tensor([row[name] for row in truth]) for name in truth[0]},
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled", help="pipeline folder; default the bundled model")
    parser.add_argument(
        "--style", choices=("pictograms", "shapes"), default="pictograms", help="scenes that the model knows"
    )
    parser.add_argument("--captions", type=int, default=300, help="pictures to draw and judge")
    parser.add_argument(
        "--split", choices=("held_out", "train"), default="held_out", help="combinations asked for"
    )
    parser.add_argument("--subjects", default="few", help="few, all, or names with commas: those of them")
    parser.add_argument("--scenes", type=int, default=60_000, help="scenes that teach the judge")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/scene_accuracy"), help="folder for judge and pictures"
    )
    options = parser.parse_args()

    pipe = (
        LatentDiffusionPipeline.bundled()
        if options.model == "bundled"
        else LatentDiffusionPipeline.from_pretrained(options.model)
    )
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae.downsample_factor
    subjects = options.subjects if options.subjects in ("few", "all") else options.subjects.split(",")

    def book(seed: int, split: str) -> SceneSource:
        return SceneSource(seed, side, options.style, subjects, split=split)  # type: ignore[arg-type]

    begin = time.perf_counter()
    judge = kept_judge(options.output, book(SEED_JUDGE, "train"), options.scenes)
    own = accuracy(judge, scene_batches(book(SEED_TEST, "held_out"), 1000, 50))
    best = accuracy(judge, reconstructed_batches(pipe, book(SEED_TEST, "held_out"), 1000))
    print(f"judge ready after {time.perf_counter() - begin:.0f} s")

    asked = book(SEED_ASKED, options.split)
    scenes = [asked.describe(i) for i in range(options.captions)]
    pictures: list[Image.Image] = []
    begin = time.perf_counter()
    drawn = accuracy(judge, drawn_batches(pipe, scenes, asked.subjects, pictures.append))
    spent = time.perf_counter() - begin
    page = options.output / f"{options.split}.png"
    grid(pictures[:64], columns=16).save(page)

    rows = {
        "judge, on 1,000 drawn scenes": own,
        "the same through the autoencoder": best,
        f"model, on {len(scenes)} captions": drawn,
    }
    print("\n| | place | colour | subject | count |\n|---|---|---|---|---|")
    for title, row in rows.items():
        print(f"| {title} |", *(f"{row[name]:.1%} |" for name in ("place", "colour", "subject", "count")))
    print(f"\n{len(scenes)} pictures of {options.split} combinations in {spent:.0f} s; the first in {page}")


if __name__ == "__main__":
    main()
