"""From answers to the settings of a run, file by file. Pure: the same answers give the same settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.config.options import all_options
from simpletuner.config.rules.adapter import STANDARD_KEYS
from simpletuner.wizard import proposals
from simpletuner.wizard.answers import Answers
from simpletuner.wizard.lycoris import lycoris_settings

# What held-out images have in common with those that are trained on.
_SHARED_KEYS = (
    *("caption_strategy", "caption_fallback", "instance_prompt", "prepend_instance_prompt", "only_instance_prompt"),
    "crop",
)


@dataclass(frozen=True)
class Plan:
    """The settings of a run, file by file; names of files are not part of it.

    Args:
        config: options of config.json.
        entries: role (`images`, `references`, `regularisation`, `eval`) -> entry of the data file.
        lycoris: content of lycoris_config.json, None where nothing of LyCORIS is trained.
        prompts: nickname -> prompt, of the library; the first prompt is `validation_prompt`.
    """

    config: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]
    lycoris: Mapping[str, Any] | None
    prompts: Mapping[str, str]


def make_plan(answers: Answers) -> Plan:
    """Every setting of the run.

    Raises:
        ConfigError: the family is unknown.
    """
    prompts = answers.prompts if answers.prompts is not None else proposals.proposed_prompts(answers)
    training = _training_options(answers)
    config = {**_model_options(answers), **training, **_validation_options(answers, training)}
    config |= {"validation_prompt": prompts[0]} if prompts else {}
    chosen = answers.lycoris
    unused = STANDARD_KEYS if chosen or answers.goal == "full" else ()
    return Plan(
        config=config
        | {name: value for name, value in answers.options.items() if value is not None and name not in unused},
        entries=_entries(answers),
        lycoris=lycoris_settings(answers.spec, chosen) if chosen else None,
        prompts=nicknames(prompts[1:]),
    )


def _model_options(answers: Answers) -> dict[str, Any]:
    options: dict[str, Any] = {"model_family": answers.family}
    if answers.flavour or answers.flavour_name != answers.spec.default_flavour:
        options["model_flavour"] = answers.flavour_name
    if answers.model:
        options["pretrained_model_name_or_path"] = answers.model
    options["model_type"] = "full" if answers.goal == "full" else "lora"
    if answers.goal != "full":
        options |= {"lora_type": "lycoris"} if answers.lycoris else {"lora_type": "standard", "lora_rank": 16}
        options |= {"use_dora": True} if answers.adapter == "dora" else {}
    return options


def _training_options(answers: Answers) -> dict[str, Any]:
    """Data, length, learning and memory; proposals read what was chosen before them."""
    chosen = answers.options
    options = proposals.memory_options(answers)
    batch = chosen.get("train_batch_size", options["train_batch_size"])
    steps = chosen.get("max_train_steps", proposals.proposed_steps(answers, batch))
    optimizer = chosen.get("optimizer", options["optimizer"])
    is_full = answers.goal == "full"
    options |= {
        "output_dir": f"output/{answers.name or proposals.folder_name(answers.images) or answers.family}",
        "resolution": proposals.proposed_resolution(answers),
        "resolution_type": "pixel_area",
        "max_train_steps": 0 if chosen.get("num_train_epochs") else steps,
        "num_train_epochs": 0,
        "learning_rate": proposals.proposed_learning_rate(optimizer, answers.goal),
        "lr_scheduler": "constant",
        "lr_warmup_steps": min(100, steps // 10),
        "grad_clip_method": "norm" if is_full else "value",
        "max_grad_norm": 1.0 if is_full else 0.01,
        "caption_dropout_probability": 0.1,
        "gradient_accumulation_steps": 1,
        "seed": 42,
        "checkpoint_step_interval": max(1, steps // 5),
        "checkpoints_total_limit": 3,
        "resume_from_checkpoint": "latest",
        "report_to": "tensorboard",
    }
    if answers.eval_images or chosen.get("eval_holdout"):
        options["eval_steps_interval"] = max(1, steps // 10)
    return options


def _validation_options(answers: Answers, training: Mapping[str, Any]) -> dict[str, Any]:
    side = answers.options.get("resolution", training["resolution"])
    is_area = answers.options.get("resolution_type") == "area"
    steps = training["max_train_steps"] or proposals.proposed_steps(answers, training["train_batch_size"])
    declared, native = all_options(), answers.spec.defaults_for(answers.flavour_name)
    names = ("validation_num_inference_steps", "validation_guidance")
    return {
        "validation_step_interval": max(1, steps // 10),
        "validation_resolution": "1024x1024" if is_area else f"{int(side)}x{int(side)}",
        **{name: native.get(name, declared[name].default) for name in names},
        "validation_seed": 42,
    }


def _entries(answers: Answers) -> dict[str, dict[str, Any]]:
    main = {
        "id": proposals.folder_name(answers.images) or "images",
        "type": "local",
        "instance_data_dir": answers.images,
        "caption_strategy": proposals.proposed_captions(answers),
        "crop": False,
        "repeats": 0,
        **answers.dataset,
    }
    fallback = proposals.proposed_fallback(answers)
    if main["caption_strategy"] == "textfile" and fallback and not main.get("only_instance_prompt"):
        main.setdefault("caption_fallback", fallback)
    if main["caption_strategy"] != "instanceprompt" and "instance_prompt" in main:
        main.setdefault("prepend_instance_prompt", True)
    entries = {"images": main}
    if answers.reference_images:
        entries["references"] = reference = {
            "id": f"{main['id']}-before",
            "type": "local",
            "dataset_type": "conditioning",
            "conditioning_type": answers.reference_type or proposals.proposed_reference_type(answers),
            "instance_data_dir": answers.reference_images,
        }
        others = main.get("conditioning_data") or []
        others = [others] if isinstance(others, str) else list(others)
        main["conditioning_data"] = [*others, reference["id"]] if others else reference["id"]
    if answers.regularisation_images:
        facts = answers.seen.get(answers.regularisation_images)
        entries["regularisation"] = {
            "id": "regularisation",
            "type": "local",
            "instance_data_dir": answers.regularisation_images,
            "caption_strategy": facts.captions if facts else "filename",
            "crop": False,
            "is_regularisation_data": True,
        }
    if answers.eval_images:
        same = {key: main[key] for key in _SHARED_KEYS if key in main}
        head = {"id": f"{main['id']}-eval", "type": "local", "dataset_type": "eval"}
        entries["eval"] = {**head, "instance_data_dir": answers.eval_images, **same}
    return entries


def nicknames(prompts: tuple[str, ...], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Names for files of prompts: those that `known` has, else their first words; each prompt once.

    Args:
        known: nickname -> prompt of a library that exists already.
    """
    taken = {prompt: nickname for nickname, prompt in (known or {}).items()}
    library: dict[str, str] = {}
    for prompt in dict.fromkeys(prompts):
        words = "_".join(re.findall(r"\w+", prompt.lower())[:5])[:60] or "prompt"
        number, nickname = 1, taken.get(prompt, words)
        while prompt not in taken and (nickname in library or nickname in taken.values() or nickname == "validation"):
            number += 1
            nickname = f"{words}_{number}"
        library[nickname] = prompt
    return library
