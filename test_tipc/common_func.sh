# Sourced by the scripts beside it. A config is a file of `key:value` lines, each known by its number; see docs/.

die() { echo "error: $*" >&2; exit 1; }

# read_lines FILE: into the array `lines`, the first at 1.
read_lines() {
    local number
    [ -f "$1" ] && [ -r "$1" ] || die "$1 cannot be read; give a file of test_tipc/configs"
    mapfile -t -O 1 lines <"$1"
    [ "${#lines[@]}" -ge 51 ] || die "$1 has ${#lines[@]} lines, expected at least 51; see test_tipc/docs"
    for number in "${!lines[@]}"; do
        case ${lines[number]} in
            '' | *[[:space:]]) die "$1:$number is blank or ends in a blank; take that away, lines are known by their numbers" ;;
            *:*:*) die "$1:$number has a second colon, where Paddle's own runner ends the value; write it with one" ;;
        esac
    done
}

key() { echo "${lines[$1]%%:*}"; }

value() { [[ ${lines[$1]} != *:* ]] || echo "${lines[$1]#*:}"; }

# value_of_mode LINE MODE: of `key:mode=value|mode=value`. A mode that is not there is an error, not the default of the tool.
value_of_mode() {
    local part parts
    [ "$(key "$1")" != null ] || return 0
    IFS='|' read -ra parts <<<"$(value "$1")"
    for part in "${parts[@]}"; do
        [ "${part%%=*}" != "$2" ] || { echo "${part#*=}"; return; }
    done
    die "line $1 of the config, '${lines[$1]}', has no value for $2; add |$2=…"
}

# option KEY VALUE: KEY=VALUE, or nothing where one of them is null or empty.
option() {
    case $1:$2 in null:* | *:null | :* | *:) ;; *) echo "$1=$2" ;; esac
}

# run LOG COMMAND…: shows and keeps what the command says, and counts it. Needs $model, $results; changes $commands, $failures.
run() {
    local log=$1 status
    shift
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    commands=$((commands + 1))
    if [ "$status" = 0 ]; then
        echo "Run successfully with command - $model - $* - $log" | tee -a "$results"
    else
        failures=$((failures + 1))
        echo "Run failed with command - $model - $* - $log (exit status $status)" | tee -a "$results"
    fi
    return "$status"
}
