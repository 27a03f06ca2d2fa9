#!/usr/bin/env bash
# Everything that a first run on an NVIDIA GPU must show, in under ten minutes: first that results are right, then times.
#
#     bash scripts/check_gpu.sh [FOLDER]
#
# Stops at the first failure. FOLDER (default: gpu_check) gets summary.txt, a log of each step, benchmarks.csv and
# launches.csv. Needs an environment with the extras "test" and "triton": .venv, or PYTHON=/path/to/python.
# Without a GPU the first steps run in Triton's interpreter, nothing is measured, and the exit status is 3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-gpu_check}
python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import torch, triton, pytest, hf_dropkey' 2>/dev/null; then
    echo "$python lacks this package, torch, Triton or pytest: run pip install -e '.[test,triton]', or name another" \
        "with PYTHON=/path/to/python" >&2
    exit 2
fi
mkdir -p "$folder"
summary=$folder/summary.txt
: >"$summary"
number=0

say() {
    echo "$*" | tee -a "$summary"
}

# step NAME SECONDS COMMAND...: runs a command into a log of its own; ends the script if it fails or takes longer
step() {
    local name=$1 limit=$2 start=$SECONDS log status=0
    shift 2
    number=$((number + 1))
    log=$folder/$(printf '%02d' $number)_$name.log
    timeout --kill-after 10 "$limit" "$@" >"$log" 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        tail -n 30 "$log" >&2
        [ $status -ne 124 ] || say "step $number took longer than $limit s"
        say "FAILED  $number $name (exit status $status), see $log"
        exit 1
    fi
    say "ok      $number $name, $((SECONDS - start)) s"
}

tests() {
    "$python" -m pytest -q -n 0 -m "not slow" "$@"
}

gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$gpu" = 0 ]; then
    export TRITON_INTERPRET=1
fi
step versions 120 "$python" -m hf_dropkey.lab.gpu_check facts
step first_call 120 "$python" -m hf_dropkey.lab.gpu_check first_call
export -f tests
export python
if [ "$gpu" = 0 ]; then
    step interpreter 300 bash -c 'tests tests/test_triton_mask.py'
    say "no GPU: PyTorch finds none here, so the steps above ran in Triton's interpreter, and nothing was measured." \
        "Run this on a machine with an NVIDIA GPU, its driver, and a torch build for CUDA."
    exit 3
fi
nvidia-smi >"$folder/nvidia-smi.txt"
step fused_attention 180 bash -c 'tests tests/test_triton_attention.py'
step masks 120 bash -c 'tests tests/test_triton_mask.py tests/test_efficient_attention.py'
step backends 180 bash -c 'tests tests/test_attention.py tests/test_flex_attention.py tests/test_counter_hash.py'
if command -v compute-sanitizer >/dev/null; then
    step memcheck 180 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m hf_dropkey.lab.gpu_check first_call
else
    say "skipped memcheck: compute-sanitizer of the CUDA toolkit is not on the PATH"
fi
benchmark=(scripts/benchmark_attention.py --dtypes bfloat16 --out "$folder/benchmarks.csv")
step kernels 120 "$python" "${benchmark[@]}" --shapes 128x6x197x64 --rounds 5
step launches 120 "$python" -m hf_dropkey.lab.gpu_check sweep --out "$folder/launches.csv"
step shapes 240 "$python" "${benchmark[@]}" --shapes 128x12x197x64 8x12x1025x64 --rounds 15
step steps 180 "$python" "${benchmark[@]}" --workload step --models small base --batch_size 128 --rounds 5 --repeats 3 \
    --variants sdpa/none sdpa/dropkey dropkey_triton/dropkey
say "all $number steps ran in $SECONDS s; times are in $folder/benchmarks.csv and the logs"
say "next: append the rows of $folder/benchmarks.csv to model_cards/benchmarks_gpu.csv, and run" \
    "$python scripts/write_backend_proofs.py: models then take the fused kernel on such a GPU where rows prove it faster"
