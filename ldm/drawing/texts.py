"""How a model is told what to draw: prompts, and for SDXL sizes too, to the Context of its UNet.

A pipeline has one of these, made of its text encoders and tokenizers; nothing else knows how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ldm.drawing.devices import Present
from ldm.files.checkpoint import Undrawn
from ldm.formats import stock
from ldm.model.context import Context
from ldm.recipes.options import Defaults, Framing
from text_encoder.clip import CLIPTextEncoder, ProjectedTextEncoder
from text_encoder.prompt import encode
from text_encoder.tokenizer import Tokenizer


@dataclass(frozen=True)
class OneText:
    """Stable Diffusion 1 and 2: the last states of one CLIP."""

    encoder: CLIPTextEncoder
    tokenizer: Tokenizer

    layout: ClassVar[stock.Layout] = stock.SD
    defaults: ClassVar[Defaults] = Defaults()
    pooled_channels: ClassVar[int] = 0  # of the whole text's vector, which this UNet is not told

    @property
    def readers(self) -> dict[str, tuple[Tokenizer, CLIPTextEncoder]]:
        """Each tokenizer with the encoder that reads its tokens, by the encoder's name in the pipeline."""
        return {"text_encoder": (self.tokenizer, self.encoder)}

    def check_clip_skip(self, count: int) -> None:
        """Raises ValueError if no layer would be left."""
        with Undrawn():
            self.encoder.drop_layers(count)

    def encode(
        self,
        prompts: Sequence[str | None],
        clip_skip: int,
        weighting: str | None,
        device: torch.device,
        present: Present,
    ) -> Context:
        """What the UNet is told of each prompt, which is encoded alone; None is the empty prompt."""
        with Undrawn():
            encoder = self.encoder.drop_layers(clip_skip) if clip_skip else self.encoder

        def states_of(tokens: Tensor) -> Tensor:
            return encoder(tokens.to(device))

        with present(self.encoder):
            states = {
                text: encode(states_of, self.tokenizer, text, weighting)
                for text in {prompt or "" for prompt in prompts}
            }
        return Context(torch.cat([states[prompt or ""] for prompt in prompts]))

    def framed(self, told: Context, size: tuple[int, int], framing: Framing) -> Context:
        """What is told, as it is. Raises ValueError if there is a framing."""
        for name, value in vars(framing).items():
            if value is not None:
                raise ValueError(f"{name}={value} is for SDXL: this model is told no sizes, leave it out")
        return told


@dataclass(frozen=True)
class TwoTexts:
    """SDXL: the penultimate states of two CLIPs side by side, the whole text as the second projects it, and
    the sizes of the picture (Podell et al. 2023, sections 2.1 and 2.2).
    """

    first: CLIPTextEncoder
    tokenizer: Tokenizer
    second: ProjectedTextEncoder
    tokenizer_2: Tokenizer
    zeros_for_none: bool  # no prompt is told as zeros, on which the model was trained, not as the empty one

    layout: ClassVar[stock.Layout] = stock.SDXL
    defaults: ClassVar[Defaults] = Defaults(guidance_scale=5.0)

    @property
    def pooled_channels(self) -> int:
        return self.second.text_projection.out_features

    @property
    def readers(self) -> dict[str, tuple[Tokenizer, CLIPTextEncoder]]:
        """As of OneText. Raises ValueError if their tokens would not stand side by side."""
        one, other = (each.chunks * each.max_length for each in (self.tokenizer, self.tokenizer_2))
        if one != other:
            raise ValueError(
                f"tokenizer gives {one} tokens a prompt and tokenizer_2 {other}: give both the same "
                "max_length and chunks"
            )
        return {
            "text_encoder": (self.tokenizer, self.first),
            "text_encoder_2": (self.tokenizer_2, self.second),
        }

    def check_clip_skip(self, count: int) -> None:
        """Raises ValueError if the encoder of fewer layers has no such state."""
        layers = min(encoder.config.num_hidden_layers for encoder in (self.first, self.second))
        if not 0 <= count < layers:
            raise ValueError(
                f"clip_skip={count}: text encoders of {layers} layers take 0 to {layers - 1}, counted from "
                "the penultimate state"
            )

    def encode(
        self,
        prompts: Sequence[str | None],
        clip_skip: int,
        weighting: str | None,
        device: torch.device,
        present: Present,
    ) -> Context:
        """What the UNet is told of each prompt but the sizes. Each is encoded alone; None: of no prompt."""
        self.check_clip_skip(clip_skip)
        texts = {prompt or "" for prompt in prompts}
        sides: dict[str, list[Tensor]] = {text: [] for text in texts}
        pooled: dict[str, Tensor] = {}

        def states_of(tokens: Tensor, *, text: str, encoder: CLIPTextEncoder) -> Tensor:
            states = encoder.hidden_states(tokens.to(device))
            if encoder is self.second and text not in pooled:  # which no weight changes
                pooled[text] = self.second.project(states[-1], tokens.to(device))
            return states[-2 - clip_skip]

        for tokenizer, encoder in self.readers.values():
            with present(encoder):
                for text in texts:
                    read = partial(states_of, text=text, encoder=encoder)
                    sides[text].append(encode(read, tokenizer, text, weighting))
        told: dict[str | None, Context] = {
            text: Context(torch.cat(sides[text], dim=-1), pooled[text]) for text in texts
        }
        if None in prompts:
            told[None] = told[""].each(torch.zeros_like) if self.zeros_for_none else told[""]
        return Context.of(*(told[prompt] for prompt in prompts))

    def framed(self, told: Context, size: tuple[int, int], framing: Framing) -> Context:
        """What is told, with the sizes. size: height and width of the picture, where framing leaves it open.

        Raises ValueError for embeddings that were given without the whole text.
        """
        if told.pooled is None or told.pooled.shape[-1] != self.pooled_channels:
            found = "none" if told.pooled is None else f"one of {told.pooled.shape[-1]} channels"
            raise ValueError(
                f"prompt_embeds hold a vector of the whole text of {self.pooled_channels} channels for this "
                f"model, and here {found}: give what encode_prompts gives"
            )
        sizes = framing.original_size or size, framing.crops_coords_top_left, framing.target_size or size
        row = [float(number) for pair in sizes for number in pair or (0, 0)]
        rows = torch.tensor([row] * len(told), device=told.embeddings.device)
        return Context(told.embeddings, told.pooled, rows)


def texts_of(
    encoder: CLIPTextEncoder,
    tokenizer: Tokenizer,
    encoder_2: CLIPTextEncoder | None,
    tokenizer_2: Tokenizer | None,
    zeros_for_none: bool,
) -> OneText | TwoTexts:
    """Of the parts of a pipeline. Raises ValueError for half a second encoder, or one of another kind."""
    if encoder_2 is None and tokenizer_2 is None:
        return OneText(encoder, tokenizer)
    if not isinstance(encoder_2, ProjectedTextEncoder) or tokenizer_2 is None:
        found = ", ".join(type(part).__name__ for part in (encoder_2, tokenizer_2))
        raise ValueError(
            f"text_encoder_2 and tokenizer_2 are {found}: expected a ProjectedTextEncoder and a Tokenizer"
        )
    return TwoTexts(encoder, tokenizer, encoder_2, tokenizer_2, zeros_for_none)
