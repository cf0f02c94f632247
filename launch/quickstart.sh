#!/usr/bin/env bash
# Installs msvae, packs images, trains a multispectral VAE and evaluates it, on synthetic leaves or on your own images.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash launch/quickstart.sh [--images GLOB…] [--out DIR] [--steps N] [-- PACK-OPTIONS…]

  --images GLOB…  rasters, or folders of rasters (default: 24 new synthetic leaf images)
  --out DIR       folder for all results (default: runs/quickstart); results of an earlier quickstart there are replaced
                  after the new images are packed
  --steps N       number of optimizer steps (default: train.max_steps in configs/train/quickstart.yaml)
  -- OPTIONS      options of `msvae pack`, such as --mask 'ndvi>0.10' --tile 128
USAGE
}

fail() {
    echo "error: $1" >&2
    exit 2
}

images=() out=runs/quickstart steps=() pack_options=()
while [ $# -gt 0 ]; do
    case $1 in
        --images)
            shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do
                # expand a quoted pattern here; the shell has already expanded an unquoted one
                if [ ! -e "$1" ] && compgen -G "$1" >/dev/null; then
                    mapfile -t -O ${#images[@]} images < <(compgen -G "$1" | sort)
                else
                    images+=("$1")
                fi
                shift
            done
            [ ${#images[@]} -gt 0 ] || fail "--images has no value; add rasters, or folders of rasters" ;;
        --out) [ $# -ge 2 ] || fail "--out needs a folder"; out=$2; shift 2 ;;
        --steps) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--steps is '${2:-}', expected a number of 1 or more"; steps=(--train.max_steps "$2"); shift 2 ;;
        --help | -h) usage; exit ;;
        --) shift; pack_options=("$@"); break ;;
        *) usage >&2; fail "unknown option $1" ;;
    esac
done
if [ -e "$out" ] && [ ! -e "$out/.quickstart" ] && { [ ! -d "$out" ] || [ -n "$(ls -A "$out")" ]; }; then
    fail "$out exists and was not written by quickstart; choose another folder with --out"
fi

for image in ${images[@]+"${images[@]}"}; do
    case "$(realpath -m "$image")/" in
        "$(realpath -m "$out")"/*) fail "$image is inside $out, which quickstart replaces; choose another --out" ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

[ -d "$out" ] || trap 'rm -rf "$out"' EXIT # remove a new folder if packing fails
mkdir -p "$out" || fail "cannot write $out; choose a writable folder with --out"
touch "$out/.quickstart"
if [ ${#images[@]} -eq 0 ]; then
    [ -d "$out/images" ] || msvae synth "$out/images" --images 24 --size 384
    images=("$out/images")
    [ ${#pack_options[@]} -gt 0 ] || pack_options=(--tile 128)
fi
msvae pack "${images[@]}" --out "$out/shards" --overwrite ${pack_options[@]+"${pack_options[@]}"}
trap - EXIT
rm -rf "$out/run" "$out/pictures" "$out/report.html" "$out/metrics.json" "$out"/{images,groups,tiles}.csv

processes=$(python -c 'import torch; print(torch.cuda.device_count())')
accelerator=multi_gpu
if [ "$processes" -eq 0 ]; then
    accelerator=cpu processes=2
fi
launch() {
    accelerate launch --config_file "$root/configs/accelerate/$accelerator.yaml" --num_processes "$processes" "$@"
}

tiles_per_step=$((2 * processes > 4 ? 2 * processes : 4))
validation=null
evaluation_split=$out/shards/train
for split in val test; do
    [ ! -d "$out/shards/$split" ] || evaluation_split=$out/shards/$split
done
[ ! -d "$out/shards/val" ] || validation=$out/shards/val

printf -v watch '%q --logdir %q' "$root/.venv/bin/tensorboard" "$out/run/tensorboard"
echo "training with $processes processes; to follow it, run: $watch"
launch "$root/train/train.py" --config "$root/configs/train/quickstart.yaml" --data.train "$out/shards/train" \
    --data.val "$validation" --data.global_batch_size "$tiles_per_step" --out "$out/run" ${steps[@]+"${steps[@]}"}
model=$out/run/best # the model with the lowest validation loss
[ -d "$model" ] || model=$out/run/model
launch "$root/train/evaluate.py" --model "$model" --data "$evaluation_split" --out "$out"

echo "model: $model"
echo "to see curves and pictures of the run: $watch"
