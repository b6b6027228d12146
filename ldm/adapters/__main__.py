"""The command line `python -m ldm.adapters`: an adapter from one spelling to another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

EXAMPLES = """
A LoRA, LoCon, LoHa, LoKr or DoRA is a table of small tensors, and each program calls them by other names:

  diffusers  unet.mid_block.attentions.0.proj_in.lora_A.weight             LoRA and DoRA
  kohya      lora_unet_mid_block_attentions_0_proj_in.lora_down.weight     all kinds: webui, ComfyUI, LyCORIS
  peft       base_model.model.mid_block.attentions.0.proj_in.lora_A.weight one model, config beside

SOURCE may be in any of them, in CompVis' or in older ones of diffusers; the tensors are copied as they are.

examples:
  python -m ldm.adapters style.safetensors style-kohya.safetensors --spelling kohya
  python -m ldm.adapters run/adapter/ style.safetensors --spelling diffusers --model FOLDER

Exit status: 0 done, 2 it cannot be (nothing was written).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: 0, or 2 where the request cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm.adapters",
        description="Writes an adapter in another spelling.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a .safetensors, or a folder of one")
    parser.add_argument("target", metavar="TARGET", help="the .safetensors to write")
    parser.add_argument("--spelling", choices=("diffusers", "kohya", "peft"), required=True, help="of TARGET")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the model that it is for, by whose names and shapes it is checked; of SD 1 and 2 not needed",
    )
    args = parser.parse_args(argv)
    from ldm.adapters.convert import convert_adapter

    try:
        adapter = convert_adapter(args.source, args.target, args.spelling, args.model)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kinds = ", ".join(sorted({layer.kind for layer in adapter.layers.values()}))
    print(f"{args.target}: {len(adapter.layers)} layers ({kinds}) of {' and '.join(adapter.parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
