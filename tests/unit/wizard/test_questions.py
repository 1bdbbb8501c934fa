"""What is asked: only what acts, and only where it has a meaning."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from simpletuner.config.options import all_options
from simpletuner.data.captions import is_camera_name
from simpletuner.wizard.answers import Answers, ImageFacts
from simpletuner.wizard.files import without_secrets
from simpletuner.wizard.pages import page_of, pages
from simpletuner.wizard.plan import make_plan
from simpletuner.wizard.question import Question, Refused, option_questions
from simpletuner.wizard.questions import FACTOR, FALLBACK, FAMILY, FLAVOUR, LYCORIS_RANK, WEBHOOK, adapter_readers
from tests.unit.wizard.projects import answers

DISCORD = "https://discord.com/api/webhooks/1/secret"


def asked(given: Answers) -> set[str]:
    return {question.key for page in pages() for question in page.questions if question.applies(given)}


def test_an_option_that_does_not_act_is_not_asked_for():
    planned = {name for name, info in all_options().items() if info.planned}
    assert planned
    assert not planned & asked(answers())
    assert option_questions(dict.fromkeys(planned, "")) == ()


def test_what_another_answer_rules_out_is_not_asked_for():
    assert {"factor", "regularisation_images"} <= asked(answers())
    assert not {"factor", "regularisation_images"} & asked(answers(goal="full"))
    assert "reference_images" not in asked(answers())
    assert "reference_images" in asked(answers(goal="edit"))
    assert "hub_model_id" not in asked(answers())
    assert "hub_model_id" in asked(answers(options={"push_to_hub": True}))
    assert "lora_rank" not in asked(answers())
    assert ("lora_rank" in asked(answers(adapter="lora")), "factor" in asked(answers(adapter="lora"))) == (True, False)


def test_a_flavour_says_what_it_takes():
    [(name, words)] = FLAVOUR.choices(answers())
    assert name == "v1"
    assert "Shitao/OmniGen-v1-diffusers, MIT; 7 GiB in bf16, 4 in int8" in words


def test_families_are_reported_in_a_line_of_80_columns():
    words = dict(FAMILY.choices(answers()))
    assert words["omnigen"] == "OmniGen              3.8 billion parameters, 7 GiB, edits too"
    assert "edits" not in words["sdxl"]
    assert max(map(len, words.values())) <= 70


def reported(question: Question) -> Callable[..., Answers]:
    return lambda text, given=None: question.write(given or answers(), text)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (DISCORD, {"webhook_type": "discord", "webhook_url": DISCORD}),
        ("http://localhost:8001/x", {"webhook_type": "raw", "callback_url": "http://localhost:8001/x"}),
        ("${MY_DISCORD}", {"webhook_type": "discord", "webhook_url": "${MY_DISCORD}"}),
        ("config/webhook.json", "config/webhook.json"),
        ("", None),
    ],
)
def test_the_address_of_a_webhook_says_what_it_is(text: str, written: object):
    given = reported(WEBHOOK)(text)
    assert given.options["webhook_config"] == written
    assert WEBHOOK.read(given, make_plan(given)) == text


def test_another_address_keeps_what_else_was_said_of_a_webhook():
    before = {"webhook_type": "discord", "webhook_url": DISCORD, "message_prefix": "luna"}
    given = reported(WEBHOOK)("https://example.org/hook", answers(options={"webhook_config": before}))
    assert given.options["webhook_config"] == {
        "webhook_type": "raw",
        "callback_url": "https://example.org/hook",
        "message_prefix": "luna",
    }


@pytest.mark.parametrize(
    ("question", "key", "most"), [(FACTOR, "factor", 64), (LYCORIS_RANK, "rank", 4096)], ids=["factor", "rank"]
)
def test_a_size_is_a_whole_number_within_its_limits(question: Question, key: str, most: int):
    for number in (1, most):
        assert getattr(question.write(answers(), str(number)), key) == number
    for text in ("0", str(most + 1), "-1", "1.5", "", "²"):
        with pytest.raises(Refused, match=f"allowed: 1 to {most}"):
            question.write(answers(), text)


def test_an_address_is_not_shown():
    assert without_secrets(f'+    "webhook_url": "{DISCORD}",') == '+    "webhook_url": "(not shown)",'
    assert without_secrets('+    "auth_token": "${TOKEN}",') == '+    "auth_token": "${TOKEN}",'
    for key in ("webhook_url", "callback_url", "auth_token", "aws_access_key_id", "aws_secret_access_key"):
        assert without_secrets(f'"{key}" : "abc"') == f'"{key}" : "(not shown)"'
    assert without_secrets(r'"auth_token": "a\"bc", "x": "y"') == '"auth_token": "(not shown)", "x": "y"'
    text = json.dumps(json.dumps([{"webhook_type": "discord", "webhook_url": DISCORD}]))
    assert without_secrets(f'"--webhook_config": {text}') == '"--webhook_config": "(not shown)"'
    assert without_secrets('"webhook_config": "config/hooks.json"') == '"webhook_config": "config/hooks.json"'


@pytest.mark.parametrize(
    ("name", "is_numbered"),
    [
        ("IMG_2031.jpg", True),
        ("holiday/DSC-0007.JPG", True),
        ("00012.png", True),
        ("PXL_20240101_103412_edited.jpg", True),
        ("a_red_star.png", False),
        ("luna 3.png", False),
        ("红星.png", False),
    ],
)
def test_the_numbers_of_a_camera_are_no_captions(name: str, is_numbered: bool):
    assert is_camera_name(name) is is_numbered


def test_a_fault_names_the_page_that_asks_for_it():
    assert page_of("subject.instance_data_dir") == "3, Images"
    assert page_of("subject.instance_prompt") == "3, Images"
    assert page_of("learning_rate") == "4, Training"
    assert page_of("pretrained_model_name_or_path") == "2, Model"
    assert page_of("lr_end") is None


@pytest.mark.parametrize(
    ("adapter", "readers"),
    [("lora", "read by diffusers, ComfyUI, A1111, Forge and kohya's scripts"), ("dora", "read by diffusers")],
)
def test_the_readers_of_an_adapter_are_those_of_the_form_that_training_writes(adapter: str, readers: str):
    """Of SDXL: kohya's form, and diffusers' for DoRA."""
    assert adapter_readers(answers(family="sdxl", adapter=adapter)) == readers


@pytest.mark.parametrize(
    ("family", "adapter"),
    [("omnigen", "lokr"), ("sdxl", "lokr"), ("flux2", "lokr"), ("omnigen2", "lora"), ("hunyuan_dit", "lora")],
)
def test_lora_is_proposed_where_programs_read_no_lokr_file_of_the_family(family: str, adapter: str):
    """Of OmniGen no program reads either. What somebody has chosen stays."""
    assert FAMILY.write(answers(), family).adapter == adapter
    back = FAMILY.write(FAMILY.write(answers(), family), "sdxl")
    assert (back.adapter, back.rank) == ("lokr", None)
    assert FAMILY.write(answers(adapter="loha"), family).adapter == "loha"


@pytest.mark.parametrize(
    ("with_text", "without_words", "prompt", "expected"),
    [
        (2, 0, None, "filename"),
        (2, 1, None, "instanceprompt"),
        (2, 0, "my cat", "instanceprompt"),
        (4, 0, "my cat", None),
        (0, 4, "my cat", None),
    ],
)
def test_what_stands_in_for_missing_texts_is_asked_where_some_are_missing(with_text, without_words, prompt, expected):
    facts = ImageFacts(usable=4, with_text=with_text, with_name=4, side=64, without_words=without_words)
    given = answers(seen={"images": facts}, dataset={"instance_prompt": prompt} if prompt else {})
    assert FALLBACK.applies(given) is (expected is not None)
    assert FALLBACK.read(given, make_plan(given)) == expected
    if expected:
        other = "filename" if expected == "instanceprompt" else "instanceprompt"
        assert other in dict(FALLBACK.choices(given))
        changed = FALLBACK.write(given, other)
        assert make_plan(changed).entries["images"]["caption_fallback"] == other
