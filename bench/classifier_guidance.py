"""Is a class drawn more often when a classifier leads to it? The judge of scenes counts.

  python train/train_classifier.py
  python -m train.teach_judge --data.source pictograms --data.subjects few --data.size 128 --output judge
  python bench/classifier_guidance.py --classifier runs/pictograms-classifier/model --judge judge

Pictures of each class from the same seeds at each scale, in both forms: of the empty prompt without
classifier-free guidance, and of one that names no class with it. --output gets a
sheet: a row for each scale of the score form, a column a class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.diffusion.classifier import GAINS
from ldm.drawing.classifier_folder import TrainedClassifier, load_classifier
from ldm.metrics.judges import Judge, open_judge, read_tested, right
from ldm.pipeline import LatentDiffusionPipeline
from train.data.pictures import grid, to_tensor

SAMPLERS = {"score": None, "mean": "ddpm"}  # of each form; None: the model's own


def draw(
    pipe: LatentDiffusionPipeline,
    classifier: TrainedClassifier,
    prompt: str,
    form: str,
    scales: tuple[float, float],
    each: int,
) -> list[Image.Image]:
    """So many pictures of each class, from the same seeds. scales: classifier-free, of the classifier."""
    pictures, free, scale = [], *scales
    tableau = pipe.tableau(None, SAMPLERS[form])
    labels = [number for number in range(len(classifier.class_names)) for _ in range(each)]
    for start in range(0, len(labels), 24):
        part = labels[start : start + 24]
        guidance = classifier.guidance(pipe, part, scale, GAINS[form](tableau))
        seeds = [(start + place) % each for place in range(len(part))]
        call = {"guidance_scale": free, "sampler": SAMPLERS[form], "seed": seeds}
        pictures += pipe([prompt] * len(part), guidance=guidance, **call).images
    return pictures


@torch.no_grad()
def share(judge: Judge, names: Sequence[str], pictures: list[Image.Image], each: int) -> float:
    """How many of the pictures show their class. names: of the classes."""
    said = judge(torch.stack([to_tensor(picture) for picture in pictures]))["subject"].tolist()
    known = judge.answers["subject"]
    return sum(known[one] == names[place // each] for place, one in enumerate(said)) / len(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classifier", required=True, help="folder of train_classifier.py, of subjects")
    parser.add_argument("--model", default="bundled", help="pipeline folder; default the bundled model")
    parser.add_argument("--each", type=int, default=4, help="pictures of each class at each scale")
    parser.add_argument("--scales", default="0,1,2,4,8", help="of the classifier")
    parser.add_argument("--mean-scales", default="1,4", help="the same in the form of the mean, by ddpm")
    parser.add_argument("--prompt", default="in snow", help="names no class; the empty one is drawn too")
    parser.add_argument(
        "--free", type=float, default=2.5, help="scale of classifier-free guidance to --prompt"
    )
    parser.add_argument("--judge", required=True, type=Path, help="folder of python -m train.teach_judge")
    parser.add_argument("--output", type=Path, default=Path("runs/classifier_guidance"))
    options = parser.parse_args()
    bundled = options.model == "bundled"
    pipe = (
        LatentDiffusionPipeline.bundled()
        if bundled
        else LatentDiffusionPipeline.from_pretrained(options.model)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.optimize()
    classifier, judge = load_classifier(options.classifier), open_judge(options.judge)
    image, truth = read_tested(options.judge)
    hit = right(judge(image), truth)["subject"].float().mean().item()
    print(f"the judge knows the class of {hit:.1%} of {len(image):,} drawn scenes\n")
    print(
        "| prompt | classifier-free | form | scale | pictures | of their class |\n|---|---|---|---|---|---|"
    )
    rows = []
    for prompt, free in (("", 1.0), (options.prompt, options.free)):
        for form, scales in (("score", options.scales), ("mean", options.mean_scales)):
            for scale in map(float, scales.split(",")):
                pictures = draw(pipe, classifier, prompt, form, (free, scale), options.each)
                found = share(judge, classifier.class_names, pictures, options.each)
                print(
                    f'| "{prompt}" | {free:g} | {form} | {scale:g} | {len(pictures)} | {found:.0%} |',
                    flush=True,
                )
                if form == "score":
                    rows += pictures[:: options.each]
    page = options.output / "led.png"
    page.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, columns=len(classifier.class_names)).save(page)
    print(f"\na picture of each class, a row for each line of the score form: {page}")


if __name__ == "__main__":
    main()
