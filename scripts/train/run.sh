#!/usr/bin/env bash
# What ft.sh and ft_lora.sh share: the names that OmniGen2's scripts have for machines become this program's.
#
#   bash scripts/train/run.sh OPTIONS.yml [--rank=N --master_addr=HOST --master_port=PORT --world_size=N] [--key=value ...]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
options="$1"
shift
arguments=()
while [ $# -gt 0 ]; do
    name="${1%%=*}"
    case "$name" in
        --rank | --master_addr | --master_port | --world_size)
            if [ "$name" = "$1" ]; then
                [ $# -ge 2 ] || { echo "$name needs a value" >&2; exit 2; }
                value="$2"
                shift
            else
                value="${1#*=}"
            fi
            case "$name" in
                --rank) arguments+=("--machine_rank=$value") ;;
                --master_addr) arguments+=("--main_process_ip=$value") ;;
                --master_port) arguments+=("--main_process_port=$value") ;;
                --world_size) arguments+=("--num_machines=$value") ;;
            esac
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
# A shell that exports these as numbers of machines must not be taken for one of several processes.
unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
exec "$root/train.sh" --config "$options" ${arguments[@]+"${arguments[@]}"}
