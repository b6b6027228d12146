"""The models whose single files are known: what each consists of, and by which shapes a file shows it.

The values are those of the published models' configurations. A number of attention heads, a noise schedule or
a kind of prediction leaves no trace in the shapes of weights: therefore a kind, not a guess at each key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoencoder.vae import AutoencoderKLConfig
from ldm.diffusion.scheduler import FLOW
from ldm.formats.keys import CLIP, OPEN_CLIP, UNET
from ldm.formats.vocabulary import SD2_PAD
from ldm.model.architecture import UNetConfig
from text_encoder.clip import CLIPTextConfig
from text_encoder.tokenizer import END

TO_IMAGE, INPAINT, UPSCALE = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionUpscalePipeline",
)
PREDICTIONS = ("epsilon", "v_prediction")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A published model without its weights."""

    title: str
    pipeline: str  # diffusers' class, as model_index.json names it
    unet: UNetConfig
    vae: AutoencoderKLConfig
    text_encoder: CLIPTextConfig
    scheduler: Mapping[str, Any]
    pad: str = END  # of the tokenizer
    low_res_scheduler: Mapping[str, Any] | None = None  # noise on the small picture of an upscaler
    max_noise_level: int | None = None  # of that noise, the most it was trained on

    @property
    def prediction(self) -> str:
        """By the name in scheduler_config.json, or "flow"."""
        flow = self.scheduler["_class_name"] == FLOW
        return "flow" if flow else self.scheduler.get("prediction_type", "epsilon")

    def configs(self) -> dict[str, Any]:
        """The configuration of each part with weights, by its name in a folder."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}


def _scheduler(name: str, prediction: str = "epsilon", beta: tuple[float, float] = (0.00085, 0.012)) -> dict:
    return {
        "_class_name": name,
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": beta[0],
        "beta_end": beta[1],
        "prediction_type": prediction,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "clip_sample": False,
    }


UNET_1 = UNetConfig(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
UNET_2 = UNetConfig(
    sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)
UNET_X4 = UNetConfig(
    sample_size=128,
    in_channels=7,  # 4 of latents, 3 of the small picture
    block_out_channels=(256, 512, 512, 1024),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    only_cross_attention=(True, True, True, False),
    cross_attention_dim=1024,
    attention_head_dim=8,
    use_linear_projection=True,
    num_class_embeds=1000,  # levels of noise on the small picture
)
VAE_F8 = AutoencoderKLConfig(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)
VAE_F4 = replace(
    VAE_F8,
    sample_size=256,
    block_out_channels=(128, 256, 512),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    scaling_factor=0.08333,
)
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, projection_dim=768
)
OPEN_CLIP_H = CLIPTextConfig(  # 23 of its 24 layers: SD 2 reads the penultimate state
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=23,
    hidden_act="gelu",
)

SD1 = Kind("Stable Diffusion 1", TO_IMAGE, UNET_1, VAE_F8, CLIP_L, _scheduler("PNDMScheduler"))
SD2_BASE = Kind(
    "Stable Diffusion 2 base", TO_IMAGE, UNET_2, VAE_F8, OPEN_CLIP_H, _scheduler("DDIMScheduler"), SD2_PAD
)
SD2_V = replace(
    SD2_BASE,
    title="Stable Diffusion 2 with v-prediction",
    unet=replace(UNET_2, sample_size=96, upcast_attention=True),
    vae=replace(VAE_F8, sample_size=768),
    scheduler=_scheduler("DDIMScheduler", "v_prediction"),
)
X4_NOISE = (0.0001, 0.02)
MAX_NOISE_LEVEL = 350
KINDS = {
    "sd1": SD1,
    "sd1-inpaint": replace(
        SD1,
        title="Stable Diffusion 1 for inpainting",
        pipeline=INPAINT,
        unet=replace(UNET_1, in_channels=9),  # 4 of latents, the mask, 4 of the masked picture
    ),
    "sd2-base": SD2_BASE,
    "sd2-v": SD2_V,
    "sd2-inpaint": replace(
        SD2_BASE,
        title="Stable Diffusion 2 for inpainting",
        pipeline=INPAINT,
        unet=replace(UNET_2, in_channels=9),
    ),
    "sd2-x4": replace(
        SD2_BASE,
        title="Stable Diffusion 2 x4 upscaler",
        pipeline=UPSCALE,
        unet=UNET_X4,
        vae=VAE_F4,
        scheduler=_scheduler("DDIMScheduler", "v_prediction", X4_NOISE),
        low_res_scheduler=_scheduler("DDPMScheduler", "epsilon", X4_NOISE),
        max_noise_level=MAX_NOISE_LEVEL,
    ),
}
# What else single files hold: the weights that come out of them, what makes them known.
CONTEXT = UNET + "{}.transformer_blocks.0.attn2.to_k.weight"
NOT_THESE = {  # a name that begins like this, and whose file it is
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "Flux",
    "model.diffusion_model.double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "lora_unet_": "a LoRA, which is added to a model",
    "lora_te_": "a LoRA, which is added to a model",
    "down_blocks.": "a UNet alone, in diffusers' names: it belongs into the folder unet/",
    "encoder.down.": "an autoencoder alone",
}


def fingerprint(shapes: Shapes) -> dict[str, Any]:
    """What tells the kinds apart: channels that come in, width of the context and whose text encoder."""
    into = shapes.get(UNET + "input_blocks.0.0.weight", (0, 0))
    context = next(
        (
            shapes[name]
            for block in ("input_blocks.1.1", "input_blocks.4.1")
            if (name := CONTEXT.format(block)) in shapes
        ),
        (0, 0),
    )
    open_clip = OPEN_CLIP + "token_embedding.weight" in shapes
    return {
        "channels that come in": into[1],
        "channels of the first level": into[0],
        "width of the context": context[-1],
        "text encoder": "OpenCLIP's" if open_clip else "CLIP's" if has_clip(shapes) else "none",
    }


def has_clip(shapes: Shapes) -> bool:
    """Whether the text encoder of SD 1 is there, in either of its spellings."""
    tail = "embeddings.token_embedding.weight"
    return CLIP + tail in shapes or CLIP.removesuffix("text_model.") + tail in shapes


def fingerprint_of(kind: Kind) -> dict[str, Any]:
    """The fingerprint of a file of this kind."""
    return {
        "channels that come in": kind.unet.in_channels,
        "channels of the first level": kind.unet.block_out_channels[0],
        "width of the context": kind.unet.cross_attention_dim,
        "text encoder": "OpenCLIP's" if kind.text_encoder.hidden_act == "gelu" else "CLIP's",
    }


def recognise(shapes: Shapes, source: str) -> list[str]:
    """The names in KINDS that a file's shapes allow: one, or both of SD 2, which differ in what they predict.

    Raises ValueError, with what was found, if it is none of them.
    """
    found = fingerprint(shapes)
    names = [name for name, kind in KINDS.items() if fingerprint_of(kind) == found]
    if not names:
        for head, what in NOT_THESE.items():
            if any(name.startswith(head) for name in shapes):
                raise ValueError(f"{source} is of {what}: expected a whole Stable Diffusion 1 or 2")
        seen = ", ".join(f"{what}: {value}" for what, value in found.items())
        raise ValueError(
            f"{source} is no single file of a known model ({seen}): known are "
            f"{', '.join(kind.title for kind in KINDS.values())}. For another, name a folder with its "
            "configuration"
        )
    return names
