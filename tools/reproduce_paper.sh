#!/usr/bin/env bash
# The paper's table, command by command, on one machine with 1, 2, 4, 8 or 16 GPUs. See docs/reproduce.md.
#   bash tools/reproduce_paper.sh --list [STEP…]     the steps, done or not
#   bash tools/reproduce_paper.sh --print [STEP…]    the commands that are left, ready to paste
#   bash tools/reproduce_paper.sh --run [STEP…]      runs them; after any end the same command goes on where it was
# STEP is a step's name or a part of it between dots: pretrain, moco_coco_800, voc_detection.densecl_coco_800; none: all.
# The last step, table, prints the results that are there beside the paper's numbers. Settings are environment variables:
#   GPUS        cards (default 0,1,2,3,4,5,6,7); the whole batch is the recipe's, whatever their number
#   COCO, IMAGENET, VOC, CITYSCAPES, SBD    data (default data/coco, imagenet, VOCdevkit, cityscapes, benchmark_RELEASE)
#   OUT         where everything goes (default output/paper)
#   PYTHON      the interpreter (default python)
# shellcheck disable=SC2030,SC2031  # a mode of a subshell is to end with it
set -euo pipefail
shopt -s extglob nullglob
unset CDPATH
started=$PWD
cd -- "$(dirname -- "$0")/.."

die() { echo "error: $1" >&2; exit "${2:-1}"; }

path() { case $1 in "") echo "$2" ;; /*) echo "$1" ;; *) echo "$started/$1" ;; esac; }

COCO=$(path "${COCO:-}" data/coco) IMAGENET=$(path "${IMAGENET:-}" data/imagenet) VOC=$(path "${VOC:-}" data/VOCdevkit)
CITYSCAPES=$(path "${CITYSCAPES:-}" data/cityscapes) SBD=$(path "${SBD:-}" data/benchmark_RELEASE)
OUT=$(path "${OUT:-}" output/paper) GPUS=${GPUS:-0,1,2,3,4,5,6,7} PYTHON=${PYTHON:-python}
case $PYTHON in */*) PYTHON=$(path "$PYTHON") ;; esac

# Also the order of the table's columns.
MODELS=(moco_coco_800 densecl_coco_800 densecl_coco_1600 moco_imagenet_200 densecl_imagenet_200 densecl_r101_imagenet_200)

steps() {
    local model suite depth task sbd=(--sbd "$SBD")
    [ -d "$SBD" ] || [ ! -d "$VOC/VOC2012/SegmentationClassAug" ] || sbd=()
    step prepare.voc_detection VOC none tools/prepare_data.py voc --root "$VOC" --task detection
    step prepare.voc_segmentation "VOC SBD" none tools/prepare_data.py voc --root "$VOC" --task segmentation "${sbd[@]}"
    step prepare.coco_10pct COCO none tools/prepare_data.py coco --root "$COCO" --fraction 0.1
    step prepare.cityscapes CITYSCAPES none tools/prepare_data.py cityscapes --root "$CITYSCAPES"
    pretrain moco_coco_800 moco_v2_r50_coco_800ep COCO "$COCO/train2017"
    pretrain densecl_coco_800 densecl_r50_coco_800ep COCO "$COCO/train2017"
    pretrain densecl_coco_1600 densecl_r50_coco_1600ep COCO "$COCO/train2017"
    pretrain moco_imagenet_200 moco_v2_r50 IMAGENET "$IMAGENET/train"
    pretrain densecl_imagenet_200 densecl_r50 IMAGENET "$IMAGENET/train"
    pretrain densecl_r101_imagenet_200 densecl_r101 IMAGENET "$IMAGENET/train"
    for model in "${MODELS[@]}"; do
        for suite in paddledet paddleseg; do
            step "export.$model.$suite" "pretrain.$model" one tools/export_finetune.py "$OUT/pretrain/$model/latest" \
                --to "$suite" --out "$OUT/backbones/${model}_$suite.pdparams"
        done
    done
    for model in "${MODELS[@]}"; do
        depth=50; [[ $model != *r101* ]] || depth=101
        detection voc_detection "faster_rcnn_r${depth}_c4_voc_24k" "VOC prepare.voc_detection" "$VOC" 0 1 2 3 4
        segmentation voc_segmentation "fcn_r$depth-d8_voc12aug_20k" 20000 "VOC prepare.voc_segmentation" "$VOC"
    done
    for model in moco_coco_800 densecl_coco_800 moco_imagenet_200 densecl_imagenet_200; do
        detection coco mask_rcnn_r50_fpn_coco_1x COCO "$COCO" 0
        detection coco_10pct mask_rcnn_r50_fpn_coco10pct "COCO prepare.coco_10pct" "$COCO" 0
        segmentation cityscapes fcn_r50-d8_cityscapes_40k_769 40000 "CITYSCAPES prepare.cityscapes" "$CITYSCAPES"
    done
    for task in knn_imagenet linear_imagenet semi_imagenet_1pct semi_imagenet_10pct; do
        probe "$task" IMAGENET --train-dir "$IMAGENET/train" --test-dir "$IMAGENET/val"
    done
    probe svm_voc07 VOC --voc07 "$VOC/VOC2007"
}

