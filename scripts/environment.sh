# Sourced by the commands beside it, from the repository's root: makes a virtual environment, runs tests in it.

# the first Python that is new enough; PYTHON=/path/to/python chooses another
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed; tried ${PYTHON:-python3, python3.13, python3.12, python3.11}." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# make_environment FOLDER REQUIREMENT CONSTRAINTS: FOLDER gets this project (REQUIREMENT is "." or ".[extras]") in the
# versions of CONSTRAINTS. Does nothing when an earlier call did the same.
make_environment() {
    local folder=$1 requirement=$2 constraints=$3 python inputs installed=
    # an installation is as good as its inputs: this folder, and the two files that say what a requirement means
    inputs=$(echo "$PWD" | cat - pyproject.toml "$constraints" | cksum)
    if [ -f "$folder/.installed" ]; then
        installed=$(sed -n "/^$inputs /p" "$folder/.installed")
    fi
    if grep -qxF "$inputs $requirement" <<<"$installed"; then
        return
    fi
    if [ ! -x "$folder/bin/python" ] || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$python has no venv module. Install it (on Debian and Ubuntu: the package python3-venv)." >&2
            return 1
        fi
        echo "Making the environment $folder with $("$python" --version)"
        "$python" -m venv --clear "$folder"
    fi
    echo "Installing $requirement with $constraints; the first time takes some minutes"
    "$folder/bin/python" -m pip install --disable-pip-version-check -e "$requirement" -c "$constraints"
    echo "$installed"$'\n'"$inputs $requirement" >"$folder/.installed"
}

# run_tests FOLDER ARGUMENTS: pytest in FOLDER's environment, the test files spread over the processor's cores. Most
# tests are the work of one thread; ARGUMENTS may have the last word, such as -n 0 for a debugger. A process that ends
# in the middle of a test ends the run: pytest-xdist (3.8) would start another, and then wait for ever. Files go in their
# order: those with few tests have the longest ones, which would be left to the end, on one core.
run_tests() {
    local folder=$1
    "$folder/bin/python" -m pytest -n logical --maxprocesses 4 --max-worker-restart 0 --dist loadfile \
        --no-loadscope-reorder \
        "${@:2}"
}
