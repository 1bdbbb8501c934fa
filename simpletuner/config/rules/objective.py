"""What must hold between the keys of loss and noise: rules and notices in the form of `rules.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simpletuner.config.checking import is_neutral
from simpletuner.config.draft import Draft
from simpletuner.config.losses import LOSSES
from simpletuner.config.options import all_options
from simpletuner.errors import Problem
from simpletuner.families.spec import FamilySpec

# Option -> values that change nothing.
FLOW_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "flow_schedule_shift": (None, 0),
    "flow_schedule_auto_shift": (False,),
    "flow_sigmoid_scale": (1,),
    "flow_use_uniform_schedule": (False,),
    "flow_use_beta_schedule": (False,),
    "flow_beta_schedule_alpha": (2,),
    "flow_beta_schedule_beta": (2,),
    "flow_custom_timesteps": (None,),
    "flow_logit_mean": (0,),
    "flow_use_mode_schedule": (False,),
    "flow_mode_scale": (1.29,),
    "flow_schedule_auto_shift_curve": ("exponential",),
    "flow_schedule_terminal": (0,),
    "flow_loss_weighting": ("none",),
}
SHAPES = ("flow_use_uniform_schedule", "flow_use_beta_schedule", "flow_use_mode_schedule", "flow_custom_timesteps")
# Option -> the switch without which nothing reads it.
SWITCHES: Mapping[str, str] = {
    "flow_beta_schedule_alpha": "flow_use_beta_schedule",
    "flow_beta_schedule_beta": "flow_use_beta_schedule",
    "flow_mode_scale": "flow_use_mode_schedule",
    "flow_schedule_auto_shift_curve": "flow_schedule_auto_shift",
}


def _is_set(draft: Draft, key: str) -> bool:
    return not is_neutral(draft.config.value(key), FLOW_OPTIONS[key])


def meaningless_options(spec: FamilySpec) -> Mapping[str, str]:
    """Option -> why it has no meaning for a family: what is written there is ignored with a warning."""
    if spec.prediction_type == "flow":
        return spec.ignored_options
    return {**dict.fromkeys(FLOW_OPTIONS, f"{spec.title} is not a flow model"), **spec.ignored_options}


def reflexflow_has_a_flow(draft: Draft) -> Iterator[Problem]:
    spec = draft.spec
    if spec and spec.prediction_type != "flow" and draft.config.objective.scheduled_sampling_reflexflow:
        message = f"true cannot be used: it is made for flow models, which {spec.title} is not"
        yield draft.problem(message, "scheduled_sampling_reflexflow", "false", fix="remove the key")


def noise_levels_are_chosen_once(draft: Draft) -> Iterator[Problem]:
    chosen = [key for key in SHAPES if _is_set(draft, key)]
    for key in chosen[1:]:
        yield draft.problem(f"{chosen[0]} chooses the noise levels already", key, fix="keep one of them")
    for key in ("flow_sigmoid_scale", "flow_logit_mean"):
        if chosen and _is_set(draft, key):
            message = f"has no use: {chosen[0]} replaces the logit-normal noise levels"
            yield draft.problem(message, key, fix="remove the key")
    if _is_set(draft, "flow_schedule_shift") and draft.config.objective.flow_schedule_auto_shift:
        message = "flow_schedule_auto_shift chooses the shift already"
        yield draft.problem(message, "flow_schedule_shift", fix="keep one of them")
    for key in ("flow_schedule_shift", "flow_schedule_auto_shift", "flow_schedule_terminal"):
        if _is_set(draft, key) and _is_set(draft, "flow_custom_timesteps"):
            message = "has no use: flow_custom_timesteps are taken as they are"
            yield draft.problem(message, key, fix="remove the key")
    for key, switch in SWITCHES.items():
        if _is_set(draft, key) and not draft.config.value(switch):
            yield draft.problem(f"has no use without {switch}", key, fix="set it, or remove this key")


def biased_levels_are_some(draft: Draft) -> Iterator[Problem]:
    options = draft.config.objective
    begin, end = options.timestep_bias_begin, options.timestep_bias_end
    if options.timestep_bias_strategy == "range" and begin >= end:
        message = f"{begin:g} is not below timestep_bias_end, which is {end:g}"
        yield draft.problem(message, "timestep_bias_begin", f"less than {end:g}")
    parts = {
        "earlier": options.timestep_bias_portion,
        "later": options.timestep_bias_portion,
        "range": (end - begin) / 1000,
    }
    if options.timestep_bias_multiplier == 0 and parts.get(options.timestep_bias_strategy, 0) >= 1:
        message = "0 leaves no noise level to train on"
        yield draft.problem(message, "timestep_bias_multiplier", "above 0, or a smaller part of the levels")


def rollouts_happen(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    share = config.objective.scheduled_sampling_probability
    if config.objective.scheduled_sampling_ramp_steps:
        share = max(config.objective.scheduled_sampling_prob_start, config.objective.scheduled_sampling_prob_end)
    if config.objective.scheduled_sampling_max_step_offset and not share:
        message = "is 0, so that nothing is rolled out, and scheduled_sampling_max_step_offset says that something is"
        yield draft.problem(message, "scheduled_sampling_probability", fix="set it, or scheduled_sampling_ramp_steps")
    if config.objective.scheduled_sampling_reflexflow and not config.objective.scheduled_sampling_max_step_offset:
        message = "has no use: nothing is rolled out, scheduled_sampling_max_step_offset is 0"
        yield draft.problem(message, "scheduled_sampling_reflexflow", fix="set scheduled_sampling_max_step_offset")


OBJECTIVE_RULES = (
    reflexflow_has_a_flow,
    noise_levels_are_chosen_once,
    biased_levels_are_some,
    rollouts_happen,
)


def settings_have_their_switch(draft: Draft) -> Iterator[str]:
    """Files of other trainers write whole groups of keys out; what does nothing is reported and kept."""
    config = draft.config
    groups = {
        f"loss_type is {config.objective.loss_type}": (True, _options_of_other_losses(config.objective.loss_type)),
        "offset_noise is false": (not config.objective.offset_noise, ("noise_offset", "noise_offset_probability")),
        "input_perturbation is 0": (not config.objective.input_perturbation, ("input_perturbation_steps",)),
        "timestep_bias_strategy is none": (
            config.objective.timestep_bias_strategy == "none",
            ("timestep_bias_multiplier", "timestep_bias_portion", "timestep_bias_begin", "timestep_bias_end"),
        ),
        "scheduled_sampling_max_step_offset is 0": (
            not config.objective.scheduled_sampling_max_step_offset,
            ("scheduled_sampling_probability", "scheduled_sampling_ramp_steps", "scheduled_sampling_start_step"),
        ),
    }
    for reason, (is_off, keys) in groups.items():
        for key in keys if is_off else ():
            if config.value(key) != all_options()[key].default:
                yield f"{draft.origin(key)}: {key}: has no effect: {reason}"


def _options_of_other_losses(loss_type: str) -> tuple[str, ...]:
    """Options that some loss reads, and this one does not."""
    names = dict.fromkeys(name for row in LOSSES.values() for name in row.options)
    return tuple(name for name in names if name not in LOSSES[loss_type].options)


def strata_have_images(draft: Draft) -> Iterator[str]:
    config = draft.config
    per_process = config.training.train_batch_size * config.training.gradient_accumulation_steps
    if (
        config.objective.timestep_stratified
        and per_process * (config.processes.num_processes or 0) * config.processes.num_machines == 1
    ):
        reason = "a step has one image: raise train_batch_size or gradient_accumulation_steps"
        yield f"{draft.origin('timestep_stratified')}: timestep_stratified: has no effect: {reason}"


OBJECTIVE_NOTICES = (settings_have_their_switch, strata_have_images)