pretrain() {  # MODEL CONFIG DATA FOLDER
    # 32 pictures a card as in the paper, for BatchNorm; fewer cards take several turns. One alone has nobody to shuffle with.
    local batch=(data.batch_size=$((cards > 8 ? 256 / cards : 32)) optim.accumulate=$((cards > 8 ? 1 : 8 / cards)))
    [ "$cards" != 1 ] || batch+=(model.bn_groups=4)
    step "pretrain.$1" "$3" all tools/train.py -c "configs/$2.yaml" -o output_dir="$(yaml "$OUT/pretrain/$1")" \
        data.root="$(yaml "$4")" "${batch[@]}" --resume
}

detection() {  # TASK CONFIG NEEDS FOLDER SEED…, for $model
    local config=$2 needs=$3 seed name save resume
    local data=(TrainDataset.dataset_dir="$(yaml "$4")" EvalDataset.dataset_dir="$(yaml "$4")")
    for seed in "${@:5}"; do
        name=$1.$model.seed_$seed save=$OUT/$1/$model/seed_$seed
        newest "$name.train" "$save/$config"/+([0-9]).pdopt
        step "$name.train" "$needs export.$model.paddledet" all tools/finetune_det.py -c "configs/det/$config.yml" train \
            "${resume[@]}" -o save_dir="$(yaml "$save")" pretrain_weights="$(yaml "$OUT/backbones/${model}_paddledet.pdparams")" \
            seed="$seed" validate=false "${data[@]}"
        step "$name.eval" "${needs%% *} $name.train" one tools/finetune_det.py -c "configs/det/$config.yml" eval \
            -o save_dir="$(yaml "$save")" weights="$(yaml "$save/$config/model_final.pdparams")" "${data[@]}"
    done
}

segmentation() {  # TASK CONFIG ITERATIONS NEEDS FOLDER, for $model
    local name=$1.$model save=$OUT/$1/$model resume
    newest "$name.train" "$save"/iter_!("$3")/model.pdopt  # after the last iteration there is nothing to go on with
    step "$name.train" "$4 export.$model.paddleseg" all tools/finetune_seg.py -c "configs/seg/$2.yml" train "${resume[@]}" \
        --save_dir "$save" --pretrained "$OUT/backbones/${model}_paddleseg.pdparams" --dataset_root "$5" \
        --batch_size $((16 / cards)) --seed 0 --no_eval
    step "$name.eval" "${4%% *} $name.train" one tools/finetune_seg.py -c "configs/seg/$2.yml" eval \
        --model_path "$save/iter_$3/model.pdparams" --dataset_root "$5"
}

probe() {  # PROTOCOL DATA OPTION…
    local run=pretrain.densecl_imagenet_200 name=$1.densecl_imagenet_200
    step "$name.probe" "$2 $run" one tools/eval.py -c configs/densecl_r50.yaml --checkpoint "$OUT/${run/.//}/latest" --no-random \
        --protocol "configs/probes/$1.yaml" --cache "$OUT/features" --out "$OUT/log/$name.json" "${@:3}"
}

