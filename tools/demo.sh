#!/usr/bin/env bash
# A first look in a few minutes on a CPU: installs the core requirements, pre-trains a small DenseCL on procedural scenes, scores
# it beside a random start and draws pictures.
#   bash tools/demo.sh                        procedural scenes, nothing to download
#   DATA=/path/to/pictures bash tools/demo.sh your own pictures: a folder, searched at any depth
#   OUT=folder                                where everything goes (default output/demo)
set -euo pipefail
data=${DATA:+$(cd "$DATA" && pwd)} || { echo "error: DATA=$DATA is not a folder; give the folder that holds your pictures" >&2; exit 1; }
cd "$(dirname "$0")/.."
. tools/environment.sh
use_environment ""
out=${OUT:-output/demo}
overrides=(output_dir="$out")
tasks=(knn)
if [ -n "$data" ]; then
    overrides+=(data.source=folder data.root="$data")
    tasks=(retrieval)
fi
"$PYTHON" tools/train.py -c configs/densecl_r18_demo.yaml -o "${overrides[@]}" --overwrite
for task in "${tasks[@]}" correspondence; do
    "$PYTHON" tools/eval.py -c "$out/config.yaml" --checkpoint "$out/latest" --task "$task" --out "$out/$task.json" >/dev/null
done
"$PYTHON" tools/extract_backbone.py "$out/latest" "$out/backbone.pdparams" >/dev/null
"$PYTHON" tools/visualize.py "$out"
