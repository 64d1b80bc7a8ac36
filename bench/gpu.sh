#!/usr/bin/env bash
# Everything that only a GPU can show, in ten minutes at most: the tests, then the benchmark.  Needs PyTorch and
# pytest, no installation:
#
#     bench/gpu.sh FOLDER         # gets junit-*.xml, kernels.json and plots/
#
# Exits with 1 where a test failed or a result of ours was wrong.  The first tests compile the kernels, eight at a
# time with pytest-xdist.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:?usage: bench/gpu.sh FOLDER}"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
limit=${MINGLE_GPU_SECONDS:-570}

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

status=0
tests() { # name, seconds, pytest's arguments
    local name=$1 seconds=$2
    shift 2
    local options=(-q -p no:cacheprovider --maxfail=25 --junit-xml="$out/junit-$name.xml")
    (cd "$root" && timeout "$seconds" "$python" -m pytest "${options[@]}" "$@") || status=1
    echo "gpu.sh: $name: done after $SECONDS s"
}

side_by_side=()
"$python" -c "import xdist" 2>/dev/null && side_by_side=(-n 8)
experts="$root/tests/gated_experts" alone="two_to_the_thirty_one or test_gpu_speed"
tests formula $((limit * 40 / 100)) "${side_by_side[@]}" -m gpu -k "not ($alone)" "$experts"/test_gpu_{formula,memory,execution}.py
tests alone 60 -m gpu -k "$alone" "$experts"/test_gpu_{memory,speed}.py
mapfile -t others < <(find "$root/tests" -name "test_gpu_*.py" | grep -vE "_(formula|memory|execution|speed)\.py$")
tests others $((limit * 20 / 100)) "${side_by_side[@]}" -m gpu "${others[@]}"

left=$((limit - SECONDS))
timeout "$left" "$python" "$root/bench/run.py" --gpu --until $((left - 60)) --out "$out/kernels.json" --plots "$out/plots" || status=1
echo "gpu.sh: all done after $SECONDS s"
exit "$status"
