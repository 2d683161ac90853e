#!/usr/bin/env bash
# A first look in a few minutes on a CPU: installs the core requirements, pre-trains a small DenseCL on procedural scenes, scores
# it beside a random start and draws pictures.
#   bash tools/demo.sh                        procedural scenes, nothing to download
#   DATA=/path/to/pictures bash tools/demo.sh your own pictures: a folder, searched at any depth
#   OUT=folder                                where everything goes (default output/demo)
set -euo pipefail
unset CDPATH
started=$PWD
cd -- "$(dirname -- "$0")/.."
. tools/environment.sh
out=$(cd -- "$started" && mkdir -p -- "${OUT:-$OLDPWD/output/demo}" && cd -- "${OUT:-$OLDPWD/output/demo}" && pwd) ||
    die "OUT=${OUT:-} cannot be made a folder; give another one"
overrides=(output_dir="$out")
task=knn
if [ -n "${DATA:-}" ]; then
    data=$(cd -- "$started" && cd -- "$DATA" && pwd) || die "DATA=$DATA is not a folder; give the folder that holds your pictures"
    overrides+=(data.source=folder data.root="'${data//\'/\'\'}'")
    task=retrieval
fi
use_environment ""
if [ -n "${DATA:-}" ]; then
    # As many iterations as on the scenes, whatever the number of pictures.
    read -r batch epochs <<<"$("$PYTHON" tools/demo_size.py "$data")" || exit 1
    overrides+=(data.batch_size="$batch" optim.epochs="$epochs" optim.max_iters=160)
fi
"$PYTHON" tools/train.py -c configs/densecl_r18_demo.yaml -o "${overrides[@]}" --overwrite
echo
echo "A frozen-feature check, trained beside a random start. It shows that all parts work, not that the network
has learned: 160 iterations are too few, and some of these scores fall below the random start's. Ten times as
many, on photos, lifted them above it (docs/first_run.md)."
for check in "$task" correspondence; do
    count=400; [ "$check" != correspondence ] || count=120
    "$PYTHON" tools/eval.py -c "$out/config.yaml" --checkpoint "$out/latest" --task "$check" --count "$count" --out "$out/$check.json"
done
"$PYTHON" tools/extract_backbone.py "$out/latest" "$out/backbone.pdparams" >/dev/null
"$PYTHON" tools/report.py "$out" >/dev/null
cat <<END

Look at   $out/report.html             scores, curves, matches, features as colours, retrieval, beside a random start
Have      $out/backbone.pdparams       the ResNet-18, torchvision's names
          $out/latest.*                the whole checkpoint; train.py --resume goes on from it
          $out/{train.log,config.yaml,vdl}
Next      bash tools/test.sh
          DATA=/path/to/pictures bash tools/demo.sh
          $PYTHON tools/train.py -c configs/densecl_r18_photos.yaml -o data.root=/path/to/pictures
END
