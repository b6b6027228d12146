"""Prompts of a call: contexts that others can use too, and what of a prompt has no effect, told once."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import inputs, options
from ldm.context import Context
from ldm.devices import Movable
from text_encoder.prompt import read, what_is_cut
from text_encoder.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ldm.attention_maps import AttentionMaps
    from ldm.texts import OneText, TwoTexts

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
    ) -> tuple[list[str], list[str]]:
        """What is cut of each prompt, and all that has no effect: warned of where it is new.

        scale: of guidance, without which nothing negative acts. Raises ValueError in place of a warning if
        strict.
        """
        cut, said = notices(prompt, self.tokenizers, weighting, "prompt")
        said += notices(negative, self.tokenizers, weighting, "negative prompt")[1]
        if scale <= 1 and (negative or negative_embeds is not None):
            said.append(f"the negative prompt has no effect without guidance: guidance_scale={scale}")
        said = list(dict.fromkeys(said))
        for notice in said:
            if strict:
                raise ValueError(notice)
            if notice not in self._told:
                self._told.append(notice)
                log.warning(notice)
        return cut, said

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
        context, uncond = self._contexts(*given, num_images_per_prompt, clip_skip, prompt_weighting)  # type: ignore[attr-defined]
        self._heed(*given, prompt_weighting, scale=math.inf)
        target = self.device if device is None else inputs.check_device(device)
        context, uncond = (side.each(lambda rows: rows.to(target)) for side in (context, uncond))
        sides = [(context.embeddings, context.pooled), (uncond.embeddings, uncond.pooled)]
        if not do_classifier_free_guidance:
            sides[1] = (None, None)
        embeds, pooled = zip(*sides, strict=True)
        return embeds if context.pooled is None else (*embeds, *pooled)

    def attention_maps(self, prompt: str | Sequence[str], **call: Any) -> AttentionMaps:
        """A call's pictures, and where each looks for each word of its prompt: see ldm.attention_maps.

        call: options as of any call; the pictures are the same, bit for bit.
        Raises ValueError if the model does not look at the text.
        """
        from ldm.attention_maps import attention_maps  # few ask for it

        return attention_maps(self, prompt, **call)  # type: ignore[arg-type]
