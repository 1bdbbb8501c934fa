#!/usr/bin/env bash
# Train all weights of OmniGen2 as options/ft.yml says; every other argument is passed on (--key=value).
#
#   bash scripts/train/ft.sh
#   bash scripts/train/ft.sh --rank=0 --master_addr=10.0.0.1 --master_port=29500 --world_size=2
#
# --rank and --world_size count machines. On one machine none of the four is needed.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" options/ft.yml "$@"
