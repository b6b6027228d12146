"""Prompts of a call: contexts that others can use too, and what of a prompt has no effect, told once."""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.drawing import inputs
from ldm.drawing.devices import Movable
from ldm.model.context import Context
from ldm.recipes import options
from text_encoder.prompt import read, what_is_cut
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.drawing.texts import OneText, TwoTexts

log = logging.getLogger(__name__)

Prompts = str | Sequence[str] | None


def notices(
    prompts: Prompts | Sequence[inputs.Prompt],
    tokenizers: Sequence[Tokenizer],
    weighting: str | None,
    name: str,
) -> tuple[list[str], list[str]]:
    """Of each prompt the end that does not fit the text encoder, "" if all does; and what is odd, in words.

    name: what the words call a prompt. Raises ValueError for prompts and weightings that cannot be.
    """
    options.check_weighting(weighting)
    cut, said = [], []
    if isinstance(prompts, list | tuple):
        prompts = [each or "" for each in prompts]
    for text in inputs.prompt_list(prompts, name.replace(" ", "_")) or []:  # type: ignore[arg-type]
        prompt = read(text, weighting)
        said += [f"{notice}: {_short(text)}" for notice in prompt.notices]
        cut.append(max((what_is_cut(prompt, tokenizer) for tokenizer in tokenizers), key=len))
        if cut[-1]:
            said.append(
                f"the {name} is too long; this end of it has no effect: {_short(cut[-1])} (more chunks, by "
                "--chunks or tokenizer.chunks, have more room)"
            )
    return cut, said


def check_heard(prompt: str, negative: str, tokenizers: Sequence[Tokenizer], weighting: str | None) -> None:
    """Raises ValueError if some of these prompts has no effect or is not read as it was meant."""
    for text, name in ((prompt, "prompt"), (negative, "negative prompt")):
        for notice in notices(text, tokenizers, weighting, name)[1]:
            raise ValueError(notice)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"


class Prompting(Movable):
    """What a pipeline does with prompts beside drawing them."""

    @property
    def texts(self) -> OneText | TwoTexts:
        raise NotImplementedError

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """Of each text encoder."""
        return [tokenizer for tokenizer, _ in self.texts.readers.values()]

    def __init__(self) -> None:
        self._told: deque[str] = deque(maxlen=1000)

    def _heed(
        self,
        prompt: Prompts,
        negative: Prompts | Sequence[inputs.Prompt],
        embeds: Tensor | Context | None,
        negative_embeds: Tensor | Context | None,
        weighting: str | None,
        scale: float,
        strict: bool = False,
        also: Sequence[str] = (),
    ) -> tuple[list[str], list[str]]:
        """What is cut of each prompt, and all that has no effect: warned of where it is new.

        scale: of guidance, without which nothing negative acts. also: what else has no effect.
        Raises ValueError in place of a warning if strict.
        """
        cut, said = notices(prompt, self.tokenizers, weighting, "prompt")
        said += notices(negative, self.tokenizers, weighting, "negative prompt")[1]
        if negative or negative_embeds is not None:
            if self.unet.config.time_cond_proj_dim is not None:
                said.append("the negative prompt has no effect: this model was distilled with its guidance")
            elif scale <= 1:
                said.append(f"the negative prompt has no effect without guidance: guidance_scale={scale}")
        said = list(dict.fromkeys([*said, *also]))
        for notice in said:
            if strict:
                raise ValueError(notice)
            if notice not in self._told:
                self._told.append(notice)
                log.warning(notice)
        return cut, said

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[inputs.Prompt],
        clip_skip: int | None = None,
        prompt_weighting: str | None = None,
    ) -> Tensor | Context:
        """The context of prompts, (B, N, D), for prompt_embeds; of SDXL a Context, with each text as a whole.

        clip_skip: leaves out so many last layers. prompt_weighting: as of a call. None in the place of a
        prompt: nothing is said. Each prompt is encoded alone: its numbers do not depend on the others.
        """
        told = self._encode(prompts, clip_skip, prompt_weighting)
        return told.embeddings if told.pooled is None else told

    def _encode(
        self, prompts: Sequence[inputs.Prompt], clip_skip: int | None = None, weighting: str | None = None
    ) -> Context:
        options.check_clip_skip(clip_skip or 0)
        return self.texts.encode(prompts, clip_skip or 0, weighting, self.device, self._present)

    def _contexts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[inputs.Prompt] | None,
        embeds: Tensor | Context | None,
        negative_embeds: Tensor | Context | None,
        images: int,
        clip_skip: int | None,
        weighting: str | None,
    ) -> tuple[Context, Context]:
        """context and uncond, with a row an image."""
        whole = functools.partial(self._encode, weighting=weighting)
        encode = functools.partial(whole, clip_skip=clip_skip)
        width = self.unet.config.cross_attention_dim
        if negative_prompt is None and negative_embeds is None:
            negative_prompt = [None]
        prompts = inputs.prompt_list(prompt, "prompt")
        negatives = inputs.negative_list(negative_prompt)
        given: Sequence[str] | Tensor | Context | None = prompts if embeds is None else embeds
        options.check_count(images, 1 if given is None else len(given))
        context = inputs.context_of(prompts, embeds, encode, (None, None, width), "prompt")
        # whole also with clip_skip, as in diffusers
        uncond = inputs.context_of(
            negatives, negative_embeds, whole, context.embeddings.shape, "negative_prompt"
        )

        def an_image_each(rows: Tensor) -> Tensor:
            return rows.to(self.device).repeat_interleave(images, dim=0)

        return context.each(an_image_each), uncond.each(an_image_each)

    def encode_prompt(
        self,
        prompt: Prompts = None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Prompts = None,
        *,
        prompt_embeds: Tensor | Context | None = None,
        negative_prompt_embeds: Tensor | Context | None = None,
        clip_skip: int | None = None,
        prompt_weighting: str | None = None,
    ) -> tuple[Tensor | None, ...]:
        """prompt_embeds and negative_prompt_embeds, (B, N, D) with a row an image: as diffusers calls it.

        Given to a call they make the same picture, bit for bit, as the prompts. Without guidance the second
        is None. Of SDXL two more follow, the vectors of the whole texts; here a call takes those with their
        embeddings, as encode_prompts gives them. Raises ValueError as a call does.
        """
        given = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        context, uncond = self._contexts(*given, num_images_per_prompt, clip_skip, prompt_weighting)
        self._heed(*given, prompt_weighting, scale=math.inf)
        target = self.device if device is None else inputs.check_device(device)
        context, uncond = (side.each(lambda rows: rows.to(target)) for side in (context, uncond))
        sides: list[tuple[Tensor | None, Tensor | None]] = [
            (side.embeddings, side.pooled) for side in (context, uncond)
        ]
        if not do_classifier_free_guidance:
            sides[1] = (None, None)
        embeds, pooled = zip(*sides, strict=True)
        return embeds if context.pooled is None else (*embeds, *pooled)
