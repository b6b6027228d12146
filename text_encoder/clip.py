"""CLIP's text transformer (Radford et al. 2021, section 2.4): tokens in, one embedding per token out.

Config keys and parameter names are those of transformers' CLIPTextModel, the field's file format. It has two
spellings: transformers 4 and single-file checkpoints put `text_model.` before each name, transformers 5 does
not. We read both (`rename_keys`) and write the older one (`save_keys`), which all of them load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREFIX = "text_model."  # before every name in the files of transformers 4, but that of the projection


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): Hendrycks & Gimpel 2016, section 2, approximating gelu; in OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,  # OpenAI's CLIP, in SD 1
    "gelu": F.gelu,  # OpenCLIP, in SD 2
}


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Keys that transformers writes into config.json and that change no output here: how the file came about,
# initial values, what is returned, and the defaults of text generation that transformers 4 gave every model.
NOTES = """
architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path
tokenizer_class initializer_range initializer_factor dropout gradient_checkpointing attn_implementation
use_bfloat16 torchscript return_dict output_hidden_states output_attentions use_cache tf_legacy_loss
pruned_heads is_encoder_decoder chunk_size_feed_forward tie_word_embeddings tie_encoder_decoder
is_decoder add_cross_attention id2label label2id cross_attention_hidden_size problem_type finetuning_task
task_specific_params prefix sep_token_id max_length decoder_start_token_id min_length do_sample
early_stopping num_beams num_beam_groups diversity_penalty top_k temperature top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids output_scores
encoder_no_repeat_ngram_size num_return_sequences return_dict_in_generate forced_bos_token_id
forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
begin_suppress_tokens
"""


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The keys of transformers' CLIPTextConfig that change the output, with its defaults.

    Raises ValueError for an activation we do not know and for sizes that do not fit together.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # the longest prompt, with its start and end token
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 512  # of CLIP's image-text space; Stable Diffusion does not project
    pad_token_id: int | None = 1  # transformers' defaults here are not the tokenizer's: read by no one
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407  # 2 in files older than transformers 4.31: see CLIPTextEncoder.pool

    # Keys of transformers and diffusers that would change the output, with the only value we implement.
    NEUTRAL: ClassVar[dict[str, object]] = {
        "attention_dropout": 0.0,
        "use_attention_mask": False,  # would hide the padding; Stable Diffusion was trained seeing it
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(NOTES.split())

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )


class Embeddings(nn.Module):
    """(B, N) tokens -> (B, N, D): the token's vector plus its position's."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class CausalSelfAttention(nn.Module):
    """(B, N, D) -> (B, N, D); no token sees a later one, so padding changes nothing before it."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """(B, N, D) -> (B, N, D), each token alone."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """(B, N, D) -> (B, N, D): attention between tokens, then an MLP, each on the normed input."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CausalSelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, one after the other. It exists for its name in the file format."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def side_by_side(states: Tensor, tokens: Tensor) -> Tensor:
    """The states of a prompt's chunks one after the other: (B * K, N, D) -> (B, K * N, D)."""
    return states.unflatten(0, tokens.shape[:-1]).flatten(1, -2)


