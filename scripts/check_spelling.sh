#!/usr/bin/env bash
# Spelling of code, messages and documentation: codespell's own dictionary, then scripts/banned_words.txt, the words that
# this project does not use, each with the reason; those are also looked for inside of names (`filter_report`).
#
#   scripts/check_spelling.sh            all files
#   scripts/check_spelling.sh FILE ...   these
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
VENV="${VENV_PATH:-$root/.venv}"

# Test data, other languages, prompts that images and recordings were made with, and what is not text.
skipped='(^|/)(constraints\.txt|banned_words\.txt|LICENSE)$|^tests/(fixtures/|golden/|unit/scripts/test_checks\.py|unit/models/qwen_image_edit/test_preparation\.py)|^scripts/mutants/|config/builtin_prompts\.py$'
skipped+='|^documentation/images/|\.zh\.md$|\.(json|png|xz|heic|safetensors|svg)$'
if (($#)); then files=("$@"); else mapfile -t files < <(git ls-files); fi
mapfile -t files < <(printf '%s\n' "${files[@]}" | grep -vE "$skipped")
((${#files[@]})) || exit 0

failed=0
"$VENV/bin/codespell" --ignore-words-list caf,tread,fro,atention "${files[@]}" || failed=1
"$VENV/bin/codespell" --dictionary scripts/banned_words.txt --regex '[A-Z]?[a-z]+' "${files[@]}" || failed=1
exit "$failed"
