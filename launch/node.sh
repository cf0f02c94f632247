#!/usr/bin/env bash
# One machine's part of a run: finds its place on the network, starts the ranks, asks them to save when it is asked to
# stop, and ends with the exit code that the ranks mean. slurm.sbatch, kubernetes.yaml and skypilot.yaml start this.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash launch/node.sh [options] train/train.py --config configs/train/sd3.yaml …    the same on every machine
       bash launch/node.sh [options] --module msvae doctor --config …    looks at the machines before a run

  --nodes N|MIN:MAX  machines that take part (1); with MIN:MAX a run begins with MIN, and goes on when some come or go
  --at HOST[:PORT]   the machine where all meet, by a name or an address that all know; its port is 29500. Needed from
                     two machines on
  --processes P      ranks on this machine; without, one a GPU, or one where there is none
  --engine NAME      a file of configs/accelerate/; without, multi_node, or cpu where there is no GPU
  --interface NAME   network interface; without, the one that leads to HOST
  --restarts N       times that ranks start again by themselves after one was lost (0, with MIN:MAX 5)
  --wait SECONDS     how long to wait for HOST (600)

exit code: 0 finished; 75 asked to stop, and 69 other machines lost or not there: run the same command again; 2 an error
that is told in one line, which a person must mend; others as the launcher ended (docs/faults.md)
USAGE
}

fail() {
    echo "error: $1" >&2
    exit 2
}

asked=''
# shellcheck disable=SC2317 # called by traps
ask_to_stop() {
    [ -n "${!:-}" ] || exit 75 # no launcher yet
    [ -z "$asked" ] || return 0
    asked=yes
    echo "$(uname -n): asked to stop by SIG$1: the ranks finish their step and save" >&2
    kill -USR2 "$!" 2>/dev/null || true
}
for signal in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064 # the signal of now
    trap "ask_to_stop $signal" "$signal"
done

nodes=1 at='' processes='' engine='' interface='' restarts='' wait_s=600
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit ;;
        --nodes | --at | --processes | --engine | --interface | --restarts | --wait)
            [ $# -ge 2 ] || fail "$1 wants a value"
            name=${1#--}
            [ "$name" != wait ] || name=wait_s
            printf -v "$name" %s "$2"
            shift 2 ;;
        --module) break ;; # accelerate knows it
        -*) usage >&2; fail "unknown option $1" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { usage >&2; fail "no script to run; give train/train.py and its options"; }
[ "$1" = --module ] || [ -f "$1" ] || fail "$1 is no file here ($PWD); run this where the repository lies"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "--nodes is '$nodes', expected a number such as 2, or 2:4"
[ "${nodes%:*}" -le "${nodes#*:}" ] || fail "--nodes is '$nodes', expected the smaller number first"
for number in "$processes" "$restarts" "$wait_s"; do
    [[ $number =~ ^[0-9]*$ ]] || fail "'$number' is no number; --processes, --restarts and --wait want one"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/.venv" ] || PATH=$root/.venv/bin:$PATH
[ -f "$root/configs/accelerate/${engine:-cpu}.yaml" ] ||
    fail "--engine is '$engine', expected the name of a file in configs/accelerate/, such as zero2"
command -v accelerate >/dev/null || fail "accelerate is not on PATH; install msvae, or activate its environment"

[[ $at =~ ^([^:]*)(:([1-9][0-9]*))?$ ]] || fail "--at is '$at', expected HOST or HOST:PORT"
at=${BASH_REMATCH[1]} port=${BASH_REMATCH[3]:-29500}
if [ "$nodes" = 1 ]; then
    at=127.0.0.1 port=0 # any free one
elif [ -z "$at" ]; then
    fail "--nodes is $nodes and nothing says where they meet; give --at HOST"
fi
found=$(python "$root/launch/network.py" "$at" "$port" --interface "$interface" --wait-s "$wait_s")
read -r address interface is_host <<<"$found"
if [ -z "$processes" ] || [ -z "$engine" ]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    engine=${engine:-$([ "$gpus" -gt 0 ] && echo multi_node || echo cpu)}
    processes=${processes:-$((gpus > 0 ? gpus : 1))}
fi
echo "$(uname -n): ranks $processes, engine $engine, machines $nodes, meeting at $at:$port, from $address on $interface"

codes=$(mktemp -d)
trap 'rm -rf "$codes"' EXIT
elastic=$([ "${nodes%:*}" = "${nodes#*:}" ] || echo 5)
# every option of torchrun can be given as PET_…; accelerate hands on those that it has no option for
export PET_NNODES=$nodes PET_RDZV_ENDPOINT=$at:$port PET_RDZV_ID=msvae PET_LOCAL_ADDR=$address
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-120} PET_SIGNALS_TO_HANDLE=SIGUSR2
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 MSVAE_EXIT_CODES=$codes
python "$root/launch/launcher.py" launch --config_file "$root/configs/accelerate/$engine.yaml" --num_machines 1 \
    --num_processes "$processes" --main_process_port 0 --rdzv_backend c10d \
    --rdzv_conf "join_timeout=$wait_s$is_host" --max_restarts "${restarts:-${elastic:-0}}" "$@" &
launcher=$!

while true; do
    status=0
    wait "$launcher" || status=$?
    kill -0 "$launcher" 2>/dev/null || break # else a signal has ended the wait, not the launcher
done

[ "$status" -ne 0 ] || exit 0
for code in 2 75 69; do
    ! grep -qsx "$code" "$codes"/* || exit "$code"
done
[ -z "$asked" ] || { echo "warning: the ranks had not all saved when they ended" >&2; exit 75; }
exit "$status"
