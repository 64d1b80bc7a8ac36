#!/usr/bin/env bash
# Everything that only a GPU can show, in three parts of at most ten minutes each.  Needs PyTorch, Triton, pytest,
# and for the first part nvcc and cmake; no installation:
#
#     bench/gpu.sh FOLDER extension     # builds mingle._C for this card; its tests, compute-sanitizer among them
#     bench/gpu.sh FOLDER kernels       # the tests of the Triton kernels
#     bench/gpu.sh FOLDER benchmark     # the cases of bench/run.py --gpu: kernels.json and plots/
#
# Several parts may be named; without one, all run.  Each writes as it goes and resumes: a test file whose
# junit-*.xml in FOLDER shows no failure is not run again.  Exits with 1 where a test failed or a result of ours
# was wrong.  The first tests compile the kernels, as many at a time as there are cores with pytest-xdist.
# MINGLE_GPU_SECONDS: how long each part may take, 570 by default.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:?usage: bench/gpu.sh FOLDER [extension] [kernels] [benchmark]}"
out=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}
limit=${MINGLE_GPU_SECONDS:-570}

cores=$(nproc)  # which heeds OMP_NUM_THREADS
# python -c from the checkout's root must not take it for the package
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 OMP_NUM_THREADS=1
cd "$root"

status=0 part_began=0
left() { echo $((limit - SECONDS + part_began)); }

options=(-q --tb=short -p no:cacheprovider --maxfail=25 -m gpu)
"$python" -c "import pytest_timeout" 2>/dev/null && options+=(--timeout=180)
side_by_side=()
"$python" -c "import xdist" 2>/dev/null && side_by_side=(-n "$((cores < 16 ? cores : 16))")

passed() { # whether a junit file shows tests and no failure
    "$python" - "$1" <<'PY' 2>/dev/null
import sys
from xml.etree import ElementTree
suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
sys.exit(int(suite.get("failures")) + int(suite.get("errors")) > 0 or suite.get("tests") == suite.get("skipped"))
PY
}

tests() { # name, pytest's arguments
    local junit="$out/junit-$1.xml" seconds
    shift
    passed "$junit" && return
    seconds=$(($(left) - 15))
    ((seconds > 5)) || { status=1; return; }
    # interrupted rather than ended, pytest tells what it has seen
    timeout --signal=INT --kill-after=20 "$seconds" "$python" -m pytest "${options[@]}" --junit-xml="$junit" "$@" || status=1
    passed "$junit" || { echo "gpu.sh: $junit: a failure, or nothing ran"; status=1; }
    echo "gpu.sh: ${junit##*/}: done after $SECONDS s"
}

extension() {
    local capability
    capability=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    if ! "$python" -c "import mingle._C" 2>/dev/null; then
        MINGLE_BUILD_EXTENSION=1 MINGLE_CUDA_ARCHITECTURES=$capability "$python" setup.py -q build_ext --inplace \
            >"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; status=1; return; }
    fi
    echo "gpu.sh: mingle._C for $capability after $SECONDS s"
    mapfile -t files < <(find tests -name "test_gpu_*.py" -not -path "tests/gated_experts/*" | sort)
    tests extension "${side_by_side[@]}" -k "not sanitizer" "${files[@]}"
    tests sanitizer "${side_by_side[@]}" -k sanitizer "${files[@]}"
}

kernels() {
    local own=tests/gated_experts alone="two_to_the_thirty_one or test_gpu_speed"
    for name in formula execution memory compiler; do
        tests "$name" "${side_by_side[@]}" -k "not ($alone)" "$own/test_gpu_$name.py"
    done
    tests alone -k "$alone" "$own"/test_gpu_{memory,speed}.py
}

benchmark() {
    local seconds
    seconds=$(left)
    timeout "$seconds" "$python" bench/run.py --gpu --until $((seconds - 60)) --out "$out/kernels.json" \
        --plots "$out/plots" || status=1
}

(($#)) || set -- extension kernels benchmark
for part in "$@"; do
    part_began=$SECONDS
    case $part in
        extension | kernels | benchmark) "$part" ;;
        *) echo "gpu.sh: $part: expected extension, kernels or benchmark" && exit 2 ;;
    esac
done
echo "gpu.sh: all done after $SECONDS s"
exit "$status"
