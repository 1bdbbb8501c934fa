#!/usr/bin/env bash
# Stage two: train all weights of Qwen-Image-Edit from the files of stage one (examples/extract_vlm_embeds.sh).
#
#   bash examples/train.sh MODEL META_DIR OUTPUT_DIR "task_a=0.5,task_b=1.2" [--flag=value ...]
#
# META_DIR has a folder for each task. The same command goes on after it was stopped. GPUS_PER_NODE is the number of
# processes of a machine, 1 if it is not set. On several machines set NNODES, NODE_RANK (or WORLD_SIZE, RANK),
# MASTER_ADDR and MASTER_PORT. Flags that are given here win over those below.
set -euo pipefail

[ $# -ge 4 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model="$1" meta="$2" output="$3" weights="$4"
shift 4
machines="${NNODES:-${WORLD_SIZE:-1}}" machine="${NODE_RANK:-${RANK:-0}}"
# These are numbers of machines here; accelerate sets its own for each process.
unset RANK WORLD_SIZE

exec accelerate launch --mixed_precision="bf16" --use_fsdp \
    --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
    --fsdp_transformer_layer_cls_to_wrap=QwenImageTransformerBlock \
    --fsdp_state_dict_type=SHARDED_STATE_DICT \
    --num_processes "$((${GPUS_PER_NODE:-1} * machines))" \
    --num_machines "$machines" \
    --machine_rank "$machine" \
    --main_process_ip "${MASTER_ADDR:-localhost}" \
    --main_process_port "${MASTER_PORT:-6003}" \
    -m simpletuner sft \
    --pretrained_model_name_or_path="$model" \
    --train_data_meta_dir="$meta" \
    --train_data_weights="$weights" \
    --train_src_img_num_weights="0=1,1=1,2=1,3=0" \
    --train_batch_size=1 \
    --image_sample_size=512 \
    --gradient_accumulation_steps=1 \
    --num_train_epochs=1 \
    --max_train_steps=512 \
    --learning_rate=2e-05 \
    --lr_scheduler="constant_with_warmup" \
    --lr_warmup_steps=100 \
    --checkpointing_steps=100 \
    --output_dir="$output" \
    --gradient_checkpointing \
    --mixed_precision="bf16" \
    --adam_weight_decay=3e-2 \
    --max_grad_norm=0.05 \
    --uniform_sampling \
    --trainable_modules "." \
    --vae_mini_batch=1 "$@"
