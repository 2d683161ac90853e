#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest: bash tools/test.sh -m slow, bash tools/test.sh -k loader
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
use_environment dev
exec "$PYTHON" -m pytest -q --durations=10 -rs "$@"
