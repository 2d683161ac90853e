#!/usr/bin/env bash
# Trains, scores, exports and infers as a config says, on each device and with each option it lists:
#   bash test_tipc/prepare.sh                     CONFIG.txt MODE
#   bash test_tipc/test_train_inference_python.sh CONFIG.txt MODE [GPUS of whole_infer]
# MODE is lite_train_lite_infer, lite_train_whole_infer, whole_train_whole_infer, whole_infer or benchmark_train. Ends with 0 if
# all commands did; each has a line in test_tipc/output/MODEL/MODE/results_python.log. See test_tipc/docs.
set -uo pipefail
[ $# -ge 2 ] && [ $# -le 3 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
mode=$2
case $mode in
    lite_train_lite_infer | lite_train_whole_infer | whole_train_whole_infer | whole_infer | benchmark_train) ;;
    *) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;;
esac
config=$(realpath -- "$1")
cd -- "$(dirname -- "$0")/.." || exit
. test_tipc/common_func.sh
read_lines "$config"
model=$(value 2)
python=$(value 3)
folder=./test_tipc/output/$model/$mode
results=$folder/results_python.log
commands=0 failures=0
mkdir -p "$folder" && : >"$results" || die "$results cannot be written"

# list LINE: the values of a line, one a line.
list() { value "$1" | tr '|' '\n'; }

# infer MODEL_DIR PICTURES NAME [ENVIRONMENT]: with all options; NAME begins the names of the logs. Reads lines 40 to 51.
infer() {
    local device mkldnn threads tensorrt precision batch
    for device in $(list 41); do
        for precision in $(list 46); do
            for batch in $(list 44); do
                if [ "$device" = cpu ] || [ "$device" = False ]; then
                    for mkldnn in $(list 42); do
                        [ "$precision" != fp16 ] || [ "$mkldnn" != False ] || continue
                        for threads in $(list 43); do
                            infer_once "$@" "cpu_usemkldnn_${mkldnn}_threads_${threads}_precision_${precision}_batchsize_$batch" \
                                "$(option "$(key 42)" "$mkldnn") $(option "$(key 43)" "$threads")"
                        done
                    done
                else
                    for tensorrt in $(list 45); do
                        [ "$precision" != fp16 ] || [ "$tensorrt" != False ] || continue
                        infer_once "$@" "gpu_usetrt_${tensorrt}_precision_${precision}_batchsize_$batch" \
                            "$(option "$(key 45)" "$tensorrt")"
                    done
                fi
            done
        done
    done
}

# infer_once MODEL_DIR PICTURES NAME ENVIRONMENT WHAT OPTIONS
infer_once() {
    local log=$folder/$3python_infer_$5.log words
    # The key of line 51 gets a file for each way, as in PaddleSeg: they are to be compared.
    read -ra words <<<"$4 $python $(value 40) $(option "$(key 41)" "$device") $6 $(option "$(key 46)" "$precision") \
        $(option "$(key 47)" "$1") $(option "$(key 48)" "$2") $(option "$(key 44)" "$batch") $(option "$(key 49)" "$(value 49)") \
        $(option "$(key 50)" "$(value 50)") $(option "$(key 51)" "${log%.log}.npz")"
    run "$log" "${words[@]}"
}

# chain GPUS DEVICE AUTOCAST TRAINER: trains, and if that went well, scores, exports and infers.
chain() {
    local gpus=${1#*;} machines= launch= environment= words name line n
    [[ $1 != *';'* ]] || machines=${1%%;*}
    for n in 16 17 18 19 20 21; do
        [ "$(key $n)" != "$4" ] || line=$n
    done
    [ -n "${line:-}" ] && [ "$(value "$line")" != null ] ||
        die "trainer $4 of line 15 has no command in lines 16 to 21 of the config"
    if [[ $gpus = *,* ]] || [ -n "$machines" ]; then
        launch="-m paddle.distributed.launch $(option --ips "$machines") --devices=$gpus --log_dir=$folder/workers"
        environment="env CUDA_VISIBLE_DEVICES=${gpus%%,*}"  # of what comes after the training
    elif [ "$gpus" != -1 ]; then
        environment="env CUDA_VISIBLE_DEVICES=$gpus"
    fi
    name=${4}_gpus_${gpus}_autocast_$3
    read -ra words <<<"$([ -n "$launch" ] || echo "$environment") $python $launch $(value "$line") $(option "$(key 5)" "$2") \
        $(option "$(key 8)" "$folder/$name") $(option "$(key 7)" "$epochs") $(option "$(key 10)" "$(value 10)") \
        $(option "$(key 6)" "$3") $(option "$(key 9)" "$train_batch") $(option "$(key 13)" "$(value 13)")"
    run "$folder/$name.log" "${words[@]}" || { echo "$name: the training failed, so nothing is made of it"; return; }
    # The first machine has the checkpoint.
    [ -z "$machines" ] || [[ " $(hostname -I) " = *" ${machines%%,*} "* ]] || return
    local weights=$folder/$name/$(value 11)
    if [ "$(value 24)" != null ]; then
        read -ra words <<<"$environment $python $(value 24) $(option "$(key 10)" "$weights") $(option "$(key 5)" "$2") \
            $(option "$(key 25)" "$(value 25)")"
        run "$folder/${name}_eval.log" "${words[@]}"
    fi
    [ "$(value $((line + 14)))" != null ] || return
    read -ra words <<<"$environment $python $(value $((line + 14))) $(option "$(key 29)" "$weights") \
        $(option "$(key 28)" "$folder/$name")"
    run "$folder/${name}_export.log" "${words[@]}" || { echo "$name: the export failed, so there is no inference"; return; }
    local exported=$folder/$name
    case $(value 36) in null | '') ;; *) exported+=/$(value 36) ;; esac
    infer "$exported" "$(value 12)" "${name}_" "$environment"
}

if [ "$mode" = whole_infer ]; then
    environment=${3:+env CUDA_VISIBLE_DEVICES=$3}
    mapfile -t exports < <(list 38)
    count=0
    for weights in $(list 37); do
        if [ "${exports[count]:-null}" != null ]; then
            read -ra words <<<"$environment $python ${exports[count]} $(option "$(key 29)" "$weights") \
                $(option "$(key 28)" "$weights")"
            run "$folder/export_$count.log" "${words[@]}" && infer "$weights" "$(value 48)" "" "$environment"
        else
            infer "$weights" "$(value 48)" "" "$environment"
        fi
        count=$((count + 1))
    done
else
    epochs=$(value_of_mode 7 "$mode") && train_batch=$(value_of_mode 9 "$mode") || exit
    mapfile -t devices < <(list 5)
    mapfile -t gpu_sets < <(list 4)
    [ "${#devices[@]}" = "${#gpu_sets[@]}" ] || die "lines 4 and 5 of the config list different numbers of devices"
    [ "$(value 4)" = -1 ] ||
        "$python" -c 'import sys, ppdensecl, paddle; sys.exit(not paddle.device.cuda.device_count())' 2>/dev/null ||
        die "$1 is for GPUs (line 4), of which Paddle sees none here; on a CPU take train_infer_python.txt"
    for n in "${!gpu_sets[@]}"; do
        for autocast in $(list 6); do
            for trainer in $(list 15); do
                chain "${gpu_sets[n]}" "${devices[n]}" "$autocast" "$trainer"
            done
        done
    done
fi
[ "$commands" -gt 0 ] || die "$config asks for no command in $mode; see lines 4, 6, 15 and 37"
echo "$((commands - failures)) of $commands commands ended well; $results"
[ "$failures" = 0 ]
