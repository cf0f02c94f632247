#!/usr/bin/env bash
# Runs every check that a change must pass: lint, types, import layers, tests. Arguments are passed to pytest, such as
# -m slow. Without arguments, two test files run at the same time.
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
