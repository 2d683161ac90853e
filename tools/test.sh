#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest: bash tools/test.sh -m slow, bash tools/test.sh -k loader
# EXTRAS=align also installs PyTorch (of Python 3.10 or newer), for the comparisons with it.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
use_environment "dev${EXTRAS:+,$EXTRAS}"
exec "$PYTHON" -m pytest -q --durations=10 -rs "$@"
