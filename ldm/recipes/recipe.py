"""The recipe of a picture: all that decides its bits, and the text that the field's tools read it as."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    "lcm": "LCM",
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
    guidance: str = "cfg"  # or apg: see options.GUIDANCES
    threshold: float | None = None  # where dynamic thresholding ends x0; None: nowhere
    worse: str | None = None  # the UNet that autoguidance leads away from, as it was asked for
    worse_hash: str | None = None  # as model_hash
    sampler: str
    seed: int  # of the first image
    width: int  # pixels of one image
    height: int
    num_images: int = 1
    image: tuple[str, str] | None = None  # the file and hash of the picture it starts from
    mask: tuple[str, str] | None = None  # likewise: white is repainted
    extend: tuple[int, int, int, int] | None = None  # pixels added to image: left, top, right, bottom
    strength: float | None = None  # of what starts from a picture
    two_pass: float | None = None  # the strength of the second pass
    first_size: tuple[int, int] | None = None  # width and height in the first of two passes
    variation_seed: int | None = None  # of the first image; the noise that seed's goes to
    variation_strength: float = 0.0  # how far: 0 not at all, 1 all the way
    clip_skip: int = 0
    prompt_weighting: str | None = None  # None: read literally
    expanded_from: str | None = None  # the prompt as it was typed, where a program wrote it out
    class_label: int | str | None = None  # of a model with classes, and of the classifier
    classifier: tuple[str, str] | None = None  # its file and hash
    classifier_scale: float = 1.0
    classifier_form: str = "score"  # or mean: see ldm.diffusion.classifier
    chunks: int | None = None  # of a prompt; None: as many as the model was trained with
    model: str  # as it was asked for
    model_hash: str  # see checkpoint.model_hash
    variant: str | None = None
    dtype: str = "float32"
    loras: tuple[tuple[str, float, str], ...] = ()  # of each its file, weight and hash: see ldm.recipes.noted
    embeddings: tuple[tuple[str, str], ...] = ()  # of each its file and hash
    upscaler: str | None = None  # as it was asked for; None: the picture is not enlarged
    upscaler_hash: str | None = None  # as model_hash
    upscale_noise: int | None = None  # level of the noise on the picture that is enlarged
    optimize: bool = False  # see LatentDiffusionPipeline.optimize
    quantize: str | None = None  # likewise
    device: str = "cpu"
    version: str = ""  # of this package
    torch: str = ""

    @property
    def variation(self) -> tuple[int, float] | None:
        """The argument of a call; None where the seed's own picture is asked for."""
        if not self.variation_strength or self.variation_seed is None:
            return None
        return self.variation_seed, self.variation_strength

    def of_image(self, index: int) -> Recipe:
        """Of one image of several, counted from 0, alone. Variations of a seed all have that seed."""
        if self.variation is None:
            return replace(self, num_images=1, seed=self.seed + index)
        return replace(self, num_images=1, variation_seed=self.variation[0] + index)

    def parameters(self) -> str:
        """The recipe as AUTOMATIC1111 writes it: prompt, negative prompt, and a line of pairs."""
        pairs = {
            "Steps": self.steps,
            "Sampler": A1111.get(self.sampler, self.sampler),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": "{}x{}".format(*self.first_size or (self.width, self.height)),
            "Model hash": self.model_hash,
            "Model": Path(self.model).name,
            **({"Clip skip": self.clip_skip + 1} if self.clip_skip else {}),  # there, 1 is the last layer
            **({"CFG Rescale phi": f"{self.guidance_rescale:g}"} if self.guidance_rescale else {}),
            **self._start_pairs(),
            **_hashes("Lora hashes", [(file, digest) for file, _, digest in self.loras]),
            **_hashes("TI hashes", self.embeddings),
            "Version": f"ldm {self.version}",
        }
        line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items())
        negative = f"Negative prompt: {self.negative_prompt}\n" if self.negative_prompt else ""
        return f"{self.prompt}\n{negative}{line}"

    def _start_pairs(self) -> dict[str, Any]:
        """What it starts from, as AUTOMATIC1111 calls it; of two passes Size is that of the first."""
        pairs: dict[str, Any] = {}
        strength = self.strength if self.two_pass is None else self.two_pass
        if strength is not None:
            pairs["Denoising strength"] = f"{strength:g}"
        if self.first_size is not None:
            across, down = self.width / self.first_size[0], self.height / self.first_size[1]
            alike = across == down
            pairs["Hires upscale" if alike else "Hires resize"] = (
                f"{across:g}" if alike else f"{self.width}x{self.height}"
            )
            pairs["Hires upscaler"] = "Lanczos"
        if self.variation_strength:
            pairs["Variation seed"] = self.variation_seed
            pairs["Variation seed strength"] = f"{self.variation_strength:g}"
        return pairs


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
        "Denoising strength": ("strength", float),
        "Variation seed": ("variation_seed", int),
        "Variation seed strength": ("variation_strength", float),
    }
    for key, (name, kind) in names.items():
        if key in pairs:
            found[name] = _value(key, pairs[key], kind)
    if "Size" in pairs:
        found["width"], found["height"] = _size("Size", pairs["Size"])
        found |= _second_pass(pairs, found)
    if "Clip skip" in pairs:
        found["clip_skip"] = max(_value("Clip skip", pairs["Clip skip"], int) - 1, 0)
    if "Sampler" in pairs:
        sampler = pairs["Sampler"].removesuffix(" Karras")
        found["sampler"] = {theirs: ours for ours, theirs in A1111.items()}.get(sampler, sampler)
    return found


def _second_pass(pairs: dict[str, str], found: dict[str, Any]) -> dict[str, Any]:
    """What of a second pass changes the options found so far; nothing where there is none."""
    first = found["width"], found["height"]
    if "Hires upscale" in pairs:
        scale = _value("Hires upscale", pairs["Hires upscale"], float)
        if not 1 < scale <= 64:
            raise ValueError(f"Hires upscale: {scale:g} is not between 1 and 64")
        last = round(first[0] * scale), round(first[1] * scale)
    elif "Hires resize" in pairs:
        last = _size("Hires resize", pairs["Hires resize"])
    else:
        return {}
    strength = found.pop("strength", 0.7)  # theirs, where nothing is said
    return {"width": last[0], "height": last[1], "two_pass": strength, "first_size": first}


def _size(key: str, text: str) -> tuple[int, int]:
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if size is None:
        raise ValueError(f"{key}: {text[:40]!r} is not like 512x512")
    return int(size[1]), int(size[2])


def _value(key: str, text: str, kind: type) -> Any:
    try:
        return kind(json.loads(text)) if text.startswith('"') else kind(text)
    except ValueError:
        raise ValueError(f"{key}: {text[:40]!r} is not a {kind.__name__}") from None