table() {
    printf '| here / paper |'; printf ' %s |' "${MODELS[@]}"; printf '\n|---|'; printf -- '---|%.0s' "${MODELS[@]}"; echo
    metric "VOC detection AP" voc_detection "^bbox as VOC 2007 counts: AP " 1 54.7 56.7 57.2 57.0 58.7 61.3
    metric "… AP50" voc_detection "^bbox as VOC 2007 counts: .*, AP50 " 1 81.0† 81.7† - 82.4† 82.8† -
    metric "… AP75" voc_detection "^bbox as VOC 2007 counts: .*, AP75 " 1 60.6† 63.0† - 63.6† 65.2† -
    metric "VOC segmentation mIoU" voc_segmentation ": mIoU " 100 64.5 67.5 68.0 67.5 69.4 74.1
    metric "COCO box AP" coco "^bbox: AP " 1 38.5† 39.6† - 39.8† 40.3† -
    metric "COCO mask AP" coco "^mask: AP " 1 34.8† 35.7† - 36.1† 36.4† -
    metric "COCO 10 % box AP" coco_10pct "^bbox: AP " 1 22.8† 24.1† - 23.8† 24.8† -
    metric "Cityscapes mIoU" cityscapes ": mIoU " 100 73.8† 75.6† - 74.5† 75.7† -
    metric "ImageNet linear, top 1" linear_imagenet "^linear: trained " 1 - - - - 63.62‡ -
    metric "ImageNet kNN, k = 20" knn_imagenet "^  k = 20: trained " 1 - - - - 48.5‡ -
    metric "ImageNet kNN, k = 200" knn_imagenet "^  k = 200: trained " 1 - - - - 45.6‡ -
    metric "ImageNet, 1 % of the labels" semi_imagenet_1pct "^semi: trained " 1 - - - - - -
    metric "ImageNet, 10 % of the labels" semi_imagenet_10pct "^semi: trained " 1 - - - - - -
    metric "VOC07 SVM, mAP" svm_voc07 "^svm: trained " 1 - - - - 82.5‡ -
    metric "VOC07 SVM, 1 positive" svm_voc07 "^  k = 1: trained " 1 - - - - 42.68‡ -
    metric "VOC07 SVM, 96 positives" svm_voc07 "^  k = 96: trained " 1 - - - - 80.55‡ -
    printf '\n%s\n' "– no result; (N) mean of N runs; † paper, unverified here; ‡ mmselfsup's, not the paper's"
}

metric() {  # LABEL TASK BEFORE-THE-NUMBER SCALE PAPER-OF-EACH-MODEL…
    local line="| $1 |" model here paper=("${@:5}") logs
    for model in "${MODELS[@]}"; do
        logs=("$OUT/log/$2.$model".*@(eval|probe).txt)
        here=$(LC_ALL=C awk -v before="$3" -v scale="$4" '
            match($0, before) { value[FILENAME] = substr($0, RSTART + RLENGTH) * scale }
            END { for (file in value) { sum += value[file]; n++ }
                  printf(n > 1 ? "%.1f (%d)" : n ? "%.1f" : "–", n ? sum / n : 0, n) }' "${logs[@]}" </dev/null)
        line+=" $here / ${paper[0]/#-/–} |" paper=("${paper[@]:1}")
    done
    echo "$line"
}

yaml() { case $1 in *[!A-Za-z0-9_./-]*) echo "'${1//\'/\'\'}'" ;; *) echo "$1" ;; esac; }  # a path as a value after -o

shown() {  # words as a shell reads them
    local word line=
    for word; do case $word in *[!A-Za-z0-9_./=,:-]* | "") line+=" ${word@Q}" ;; *) line+=" $word" ;; esac; done
    echo "${line# }"
}

