"""A judge of pictures: a small classifier with some questions, such as which colour, and known answers.

It is a folder, which `python -m train.teach_judge` writes: the weights and what they were taught on; what to
ask of a model, of combinations that training shows (seen.jsonl) and never showed (held_out.jsonl), each line
a prompt and the right answers; and pictures with theirs, on which the judge is judged itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.files.checkpoint import model_hash, read_tensors
from ldm.files.config import read_json, replacing, write_json

FORMAT = "ldm-judge-2"
WEIGHTS, TESTED = "judge.safetensors", "tested.safetensors"
SPLITS = {"held_out": "training never showed", "seen": "training shows"}  # combinations that ...
UNASKED = -100  # in the place of an answer: neither taught nor counted, ignored by cross_entropy
BATCH = 50  # pictures that are judged at once

Answers = Mapping[str, Tensor]  # to each question (N,) int64, places in the list of its answers or UNASKED


class Network(nn.Module):
    """(B, 3, H, W) in [-1, 1] to the logits of each question's answers."""

    def __init__(self, answers: Mapping[str, int], width: int = 24) -> None:
        """answers: how many, by question. width: channels of the first layer."""
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
        self.heads = nn.ModuleDict({name: nn.Linear(16 * w, count) for name, count in answers.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        h = self.features(image)
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)  # what is everywhere, and what is somewhere
        return {name: head(h) for name, head in self.heads.items()}


def seen(image: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) to (B, 3, side, side): each pixel a mean over those it covers."""
    return image if image.shape[2:] == (side, side) else F.interpolate(image, (side, side), mode="area")


class Asked(NamedTuple):
    """A prompt, and what a picture of it shows."""

    prompt: str
    answers: Mapping[str, str | None]  # by question; None: the prompt leaves it open


@dataclass(frozen=True)
class Judge:
    """The network, and what its answers mean."""

    network: Network
    answers: Mapping[str, Sequence[str]]  # by question
    size: int  # pixels a side of the pictures that it judges
    sees: int  # pixels a side that it shrinks them to: more tell it nothing more
    taught: Mapping[str, Any]  # on what, for the protocol

    @torch.no_grad()
    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """The likeliest answer to each question, (N,), of pictures (N, 3, size, size) in [-1, 1]."""
        found = [self.network(seen(rows, self.sees)) for rows in image.split(BATCH)]
        return {name: torch.cat([each[name] for each in found]).argmax(1) for name in self.answers}

    def places(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """The right answers as numbers. Raises ValueError for one that the judge does not know."""
        told: dict[str, list[int]] = {name: [] for name in self.answers}
        for each in asked:
            for name, known in self.answers.items():
                answer = each.answers.get(name)
                if answer is not None and answer not in known:
                    raise ValueError(
                        f"{each.prompt!r} asks for the {name} {answer!r}: the judge knows {known}"
                    )
                told[name].append(UNASKED if answer is None else known.index(answer))
        return {name: torch.tensor(values) for name, values in told.items()}


def right(said: Answers, asked: Answers) -> dict[str, Tensor]:
    """To each question the truth of the answers to it, (R,) of those that were asked; "all" (N,): of all."""
    hit = {name: said[name] == asked[name] for name in said}
    told = {name: asked[name] != UNASKED for name in said}
    whole = torch.stack([hit[name] | ~told[name] for name in said]).all(0)
    return {**{name: hit[name][told[name]] for name in said}, "all": whole}


def save_judge(
    folder: Path, judge: Judge, asked: Mapping[str, Sequence[Asked]], pictures: Tensor, answers: Answers
) -> None:
    """Writes a judge; judge.json comes last. asked: by SPLITS. pictures: (N, 3, size, size) in [-1, 1]."""
    for split in SPLITS.keys() - asked.keys():
        (folder / f"{split}.jsonl").unlink(missing_ok=True)  # another judge's
    for split, lines in asked.items():
        with replacing(folder / f"{split}.jsonl") as temporary:
            rows = ({"prompt": each.prompt, "asked": dict(each.answers)} for each in lines)
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    levels = ((pictures + 1) * 127.5).round().to(torch.uint8)
    with replacing(folder / TESTED) as temporary:
        save_file({"pictures": levels, **answers}, temporary)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(judge.network.state_dict(), temporary)
    facts = {"size": judge.size, "sees": judge.sees, "answers": judge.answers, "taught": judge.taught}
    write_json(folder / "judge.json", {"format": FORMAT, **facts})


def open_judge(folder: Path) -> Judge:
    """What save_judge wrote. Raises ValueError, saying what is wrong, for a folder that is no judge."""
    if not (folder / "judge.json").is_file():
        raise ValueError(
            f"{folder} holds no judge: teach one by python -m train.teach_judge --output {folder}"
        )
    facts = read_json(folder / "judge.json")
    if facts.get("format") != FORMAT:
        raise ValueError(f"{folder} holds a judge of format {facts.get('format')!r}: expected {FORMAT}")
    network = Network({name: len(known) for name, known in facts["answers"].items()})
    tensors = read_tensors(folder / WEIGHTS)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} is not of this judge: {str(error).splitlines()[-1]}") from None
    taught = {**facts["taught"], "judge_hash": model_hash([folder / WEIGHTS])}
    return Judge(network.eval(), facts["answers"], facts["size"], facts["sees"], taught)


def read_asked(folder: Path, split: str) -> list[Asked]:
    """What a judge asks for, of one of SPLITS; nothing where its subjects leave the split empty."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        return []
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Asked(row["prompt"], row["asked"]) for row in rows]


def read_tested(folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The pictures on which a judge is judged, (N, 3, size, size) in [-1, 1], and the right answers."""
    tensors = read_tensors(folder / TESTED)
    return tensors.pop("pictures").float() / 127.5 - 1, tensors
