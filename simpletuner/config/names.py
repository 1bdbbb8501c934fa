"""Names of variables that mean options."""

from __future__ import annotations

from collections.abc import Mapping

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
