#!/bin/sh
# gpu.sh [built] -- for a machine with an NVIDIA GPU: build; the CUDA twins and the goldens on it;
# an answer of either backend; a table of how near each kernel comes to what this GPU can; the
# tests under compute-sanitizer, if there is one.  `built`: what lies in build/ is used as it is.
set -u
cd "$(dirname "$0")/.."
b=build bad=0
if [ "${1:-}" != built ]; then
    make -j "$(nproc)" dsv4 $b/mkmodel $b/kernels.fatbin $b/gpu_peak.fatbin $b/test_cuda \
        $b/test_cuda_attend $b/test_model $b/gpu_bench || exit 1
fi
try() { echo "+ $*"; "$@" || { echo "FAIL $*"; bad=1; }; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
try $b/test_cuda $b/kernels.fatbin
try $b/test_cuda_attend $b/kernels.fatbin
try $b/test_model tests/goldens cuda
[ -e $b/gpu-demo/config.json ] || $b/mkmodel tiny $b/gpu-demo --experts 64 --seed 1
for backend in cpu cuda; do
    try ./dsv4 run -m $b/gpu-demo -f tests/demo.txt -n 48 --no-think --temp 0 --backend $backend \
        --print-ids
done
try $b/gpu_bench $b/gpu_peak.fatbin
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        try compute-sanitizer --tool $tool --error-exitcode 9 $b/test_cuda $b/kernels.fatbin
        try compute-sanitizer --tool $tool --error-exitcode 9 $b/test_cuda_attend $b/kernels.fatbin
    done
    try compute-sanitizer --tool memcheck --error-exitcode 9 $b/test_model tests/goldens cuda brief
fi
exit $bad
