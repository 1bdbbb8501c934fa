#!/usr/bin/env bash
# Installs what some tests need and pip cannot install, with apt-get (Debian, Ubuntu). Nothing calls this script by
# itself; without the packages those tests are skipped.
#
#   scripts/install_system_packages.sh          prints the packages and asks
#   scripts/install_system_packages.sh --yes    does not ask
set -euo pipefail

packages=(
    chromium # the browser in which tests/end_to_end/test_monitor_page.py opens the monitor's page
)

command -v apt-get >/dev/null || {
    echo "there is no apt-get here; install with your own package manager: ${packages[*]}" >&2
    exit 1
}
echo "apt-get will install: ${packages[*]}"
if [[ "${1:-}" != --yes ]]; then
    read -r -p "go on? [y/N] " answer
    [[ "$answer" == [yY]* ]] || exit 1
fi
as_root=()
((EUID == 0)) || as_root=(sudo)
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y --no-install-recommends "${packages[@]}"
