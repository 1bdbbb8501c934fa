"""Assembles the tiny OmniGen as a diffusers model folder.

Trained autoencoders go in as they are. The transformer is either fresh (seeded; the start of the project's own
full training) or a trained one. The folder is what the public OmniGen pipeline reads; only the preview decoder,
which no pipeline names, is added.

    python scripts/tiny_omnigen/build_model.py --autoencoders build/tiny_omnigen/autoencoders --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_omnigen.tokenizer import build_tokenizer

HIDDEN_SIZE = 256
NUM_LAYERS = 6
NUM_HEADS = 4
INTERMEDIATE_SIZE = 640
EMBEDDING_STD = 0.1


def build_transformer(vocab_size: int, pad_token_id: int, seed: int) -> OmniGenTransformer2DModel:
    """A fresh transformer with an initialization that suits its width."""
    num_frequencies = HIDDEN_SIZE // NUM_HEADS // 2
    factors = [1.0] * num_frequencies
    transformer = OmniGenTransformer2DModel(
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        intermediate_size=INTERMEDIATE_SIZE,
        num_layers=NUM_LAYERS,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rope_scaling={"short_factor": factors, "long_factor": factors},
        pos_embed_max_size=32,
        time_step_dim=256,
    )
    torch.manual_seed(seed)
    initialize(transformer)
    return transformer


@torch.no_grad()
def initialize(transformer: OmniGenTransformer2DModel) -> None:
    """Unit-variance projections, branches scaled down by depth, and an output that starts near nothing.

    The default of `nn.Embedding`, a standard deviation of 1, would drown every layer's first outputs.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            is_branch_end = name.endswith(("to_out.0", "down_proj"))
            depth_scale = (2 * NUM_LAYERS) ** -0.5 if is_branch_end else 1.0
            nn.init.normal_(module.weight, std=fan_in**-0.5 * depth_scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.normal_(transformer.proj_out.weight, std=0.02)


def write_model_index(output: Path) -> None:
    index = {
        "_class_name": "OmniGenPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "OmniGenTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def choose_transformer(
    trained: Path | None, num_tokens: int, pad_token_id: int, seed: int
) -> OmniGenTransformer2DModel:
    if trained is not None:
        return OmniGenTransformer2DModel.from_pretrained(trained, torch_dtype=torch.bfloat16)
    vocab_size = -(-num_tokens // 32) * 32
    return build_transformer(vocab_size, pad_token_id, seed).bfloat16()


def tidy_configurations(output: Path) -> None:
    """Takes out the folder that a configuration was loaded from, and what diffusers writes but warns of on reading."""
    for path in output.glob("*/config.json"):
        entries = json.loads(path.read_text(encoding="utf-8"))
        entries.pop("_name_or_path", None)
        if entries["_class_name"] == "AutoencoderTiny":
            entries.pop("block_out_channels", None)
        path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_model(output: Path, autoencoders: Path, trained_transformer: Path | None, seed: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(output / "tokenizer")
    FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1).save_pretrained(output / "scheduler")
    AutoencoderKL.from_pretrained(autoencoders / "vae").save_pretrained(output / "vae")
    # Half precision is plenty for a glance, and the shipped folder has to stay below 16 MB.
    preview = AutoencoderTiny.from_pretrained(autoencoders / "preview_decoder", torch_dtype=torch.float16)
    preview.save_pretrained(output / "preview_decoder")
    transformer = choose_transformer(trained_transformer, len(tokenizer), tokenizer.pad_token_id, seed)
    transformer.save_pretrained(output / "transformer")
    write_model_index(output)
    tidy_configurations(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--autoencoders", type=Path, default=Path("build/tiny_omnigen/autoencoders"))
    parser.add_argument("--transformer", type=Path, help="a trained transformer folder; without it, a fresh one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for needed in (arguments.autoencoders / "vae", arguments.autoencoders / "preview_decoder", arguments.transformer):
        if needed is not None and not needed.is_dir():
            parser.error(f"there is no folder {needed}; train_autoencoders.py writes the autoencoders")
    build_model(arguments.output, arguments.autoencoders, arguments.transformer, arguments.seed)
    size = sum(path.stat().st_size for path in arguments.output.rglob("*") if path.is_file())
    print(f"wrote {arguments.output}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
