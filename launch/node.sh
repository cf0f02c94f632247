#!/usr/bin/env bash
# Starts the ranks of one machine: finds the address and interface of the machine, launches the ranks, asks them to save
# when a signal asks it to stop, and exits with the code of the ranks. slurm.sbatch, kubernetes.yaml and skypilot.yaml
# run this script.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash launch/node.sh [options] train/train.py --config configs/train/sd3.yaml …    run the same on every machine
       bash launch/node.sh [options] --module msvae doctor --config …    check the machines before a run

  --nodes N|MIN:MAX  number of machines (1); with MIN:MAX, the run starts with MIN machines, and continues when machines
                     join or leave
  --at HOST[:PORT]   machine where all machines meet: a name or an address that all of them can resolve. The default
                     port is 29500. Required for two or more machines
  --processes P      ranks on this machine (default: one per GPU, or one if there is no GPU)
  --engine NAME      a file in configs/accelerate/ (default: multi_node, or cpu if there is no GPU)
  --interface NAME   network interface (default: the interface of the route to HOST)
  --restarts N       restarts of the ranks after one was lost (default: 0; 5 with MIN:MAX)
  --wait SECONDS     longest time to wait for HOST (600)

exit code: 0 finished; 75 asked to stop, 69 other machines lost or unreachable: run the same command again; 2 an error
that you must fix, printed on one line; any other code is the code of the launcher (docs/faults.md)
USAGE
}

fail() {
    echo "error: $1" >&2
    exit 2
}

asked=''
# shellcheck disable=SC2317 # traps call this function
ask_to_stop() {
    [ -n "${!:-}" ] || exit 75 # the launcher has not started
    [ -z "$asked" ] || return 0
    asked=yes
    echo "$(uname -n): asked to stop by SIG$1: the ranks finish their step and save" >&2
    kill -USR2 "$!" 2>/dev/null || true
}
for signal in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064 # expand the signal now
    trap "ask_to_stop $signal" "$signal"
done

nodes=1 at='' processes='' engine='' interface='' restarts='' wait_s=600
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit ;;
        --nodes | --at | --processes | --engine | --interface | --restarts | --wait)
            [ $# -ge 2 ] || fail "$1 needs a value"
            name=${1#--}
            [ "$name" != wait ] || name=wait_s
            printf -v "$name" %s "$2"
            shift 2 ;;
        --module) break ;; # an option of accelerate
        -*) usage >&2; fail "unknown option $1" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || { usage >&2; fail "no script to run; add train/train.py and its options"; }
[ "$1" = --module ] || [ -f "$1" ] || fail "the file $1 does not exist in $PWD; run this in the repository"
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "--nodes is '$nodes', expected a number such as 2, or 2:4"
[ "${nodes%:*}" -le "${nodes#*:}" ] || fail "--nodes is '$nodes', expected the smaller number first"
for number in "$processes" "$restarts" "$wait_s"; do
    [[ $number =~ ^[0-9]*$ ]] || fail "got '$number', expected a number for --processes, --restarts and --wait"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/.venv" ] || PATH=$root/.venv/bin:$PATH
[ -f "$root/configs/accelerate/${engine:-cpu}.yaml" ] ||
    fail "--engine is '$engine', expected the name of a file in configs/accelerate/, such as zero2"
command -v accelerate >/dev/null || fail "accelerate is not on PATH; install msvae or activate its environment"

[[ $at =~ ^([^:]*)(:([1-9][0-9]*))?$ ]] || fail "--at is '$at', expected HOST or HOST:PORT"
at=${BASH_REMATCH[1]} port=${BASH_REMATCH[3]:-29500}
if [ "$nodes" = 1 ]; then
    at=127.0.0.1 port=0 # any free port
elif [ -z "$at" ]; then
    fail "--nodes is $nodes but --at is missing; set --at HOST to the machine where all meet"
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
# torchrun reads every option from PET_…; these are the options that accelerate does not have
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
    kill -0 "$launcher" 2>/dev/null || break # otherwise a signal ended the wait, and the launcher still runs
done

[ "$status" -ne 0 ] || exit 0
for code in 2 75 69; do
    ! grep -qsx "$code" "$codes"/* || exit "$code"
done
[ -z "$asked" ] || { echo "warning: some ranks ended before they had saved" >&2; exit 75; }
exit "$status"
