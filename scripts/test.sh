#!/usr/bin/env bash
# Sets up .venv and runs the fast tests; arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

make_environment .venv ".[test]" constraints.txt
run_tests .venv -m "not slow" "$@"
