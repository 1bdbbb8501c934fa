"""The flags of FireRed-Image-Edit's `sft`: names, kinds, defaults.

Source: FireRedTeam/FireRed-Image-Edit (Apache-2.0), `train/src/arguments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner.commands.flags import FlagParser, given_names

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
DENSITIES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")
# What the original adapts with `--use_peft_lora`, by the ends of the names of layers.
LORA_LAYERS = (
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
)
DEFAULT_SEED = 42


@dataclass(frozen=True)
class SftFlags:
    """A command line of `sft`.

    Args:
        values: of every flag, by name.
        given: flags that were written.
        rest: the other words, which are options of this program.
    """

    values: dict[str, Any]
    given: frozenset[str]
    rest: tuple[str, ...]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def parse_sft(words: Sequence[str]) -> SftFlags:
    """Read a command line.

    Raises:
        ConfigError: a flag without its value, or with one that it cannot have.
    """
    found, rest = sft_parser().parse_known_args(list(words))
    values = vars(found)
    return SftFlags(values, frozenset(given_names(words)) & values.keys(), tuple(rest))


def sft_parser() -> FlagParser:
    """Every flag with its help."""
    about = (
        "Train from files that extract-vlm-embeds has made, by the flags of FireRed-Image-Edit's sft. Every option of "
        "this program can be given too, as --key=value: simpletuner options lists them."
    )
    parser = FlagParser("sft", about)
    _add_model(parser)
    _add_data(parser)
    _add_training(parser)
    _add_objective(parser)
    _add_logging(parser)
    return parser


def _add_model(parser: FlagParser) -> None:
    flag = parser.flag
    flag("pretrained_model_name_or_path", str, None, "Model folder or hub id.", required=True)
    flag("transformer_path", str, None, "Transformer in place of the model's (.safetensors).")
    flag("vae_path", str, None, "VAE in place of the model's (.safetensors, or a folder).")
    flag(
        "trainable_modules", str, None, "Weights whose names contain one of these texts train; . means all.", nargs="+"
    )
    flag("trainable_modules_low_learning_rate", str, [], "These train too, at half the rate.", nargs="+")
    flag("use_peft_lora", bool, False, "Train a LoRA.")
    flag("lora_r", int, 32, "Rank of the LoRA.")
    flag("lora_alpha", float, 32.0, "The LoRA is multiplied by lora_alpha / lora_r.")
    flag("lora_dropout", float, 0.0, "Share of the inputs of the LoRA that are dropped.")
    flag("lora_target_modules", str, list(LORA_LAYERS), "Layers, by the ends of their names.", nargs="+")
    flag("lora_path", str, None, "LoRA to start from (.safetensors, or a folder of PEFT).")


def _add_data(parser: FlagParser) -> None:
    flag = parser.flag
    flag("train_data_meta_dir", str, None, "Folder with one folder for each task.", required=True)
    flag(
        "train_data_weights", str, None, "task=weight,...: tasks that are not named are not trained. Unset: all alike."
    )
    flag("train_src_img_num_weights", str, "0=0,1=10,2=0,3=0", "Weights of rows by their number of source images.")
    flag("train_batch_size", int, 16, "Images of one forward pass of one process.")
    flag("image_sample_size", int, 512, "Images have the area of a square of this side.")
    flag("condition_encoder_mode", str, "offline", "offline: embeddings of files; sync: encode while training.")
    flag("enable_inverse", bool, False, "Train rows in the inverse direction too.")
    flag("skip_bad_rows", bool, False, "Leave out rows that cannot be used. Otherwise they are an error.")
    flag("streaming", bool, False, "Refused: the original never built it.")
    flag("vae_mini_batch", int, 32, "Images that the VAE encodes at once.")
    flag("dataloader_num_workers", int, 0, "Without effect: the next batch is always prepared while one is trained.")
    flag("prefetch_factor", int, 2, "Without effect, as dataloader_num_workers.")


def _add_training(parser: FlagParser) -> None:
    flag = parser.flag
    flag("seed", int, DEFAULT_SEED, "Seed of everything that is random.")
    flag("use_fsdp", bool, False, "Shard the weights across the processes; accelerate launch --use_fsdp sets it too.")
    flag("local_rank", int, -1, "Without effect: LOCAL_RANK sets it.")
    flag("nnodes", int, 1, "Without effect: the launcher sets it.")
    flag("num_processes_per_node", int, 1, "Without effect: the launcher sets it.")
    flag("output_dir", str, "model-finetuned", "Folder of checkpoints and results.")
    flag("num_train_epochs", int, 100, "Length of the run where max_train_steps is not given.")
    flag("max_train_steps", int, None, "Optimizer steps.")
    flag("gradient_accumulation_steps", int, 1, "Forward passes of an optimizer step.")
    flag("learning_rate", float, 1e-4, "Highest learning rate.")
    flag("scale_lr", bool, False, "Multiply it by the images of an optimizer step.")
    flag("lr_scheduler", str, "constant", "Learning rate schedule.", choices=SCHEDULES)
    flag("lr_warmup_steps", int, 500, "Warm-up in optimizer steps; none for constant.")
    flag("use_8bit_adam", bool, False, "AdamW of bitsandbytes, with states of 8 bits.")
    flag("use_came", bool, False, "CAME in place of AdamW.")
    flag("adam_beta1", float, 0.9, "Of AdamW.")
    flag("adam_beta2", float, 0.999, "Of AdamW.")
    flag("adam_weight_decay", float, 1e-2, "Of AdamW.")
    flag("adam_epsilon", float, 1e-8, "Of AdamW.")
    flag("max_grad_norm", float, 1.0, "Limit of the norm of the gradient.")
    flag("abnormal_norm_clip_start", int, 1000, "Refused where given: the limit is max_grad_norm at every step.")
    flag("initial_grad_norm_ratio", int, 5, "Refused where given: the limit is max_grad_norm at every step.")
    flag("gradient_checkpointing", bool, False, "Recompute activations in the backward pass.")
    flag("allow_tf32", bool, False, "Round inputs of float32 products to TF32.")
    flag("mixed_precision", str, None, "Number format; accelerate launch sets it too.", choices=("no", "fp16", "bf16"))
    flag("checkpointing_steps", int, 500, "Save every n optimizer steps.")
    flag("checkpoints_total_limit", int, None, "Checkpoints that are kept.")
    flag("resume_from_checkpoint", str, "latest", "latest, none, or the name of a checkpoint in output_dir.")


def _add_objective(parser: FlagParser) -> None:
    flag = parser.flag
    flag("train_sampling_steps", int, 1000, "Without effect: noise levels are continuous.")
    flag("uniform_sampling", bool, False, "Sample all noise levels equally often, in strata over the processes.")
    flag("weighting_scheme", str, "none", "Density of noise levels, and weights of the loss.", choices=DENSITIES)
    flag("logit_mean", float, 0.0, "Of weighting_scheme logit_normal; above 0 is less noise.")
    flag("logit_std", float, 1.0, "Of weighting_scheme logit_normal.")
    flag("mode_scale", float, 1.29, "Of weighting_scheme mode.")


def _add_logging(parser: FlagParser) -> None:
    flag = parser.flag
    flag("logging_dir", str, "logs", "Without effect: logs are in output_dir.")
    flag("report_to", str, "wandb", "Trackers, with commas; none for none.")
    flag("report_model_info", bool, False, "Without effect: the start of the log says what is trained.")
    flag("tracker_project_name", str, "rededit-finetune", "Project in trackers.")
