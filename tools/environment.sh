# Sourced by the other scripts: `use_environment EXTRAS` (a comma-separated list, or nothing) sets $PYTHON to an interpreter
# with ppdensecl's requirements, installing what is missing. The versions are pinned by the requirements files.
#   VENV              virtual environment to make or reuse (default .venv; an active one is used as it is)
#   PADDLEPADDLE      version of paddlepaddle, where it is installed (default: that of requirements.txt)

die() { echo "error: $*" >&2; exit 1; }

use_environment() {
    local extras=$1 stamp paddle hash
    if [ -n "${VENV:-}" ] || { [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ] && ! has_gpu_paddle python3; }; then
        VENV=${VENV:-.venv}
        if [ ! -x "$VENV/bin/python" ]; then
            check_version python3
            echo "making the virtual environment $VENV"
            python3 -m venv "$VENV" || die "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
        fi
        PYTHON=$VENV/bin/python
    else
        PYTHON=$(command -v python3)
    fi
    check_version "$PYTHON"
    paddle=$(sed -n 's/^paddlepaddle==//p' requirements.txt)
    paddle=paddlepaddle==${PADDLEPADDLE:-$paddle}
    # Once installed nothing is asked of the network: the stamp remembers what was installed last.
    stamp=$("$PYTHON" -c 'import sys; print(sys.prefix)')/.ppdensecl-installed
    hash=$(echo "$paddle $extras $PWD" | cat - pyproject.toml requirements.txt requirements-gpu.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$hash" ]; then
        if has_gpu_paddle "$PYTHON"; then
            echo "using the paddlepaddle-gpu that is installed"
            "$PYTHON" -m pip install -q --no-deps -e . &&
                # shellcheck disable=SC2046
                "$PYTHON" -m pip install -q -c requirements-gpu.txt $(requirements_without_paddle "$extras")
        else
            echo "installing the requirements (a minute or a few)"
            "$PYTHON" -m pip install -q -c requirements-gpu.txt "$paddle" -e ".${extras:+[$extras]}"
        fi || die "pip could not install the requirements; see its message above"
        echo "$hash" >"$stamp" || true
    fi
    "$PYTHON" -c 'import cv2' 2>/dev/null ||
        die "OpenCV does not start ($("$PYTHON" -c 'import cv2' 2>&1 | tail -1)); on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0"
}

check_version() {
    "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' ||
        die "$1 is $("$1" -V 2>&1), but 3.9 to 3.11 is needed; put one first on PATH, or activate an environment that has it"
}

has_gpu_paddle() {
    "$1" -c 'from importlib.metadata import version; version("paddlepaddle-gpu")' 2>/dev/null
}

requirements_without_paddle() {
    "$PYTHON" - "$1" <<'PY'
import re, sys
from importlib.metadata import requires
extras = sys.argv[1].split(",")
for requirement in requires("ppdensecl"):
    name, _, marker = requirement.partition(";")
    extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
    if not name.startswith("paddlepaddle") and (extra is None or extra.group(1) in extras):
        print(name.strip().replace(" ", ""))
PY
}
