"""Does a model draw what it is asked for? The judge (train/measure/judge.py), taught on drawn scenes, counts.

  python bench/scene_accuracy.py                 the bundled model, 300 held-out captions
  python bench/scene_accuracy.py --model RUN/model --captions 100 --split train
  python bench/scene_accuracy.py --model runs/shapes/model --style shapes --scenes 20000

The judge is kept beside the pictures, so that another run only judges. Pictograms need the Noto Color Emoji
font, as training does. `python -m train.run` asks the same of what it has trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.pipeline import LatentDiffusionPipeline
from train.data.pictures import grid
from train.data.scenes import SceneSource, Split
from train.measure.judge import judge_scenes


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

    def book(seed: int, split: Split) -> SceneSource:
        return SceneSource(seed, side, options.style, subjects, split=split)

    begin = time.perf_counter()
    verdict = judge_scenes(
        pipe,
        book,
        options.output,
        captions=options.captions,
        scenes=options.scenes,
        split=options.split,
    )
    page = options.output / f"{options.split}.png"
    grid(verdict.pictures[:64], columns=16).save(page)
    print(f"\n{verdict}\n")
    spent = time.perf_counter() - begin
    print(
        f"{options.captions} pictures of {options.split} combinations in {spent:.0f} s; the first in {page}"
    )


if __name__ == "__main__":
    main()
