"""The tokenizer of the tiny OmniGen: byte-level BPE in which each word of the tiny world is one token.

Short sequences are what makes a transformer of five million parameters quick to train. Every word that has a
token here gets it by merges from its first letter on, so that no merge can break up another word; anything else
still encodes, in smaller pieces or bytes.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .shapes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES

# The order gives the ids. OmniGen's processor pads with 2 and drops a leading 1 from later chunks.
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|assistant|>",
    "<|diffusion|>",
    "<|end|>",
    "<img>",
    "</img>",
    "<cfg>",
)
# OmniGen puts this sentence before each prompt; as one token it costs nothing.
INSTRUCTION = "Generate an image according to the following instructions"
# Words that a first experiment with the example is likely to need. The base has never seen them.
FURTHER_WORDS = (
    "and the of in with under over next to image photo generating image same but replace change remove add make "
    "it shape object thing two three hexagon pentagon oval heart arrow moon sun house tree flower fish cat dog "
    "letter wheel drop cloud leaf bolt gold silver violet dark light bright left right top bottom middle centre"
)
TEMPLATE = "<|user|>\n" + INSTRUCTION + "\n{prompt}<|end|>\n<|assistant|>\n<|diffusion|>"


def process_words() -> list[str]:
    """Every word that a caption can contain, the new shape's included."""
    phrases = [*SHAPES, *COLORS, *BACKGROUNDS, *SIZES, *POSITIONS, "a", "background"]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def build_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that grow each word, with its leading space (written as in GPT-2), from the left."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(len(word)):
            merges["Ġ" + word[:end], word[end]] = None
    # "an" opens a caption, without a space. It comes last, so that it cannot take letters out of other words.
    merges["a", "n"] = None
    return list(merges)


def build_tokenizer() -> PreTrainedTokenizerFast:
    merges = build_merges([*process_words(), *FURTHER_WORDS.split()])
    pieces = [*SPECIAL_TOKENS, INSTRUCTION, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(INSTRUCTION, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        model_max_length=4096,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
