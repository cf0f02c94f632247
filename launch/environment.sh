# Other scripts source this file. `prepare_environment [EXTRA]` creates or reuses .venv in the repository, installs
# msvae with pinned versions, and puts its `msvae`, `accelerate` and `python` first on PATH.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer on PATH; install it, then run this command again" >&2
    return 1
}

prepare_environment() {
    local extra=${1:-} state wanted python quiet=--quiet
    state=$root/.venv/.installed-${extra:-base}
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ "$(cat "$state" 2>/dev/null)" != "$wanted" ]; then
        echo "preparing the environment in $root/.venv; the first time needs some minutes"
        [ ! -t 1 ] || quiet=
        [ -x "$root/.venv/bin/python" ] || { python=$(find_python) && "$python" -m venv "$root/.venv"; } || return 1
        "$root/.venv/bin/python" -m pip install $quiet --disable-pip-version-check \
            --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}" || {
            echo "error: the installation failed; fix the error printed above, then run this command again" >&2
            return 1
        }
        echo "$wanted" >"$state"
    fi
    PATH=$root/.venv/bin:$PATH
}
