#!/usr/bin/env bash
# Stage one: encode the instructions and images of a .jsonl file, once, on all GPUs of a machine.
#
#   bash examples/extract_vlm_embeds.sh DATA.jsonl META_DIR/TASK MODEL [--disable_inverse | --t2i_mode] [--flag=value ...]
#
# The rows and the embeddings of the task are written where stage two (examples/train.sh) reads them. The same command
# goes on after it was stopped. GPUS_PER_NODE is the number of processes, 1 if it is not set. On several machines set
# NNODES, NODE_RANK (or WORLD_SIZE, RANK), MASTER_ADDR and MASTER_PORT; all of them see the same folders.
set -euo pipefail

[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data="$1" task="$2" model="$3"
shift 3
machines="${NNODES:-${WORLD_SIZE:-1}}" machine="${NODE_RANK:-${RANK:-0}}"
# These are numbers of machines here; torchrun sets its own for each process.
unset RANK WORLD_SIZE

exec torchrun --nproc_per_node="${GPUS_PER_NODE:-1}" --nnodes="$machines" --node_rank="$machine" \
    --master_port="${MASTER_PORT:-6003}" --master_addr="${MASTER_ADDR:-localhost}" \
    -m simpletuner extract-vlm-embeds "$data" \
    --output_jsonl_dir "$task" \
    --embeddings_save_dir "$task/embeddings" \
    --model_path "$model" \
    --batch_size 4 "$@"
