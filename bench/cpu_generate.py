"""Generation on the CPU at the size of Stable Diffusion 1.5: our pipeline, diffusers and OpenVINO.

  python bench/cpu_generate.py                                UNet calls at 512x512, every row
  python bench/cpu_generate.py --steps 20 --rows "diffusers, frozen"    whole pictures too, of few rows
  python bench/cpu_generate.py --size 64 --channels 32,64 --steps 2     a check of a minute

Random weights, the same for all. Each row is a process of its own and they take turns. Memory is the peak of
the whole process in a call. The relative error is to our pipeline in float32. OpenVINO takes part where it is
installed (pip install -c constraints.txt openvino), bf16 where the CPU multiplies it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.measure import hardware, table
from bench.models import SD1, Size, narrower, write_pipeline
from bench.rows import Make, Result, Row, Settings, Unavailable, chosen, race, start
from bench.sides import Ours, OursCompiled, OursOptimized, Theirs, TheirsCompiled, TheirsFrozen
from ldm.drawing.devices import default_dtype


class Bare(torch.nn.Module):
    """The UNet as a function of tensors to a tensor."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, xt: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(xt, t, context, return_dict=False)[0]


class TheirsOpenVINO(Theirs):
    """diffusers' pipeline with its UNet converted to OpenVINO. static: for one shape, compiled for each."""

    def __init__(self, settings: Settings, *, static: bool) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # or it reports its use
        try:
            import openvino
        except ImportError:
            raise Unavailable("OpenVINO is not installed (pip install openvino)") from None

        super().__init__(settings)
        self.core, self.static, self.compiled = openvino.Core(), static, {}
        self.core.set_property("CPU", {"INFERENCE_NUM_THREADS": settings.threads})
        unet = self.pipe.unet
        with torch.no_grad():
            self.model = openvino.convert_model(Bare(unet), example_input=self.inputs(1))
        unet.forward = self.forward
        unet.to("meta")  # its weights are OpenVINO's now

    def forward(self, xt: Tensor, t: Tensor, encoder_hidden_states: Tensor, **options: Any) -> tuple[Tensor]:
        """In the place of the UNet's own; options: diffusers', none of which this UNet uses."""
        inputs = [xt.contiguous().numpy(), t.numpy(), encoder_hidden_states.contiguous().numpy()]
        (answer,) = self.for_shapes([each.shape for each in inputs])(inputs).values()
        return (torch.from_numpy(answer),)

    def for_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Any:
        key = tuple(shapes) if self.static else ()
        if key not in self.compiled:
            model = self.model.clone() if self.static else self.model
            if self.static:
                model.reshape(dict(zip(model.inputs, map(list, shapes))))
            self.compiled[key] = self.core.compile_model(model, "CPU")
        return self.compiled[key]


def rows() -> dict[str, Make]:
    """Every row. The first is what the others are compared with."""
    fp32: dict[str, Make] = {
        "ours, fp32": partial(Ours, dtype=torch.float32),
        "ours, fp32, optimized": partial(OursOptimized, dtype=torch.float32),
        "ours, int8, optimized": partial(OursOptimized, dtype=torch.float32, quantize="int8"),
        "ours, fp32, compiled": partial(OursCompiled, mode="default", dtype=torch.float32),
        "diffusers, fp32": Theirs,
        "diffusers, fp32, channels_last": partial(Theirs, channels_last=True),
        "diffusers, fp32, compiled": partial(TheirsCompiled, mode="default"),
        "diffusers, fp32, frozen": TheirsFrozen,
        "OpenVINO, any shape": partial(TheirsOpenVINO, static=False),
        "OpenVINO, one shape": partial(TheirsOpenVINO, static=True),
    }
    if default_dtype(torch.device("cpu")) == torch.float32:
        return fp32  # elsewhere bf16 is multiplied as float32, slower
    half = torch.bfloat16
    return fp32 | {
        "ours, bf16": partial(Ours, dtype=half),
        "ours, bf16, optimized": partial(OursOptimized, dtype=half),
        "ours, bf16, compiled": partial(OursCompiled, mode="default", dtype=half),
        "diffusers, bf16, channels_last": partial(Theirs, dtype=half, channels_last=True),
        "diffusers, bf16, compiled": partial(TheirsCompiled, mode="default", dtype=half),
        "diffusers, bf16, frozen": partial(TheirsFrozen, dtype=half),
    }


def show(results: Sequence[Result], what: str) -> None:
    """Prints a table. what: "UNet call", the name of the first column."""
    base = results[0].seconds
    lines = [
        [one.name, one.why, "", "", ""]
        if one.why
        else [
            one.name,
            f"{one.seconds:.3f}",
            f"{base / one.seconds:.2f}",
            f"{one.memory / 2**30:.2f}",
            f"{one.error:.1e}",
        ]
        for one in results
    ]
    print(table([what, "seconds", "times as fast as the first", "GiB", "relative error"], lines) + "\n")


def show_profiles(rows: Sequence[Row], batch: int) -> None:
    """Prints which groups of operators a UNet call spends its time in, in percent of it."""
    found = {row.name: row.ask("profile", "unet", batch) for row in rows if not row.why}
    groups = list(next(iter(found.values())).groups)
    lines = [
        [name, *(f"{100 * share.groups[group]:.0f}" for group in groups)]
        for name, share in found.items()
        if share is not None
    ]
    print(table(["% of a UNet call", *groups], lines) + "\n", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512, help="side of a picture, a multiple of 64")
    parser.add_argument("--steps", type=int, default=0, help="of whole pictures; 0: only UNet calls")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--rounds", type=int, default=5, help="in each, every row has its turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each row")
    parser.add_argument("--channels", default="", help="of the levels of a smaller UNet, such as 64,128,256")
    parser.add_argument("--profile", action="store_true", help="where the time of each row's UNet call goes")
    parser.add_argument("--rows", default="", help="parts of the names of rows, with semicolons between them")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    makes = chosen(rows(), options.rows)
    size: Size = SD1
    if options.channels:
        size = narrower(SD1, tuple(int(width) for width in options.channels.split(",")))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_pipeline(size, Path(folder))
        settings = Settings(Path(folder), "cpu", options.size, options.steps, options.threads, warm_up=1)
        asked = start(makes, settings, stack)
        where = f"{options.size}x{options.size} pixels, batch {options.batch} with guidance"
        print(f"{where}; {hardware(torch.device('cpu'))}; medians of {options.rounds} rounds\n", flush=True)
        show(race(asked, "unet", options.batch, options.rounds), "UNet call")
        if options.profile:
            show_profiles(asked, options.batch)
        if options.steps:
            pictures = race(asked, "picture", options.batch, options.rounds, warmed_by="unet")
            show(pictures, f"picture, {options.steps} steps")


if __name__ == "__main__":
    main()
