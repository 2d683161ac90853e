#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest: bash tools/test.sh -m slow, bash tools/test.sh -k loader
# EXTRAS=finetune,export,service,notebooks,align also installs what these parts need (align: PyTorch, of Python 3.10 or newer).
# Without, their tests are skipped and say so.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
use_environment "dev${EXTRAS:+,$EXTRAS}"
exec "$PYTHON" -m pytest -q --durations=10 -rs "$@"
