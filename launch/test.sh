#!/usr/bin/env bash
# Everything a change must pass: lint, types, import layers, tests. Arguments go to pytest, such as -m slow; without any,
# two files of tests run at once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment dev
cd "$root"
ruff check .
ruff format --check .
mypy
lint-imports
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
pytest "$@"