class CLIPTextEncoder(nn.Module):
    """CLIP's text transformer; new weights are drawn as CLIP's were (Radford et al. 2021, released code)."""

    config_class = CLIPTextConfig
    stock_class = "CLIPTextModel"

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """The last hidden state after the final layer norm: what Stable Diffusion calls the context.

        tokens: (B, N) int64, N <= max_position_embeddings; or (B, K, N) in K chunks, of which none sees
        another. Returns (B, N, D), or (B, K * N, D), the chunks one after the other.
        Raises ValueError if there are more tokens than positions.
        """
        return side_by_side(self.final_layer_norm(self.encoder(self.embed(tokens))), tokens)

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """What enters the first layer and what leaves each, without the final norm: one more than layers.

        tokens, shapes and what is raised: as of forward.
        """
        states = [self.embed(tokens)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return [side_by_side(state, tokens) for state in states]

    def embed(self, tokens: Tensor) -> Tensor:
        """What enters the first layer, each chunk a row. Raises ValueError as forward."""
        if tokens.shape[-1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{tokens.shape[-1]} tokens, but this text encoder has {self.config.max_position_embeddings} "
                "positions: cut the prompt, as Tokenizer does at its max_length"
            )
        return self.embeddings(tokens.flatten(0, -2))

    def pool(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The state at each prompt's first end token, which has seen the whole prompt: (B, D).

        states: (B, N, D), of forward. tokens: (B, N) int64, the same; each row holds an end token.
        """
        # Before transformers 4.31 configs said eos_token_id = 2 by mistake; the end token has the largest id.
        is_end = tokens if self.config.eos_token_id == 2 else tokens == self.config.eos_token_id
        return states[torch.arange(len(tokens), device=states.device), is_end.int().argmax(1)]

    def drop_layers(self, count: int) -> CLIPTextEncoder:
        """This encoder without its last `count` layers, sharing its weights: diffusers' clip_skip.

        count = 1 is the penultimate state, with the final layer norm; SD 2 was trained on that.
        Raises ValueError if no layer would be left.
        """
        layers = self.config.num_hidden_layers
        if not 0 <= count < layers:
            raise ValueError(f"clip_skip={count}: a text encoder of {layers} layers takes 0 to {layers - 1}")
        with torch.device("meta"):
            fewer = CLIPTextEncoder(replace(self.config, num_hidden_layers=layers - count))
        fewer.embeddings, fewer.final_layer_norm = self.embeddings, self.final_layer_norm
        fewer.encoder.layers = self.encoder.layers[: layers - count]
        fewer.training = self.training
        return fewer

    def reset_parameters(self) -> None:
        """Draws new weights; the residual branches start smaller the more layers there are (GPT-2's rule)."""
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        nn.init.normal_(self.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.01)
        for name, parameter in self.encoder.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=(2 * depth * width) ** -0.5)
            elif name.endswith("fc1.weight"):
                nn.init.normal_(parameter, std=(2 * width) ** -0.5)
            elif name.endswith("_proj.weight"):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @staticmethod
    def rename_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The names of any file to ours: no `text_model.`, and without the positions that old files hold."""
        return {
            name.removeprefix(PREFIX): tensor
            for name, tensor in state_dict.items()
            if not name.endswith("embeddings.position_ids")
        }

    @staticmethod
    def save_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names to those that transformers 4, transformers 5 and single-file readers all load."""
        return {PREFIX + name: tensor for name, tensor in state_dict.items()}


class ProjectedTextEncoder(CLIPTextEncoder):
    """CLIP's text transformer with its way into the space that texts share with pictures: SDXL's second.

    Parameter names are those of transformers' CLIPTextModelWithProjection.
    """

    stock_class = "CLIPTextModelWithProjection"

    def __init__(self, config: CLIPTextConfig) -> None:
        """Raises ValueError for a config without projection_dim."""
        if config.projection_dim is None or config.projection_dim < 1:
            raise ValueError(
                f"projection_dim={config.projection_dim}: expected at least 1, of the projection"
            )
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        nn.init.normal_(self.text_projection.weight, std=config.hidden_size**-0.5)

    def project(self, state: Tensor, tokens: Tensor) -> Tensor:
        """Each prompt as a whole, (B, projection_dim): the projection of its pooled state.

        state: the last of hidden_states of these tokens. Of a prompt in chunks the first counts.
        """
        first = tokens if tokens.ndim == 2 else tokens[:, 0]
        return self.text_projection(self.pool(self.final_layer_norm(state[:, : first.shape[1]]), first))

    @staticmethod
    def save_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our names to those of the files: the projection's stands without `text_model.`."""
        return {
            name if name.startswith("text_projection.") else PREFIX + name: tensor
            for name, tensor in state_dict.items()
        }
