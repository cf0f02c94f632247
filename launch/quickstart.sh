#!/usr/bin/env bash
# From nothing to a trained and judged multispectral VAE, on synthetic leaves or on your own images.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash launch/quickstart.sh [--images GLOB…] [--out DIR] [--steps N] [-- PACK-OPTIONS…]

  --images GLOB…  rasters or folders of them; without, 24 synthetic leaf images are made
  --out DIR       where everything is written (runs/quickstart); an earlier quickstart there is replaced, once the
                  images of the new one are packed
  --steps N       optimizer steps instead of those of configs/train/quickstart.yaml
  -- OPTIONS      handed to `msvae pack`, such as --mask 'ndvi>0.10' --tile 128
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
                # a quoted pattern is expanded here, an unquoted one was by the shell
                if [ ! -e "$1" ] && compgen -G "$1" >/dev/null; then
                    mapfile -t -O ${#images[@]} images < <(compgen -G "$1" | sort)
                else
                    images+=("$1")
                fi
                shift
            done
            [ ${#images[@]} -gt 0 ] || fail "--images names nothing; give rasters or folders of them" ;;
        --out) [ $# -ge 2 ] || fail "--out wants a folder"; out=$2; shift 2 ;;
        --steps) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--steps is '${2:-}', expected a number of 1 or more"; steps=(--train.max_steps "$2"); shift 2 ;;
        --help | -h) usage; exit ;;
        --) shift; pack_options=("$@"); break ;;
        *) usage >&2; fail "unknown option $1" ;;
    esac
done
if [ -e "$out" ] && [ ! -e "$out/.quickstart" ] && { [ ! -d "$out" ] || [ -n "$(ls -A "$out")" ]; }; then
    fail "$out exists and was not made by quickstart; name another folder with --out"
fi

for image in ${images[@]+"${images[@]}"}; do
    case "$(realpath -m "$image")/" in
        "$(realpath -m "$out")"/*) fail "$image lies in $out, which quickstart replaces; name another --out" ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

[ -d "$out" ] || trap 'rm -rf "$out"' EXIT # without shards there is nothing worth keeping
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
judged=$out/shards/train
for split in val test; do
    [ ! -d "$out/shards/$split" ] || judged=$out/shards/$split
done
[ ! -d "$out/shards/val" ] || validation=$out/shards/val

printf -v watch '%q --logdir %q' "$root/.venv/bin/tensorboard" "$out/run/tensorboard"
echo "training with $processes processes; watch it with: $watch"
launch "$root/train/train.py" --config "$root/configs/train/quickstart.yaml" --data.train "$out/shards/train" \
    --data.val "$validation" --data.global_batch_size "$tiles_per_step" --out "$out/run" ${steps[@]+"${steps[@]}"}
model=$out/run/best # by its loss on the validation split
[ -d "$model" ] || model=$out/run/model
launch "$root/train/evaluate.py" --model "$model" --data "$judged" --out "$out"

echo "model: $model"
echo "curves and pictures of the run: $watch"
