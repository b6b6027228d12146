"""The methods of a pipeline by which adapters come and go, with diffusers' names."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.adapters.names import FLAT

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.adapters.applied import Applied
    from ldm.adapters.words import Source, Words
    from text_encoder.clip import CLIPTextEncoder
    from text_encoder.tokenizer import Tokenizer

Weight = float | Mapping[str, float] | None


class Adaptable:
    """LoRA and its kin, and learned words, for a pipeline. Change them while it is not drawing."""

    text_encoder: CLIPTextEncoder
    tokenizer: Tokenizer

    @property
    def components(self) -> dict[str, Any]:
        raise NotImplementedError

    @functools.cached_property
    def _applied(self) -> Applied:
        from ldm.adapters.applied import Applied

        return Applied({part: self.components[part] for part in FLAT if part in self.components})

    @functools.cached_property
    def _words(self) -> Words:
        from ldm.adapters.words import Words

        return Words(self.text_encoder, self.tokenizer)

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Loads an adapter, which then is the only active one: see set_adapters for several.

        source: a .safetensors, a folder of one, or tensors by name: LoRA, LoCon, LoHa, LoKr or DoRA as PEFT,
        diffusers, kohya or LyCORIS spell them. adapter_name: default_0, default_1, ... if left out.
        Raises ValueError, with the pipeline as it was, unless all of it fits this model and changes it.
        """
        from ldm.adapters.files import read_adapter

        name = adapter_name
        if name is None:
            taken = self._applied.state.adapters
            name = next(each for i in range(len(taken) + 1) if (each := f"default_{i}") not in taken)
        self._applied.add(name, read_adapter(source, self._applied.index, weight_name))

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] = None
    ) -> None:
        """Makes these adapters active and no others; their deltas times the weights are summed.

        adapter_weights: one for all or one for each; a number, or numbers by part, such as {"unet": 0.5}.
        Raises ValueError for an adapter that is not loaded.
        """
        asked = self._applied.known(adapter_names)
        one = adapter_weights is None or isinstance(adapter_weights, int | float | Mapping)
        weights: list[Any] = [adapter_weights] * len(asked) if one else list(adapter_weights)  # type: ignore[arg-type]
        if len(weights) != len(asked):
            raise ValueError(
                f"{len(asked)} adapters and {len(weights)} weights: expected as many, or one for all"
            )
        self._applied.activate(asked, weights)

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters that set_adapters made active."""
        return list(self._applied.state.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all loaded adapters, by the part that they are for."""
        adapters = self._applied.state.adapters
        found = {part: [name for name, each in adapters.items() if part in each.parts] for part in FLAT}
        return {part: mine for part, mine in found.items() if mine}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forgets these adapters, fused or not. Raises ValueError for one that is not loaded."""
        self._applied.delete(self._applied.known(adapter_names))

    def disable_lora(self) -> None:
        """Draws without adapters, until enable_lora; fused ones stay."""
        self._enable(False)

    def enable_lora(self) -> None:
        """Draws with the active adapters again."""
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        from dataclasses import replace

        self._applied.become(replace(self._applied.state, enabled=enabled))

    def fuse_lora(
        self,
        components: Sequence[str] = tuple(FLAT),
        lora_scale: float = 1.0,
        safe_fusing: bool = True,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Makes adapters part of the weights: they stay whatever set_adapters says, also after unloading.

        Here this saves no time, as active adapters always are in the weights. adapter_names: the active ones
        if left out. safe_fusing is for diffusers' scripts: what is not finite is always refused.
        Raises ValueError if there is no adapter to fuse.
        """
        asked = self._applied.known(self.get_active_adapters() if adapter_names is None else adapter_names)
        if not asked:
            raise ValueError("fuse_lora: no adapter is active: load_lora_weights() first")
        self._applied.fuse(asked, components, lora_scale)

    def unfuse_lora(self, components: Sequence[str] = tuple(FLAT)) -> None:
        """Takes fused adapters out, bit for bit; active ones stay. Raises ValueError if none is fused."""
        self._applied.unfuse(components)

    def unload_lora_weights(self) -> None:
        """Forgets all adapters: the weights are, bit for bit, as before, and with those that were fused."""
        self._applied.unload()

    def save_lora_weights(
        self,
        save_directory: str | Path,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        spelling: str = "diffusers",
    ) -> Path:
        """Writes a loaded adapter as diffusers, kohya or PEFT spell it; the path of the file.

        adapter_name: the active one if left out. weight_name: what diffusers or PEFT call it if left out.
        Raises ValueError for what that spelling has no way to say.
        """
        from ldm.adapters.files import USUAL, write_adapter

        asked = self._applied.known(self.get_active_adapters() if adapter_name is None else adapter_name)
        if len(asked) != 1:
            raise ValueError(f"save_lora_weights: {len(asked)} adapters are active: name one by adapter_name")
        path = Path(save_directory) / (weight_name or USUAL[spelling == "peft"])
        write_adapter(self._applied.state.adapters[asked[0]], path, spelling)
        return path

    def load_textual_inversion(
        self, source: Source, token: str | None = None, weight_name: str | None = None
    ) -> None:
        """Loads learned words, to be written in prompts as they are called.

        source: a .safetensors of diffusers or AUTOMATIC1111, a folder of one, or tensors. token: what to call
        the word, else as its file says. A word of several vectors becomes as many tokens.
        Raises ValueError, with the pipeline as it was, unless it fits this text encoder and is new to it.
        """
        from ldm.adapters.words import read_words

        new = read_words(source, token, weight_name)
        for word in new.keys() & self._words.words.keys():
            raise ValueError(f"the word {word!r} is loaded already: give another name by token")
        self.tokenizer = self._words.become({**self._words.words, **new}, self.tokenizer)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forgets learned words, all if none is named; without any, all is bit for bit as before them.

        Raises ValueError for a word that is not loaded.
        """
        have = self._words.words
        gone = set(have) if tokens is None else {tokens} if isinstance(tokens, str) else set(tokens)
        if gone - have.keys():
            raise ValueError(
                f"no learned word {min(gone - have.keys())!r}: loaded are {', '.join(have) or 'none'}"
            )
        self.tokenizer = self._words.become(
            {word: value for word, value in have.items() if word not in gone}, self.tokenizer
        )
