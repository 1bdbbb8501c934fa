"""Names of options that are not options any more, other spellings, and the nearest known name of a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

# Old name -> name that is read now. All of them occur in files written for earlier trainers.
RENAMED: Mapping[str, str] = {
    "validation_steps": "validation_step_interval",
    "checkpointing_steps": "checkpoint_step_interval",
    "checkpointing_limit": "checkpoints_total_limit",
    "save_total_limit": "checkpoints_total_limit",
    "max_num_steps": "max_train_steps",
    "num_epochs": "num_train_epochs",
    "eval_step_interval": "eval_steps_interval",
    "lr_schedule": "lr_scheduler",
    "vae_cache_preprocess": "vae_cache_ondemand",
    "pretrained_model_name": "pretrained_model_name_or_path",
    "pretrained_unet_model_name_or_path": "pretrained_transformer_model_name_or_path",
    "pretrained_vae_name_or_path": "pretrained_vae_model_name_or_path",
    "validation_num_images": "num_validation_images",
    "flux_schedule_shift": "flow_schedule_shift",
    "flow_matching_shift": "flow_schedule_shift",
}

# Renamed options whose meaning is the opposite of the new one.
INVERTED = frozenset({"vae_cache_preprocess"})

# Other spellings of values: (option, value) -> value.
VALUE_ALIASES: Mapping[tuple[str, str], str] = {("lr_scheduler", "cosine_with_warmup"): "cosine"}

NOT_NEEDED = "it is not needed any more"

# Options that have no effect any more, and why. A file may keep them; a warning says so.
RETIRED: Mapping[str, str] = {
    "validation_torch_compile": "pictures are drawn with the model that trains",
    "validation_torch_compile_mode": "pictures are drawn with the model that trains",
    "offload_during_startup": "encoders are always freed before the denoiser is loaded",
    "keep_vae_loaded": "the VAE is kept in memory where it is needed",
    "seed_for_each_device": "noise is keyed by the place in the global batch, so devices never share it",
    "ema_device": "the average lies beside the weights that it averages",
    "ema_cpu_only": "the average lies beside the weights that it averages",
    "ema_foreach_disable": NOT_NEEDED,
    "compress_disk_cache": "latents do not compress; they are stored as they are",
    "preserve_data_backend_cache": "the index of a folder is always kept and refreshed",
    "override_dataset_config": "cached entries are named by content and settings, and can never be stale",
    "vae_cache_scan_behaviour": "damaged cache entries are found by their digest and made again",
    "vae_cache_scan_behavior": "damaged cache entries are found by their digest and made again",
    "checkpointing_use_tempdir": "checkpoints are always written aside and then renamed",
    "delete_invalid_checkpoints": "unfinished checkpoints are never taken for complete ones",
    "ignore_final_epochs": "max_train_steps or num_train_epochs alone says when a run ends",
    "strict_epoch_limit": "max_train_steps or num_train_epochs alone says when a run ends",
    "metadata_update_interval": "the index is written as it is read",
    "i_know_what_i_am_doing": "checks say what is wrong; none of them is a matter of opinion",
    "print_filenames": NOT_NEEDED,
    "print_sampler_statistics": "the data report shows how many pictures take part",
    "dataloader_prefetch": "the next batch is always prepared while one is trained",
    "dataloader_prefetch_qlen": "the next batch is always prepared while one is trained",
    "max_workers": "the number of threads follows the machine",
    "read_batch_size": NOT_NEEDED,
    "image_processing_batch_size": NOT_NEEDED,
    "enable_multiprocessing": NOT_NEEDED,
    "aws_max_pool_connections": NOT_NEEDED,
    "set_grads_to_none": "gradients are always set to none",
    "enable_xformers_memory_efficient_attention": "torch's own attention is used",
    "logging_dir": "logs are kept in output_dir",
    "cache_dir_text": "caches are folders in cache_dir",
    "cache_file_suffix": "cached entries are named by content",
    "webhook_log_level": "it belongs into webhook_config",
}

# Names of variables in `config.env` files that are not simply the option's name in capitals.
ENV_FILE_NAMES: Mapping[str, str] = {
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_NUM_MACHINES": "num_machines",
    "MODEL_NAME": "pretrained_model_name_or_path",
    "VAE_NAME": "pretrained_vae_model_name_or_path",
    "MAX_NUM_STEPS": "max_train_steps",
    "NUM_EPOCHS": "num_train_epochs",
    "CHECKPOINTING_STEPS": "checkpoint_step_interval",
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "VALIDATION_STEPS": "validation_step_interval",
    "LR_SCHEDULE": "lr_scheduler",
    "TRAINING_SEED": "seed",
    "DATALOADER_CONFIG": "data_backend_config",
    "MINIMUM_RESOLUTION": "minimum_image_size",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
}

EXTRA_ARGUMENTS = "TRAINER_EXTRA_ARGS"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely means, or None where none is near.

    Ranked by the number of single-letter edits (insertion, deletion, replacement, exchange of neighbours), then by
    difflib's ratio; names that differ in more than a third of their letters are not near.
    """
    folded = word.lower().replace("-", "_")
    matcher = difflib.SequenceMatcher(b=folded)
    best: tuple[int, float, str] | None = None
    for name in known:
        limit = max(1, min(4, len(name) // 3))
        if abs(len(name) - len(folded)) > limit:
            continue
        distance = edit_distance(folded, name.lower())
        if distance > limit or (best and distance > best[0]):
            continue
        matcher.set_seq1(name)
        rank = (distance, -matcher.ratio(), name)
        best = rank if best is None or rank < best else best
    if best:
        return best[2]
    close = difflib.get_close_matches(folded, list(known), n=1, cutoff=0.75)
    return close[0] if close else None


def edit_distance(a: str, b: str) -> int:
    """Single-letter edits from `a` to `b`, an exchange of neighbours counting as one (optimal string alignment)."""
    before, previous = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]
