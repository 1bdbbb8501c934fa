"""Token ids, positions and masks against diffusers' processor (golden) and transformers' tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from simpletuner.errors import DataError
from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.tokens import (
    PREFIX,
    SUFFIX,
    PromptTokenizer,
    collate_tokens,
    embeds_from_tokens,
)
from tests.tiny import GOLDEN

CASES = json.loads((GOLDEN / "omnigen" / "processor_cases.json").read_text())
TEXT = PREFIX + "a red  circle <img>on a</img> blue background" + SUFFIX


def golden_tokenizer(max_tokens: int = 1024) -> PromptTokenizer:
    backend = Tokenizer.from_file(str(GOLDEN / "omnigen" / "tokenizer" / "tokenizer.json"))
    return PromptTokenizer(backend, max_tokens)


def rows_of(case: dict) -> list[tuple[str, list[tuple[int, int]]]]:
    """The golden rows: prompts, negative prompts, then, with input images, the images alone."""
    prompts, negative = case["prompts"], CASES["negative_prompt"]
    if case["input_image_sizes_wh"] is None:
        return [(prompt, []) for prompt in prompts] + [(negative, [])] * len(prompts)
    sizes = [tuple(shape[-2:]) for shape in case["processed_image_shapes"]]
    sizes = sizes[: len(case["input_image_sizes_wh"][0])]
    tags = " ".join(f"<img><|image_{i + 1}|></img>" for i in range(len(sizes)))
    return [(prompts[0], sizes), (negative, []), (tags, sizes)]


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_a_batch_has_the_layout_of_the_public_processor(case: dict):
    tokenizer = golden_tokenizer()
    embeds = [embeds_from_tokens(tokenizer(prompt, sizes)) for prompt, sizes in rows_of(case)]
    num_image = case["height"] * case["width"] // 256
    rows = collate_tokens(embeds, [], torch.device("cpu"))

    assert rows.input_ids.tolist() == case["input_ids"]
    assert rows.position_ids(num_image).tolist() == case["position_ids"]
    spans = {str(i): [[start, end] for start, end, _ in row] for i, row in enumerate(rows.reference_spans) if row}
    assert spans == case["input_image_spans"]

    golden = torch.tensor([[[int(digit) for digit in line] for line in mask] for mask in case["attention_mask"]]).bool()
    num_condition = rows.num_text + 1
    padding = (rows.num_text - rows["lengths"]).tolist()
    for index, pad in enumerate(padding):
        causal = torch.ones(num_condition, num_condition, dtype=torch.bool).tril()
        condition = causal if rows.condition_mask is None else rows.condition_mask[index, 0]
        assert torch.equal(condition[pad:], golden[index, pad:num_condition, :num_condition])
        visible = torch.ones(rows.num_text) if rows.text_visible is None else rows.text_visible[index]
        assert torch.equal(visible.bool().expand(num_image, -1), golden[index, num_condition:, : rows.num_text])
        assert not golden[index, pad:num_condition, num_condition:].any()
        assert golden[index, num_condition:, num_condition:].all()


def llama_like_folder(path: Path, has_prepend: bool, config: dict) -> Path:
    """A small tokenizer built as Llama's are: byte fallback BPE, `▁` for spaces, chat tags, BOS by post-processor."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if has_prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + alphabet, show_progress=False)
    tokenizer.train_from_iterator([PREFIX, "a red circle on a blue background"] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tags = ["<|user|>", "<|end|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(tag, rstrip=True, normalized=False) for tag in tags])
    tokenizer.add_special_tokens([AddedToken(tag, normalized=False) for tag in ("<|diffusion|>", "<img>", "</img>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (path / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", **config}
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def ids_of(folder: Path, prompt: str) -> list[int]:
    return PromptTokenizer.from_source(ModelSource(str(folder)), get_spec("omnigen"))(prompt).input_ids


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_a_llama_tokenizer_gives_the_ids_of_transformers(tmp_path: Path, config: dict):
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **config}
    folder = llama_like_folder(tmp_path, has_prepend=False, config=config)
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = ids_of(folder, "a red  circle <img>on a</img> blue background")
    assert ids == theirs(TEXT).input_ids
    assert ids[0] == theirs.bos_token_id


def test_the_normalizer_of_the_file_rules_as_when_the_weights_were_trained(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    folder = llama_like_folder(tmp_path, has_prepend=True, config=config)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"))
    assert ids_of(folder, "a red  circle <img>on a</img> blue background") == theirs(TEXT).input_ids


def test_the_golden_tokenizer_gives_the_ids_of_transformers():
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(GOLDEN / "omnigen" / "tokenizer")
    assert golden_tokenizer()("a red  circle <img>on a</img> blue background").input_ids == theirs(TEXT).input_ids


def test_later_chunks_of_an_edit_prompt_have_no_bos(tmp_path: Path):
    folder = llama_like_folder(tmp_path, has_prepend=False, config={"add_bos_token": True})
    tokenizer = PromptTokenizer.from_source(ModelSource(str(folder)), get_spec("omnigen"))
    ids = tokenizer("turn <img><|image_1|></img> green", [(32, 32)]).input_ids
    assert ids[0] == 1
    assert 1 not in ids[1:]


def test_a_long_prompt_loses_its_end_and_keeps_the_template():
    long = "a red circle on a blue background, " * 20
    whole = golden_tokenizer()(long)
    cut = golden_tokenizer(max_tokens=40)(long)
    tail = golden_tokenizer()("").input_ids[-5:]
    assert not whole.is_cut
    assert cut.is_cut
    assert len(cut.input_ids) == 40
    assert cut.input_ids == whole.input_ids[:35] + tail
    length = len(whole.input_ids)
    assert [golden_tokenizer(max_tokens=most)(long).is_cut for most in (length, length - 1)] == [False, True]


def test_an_image_may_stand_twice_in_a_prompt():
    tokens = golden_tokenizer()(
        "<img><|image_1|></img> and <img><|image_2|></img>, <img><|image_1|></img>", [(16, 32), (32, 32)]
    )
    assert [(end - start, index) for start, end, index in tokens.reference_spans] == [(2, 0), (4, 1), (2, 0)]
    assert all(tokens.input_ids[start:end] == [0] * (end - start) for start, end, _ in tokens.reference_spans)


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [
        ("<img><|image_1|></img>", [(16, 16)] * 2),
        ("<img><|image_1|></img>", []),
        ("<img><|image_2|></img>", [(16, 16)]),
        ("<img><|image_1|></img><img><|image_3|></img>", [(16, 16)] * 3),
    ],
)
def test_placeholders_that_do_not_fit_the_images_are_refused(prompt: str, sizes: list[tuple[int, int]]):
    with pytest.raises(DataError, match="input images"):
        golden_tokenizer()(prompt, sizes)


def test_a_tokenizer_folder_without_tokenizer_json_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        PromptTokenizer.from_source(ModelSource(str(tmp_path)), get_spec("omnigen"))


def test_input_images_that_a_prompt_does_not_name_stand_in_front_of_it():
    tokenizer = golden_tokenizer()
    sizes = [(32, 32), (16, 48)]
    named = tokenizer("<img><|image_1|></img> <img><|image_2|></img> make it green", sizes)
    assert tokenizer("make it green", sizes) == named
