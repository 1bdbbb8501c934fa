"""Names that files written for other or earlier trainers hold, and what becomes of each: read under its present name,
ignored with a warning, or refused because the run would be another one.

Every option name that SimpleTuner's documentation lists is an option here or stands in one of these tables; none is
answered with "there is no option of this name".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
}

# Renamed options whose meaning is the opposite of the new one.
INVERTED = frozenset({"vae_cache_preprocess"})

# Other spellings of values: (option, value) -> value.
VALUE_ALIASES: Mapping[tuple[str, str], str] = {("lr_scheduler", "cosine_with_warmup"): "cosine"}

NOT_NEEDED = "it is not needed any more"
_VIDEO = "it is made for video models, and all families here make images"
_OTHER_FAMILY = "it belongs to a family that is not supported here"

# Keys of config.json and of dataset entries.
NEVER_DELETED: Mapping[str, str] = dict.fromkeys(
    ("delete_problematic_images", "delete_unwanted_images"),
    "images of yours are never deleted; unusable ones are skipped and reported",
)

# Options that have no effect any more, and why. A file may keep them; a warning says so.
RETIRED: Mapping[str, str] = {
    "validation_torch_compile": "images are generated with the model that trains",
    "validation_torch_compile_mode": "images are generated with the model that trains",
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
    "checkpointing_use_tempdir": "checkpoints are always written under a temporary name and then renamed",
    "delete_invalid_checkpoints": "unfinished checkpoints are never mistaken for complete ones",
    "ignore_final_epochs": "only max_train_steps or num_train_epochs sets the length of a run",
    "strict_epoch_limit": "only max_train_steps or num_train_epochs sets the length of a run",
    "metadata_update_interval": "the index is written as it is read",
    "i_know_what_i_am_doing": "checks report only what is wrong",
    "print_filenames": NOT_NEEDED,
    "print_sampler_statistics": "the data report shows how many images take part",
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
    "webhook_log_level": "it belongs in webhook_config",
    # Reading data: the way of doing the same here is another.
    **NEVER_DELETED,
    "ignore_missing_files": "missing files are skipped and reported",
    "skip_file_discovery": "only what has changed is read at each start",
    "cache_dir_vae": "caches are folders in cache_dir",
    "aspect_bucket_disable_rebuild": "buckets are computed from sizes alone, which takes no time",
    "aspect_bucket_worker_count": "the number of threads follows the machine",
    "torch_num_threads": "the environment variable OMP_NUM_THREADS sets it",
    "debug_aspect_buckets": "`simpletuner check` shows every bucket",
    "debug_dataset_loader": "`simpletuner check` shows what is loaded",
    "disable_segmented_timestep_sampling": "timesteps of a batch are always drawn independently",
    "data_aesthetic_score": "it is a condition of the SDXL refiner, which is not supported here",
    # Speed and memory: results are the same without them.
    "fuse_qkv_projections": "the same attention is computed without fusing",
    "unet_attention_slice": "torch's own attention needs no slices",
    "sla_config": "it belongs to an attention kernel that is not built",
    "sageattention_usage": "it belongs to an attention kernel that is not built",
    "group_offload_type": "enable_group_offload always moves whole blocks",
    "group_offload_blocks_per_group": "enable_group_offload always moves one block at a time",
    "group_offload_use_stream": "enable_group_offload always copies in parallel with the computation",
    "offload_during_save": "weights are written tensor by tensor",
    "dynamo_mode": "the compiler's own mode is used",
    "dynamo_fullgraph": "blocks are compiled one by one, each as a whole",
    "dynamo_dynamic": "sizes that change are found by the compiler",
    "dynamo_use_regional_compilation": "blocks are always compiled one by one",
    "accelerator_cache_clear_interval": "memory is given back between the phases of a run",
    "optimizer_offload_gradients": "gradients stay on the device",
    "optimizer_release_gradients": "gradients are freed after each step",
    "fuse_optimizer": "the optimizer's fastest kernel is chosen by itself",
    "fully_unload_text_encoder": "encoders are always freed after encoding",
    "vae_enable_patch_conv": "it is made for video models",
    "sdnq_compile_mode": "it belongs to another quantization library",
    "sdnq_group_size": "it belongs to another quantization library",
    "sdnq_hadamard_group_size": "it belongs to another quantization library",
    "sdnq_use_hadamard": "it belongs to another quantization library",
    "sdnq_use_quantized_matmul": "it belongs to another quantization library",
    # Validation and trackers.
    "validation_stitch_input_location": "references are always left of the image",
    "validation_adapter_name": "it belongs to validation_adapter_path, which is not built",
    "validation_adapter_strength": "it belongs to validation_adapter_path, which is not built",
    "validation_adapter_mode": "it belongs to validation_adapter_path, which is not built",
    "tracker_image_layout": "each tracker has one layout",
    "training_scheduler_timestep_spacing": "training draws from all timesteps",
    "inference_scheduler_timestep_spacing": "the model's own scheduler says which timesteps it visits",
    "local_rank": "the launcher says which process this is",
    # Parts of a feature that is refused where it is switched on.
    "controlnet_custom_config": "it belongs to controlnet, which is not built",
    "controlnet_model_name_or_path": "it belongs to controlnet, which is not built",
    "soft_min_snr_sigma_data": "it belongs to use_soft_min_snr, which is not built",
    "diff2flow_loss": "it belongs to diff2flow_enabled, which is not built",
    "singlora_ramp_up_steps": "it belongs to a mode of peft_lora_mode that is not built",
    "distillation_config": "it belongs to distillation_method, which is not built",
    "flux_guidance_min": "it belongs to flux_guidance_mode random-range, which is not built",
    "flux_guidance_max": "it belongs to flux_guidance_mode random-range, which is not built",
    "freeze_encoder_before": "it belongs to train_text_encoder, which is not built",
    "freeze_encoder_after": "it belongs to train_text_encoder, which is not built",
    "freeze_encoder_strategy": "it belongs to train_text_encoder, which is not built",
    "text_encoder_limit": "it belongs to train_text_encoder, which is not built",
    "save_text_encoder": "it belongs to train_text_encoder, which is not built",
    "refiner_training_strength": "it belongs to refiner_training, which is not built",
    "refiner_training_invert_schedule": "it belongs to refiner_training, which is not built",
    "sdxl_refiner_uses_full_range": "it belongs to refiner_training, which is not built",
    "crepa_block_index": _VIDEO,
    "crepa_lambda": _VIDEO,
    "crepa_adjacent_distance": _VIDEO,
    "crepa_adjacent_tau": _VIDEO,
    "crepa_cumulative_neighbors": _VIDEO,
    "crepa_normalize_by_frames": _VIDEO,
    "crepa_spatial_align": _VIDEO,
    "crepa_model": _VIDEO,
    "crepa_encoder_image_size": _VIDEO,
    "framerate": _VIDEO,
    "validation_num_video_frames": _VIDEO,
    "ltx_train_mode": _VIDEO,
    "ltx_i2v_prob": _VIDEO,
    "ltx_partial_noise_fraction": _VIDEO,
    "ltx_protect_first_frame": _VIDEO,
    "hidream_use_load_balancing_loss": _OTHER_FAMILY,
    "hidream_load_balancing_loss_weight": _OTHER_FAMILY,
}


@dataclass(frozen=True)
class Unbuilt:
    """An option of another trainer that would change the result and is not built here.

    Args:
        reason: why it is refused.
        neutral: values that say what happens here anyway, besides everything that means off (see `is_off`).
        fix: what to do; None: remove the key.
        where: (option, start of its value): it acts only there, and has no effect elsewhere.
    """

    reason: str
    neutral: tuple[str, ...] = ()
    fix: str | None = None
    where: tuple[str, str] | None = None

    def accepts(self, value: Any) -> bool:
        """Whether `value` asks for nothing that is missing."""
        return is_off(value) or str(value).strip().lower() in self.neutral


def is_off(value: Any) -> bool:
    """Whether a value of an option means that it does nothing: null, false, 0, "", "none", "no"."""
    return value in (None, False, 0) or str(value).strip().lower() in ("", "none", "null", "false", "no", "off", "0")


UNBUILT: Mapping[str, Unbuilt] = {
    "tread_config": Unbuilt("routing tokens around blocks (TREAD) is not built"),
    "control": Unbuilt("models that take a control image as channels are not built"),
    "refiner_training": Unbuilt("mixtures of a base and a refiner are not built"),
    "distillation_method": Unbuilt("distillation is not built"),
    "diff2flow_enabled": Unbuilt("the objective of a family is never replaced by another"),
    "use_soft_min_snr": Unbuilt("soft min-SNR weights are not built", fix="use snr_gamma"),
    "snr_weight": Unbuilt("it is not built", ("1", "1.0"), fix="use snr_gamma"),
    "crepa_enabled": Unbuilt(_VIDEO),
    "prediction_type": Unbuilt(
        "what a model predicts is in its own scheduler_config.json", fix="remove the key; it is read from the model"
    ),
    "rescale_betas_zero_snr": Unbuilt(
        "the noise levels are in the model's own scheduler_config.json", fix="set it there, and remove the key"
    ),
    "flux_lora_target": Unbuilt(
        "it is called lora_target here, and has other groups",
        ("all",),
        fix="lora_target takes attention, feed-forward, modulation, all-linear, or names of layers",
    ),
    "slider_lora_target": Unbuilt("slider training is not built"),
    "init_lokr_norm": Unbuilt("LoKr starts from exactly the base model here"),
    "layer_freeze_strategy": Unbuilt("full training moves all weights", fix="use an adapter with lora_target"),
    "flux_fast_schedule": Unbuilt("noise levels of a fixed list are not built", fix="use flow_custom_timesteps"),
    "flux_guidance_mode": Unbuilt("FLUX.1 trains with guidance 1 only", ("constant",)),
    "flux_guidance_value": Unbuilt("FLUX.1 trains with guidance 1 only", ("1", "1.0")),
    "flux_attention_masked_training": Unbuilt("FLUX.1 attends to the padding of its captions, as it was trained"),
    "sana_complex_human_instruction": Unbuilt(
        "the instruction of diffusers' pipeline is put before every caption",
        where=("model_family", "sana"),
    ),
    "t5_padding": Unbuilt("captions are padded as the family was trained", ("unmodified",)),
    "sd3_clip_uncond_behaviour": Unbuilt("a dropped caption is the encoded empty text", ("empty_string",)),
    "sd3_t5_uncond_behaviour": Unbuilt("a dropped caption is the encoded empty text", ("empty_string",)),
    "gradient_precision": Unbuilt("gradients have the precision of what they move", ("unmodified",)),
    "prodigy_steps": Unbuilt(
        "the learning rate is found during the whole run", where=("optimizer", "prodigy"), fix="use prodigy without it"
    ),
    "optimizer_cpu_offload_method": Unbuilt(
        "the optimizer's state stays beside the weights", fix="use deepspeed_config"
    ),
    "offload_param_path": Unbuilt("deepspeed_config says where weights are offloaded"),
    "enable_model_cpu_offload": Unbuilt("whole models are not moved back and forth", fix="use enable_group_offload"),
    "group_offload_to_disk_path": Unbuilt("offloaded blocks wait in main memory only"),
    "ramtorch_target_modules": Unbuilt("enable_group_offload does this for all blocks"),
    "ramtorch_text_encoder": Unbuilt("encoders are freed after encoding", fix="use text_encoder_offload"),
    "ramtorch_vae": Unbuilt("the VAE is freed after encoding"),
    "ramtorch_controlnet": Unbuilt("ControlNets cannot be trained yet"),
    "pretrained_t5_model_name_or_path": Unbuilt(
        "text encoders come from pretrained_model_name_or_path", fix="use text_encoder_paths"
    ),
    "pretrained_transformer_subfolder": Unbuilt(
        "a model folder has the layout that diffusers saves", ("transformer",), fix="use the folder's own name"
    ),
    "pretrained_unet_subfolder": Unbuilt(
        "a model folder has the layout that diffusers saves", ("unet",), fix="use the folder's own name"
    ),
    "parquet_caption_column": Unbuilt(
        "it is a key of a dataset here", fix='write it into the entry, as "parquet": {"caption_column": ...}'
    ),
    "parquet_filename_column": Unbuilt(
        "it is a key of a dataset here", fix='write it into the entry, as "parquet": {"filename_column": ...}'
    ),
    "prepend_instance_prompt": Unbuilt("it is a key of a dataset here", fix="write it into the entries"),
    "only_instance_prompt": Unbuilt("it is a key of a dataset here", fix="write it into the entries"),
    "validation_using_datasets": Unbuilt("validation does not use images of datasets", fix="use validation_references"),
    "validation_adapter_path": Unbuilt("a second adapter in validation is not built", fix="use simpletuner generate"),
    "validation_adapter_config": Unbuilt("a second adapter in validation is not built", fix="use simpletuner generate"),
    "enable_watermark": Unbuilt("images carry no watermark"),
    "post_upload_script": Unbuilt("scripts after uploads are not built", fix="use a webhook"),
    "post_checkpoint_script": Unbuilt("scripts after checkpoints are not built", fix="use validation_external_script"),
}
