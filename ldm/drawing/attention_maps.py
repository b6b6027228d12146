"""Where a picture looks at each word of its prompt: cross-attention as heat (Tang et al. 2022, "DAAM").

A pixel of a layer shares its attention out among the tokens: softmax(q k^T / sqrt(D)) of Vaswani et al. 2017,
eq. 1, sums to 1. Its mean over heads, layers and steps, each layer enlarged to the picture's size, is a
word's heat. It is computed beside the kernel's answer, which it does not change, and for the prompts alone,
not for the negative ones. Enlarging is linear here, cubic in the paper, so that the heats still sum to 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.model.attention import CrossAttention, SelfAttention
from ldm.model.context import Context, Predict
from ldm.recipes.picture import grid
from text_encoder.prompt import read, words_of

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline, PipelineOutput


SIDE = 160  # pixels: smaller pictures are enlarged on a sheet


class WordMap(NamedTuple):
    """A word of a prompt, and the share of every pixel's attention that its tokens get."""

    word: str
    heat: Tensor  # (H, W) float32 in [0, 1]; of all tokens, start, end and padding too, the sum is 1


class AttentionMaps(NamedTuple):
    """A call's output, and the words of each of its images."""

    output: PipelineOutput
    maps: list[list[WordMap]]


class Watcher:
    """A UNet that remembers where it looked: (xt, t, context) -> prediction. For one run at a time."""

    def __init__(self, unet: Predict) -> None:
        self.unet = unet
        self.forget()

    def forget(self) -> None:
        """Makes ready for the next run."""
        self.sums: dict[int, Tensor] = {}  # by the pixels of a layer, (B, pixels, N): sums over layers, steps
        self.layers = 0  # that looked at the text, in all steps

    def __call__(self, xt: Tensor, t: Tensor, context: Tensor | Context) -> Tensor:
        self.rows, _, *self.size = xt.shape
        run = context if isinstance(context, Context) else Context(context)
        run.look = self.look  # type: ignore[method-assign]  # of this run's own object
        return self.unet(xt, t, run)

    def look(self, layer: CrossAttention, q: Tensor, k: Tensor) -> None:
        """Adds a layer's attention to the text, the mean of its heads.

        q: (k * B, pixels, C). k: (k * B, N, C). Of several texts for each latent the prompts come last.
        """
        if isinstance(layer, SelfAttention):
            return
        q, k = (x[-self.rows :].float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (q, k))
        shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        pixels = shares.shape[1]
        self.sums[pixels] = self.sums[pixels] + shares if pixels in self.sums else shares
        self.layers += 1

    def heat(self, image: int, words: Sequence[Sequence[int]], height: int, width: int) -> Tensor:
        """The heat of each of the words, given as rows of the context, for one image: (words, H, W) float32.

        Raises ValueError if no layer looked at the text.
        """
        if not self.layers:
            raise ValueError("no layer of this UNet looks at the tokens of the text: there are no maps of it")
        heat = torch.zeros(len(words), height, width)
        for pixels, total in self.sums.items():
            shares = [total[image, :, list(rows)].sum(1) for rows in words]
            small = torch.stack(shares).cpu().unflatten(1, level_size(pixels, *self.size))
            heat += F.interpolate(small[None], (height, width), mode="bilinear")[0]
        return heat / self.layers


def level_size(pixels: int, h: int, w: int) -> tuple[int, int]:
    """Height and width of the level of that many pixels: h and w halved, odd ones rounded up, in ADM down."""
    for rounded in (1, 0):
        a, b = h, w
        while a * b > pixels:
            a, b = (a + rounded) // 2, (b + rounded) // 2
        if a * b == pixels:
            return a, b
    raise AssertionError(f"no level of {h}x{w} latents has {pixels} pixels")


def watched(pipe: LatentDiffusionPipeline) -> tuple[LatentDiffusionPipeline, Watcher]:
    """A pipeline of the same parts, and what watches its calls; the one given is not changed."""
    twin, watcher = copy.copy(pipe), Watcher(pipe._predict)
    twin._predict = watcher  # type: ignore[method-assign]
    return twin, watcher


def maps_of(
    watcher: Watcher, pipe: LatentDiffusionPipeline, texts: Sequence[str], weighting: str | None
) -> list[list[WordMap]]:
    """Of each image of the last run its words and their heat. texts: the prompt of each."""
    height, width = (side * pipe.vae.downsample_factor for side in watcher.size)
    maps = []
    for image, text in enumerate(texts):
        words = words_of(read(text, weighting), pipe.tokenizer)
        heats = watcher.heat(image, [rows for _, rows in words], height, width) if words else ()
        maps.append([WordMap(word, heat) for (word, _), heat in zip(words, heats, strict=True)])
    return maps


def attention_maps(pipe: LatentDiffusionPipeline, prompt: str | Sequence[str], **call: Any) -> AttentionMaps:
    """See LatentDiffusionPipeline.attention_maps."""
    twin, watcher = watched(pipe)
    output = twin(prompt, **call)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = [text for text in prompts for _ in range(len(output.images) // len(prompts))]
    return AttentionMaps(output, maps_of(watcher, pipe, texts, call.get("prompt_weighting")))


# Pictures


def colours(heat: np.ndarray) -> np.ndarray:
    """Black over red and yellow to white: (H, W) in [0, 1] to (H, W, 3) in [0, 1]."""
    return np.clip(3 * heat[..., None] - np.arange(3), 0, 1)


def over(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in grey under a word's heat, which is stretched from its least to its most."""
    spread = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    grey = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    mixed = 0.45 * grey + 0.55 * colours(spread.numpy())
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def labelled(image: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text on white above it; what is too long for it ends in dots."""
    size = max(image.width // 10, 10)  # pixels
    font = ImageFont.load_default(size)
    while len(text) > 1 and font.getlength(text) > image.width:
        text = text.removesuffix("…")[:-1] + "…"
    sheet = Image.new("RGB", (image.width, image.height + math.ceil(1.4 * size)), "white")
    sheet.paste(image, (0, sheet.height - image.height))
    ImageDraw.Draw(sheet).text((image.width / 2, size * 0.7), text, "black", font, anchor="mm")
    return sheet


def attention_sheet(images: Sequence[Image.Image], maps: Sequence[Sequence[WordMap]]) -> Image.Image:
    """Each picture, and beside it, for each word of its prompt, the heat of that word over the picture.

    One picture's sheet is nearly square; several pictures of one prompt have a row each.
    """
    cells, times = [], math.ceil(SIDE / images[0].width)
    for image, words in zip(images, maps, strict=True):
        drawn = [("", image), *((word, over(image, heat)) for word, heat in words)]
        for word, cell in drawn:
            cells.append(labelled(cell.resize((times * cell.width, times * cell.height)), word))
    return grid(cells, None if len(images) == 1 else len(maps[0]) + 1)