selected() {
    local part
    for part in "${parts[@]}"; do [[ .$1. != *".$part."* ]] || return 0; done
    [ ${#parts[@]} = 0 ]
}

is_done() { [ -e "$OUT/done/$1" ]; }

newest() {  # STEP .pdopt-FILE…: sets `resume` to the option that goes on from the last snapshot that kill -9 did not cut short
    local file stem
    resume=()
    if [[ $mode != --@(print|run) || $# = 1 ]] || ! selected "$1" || is_done "$1"; then return; fi
    while IFS= read -r file; do
        stem=${file%.pdopt}
        "$PYTHON" -c 'import sys; from ppdensecl.engine import checkpoint; list(map(checkpoint.read_nested, sys.argv[1:]))' \
            "$stem.pdparams" "$stem.pdopt" 2>/dev/null || continue
        resume=(--resume "${stem%/model}")
        break
    done < <(printf '%s\n' "${@:2}" | sort -rV)
}

step() {  # NAME NEEDS CARDS TOOL ARGUMENT…: NEEDS are data sets and steps, CARDS are all, one or none
    local name=$1 log=$OUT/log/$1 command=("$PYTHON") need status=0
    selected "$name" || return 0
    case $3 in
        all) command+=(-m paddle.distributed.launch --devices "$GPUS" --log_dir "$log") ;;
        one) command=(env CUDA_VISIBLE_DEVICES="${GPUS%%,*}" "$PYTHON") ;;
    esac
    command+=("${@:4}")
    if [ "$mode" = names ]; then echo "$name"; return; fi
    if is_done "$name"; then
        case $mode in --list) echo "done      $name" ;; --print) echo "# $name is done" ;; esac
        return
    fi
    case $mode in
        --list) echo "not done  $name" ;;
        --print) echo "# $name"; echo "$(shown "${command[@]}") | tee $(shown "$log.txt")" ;;
        check) for need in $2; do check "$need"; done ;;
        --run)
            echo "== $name"; shown "${command[@]}"
            "${command[@]}" | tee -i "$log.part" || status=$?
            [ "$status" = 0 ] || die "$name ended with status $status; mend what it says, then the same command goes on" "$status"
            mv "$log.part" "$log.txt"
            shown "${command[@]}" >"$OUT/done/$name.part"
            mv "$OUT/done/$name.part" "$OUT/done/$name" ;;
    esac
}

check() {  # what the step $name needs
    local lies folder
    case $1 in
        COCO) lies="train2017 val2017 annotations" ;;
        IMAGENET) lies="train val" ;;
        VOC) lies="VOC2007 VOC2012" ;;
        CITYSCAPES) lies="leftImg8bit gtFine" ;;
        SBD) lies=dataset/cls; [ ! -d "$VOC/VOC2012/SegmentationClassAug" ] || return 0 ;;
        *) is_done "$1" || selected "$1" || die "$name needs $1, which is not done; name it too: --run $1 $name"; return ;;
    esac
    for folder in $lies; do
        [ -d "${!1}/$folder" ] || die "$1=${!1} has no folder $folder; set $1 to the folder of ${lies// /, } (docs/data.md)"
    done
}

mode=${1:-} parts=("${@:2}")
[[ $mode = --@(list|print|run) ]] || { sed -n '2,11s/^# \{0,1\}//p' tools/reproduce_paper.sh >&2; exit 2; }
commas=${GPUS//[!,]/}
cards=$(tr , '\n' <<<"$GPUS" | grep -xE '[0-9]+' | sort -u | wc -l) || true
[ "$cards" = $((${#commas} + 1)) ] || die "GPUS=$GPUS: give the numbers of the cards, each once, such as 0,1,2,3"
[[ $cards = @(1|2|4|8|16) ]] || die "GPUS=$GPUS: $cards cards cannot share a batch of 16 evenly; give 1, 2, 4, 8 or 16"
for part in "${parts[@]}"; do
    [ -n "$(mode=names parts=("$part"); steps; ! selected table || echo table)" ] ||
        die "$part is no step and no part of one; see --list" 2
done
if [ "$mode" = --print ]; then
    shown cd -- "$PWD"; shown mkdir -p "$OUT/log" "$OUT/backbones"
elif [ "$mode" = --run ]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is no command; set it to the interpreter that has the requirements"
    (mode=check; steps)
    mkdir -p "$OUT/log" "$OUT/backbones" "$OUT/done" || die "OUT=$OUT cannot be made a folder; give another one"
    exec {lock}>"$OUT/lock"  # all commands below inherit it: what outlives a killed script still holds it
    flock -n -E 100 "$lock" || [ $? != 100 ] || die "OUT=$OUT: a command of another run still works there; wait for it or end it"
fi
steps
! selected table || case $mode in
    --list) echo "always    table" ;;
    --print) echo "# table"; shown env OUT="$OUT" bash tools/reproduce_paper.sh --run table ;;
    --run) table ;;
esac
