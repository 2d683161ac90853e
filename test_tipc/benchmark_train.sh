#!/usr/bin/env bash
# Measures the speed of training, by the lines of a config after train_benchmark_params:
#   bash test_tipc/prepare.sh         CONFIG.txt benchmark_train
#   bash test_tipc/benchmark_train.sh CONFIG.txt benchmark_train [PARAMS]
# PARAMS, such as dynamic_bs32_fp32_DP_N1C8 (type, batch of a card, precision, mode, machines and cards), count more. Logs are in
# train_log/ and speeds, as JSON, in index/ of BENCHMARK_LOG_DIR (default test_tipc/output/benchmark). See test_tipc/docs.
set -uo pipefail
[ $# -ge 2 ] && [ $# -le 3 ] && [ "$2" = benchmark_train ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
config=$(realpath -- "$1")
out=$(realpath -m -- "${BENCHMARK_LOG_DIR:-$(dirname -- "$0")/output/benchmark}")
cd -- "$(dirname -- "$0")/.." || exit
. test_tipc/common_func.sh
read_lines "$config"

# benchmark KEY: its value after train_benchmark_params.
benchmark() {
    local number seen=
    for number in "${!lines[@]}"; do
        [ -z "$seen" ] || [ "$(key "$number")" != "$1" ] || { value "$number"; return; }
        [[ ${lines[number]} != *train_benchmark_params* ]] || seen=yes
    done
    die "$config has no line $1:… after train_benchmark_params"
}

# set_value LINE VALUE: keeps the key.
set_value() { lines[$1]=$(key "$1"):$2; }

model=$(value 2)
epochs=$(benchmark epoch) && batches=$(benchmark batch_size) && precisions=$(benchmark fp_items) && flags=$(benchmark flags) &&
    trainer=$(benchmark model_type) && workers=$(benchmark num_workers) || exit
run_mode=DP device_num=N1C1
if [ $# = 3 ]; then
    [[ $3 =~ ^[^_]+_bs([0-9]+)_([^_]+)_([^_]+)_(N[1-9][0-9]*C[1-9][0-9]*)$ ]] ||
        die "$3: expected PARAMS such as dynamic_bs32_fp32_DP_N1C1"
    batches=${BASH_REMATCH[1]} precisions=${BASH_REMATCH[2]} run_mode=${BASH_REMATCH[3]} device_num=${BASH_REMATCH[4]}
fi
machines=${device_num#N} cards=${device_num#*C}
machines=${machines%C*}
gpus=$(value 4)
if [ "$gpus" = -1 ]; then
    [ "$device_num" = N1C1 ] || die "$config is for the CPU, not for $device_num; take train_gpu_infer_python.txt"
else
    [[ $gpus = *';'* ]] || [ "$machines" = 1 ] ||
        die "$config is for one machine, not for $device_num; take train_fleet_infer_python.txt"
    here=$(seq -s, 0 $((cards / machines - 1)))
    [[ $gpus = *';'* ]] && gpus="${gpus%%;*};$here" || gpus=$here
fi
if [ "$flags" != null ]; then
    IFS=';' read -ra flags <<<"$flags"
    export "${flags[@]?}"
fi
set_value 4 "$gpus"
set_value 5 "$(value 5 | cut -d'|' -f1)"
set_value 7 "benchmark_train=$epochs"
set_value 15 "$trainer"
lines[16]+=" -o log.interval=1"
[ "$workers" = null ] || lines[16]+=" data.workers=$workers"
set_value 24 null
set_value 30 null
mkdir -p "$out/train_log" "$out/index" || exit
failed=0
for batch in ${batches//|/ }; do
    for precision in ${precisions//|/ }; do
        case $precision in  # Paddle's names and the config's
            off | null) precision=fp32 ;;
            float16 | amp) precision=fp16 ;;
            bfloat16) precision=bf16 ;;
        esac
        case $precision in
            fp32) set_value 6 off ;;
            fp16) set_value 6 float16 ;;
            bf16) set_value 6 bfloat16 ;;
            *) die "$precision: expected fp32, fp16 or bf16 as precision" ;;
        esac
        set_value 9 "benchmark_train=$batch"
        printf '%s\n' "${lines[@]}" >"$out/benchmark_train.txt"
        name=ppdensecl_${model}_bs${batch}_${precision}_${run_mode}_$device_num
        started=$(date +%s)
        log=$out/train_log/${name}_log
        if ! bash test_tipc/test_train_inference_python.sh "$out/benchmark_train.txt" benchmark_train >"$log" 2>&1; then
            tail -n 3 "$log" >&2
            failed=1
        elif ! "$(value 3)" test_tipc/speed_log.py "$log" --output="$out/index/${name}_speed" --device-num="$device_num" \
                --model-name="${name#ppdensecl_}" --batch-size="$batch" --fp-item="$precision" --run-mode="$run_mode" \
                --model-run-time=$(($(date +%s) - started)); then
            failed=1
        fi
    done
done
exit $failed
