"""From answers to settings: what is proposed, and that nothing chosen is changed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from simpletuner.config.json_reader import Document
from simpletuner.config.lycoris import check_lycoris
from simpletuner.errors import ConfigError
from simpletuner.families.presets import preset_for
from simpletuner.families.registry import family_names, get_spec
from simpletuner.hardware import GIB, Hardware
from simpletuner.wizard.answers import ImageFacts, read_goal
from simpletuner.wizard.images import missing_captions
from simpletuner.wizard.lycoris import Lycoris, lycoris_settings
from simpletuner.wizard.plan import make_plan, nicknames
from simpletuner.wizard.proposals import card_preset, proposed_learning_rate, proposed_steps
from tests.unit.wizard.projects import CPU, LARGE_GPU, SMALL_GPU, answers

FEW = ImageFacts(usable=20, with_text=0, with_name=20, side=700)


@pytest.mark.parametrize(
    ("optimizer", "goal", "expected"),
    [
        ("adamw_bf16", "subject", 1e-4),
        ("bnb-lion8bit-paged", "style", 2e-5),
        ("adamw", "full", 1e-5),
        ("prodigy", "subject", 1.0),
        ("optimi-lion", "subject", 2e-5),
        ("torch-sgd", "subject", 1e-2),
        ("muon", "subject", 1e-4),
    ],
)
def test_the_learning_rate_follows_the_optimizer(optimizer: str, goal: str, expected: float):
    assert proposed_learning_rate(optimizer, goal) == pytest.approx(expected)


def test_what_somebody_chose_is_never_changed():
    chosen = {"learning_rate": 3e-6, "max_train_steps": 77, "lr_warmup_steps": 5, "mixed_precision": "no"}
    for goal in ("subject", "style", "full"):
        for hardware in (CPU, SMALL_GPU, LARGE_GPU):
            config = make_plan(answers(goal=goal, hardware=hardware, options=chosen)).config
            assert {name: config[name] for name in chosen} == chosen


def test_number_formats_and_batch_follow_the_machine():
    cpu, small, large = (make_plan(answers(hardware=each)).config for each in (CPU, SMALL_GPU, LARGE_GPU))
    assert (cpu["mixed_precision"], cpu["optimizer"]) == ("no", "adamw")
    assert (small["mixed_precision"], small["train_batch_size"], small["gradient_checkpointing"]) == ("bf16", 1, True)
    assert large["train_batch_size"] > small["train_batch_size"]


def test_an_adapter_is_proposed_as_it_was_computed_for_the_card():
    for gib, card in ((8, 8), (10, 8), (12, 12), (16, 16), (24, 24)):
        config = make_plan(answers(hardware=Hardware("cuda", "GPU", gib * GIB, 32 * GIB, 8))).config
        preset = preset_for("omnigen", "v1", card)
        assert preset is not None
        assert {name: config[name] for name in preset.options} == preset.options
        assert ("base_model_precision" in config) == (gib < 12)
    assert "base_model_precision" not in make_plan(answers(hardware=SMALL_GPU, goal="full")).config


def test_a_card_of_48_gib_is_roomy_and_needs_no_preset():
    cards = [answers(hardware=Hardware("cuda", "GPU", gib * GIB, 64 * GIB, 8)) for gib in (47, 48)]
    assert [card_preset(each) for each in cards] == [preset_for("omnigen", "v1", 24), None]


def test_on_a_card_without_a_preset_a_model_that_does_not_fit_is_quantized(monkeypatch: pytest.MonkeyPatch):
    """By hand: 3.76e9 weights are 7.0 GiB in 16 bits and 3.5 in 8; 4 GiB come beside them, of 90 % of the card."""
    monkeypatch.setattr("simpletuner.wizard.proposals._if_built", lambda option, value: value)
    monkeypatch.setattr("simpletuner.wizard.proposals._is_built", lambda option: True)
    monkeypatch.setattr("simpletuner.wizard.proposals.card_preset", lambda answers: None)
    formats = {}
    for gib in (6, 8, 10, 12, 16, 24):
        config = make_plan(answers(hardware=Hardware("cuda", "GPU", gib * GIB, 32 * GIB, 8))).config
        formats[gib] = (config.get("base_model_precision"), config.get("quantize_via"), config["optimizer"])
    paged = "bnb-lion8bit-paged"
    assert formats == {
        6: ("int4-quanto", "cpu", paged),  # nothing fits: the smallest
        8: ("nf4-bnb", "cpu", paged),
        10: ("int8-quanto", "cpu", paged),
        12: ("int8-quanto", "cpu", paged),
        16: (None, None, "adamw_bf16"),
        24: (None, None, "adamw_bf16"),
    }


def test_an_edit_is_taught_to_a_checkpoint_that_was_made_for_it():
    assert make_plan(answers(family="flux", goal="edit")).config["model_flavour"] == "kontext"
    assert "model_flavour" not in make_plan(answers(family="flux", goal="style")).config
    assert make_plan(answers(family="flux", flavour="dev", goal="edit")).config["model_flavour"] == "dev"
    assert "model_flavour" not in make_plan(answers(family="omnigen", goal="edit")).config


def test_pairs_become_two_entries_that_name_each_other():
    after = ImageFacts(usable=4, with_text=4, with_name=4, side=64, shapes=frozenset({(64, 64)}))
    given = answers(goal="edit", reference_images="before", seen={"images": after, "before": after})
    entries = make_plan(given).entries
    assert entries["images"]["conditioning_data"] == entries["references"]["id"] == "images-before"
    assert entries["references"]["dataset_type"] == "conditioning"
    assert entries["references"]["instance_data_dir"] == "before"
    assert entries["references"]["conditioning_type"] == "reference_strict"
    other = replace(after, shapes=frozenset({(64, 128)}))
    given = replace(given, seen={"images": after, "before": other}, dataset={"conditioning_data": "masks"})
    entries = make_plan(given).entries
    assert entries["references"]["conditioning_type"] == "reference_loose"
    assert entries["images"]["conditioning_data"] == ["masks", "images-before"]


def test_steps_and_resolution_follow_the_images():
    config = make_plan(answers(seen={"images": FEW})).config
    assert config["max_train_steps"] == 2000  # 100 passes over 20 images, one at a time
    assert (config["resolution"], config["validation_resolution"]) == (512, "512x512")
    unseen = make_plan(answers()).config
    assert unseen["resolution"] == 1024
    assert make_plan(answers(seen={"images": replace(FEW, side=512)})).config["resolution"] == 512
    small_model = answers(family="sd15", hardware=LARGE_GPU, seen={"images": replace(FEW, side=1000)})
    assert make_plan(small_model).config["resolution"] == 512  # what it was trained at, however large the images are


def test_images_for_prior_preservation_are_marked_as_such():
    entries = make_plan(answers(regularisation_images="others", eval_images="held_out")).entries
    marked = {name: entry.get("is_regularisation_data", False) for name, entry in entries.items()}
    assert marked == {"images": False, "regularisation": True, "eval": False}


def test_a_run_has_one_length():
    config = make_plan(answers(options={"num_train_epochs": 3})).config
    assert (config["max_train_steps"], config["num_train_epochs"]) == (0, 3)
    config = make_plan(answers(options={"max_train_steps": 77})).config
    assert (config["max_train_steps"], config["num_train_epochs"]) == (77, 0)


def test_the_first_prompt_is_an_option_and_the_others_are_a_file():
    plan = make_plan(answers(dataset={"instance_prompt": "ohwx dog"}))
    assert plan.config["validation_prompt"] == "ohwx dog"
    assert list(plan.prompts.values()) == [
        "ohwx dog on a beach at sunset",
        "a pencil drawing of ohwx dog",
        "a mountain lake in the morning",
    ]


@pytest.mark.parametrize(("with_text", "strategy"), [(20, "textfile"), (19, "filename"), (0, "filename")])
def test_text_files_are_read_where_each_image_of_a_folder_has_one(with_text: int, strategy: str):
    given = answers(regularisation_images="others", seen={"others": replace(FEW, with_text=with_text)})
    assert make_plan(given).entries["regularisation"]["caption_strategy"] == strategy


def test_captions_beside_the_images_are_used_and_a_name_is_put_in_front():
    with_text = ImageFacts(usable=20, with_text=20, with_name=20, side=700)
    entry = make_plan(answers(seen={"images": with_text}, dataset={"instance_prompt": "ohwx"})).entries["images"]
    assert entry["caption_strategy"] == "textfile"
    assert entry["prepend_instance_prompt"] is True
    entry = make_plan(answers(seen={"images": FEW}, dataset={"instance_prompt": "ohwx"})).entries["images"]
    assert entry["caption_strategy"] == "instanceprompt"
    assert "prepend_instance_prompt" not in entry


def test_full_training_has_no_adapter():
    plan = make_plan(answers(goal="full"))
    assert plan.config["model_type"] == "full"
    assert "lora_type" not in plan.config
    assert plan.lycoris is None


@pytest.mark.parametrize("family", family_names())
def test_the_adapter_s_targets_exist_in_every_family(family: str):
    spec = get_spec(family)
    document = Document("lycoris_config.json", lycoris_settings(spec, Lycoris()))
    assert check_lycoris(document, spec) == []


def test_a_goal_is_one_of_those_there_are():
    assert read_goal("edit") == "edit"
    with pytest.raises(ConfigError, match="not a goal") as caught:
        read_goal("sbject")
    assert caught.value.problems[0].fix == 'did you mean "subject"?'


def test_each_prompt_has_a_nickname_of_its_own_and_keeps_the_one_it_had():
    names = nicknames(("a cat", "A cat!", "a dog", "validation"), {"rex": "a dog", "a_cat": "something else"})
    assert list(names.values()) == ["a cat", "A cat!", "a dog", "validation"]
    assert names["rex"] == "a dog"
    assert {"a_cat", "validation"}.isdisjoint(names)


def test_the_names_of_a_camera_are_not_proposed_as_captions():
    strategies = {}
    for facts in (FEW, replace(FEW, are_numbered=True)):
        entry = make_plan(answers(goal="style", seen={"images": facts})).entries["images"]
        strategies[facts.are_numbered] = entry["caption_strategy"]
    assert strategies == {False: "filename", True: "instanceprompt"}


def test_an_edit_is_validated_with_an_instruction_of_the_pairs():
    facts = replace(FEW, with_text=20, caption="turn it into a generating")
    config = make_plan(answers(goal="edit", reference_images="before", seen={"images": facts})).config
    assert config["validation_prompt"] == "turn it into a generating"


def test_results_are_filed_under_the_name_of_the_configuration():
    assert make_plan(answers()).config["output_dir"] == "output/images"
    assert make_plan(answers(name="luna")).config["output_dir"] == "output/luna"


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(20, 1, 2000), (20, 4, 500), (12, 2, 600), (500, 1, 3000), (1, 1, 500)]
)
def test_a_subject_is_seen_a_hundred_times_within_limits(images: int, batch: int, steps: int):
    facts = SimpleNamespace(usable=images)
    given = replace(answers(goal="subject"), seen={"images": facts})
    assert proposed_steps(given, batch) == steps


def test_intervals_of_a_run_of_a_few_steps_are_at_least_one():
    config = make_plan(answers(options={"max_train_steps": 3}, eval_images="held_out")).config
    intervals = ("checkpoint_step_interval", "validation_step_interval", "eval_steps_interval")
    assert [config[name] for name in intervals] == [1, 1, 1]
    assert config["lr_warmup_steps"] == 0


@pytest.mark.parametrize(
    ("strategy", "fallback", "has_prompt", "missing"),
    [
        ("textfile", None, False, 15),
        ("filename", None, False, 8),
        ("instanceprompt", None, False, 0),
        ("textfile", "instanceprompt", True, 0),
        ("textfile", "filename", False, 3),
    ],
)
def test_images_without_a_caption_are_counted_by_what_each_strategy_finds(strategy, fallback, has_prompt, missing):
    """Of 20 images 5 have a text and 12 a name with words; 3 have neither."""
    facts = ImageFacts(usable=20, with_text=5, with_name=12, side=700, without_words=3)
    assert missing_captions(facts, strategy, fallback, has_prompt) == missing
