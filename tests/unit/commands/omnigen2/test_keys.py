"""OmniGen2's options files: what each key becomes, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from simpletuner.commands.omnigen2.keys import accumulation, translate
from simpletuner.config.yaml_reader import read_yaml
from simpletuner.errors import ConfigError

ROOT = Path(__file__).parents[4]
MINIMAL = """
name: mine
data: {data_path: mix.yml, max_output_pixels: 1048576, max_input_pixels: 1048576}
model: {pretrained_model_path: OmniGen2/OmniGen2}
train: {batch_size: 2, max_train_steps: 10, learning_rate: 1e-4, warmup_lr_init: 1e-18}
transport: {do_shift: true, dynamic_time_shift: true}
"""


def translated(tmp_path: Path, text: str):
    (tmp_path / "options.yml").write_text(text)
    return translate(read_yaml(tmp_path / "options.yml"))


def test_the_shipped_lora_options_become_these() -> None:
    translation = translate(read_yaml(ROOT / "options" / "ft_lora.yml"))
    assert translation.config == {
        "model_family": "omnigen2",
        "output_dir": "experiments/ft_lora",
        "cache_dir": "experiments/ft_lora/cache",
        "seed": 2233,
        "resume_from_checkpoint": "latest",
        "loss_balance": "pixels",
        "caption_dropout_probability": 0.0001,
        "reference_dropout_probability": 0.5,
        "pretrained_model_name_or_path": "OmniGen2/OmniGen2",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 4000,
        "num_train_epochs": 0,
        "gradient_checkpointing": True,
        "disable_tf32": True,
        "mixed_precision": "bf16",
        "optimizer": "torch-adamw",
        "learning_rate": 8e-7,
        "lr_scale": False,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_weight_decay": 0.01,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "grad_clip_method": "norm",
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 500,
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target": "attention",
        "lora_init_type": "gaussian",
        "report_to": "wandb,tensorboard",
        "tracker_project_name": "OmniGen2",
        "checkpoint_step_interval": 1000,
        "checkpoints_total_limit": 0,
    }
    assert translation.data_path == "data_configs/train/example/mix.yml"
    assert translation.max_input_pixels == (1048576, 1048576, 589824, 262144)
    assert (translation.max_output_pixels, translation.max_side, translation.global_batch_size) == (1048576, 2048, 16)
    for words in ("workder_specific_seed", "black-forest-labs/FLUX.1-dev", "Qwen/Qwen2.5-VL-3B-Instruct", "arch_opt"):
        assert any(words in note for note in translation.notes), words


def test_the_shipped_full_options_train_all_weights() -> None:
    config = translate(read_yaml(ROOT / "options" / "ft.yml")).config
    assert config["model_type"] == "full"
    assert config["output_dir"] == "experiments/ft"
    assert not [key for key in config if key.startswith("lora_")]


def test_a_small_number_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 would read `1e-18` as a text."""
    assert translated(tmp_path, MINIMAL).config["learning_rate"] == 1e-4
    assert read_yaml(tmp_path / "options.yml").values["train.warmup_lr_init"] == 1e-18


@pytest.mark.parametrize(
    ("transport", "shift"),
    [
        ("{do_shift: true, dynamic_time_shift: true}", None),
        ("{do_shift: false}", 1.0),
        ("{do_shift: true, dynamic_time_shift: false}", math.exp(1.15)),  # 1048576 pixels are 4096 tokens
        ("{do_shift: true, dynamic_time_shift: false, time_shift_version: v2}", 3.2),
        ("{do_shift: true, dynamic_time_shift: true, time_shift_version: v2}", None),
    ],
)
def test_the_shift_of_times(tmp_path: Path, transport: str, shift: float | None) -> None:
    text = MINIMAL.replace("transport: {do_shift: true, dynamic_time_shift: true}", f"transport: {transport}")
    found = translated(tmp_path, text).config.get("flow_schedule_shift")
    assert found == (None if shift is None else pytest.approx(shift, abs=1e-5))


def test_stratified_times_and_the_second_shift_are_options_here(tmp_path: Path) -> None:
    text = "snr_type: stratified_uniform, time_shift_version: v2, do_shift: true"
    config = translated(tmp_path, MINIMAL.replace("do_shift: true", text)).config
    assert (config["flow_use_uniform_schedule"], config["timestep_stratified"]) == (True, True)
    assert (config["flow_schedule_auto_shift"], config["flow_schedule_auto_shift_curve"]) == (True, "sqrt")


def test_parts_come_from_folders_of_their_own_and_from_the_hub_where_the_model_lacks_them(tmp_path: Path) -> None:
    """The VAE of FLUX.1 is gated, so that the model's own is used where there is one."""
    keys = "pretrained_vae_model_name_or_path: {vae}, pretrained_text_encoder_model_name_or_path: {encoder}"

    def parts(model: Path | str, vae: str, encoder: str) -> tuple[str | None, str | None, int]:
        text = MINIMAL.replace("OmniGen2/OmniGen2}", f"{model}, {keys.format(vae=vae, encoder=encoder)}}}")
        found = translated(tmp_path, text)
        config = found.config
        return config.get("pretrained_vae_model_name_or_path"), config.get("text_encoder_paths"), len(found.notes)

    hub = ("black-forest-labs/FLUX.1-dev", "Qwen/Qwen2.5-VL-3B-Instruct")
    assert parts("OmniGen2/OmniGen2", *hub) == (None, None, 2)
    (tmp_path / "bare").mkdir()
    assert parts(tmp_path / "bare", *hub) == (*hub, 0)
    for part in ("vae", "mllm"):
        (tmp_path / "whole" / part).mkdir(parents=True)
        (tmp_path / "whole" / part / "config.json").write_text("{}")
    assert parts(tmp_path / "whole", *hub) == (None, None, 2)
    own = (str(tmp_path / "whole" / "vae"), str(tmp_path / "whole" / "mllm"))
    assert parts("OmniGen2/OmniGen2", *own) == (*own, 0)


