#!/usr/bin/env bash
# Sets up .venv and runs the quickstart; arguments are passed on to scripts/quickstart.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

make_environment .venv ".[plots,train]" constraints.txt
exec .venv/bin/python scripts/quickstart.py "$@"
