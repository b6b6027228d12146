"""Our CLIP text transformer against transformers' CLIPTextModel, and the names in its files."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ldm.files.config import read_config
from text_encoder.clip import CLIPTextConfig, CLIPTextEncoder, ProjectedTextEncoder

ODD = {  # no two sizes alike, none a power of two
    "vocab_size": 611,
    "hidden_size": 30,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 21,
    "layer_norm_eps": 1e-4,
    "projection_dim": 18,
    "bos_token_id": 609,
    "eos_token_id": 610,
}
SD1 = {  # text_encoder/config.json of Stable Diffusion 1.5, what shapes it
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SD2 = {  # of 2.1: OpenCLIP's ViT-H without its last layer
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
}
CASES = [
    pytest.param(ODD, id="odd"),
    pytest.param(ODD | {"hidden_act": "gelu", "eos_token_id": 2, "num_attention_heads": 2}, id="odd, gelu"),
    pytest.param(SD1, id="SD 1.5", marks=pytest.mark.slow),
    pytest.param(SD2, id="SD 2.1", marks=pytest.mark.slow),
]


def stock_model(sizes: dict) -> transformers.CLIPTextModel:
    """transformers' model with weights and biases large enough that a mistake shows."""
    stock = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)).eval()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
    return stock


def ours_of(stock: transformers.CLIPTextModel, sizes: dict) -> CLIPTextEncoder:
    with torch.device("meta"):
        ours = CLIPTextEncoder(CLIPTextConfig(**sizes))
    ours.load_state_dict(ours.rename_keys(stock.state_dict()), strict=True, assign=True)
    return ours


def random_tokens(config: CLIPTextConfig, count: int = 3) -> torch.Tensor:
    """Prompts of different lengths, padded with the end token: (count, N)."""
    tokens = torch.randint(config.vocab_size - 2, (count, config.max_position_embeddings))
    tokens[:, 0] = config.vocab_size - 2
    for row, length in zip(tokens, (1, 6, 13), strict=False):
        row[length:] = config.vocab_size - 1
    return tokens


def gradients(loss: torch.Tensor, model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names]), strict=True))


@pytest.fixture
def odd() -> CLIPTextEncoder:
    return CLIPTextEncoder(CLIPTextConfig(**ODD)).eval()


# Parity


@pytest.mark.parametrize("sizes", CASES)
def test_states_and_gradients_are_those_of_transformers(sizes):
    stock = stock_model(sizes)
    ours = ours_of(stock, sizes)
    tokens = random_tokens(ours.config)
    expected = stock(tokens)
    states = ours(tokens)
    scale = expected.last_hidden_state.abs().max()
    assert (states - expected.last_hidden_state).abs().max() <= 1e-5 * scale
    assert (ours.pool(states, tokens) - expected.pooler_output).abs().max() <= 1e-5 * scale

    # The gradients of the first layer have come through all others; with the real sizes those are enough.
    ends = (
        "embeddings.position",
        "encoder.layers.0.",
        f"encoder.layers.{ours.config.num_hidden_layers - 1}.",
    )
    names = [
        name for name, _ in ours.named_parameters() if sizes["hidden_size"] < 99 or name.startswith(ends)
    ]
    weight = torch.randn_like(states)
    grads = gradients((states * weight).sum(), ours, names)
    expected_grads = gradients((expected.last_hidden_state * weight).sum(), stock, names)
    for name in names:
        # k_proj.bias shifts all scores of a row alike, so its gradient is 0 but for rounding.
        size = expected_grads[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert (grads[name] - expected_grads[name]).norm() <= 1e-4 * size, name


@pytest.mark.parametrize("eos_token_id", [610, 2])
def test_the_projection_and_all_states_are_those_of_transformers(eos_token_id, tmp_path):
    """In memory and by way of a folder, in both directions."""
    from ldm.files.checkpoint import load_model, save_model

    sizes = ODD | {"eos_token_id": eos_token_id, "hidden_act": "gelu"}
    stock = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes)).eval()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stock.save_pretrained(tmp_path / "theirs")
    ours = load_model(ProjectedTextEncoder, tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    again, report = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens(ours.config)
    states = ours.hidden_states(tokens)
    for each in (stock, again):
        expected = each(tokens, output_hidden_states=True)
        torch.testing.assert_close(tuple(states), expected.hidden_states, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            ours.project(states[-1], tokens), expected.text_embeds, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_dropping_layers_is_clip_skip_of_diffusers(count):
    stock = stock_model(ODD)
    ours = ours_of(stock, ODD)
    tokens = random_tokens(ours.config)
    hidden = stock(tokens, output_hidden_states=True).hidden_states[-(count + 1)]
    expected = stock.final_layer_norm(hidden)
    fewer = ours.drop_layers(count)
    torch.testing.assert_close(fewer(tokens), expected, rtol=1e-5, atol=1e-5)
    assert fewer.config.num_hidden_layers == len(fewer.encoder.layers) == 3 - count


def test_dropping_layers_shares_the_weights_and_leaves_the_encoder(odd):
    tokens = random_tokens(odd.config)
    before = odd(tokens)
    fewer = odd.drop_layers(1)
    ours = dict(odd.named_parameters())
    assert all(parameter is ours[name] for name, parameter in fewer.named_parameters())
    assert not fewer.training
    assert torch.equal(odd(tokens), before)


def test_a_token_sees_none_that_come_later(odd):
    tokens = random_tokens(odd.config)
    changed = tokens.clone()
    changed[:, 9:] = 5
    states, other = odd(tokens), odd(changed)
    torch.testing.assert_close(states[:, :9], other[:, :9])
    assert not torch.allclose(states[:, 9:], other[:, 9:])


def test_shorter_prompts_than_the_longest_are_taken(odd):
    tokens = random_tokens(odd.config)
    torch.testing.assert_close(odd(tokens[:, :7]), odd(tokens)[:, :7])


@pytest.mark.parametrize(("eos_token_id", "expected"), [(40, 2), (2, 3)])
def test_the_pooled_state_is_at_the_first_end_token_or_in_old_configs_at_the_largest(eos_token_id, expected):
    encoder = CLIPTextEncoder(CLIPTextConfig(**ODD | {"eos_token_id": eos_token_id}))
    tokens = torch.tensor([[7, 2, 40, 41, 40, 41]])
    states = torch.arange(6.0)[None, :, None].expand(1, 6, 30)
    assert torch.equal(encoder.pool(states, tokens), torch.full((1, 30), float(expected)))


# Files


def test_transformers_reads_what_we_write(odd, tmp_path):
    from ldm.files.checkpoint import load_model, save_model

    save_model(odd, tmp_path)
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "model.safetensors"))
    stock, report = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens = random_tokens(odd.config)
    torch.testing.assert_close(stock(tokens).last_hidden_state, odd(tokens), rtol=1e-5, atol=1e-5)
    assert torch.equal(load_model(CLIPTextEncoder, tmp_path, torch.float32)(tokens), odd(tokens))


