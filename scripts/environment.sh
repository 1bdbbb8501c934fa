# Sourced by train.sh, tests/run and .ci/run: makes the virtual environment once, and installs again only when what
# decides its contents has changed. Sets VENV. Needs $root, the folder of the clone.

VENV="${VENV_PATH:-$root/.venv}"

# Prints a Python that is new enough, or says what is missing.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "simpletuner needs Python 3.11 or newer with its venv module, and none was found." >&2
    echo "  fix: install it (Debian, Ubuntu: apt install python3 python3-venv), or set PYTHON=/path/to/python3" >&2
    return 2
}

# ensure_environment EXTRAS: installs the clone, pinned, with the extras (a comma list, may be empty).
# Each line of the stamp is a checksum of pyproject.toml and constraints.txt, the folder, and extras that are installed.
ensure_environment() {
    local extras="$1" stamp="$VENV/.simpletuner-installed" sources python
    sources="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum | tr ' ' '-') $root"
    if [[ -x "$VENV/bin/simpletuner" && -f "$stamp" ]] && grep -qxF "$sources [$extras]" "$stamp"; then
        return
    fi
    if [[ ! -x "$VENV/bin/python" ]]; then
        python="$(find_python)"
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    echo "installing simpletuner${extras:+ with $extras}; the first time this takes some minutes"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root${extras:+[$extras]}"
    # Extras that were installed from other sources may be out of date: only lines of the same sources stay.
    { grep -F "$sources [" "$stamp" 2>/dev/null || true; echo "$sources [$extras]"; } >"$stamp.new"
    mv "$stamp.new" "$stamp"
}
