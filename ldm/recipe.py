"""The recipe of a picture: all that decides its bits, and the text that the field's tools read it as."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TEXT = 1 << 20  # characters of a text that are looked at
# AUTOMATIC1111's names of samplers; another is written under its own name.
A1111 = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "plms": "PLMS",
}
PAIR = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,"]*)(?:,|$)')


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the bits of a picture."""

    prompt: str
    negative_prompt: str = ""
    steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None  # of log(alpha / sigma); None: everywhere
    sampler: str
    seed: int  # of the first image
    width: int  # pixels of one image
    height: int
    num_images: int = 1
    clip_skip: int = 0
    prompt_weighting: str | None = None  # None: read literally
    chunks: int | None = None  # of a prompt; None: as many as the model was trained with
    model: str  # as it was asked for
    model_hash: str  # see checkpoint.model_hash
    variant: str | None = None
    dtype: str = "float32"
    loras: tuple[
        tuple[str, float, str], ...
    ] = ()  # of each its file, weight and hash: see ldm.adapters.noted
    embeddings: tuple[tuple[str, str], ...] = ()  # of each its file and hash
    optimize: bool = False  # see LatentDiffusionPipeline.optimize
    quantize: str | None = None  # likewise
    device: str = "cpu"
    version: str = ""  # of this package
    torch: str = ""

    def parameters(self) -> str:
        """The recipe as AUTOMATIC1111 writes it: prompt, negative prompt, and a line of pairs."""
        pairs = {
            "Steps": self.steps,
            "Sampler": A1111.get(self.sampler, self.sampler),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_hash,
            "Model": Path(self.model).name,
            **({"Clip skip": self.clip_skip + 1} if self.clip_skip else {}),  # there, 1 is the last layer
            **({"CFG Rescale phi": f"{self.guidance_rescale:g}"} if self.guidance_rescale else {}),
            **_hashes("Lora hashes", [(file, digest) for file, _, digest in self.loras]),
            **_hashes("TI hashes", self.embeddings),
            "Version": f"ldm {self.version}",
        }
        line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items())
        negative = f"Negative prompt: {self.negative_prompt}\n" if self.negative_prompt else ""
        return f"{self.prompt}\n{negative}{line}"


def _hashes(key: str, files: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The pair that names files with their hashes; none where there are no files."""
    text = ", ".join(f"{Path(file).stem}: {digest}" for file, digest in files)
    return {key: text} if text else {}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def parse_parameters(text: str) -> dict[str, Any]:
    """The options that an AUTOMATIC1111 text gives, by Recipe's names; what it does not give is left out.

    Raises ValueError if the last line holds fewer than three pairs, or if a value is not what it should be.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"the parameters have {len(text)} characters: expected at most {MAX_TEXT}")
    *head, last = text.strip().split("\n")
    pairs, position = {}, 0
    while position < len(last) and (match := PAIR.match(last, position)):
        pairs[match[1].strip()] = match[2].strip()
        position = match.end()
    if position < len(last) or len(pairs) < 3:
        raise ValueError(f"the parameters do not end in a line like 'Steps: 20, Sampler: ...': {last[:80]!r}")
    starts = [index for index, line in enumerate(head) if line.startswith("Negative prompt:")]
    cut = starts[0] if starts else len(head)
    found: dict[str, Any] = {"prompt": "\n".join(head[:cut])}
    if starts:
        found["negative_prompt"] = "\n".join(head[cut:]).removeprefix("Negative prompt:").strip()
    names = {"Steps": ("steps", int), "CFG scale": ("guidance_scale", float), "Seed": ("seed", int)}
    names |= {
        "Model": ("model", str),
        "Model hash": ("model_hash", str),
        "CFG Rescale phi": ("guidance_rescale", float),
    }
    for key, (name, kind) in names.items():
        if key in pairs:
            found[name] = _value(key, pairs[key], kind)
    if "Size" in pairs:
        size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", pairs["Size"])
        if size is None:
            raise ValueError(f"Size: {pairs['Size'][:40]!r} is not like 512x512")
        found["width"], found["height"] = int(size[1]), int(size[2])
    if "Clip skip" in pairs:
        found["clip_skip"] = max(_value("Clip skip", pairs["Clip skip"], int) - 1, 0)
    if "Sampler" in pairs:
        sampler = pairs["Sampler"].removesuffix(" Karras")
        found["sampler"] = {theirs: ours for ours, theirs in A1111.items()}.get(sampler, sampler)
    return found


def _value(key: str, text: str, kind: type) -> Any:
    try:
        return kind(json.loads(text)) if text.startswith('"') else kind(text)
    except ValueError:
        raise ValueError(f"{key}: {text[:40]!r} is not a {kind.__name__}") from None