def test_a_cosine_ends_with_the_run(tmp_path: Path) -> None:
    cosine = "lr_scheduler: timm_cosine, t_initial: 8, lr_min: 1e-6, warmup_t: 2, warmup_prefix: true, cycle_decay: 1.0"
    config = translated(tmp_path, MINIMAL.replace("batch_size: 2", f"batch_size: 2, {cosine}")).config
    assert (config["lr_scheduler"], config["lr_warmup_steps"], config["lr_end"]) == ("cosine", 2, 1e-6)
    with pytest.raises(ConfigError, match="after 8 steps"):
        translated(tmp_path, MINIMAL.replace("batch_size: 2", f"batch_size: 2, {cosine.replace('8', '20')}"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "batch_size: 2",
            "batch_sise: 2",
            ["train.batch_sise: there is no such key", 'did you mean "train.batch_size"?'],
        ),
        ("batch_size: 2", "batch_size: two", ['"two" cannot be used', "a whole number", "options.yml:5"]),
        ("do_shift: true", "snr_type: zero, do_shift: true", ['"zero" cannot be trained with', "stratified_uniform"]),
        ("do_shift: true", "time_shift_version: v3, do_shift: true", ['"v3" is not a shift', "v1, v2"]),
        ("data_path: mix.yml", "data_path: mix.yml, use_chat_template: false", ["chat template"]),
        ("data_path: mix.yml", "data_path: mix.yml, maximum_text_tokens: 512", ["512 cannot be set", "888"]),
        ("max_input_pixels: 1048576", "max_input_pixels: []", ["is not a list of pixel counts"]),
        ("max_input_pixels: 1048576", "max_input_pixels: [4096, 0]", ["is not a list of pixel counts"]),
        ("max_input_pixels: 1048576", "max_input_pixels: 0", ["is not a list of pixel counts"]),
        ("max_input_pixels: 1048576", "max_input_pixels: [a]", ["is not a list of pixel counts"]),
        ("1e-18", "1e-5", ["a warm-up begins at 0"]),
        ("name: mine", "", ["name: it is missing"]),
        ("batch_size: 2", "batch_size: 2, lr_scheduler: piecewise_constant", ["not a supported schedule"]),
        ("model: {", "model: {resize_token_embeddings: true, ", ["the language model is used as it is"]),
        ("name: mine", "name: mine\nlogger: {log_with: [swanlab]}", ['"swanlab" is not a supported tracker']),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in MINIMAL
    with pytest.raises(ConfigError) as error:
        translated(tmp_path, MINIMAL.replace(old, new))
    for each in words:
        assert each in error.value.render(), error.value.render()


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    text = MINIMAL.replace("batch_size: 2", "batch_size: no").replace("do_shift: true", "snr_type: zero")
    with pytest.raises(ConfigError) as error:
        translated(tmp_path, text)
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("keys", "steps", "epochs"),
    [
        ("max_train_steps: 10, num_train_epochs: 3", 10, 0),
        ("num_train_epochs: 3", 0, 3),
        ("max_train_steps: 10", 10, 0),
    ],
)
def test_a_run_has_one_length_and_steps_come_before_epochs(tmp_path: Path, keys: str, steps: int, epochs: int) -> None:
    config = translated(tmp_path, MINIMAL.replace("max_train_steps: 10", keys)).config
    assert (config["max_train_steps"], config["num_train_epochs"]) == (steps, epochs)


@pytest.mark.parametrize(("processes", "count"), [(8, 1), (4, 2), (1, 8)])
def test_the_global_batch_is_met_by_accumulation(tmp_path: Path, processes: int, count: int) -> None:
    translation = translated(tmp_path, MINIMAL.replace("batch_size: 2", "batch_size: 2, global_batch_size: 16"))
    document = read_yaml(tmp_path / "options.yml")
    found, line = accumulation(translation, document, processes)
    assert found == count
    assert (line is None) == (count == 1)
    with pytest.raises(ConfigError, match="not a multiple of 6: 3 processes"):
        accumulation(translation, document, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", 'gives "a" twice'),
        ("- a\n- b", "no keys with values"),
        ("a: [1,", "is not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("", "no keys with values"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "options.yml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(tmp_path / "options.yml")


def test_faults_of_an_options_file_have_the_line_that_an_editor_shows(tmp_path: Path) -> None:
    path = tmp_path / "options.yml"
    path.write_text("a: 1\nb:\n  c: 2\n")
    assert read_yaml(path).lines == {"a": 1, "b": 2, "b.c": 3}
    path.write_text("a: 1\nb: 2\nc: 'open\nd: [\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    [problem] = caught.value.problems
    assert problem.line == 5  # where the file ends, and a quote should


@pytest.mark.parametrize(
    ("written", "trackers"),
    [
        ("[tensorboard, wandb]", "tensorboard,wandb"),
        ("[wandb]", "wandb"),
        ("tensorboard", "tensorboard"),
        ("[]", "none"),
    ],
)
def test_trackers_are_one_name_or_a_list(tmp_path: Path, written: str, trackers: str) -> None:
    config = translated(tmp_path, MINIMAL.replace("name: mine", f"name: mine\nlogger: {{log_with: {written}}}")).config
    assert config["report_to"] == trackers
