"""Tiny text encoders and tokenizers in the real file formats, made without a download."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(path: Path, pad_token: str = CLIP_END) -> Path:
    """A CLIP tokenizer whose words are their bytes: the vocabulary of the real one without its merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *[f"{letter}</w>" for letter in letters], CLIP_START, CLIP_END]
    path.mkdir(parents=True)
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": pad_token}
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def tiny_clip(hidden_size: int, projection_dim: int, with_projection: bool, seed: int = 0) -> torch.nn.Module:
    """A stock CLIP text encoder over `write_clip_tokenizer`'s 514 tokens."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=projection_dim,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        # As in the released SDXL and FLUX.1: 2 makes transformers look for the largest id, which is the end's.
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
        initializer_factor=3.0,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def write_t5_tokenizer(path: Path) -> Path:
    """A T5 tokenizer whose pieces are single letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, *string.digits, *".,-"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def write_bert_tokenizer(path: Path) -> Path:
    """A BERT tokenizer whose words are single letters."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    letters = [*string.ascii_lowercase, *string.digits, *".,-"]
    tokens = [*special.values(), "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    path.mkdir(parents=True)
    (path / "vocab.txt").write_text("\n".join(tokens))
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def tiny_bert(hidden_size: int = 16, seed: int = 0) -> BertModel:
    """A stock BERT over `write_bert_tokenizer`'s 83 tokens, without its pooler."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=96,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        initializer_range=0.5,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def tiny_t5(hidden_size: int = 16, seed: int = 0) -> T5EncoderModel:
    """A stock T5 encoder (v1.1, as FLUX.1 and SD3 use it)."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64,
        d_model=hidden_size,
        d_kv=8,
        d_ff=2 * hidden_size,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        initializer_factor=1.0,
    )
    return T5EncoderModel(config).eval()


def write_gemma_tokenizer(path: Path) -> Path:
    """A Gemma tokenizer whose pieces are single letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, *string.digits]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    GemmaTokenizer(vocab=numbers, merges=[], add_bos_token=True).save_pretrained(path)
    return path


def tiny_gemma2(hidden_size: int = 16, seed: int = 0) -> Gemma2Model:
    """A stock Gemma 2 over `write_gemma_tokenizer`'s 324 tokens, whose second layer sees a window only."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=324,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        initializer_range=0.5,
    )
    return Gemma2Model(config).eval()


def tiny_qwen3(cls: type, vocab_size: int = 261, hidden_size: int = 16, num_layers: int = 4) -> torch.nn.Module:
    """A stock Qwen3 over the tokens of `write_qwen2_tokenizer`, with or without its head."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )
    model = cls(config).eval()
    model.base_model.norm.weight.data.uniform_(0.5, 2)  # with ones, a state normed twice would be the same
    # Embeddings of the released model's initial size (0.02) would make all prompts alike.
    model.base_model.embed_tokens.weight.data.mul_(50)
    return model