@pytest.mark.parametrize("version", [4, 5])
def test_we_read_what_transformers_writes(version, tmp_path):
    from ldm.files.checkpoint import load_model

    stock = stock_model(ODD)
    stock.save_pretrained(tmp_path)  # version 5 writes the names without text_model.
    if version == 4:
        tensors = {f"text_model.{name}": value for name, value in stock.state_dict().items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(21)[None]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_model(CLIPTextEncoder, tmp_path, torch.float32)
    tokens = random_tokens(ours.config)
    torch.testing.assert_close(ours(tokens), stock(tokens).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_saved_names_read_back_to_our_own(odd):
    state = odd.state_dict()
    assert odd.rename_keys(odd.save_keys(state)).keys() == odd.rename_keys(state).keys() == state.keys()


def test_every_key_of_a_stock_config_is_understood():
    values = transformers.CLIPTextConfig(**ODD).to_dict() | {
        "use_attention_mask": False,
        "torch_dtype": "float16",
    }
    assert read_config(CLIPTextConfig, values, "config.json") == CLIPTextConfig(**ODD)


def test_our_defaults_are_those_of_transformers():
    stock, ours = transformers.CLIPTextConfig(), CLIPTextConfig()
    assert all(getattr(stock, name) == value for name, value in vars(ours).items())


# New weights


def test_new_weights_have_the_scale_of_clip_and_come_from_the_seed():
    sizes = SD1 | {"vocab_size": 900, "num_hidden_layers": 2}
    torch.manual_seed(3)
    first = CLIPTextEncoder(CLIPTextConfig(**sizes)).state_dict()
    torch.manual_seed(3)
    again = CLIPTextEncoder(CLIPTextConfig(**sizes)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    expected = {
        "embeddings.token_embedding.weight": 0.02,
        "embeddings.position_embedding.weight": 0.01,
        "encoder.layers.1.self_attn.v_proj.weight": 768**-0.5,
        "encoder.layers.1.self_attn.out_proj.weight": (4 * 768) ** -0.5,
        "encoder.layers.1.mlp.fc1.weight": (2 * 768) ** -0.5,
        "encoder.layers.1.mlp.fc2.weight": (4 * 768) ** -0.5,
    }
    for name, std in expected.items():
        assert first[name].std().item() == pytest.approx(std, rel=0.02), name
    assert not first["encoder.layers.0.mlp.fc1.bias"].any()
    assert (first["encoder.layers.0.layer_norm1.weight"] == 1).all()


# Errors


def test_more_tokens_than_positions(odd):
    with pytest.raises(ValueError, match="22 tokens, but this text encoder has 21 positions"):
        odd(torch.zeros(1, 22, dtype=torch.int64))


@pytest.mark.parametrize("count", [-1, 3])
def test_dropping_more_layers_than_there_are(odd, count):
    with pytest.raises(ValueError, match=f"clip_skip={count}: a text encoder of 3 layers takes 0 to 2"):
        odd.drop_layers(count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu' is not one of quick_gelu, gelu"),
        ({"num_attention_heads": 4}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPTextConfig(**ODD | change)


@pytest.mark.parametrize("change", [{"attention_dropout": 0.1}, {"use_attention_mask": True}, {"rope": 1}])
def test_configs_that_need_more_than_we_have_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        read_config(CLIPTextConfig, ODD | change, "config.json")
