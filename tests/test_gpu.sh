#!/bin/sh
# test_gpu.sh BUILD_DIR DSV4 -- all of CUDA on the GPU in software: the twins, the goldens, the
# program, for each capability; two at a time.  The last line is "N passed, N failed".
build=$1 dsv4=$2
[ -e "$build/kernels.fatbin" ] || { echo "test-gpu needs nvcc on the PATH"; exit 1; }
one() { # one CAPABILITY
    export SOFTGPU=cc=$1,seed=11 LD_LIBRARY_PATH=build/softgpu
    "$build/test_cuda" "$build/kernels.fatbin"
    "$build/test_cuda_attend" "$build/kernels.fatbin"
    "$build/test_model" tests/goldens cuda
    unset SOFTGPU LD_LIBRARY_PATH
    build/venv/bin/python3 tests/test_gpu.py "$dsv4" "$build/mkmodel" "$1"
}
log=$build/test_gpu
two() { # two A B: their output as it comes, each in its own file, too
    for cc in "$@"; do
        (one "$cc" 2>&1 || echo "FAIL $cc: exit $?") | tee "$log.$cc.log" | sed -u "s/^/$cc  /" &
    done
    wait
}
rm -f "$log".*.log
two 8.0 8.9
two 9.0 12.0
cat "$log".*.log >"$log.log"
# each capability's 36 tests must have been run: a program that died has none to show
passed=$(grep -c '^ok ' "$log.log")
failed=$(grep -c '^FAIL ' "$log.log")
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -eq $((4 * 36)) ]
