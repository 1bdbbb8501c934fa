#!/usr/bin/env bash
# Train with one command: makes .venv and installs on the first start, then runs `simpletuner train` with all arguments.
#
#   ./train.sh                       trains config/config.json, or the shipped example where there is none
#   ./train.sh --max_train_steps=50  options of the configuration can be given here
#
# PYTHON chooses the interpreter, VENV_PATH another place for the environment, EXTRAS what else to install
# (several with commas; documentation/INSTALL.md lists them).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$root/scripts/environment.sh"
ensure_environment "${EXTRAS:-}"
# exec: SIGTERM and Ctrl-C reach Python itself, which saves a checkpoint and leaves.
exec "$VENV/bin/simpletuner" train "$@"
