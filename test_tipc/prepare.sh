#!/usr/bin/env bash
# Makes what test_train_inference_python.sh works on, in test_tipc/output; nothing is downloaded:
#   bash test_tipc/prepare.sh CONFIG.txt MODE
# `lite` in MODE are 16 (training) and 8 (inference) synthetic scenes; `whole` (and benchmark_train) are 64 and 32, or
#   TRAIN_DATA=FOLDER, INFER_DATA=FOLDER   your own pictures
# and whole_infer takes the weights of the last training of this model here, or
#   WEIGHTS=FILE                           a .pdparams of this project, or others' .pth, .pt, .safetensors
#   WEIGHTS=fixed                          those that test_tipc/results was made with
set -euo pipefail
[ $# = 2 ] || { sed -n '2,8s/^# //p' "$0" >&2; exit 2; }
mode=$2
case $mode in
    lite_train_lite_infer) train=lite infer=lite ;;
    lite_train_whole_infer) train=lite infer=whole ;;
    whole_train_whole_infer) train=whole infer=whole ;;
    whole_infer) train='' infer=whole ;;
    benchmark_train) train=whole infer='' ;;
    *) sed -n '2,8s/^# //p' "$0" >&2; exit 2 ;;
esac
config=$(realpath -- "$1")
for name in TRAIN_DATA INFER_DATA WEIGHTS; do  # relative to where the command was given
    [ -z "${!name:-}" ] || [ "${!name}" = fixed ] || printf -v "$name" %s "$(realpath -- "${!name}")"
done
cd -- "$(dirname -- "$0")/.."
. test_tipc/common_func.sh
read_lines "$config"
model=$(value 2)
python=$(value 3)

# pictures NAME lite|whole SEED COUNT_LITE COUNT_WHOLE FOLDER: test_tipc/output/data/NAME.
pictures() {
    local target=test_tipc/output/data/$1 count=$4
    mkdir -p test_tipc/output/data
    rm -rf "$target"
    if [ "$2" = whole ]; then
        count=$5
        if [ -n "$6" ]; then
            [ -d "$6" ] || die "$6 is no folder; give one with pictures"
            ln -s "$6" "$target"
            echo "$target: the pictures of $6"
            return
        fi
    fi
    "$python" - "$target" "$count" "$3" <<'PY'
import sys
from pathlib import Path

sys.path.insert(0, ".")
from ppdensecl.data.synthetic import SyntheticSource

folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
source = SyntheticSource(count, seed, (192, 256))
for i in range(count):
    (folder / f"{i:03d}.png").write_bytes(source.read(i))
PY
    echo "$target: $count synthetic scenes"
}

[ -z "$train" ] || pictures train "$train" 0 16 64 "${TRAIN_DATA:-}"
[ -z "$infer" ] || pictures infer "$infer" 1 8 32 "${INFER_DATA:-}"
if [ "$mode" = whole_infer ]; then
    target=$(value 37)
    mkdir -p "$(dirname "$target")"
    if [ "${WEIGHTS:-}" = fixed ]; then
        read -ra words <<<"$(value 38)"  # of which the second and third are -c CONFIG
        exec "$python" test_tipc/fixed_weights.py "${words[@]:1:2}" --output="$target.pdparams"
    fi
    # shellcheck disable=SC2012
    weights=${WEIGHTS:-$(ls -t test_tipc/output/"$model"/*/*/latest.pdparams 2>/dev/null | head -1 || true)}
    [ -n "$weights" ] || die "whole_infer needs weights: give WEIGHTS=FILE, or run $model in the mode lite_train_lite_infer first"
    case $weights in
        *.pdparams) cp -- "$weights" "$target.tmp" && mv -- "$target.tmp" "$target.pdparams" ;;
        *) "$python" tools/convert_weights.py --backbone "$weights" "$target.pdparams" ;;
    esac
    echo "$target.pdparams: the weights of $weights"
fi
