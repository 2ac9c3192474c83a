#!/bin/sh
# run.sh BUILD_DIR DSV4 -- every test, a line each; the last line is "N passed, N failed".
# A program prints "ok ..." or "FAIL ..." for each test; one that dies otherwise counts as failed.
build=$1 dsv4=$2 venv=build/venv/bin/python3
log=$build/test.log
: >"$log"
try() {
    "$@" >"$build/one.log" 2>&1
    rc=$?
    cat "$build/one.log"
    cat "$build/one.log" >>"$log"
    if [ $rc -ne 0 ] && ! grep -q '^FAIL ' "$build/one.log"; then
        echo "FAIL $*: exit $rc" | tee -a "$log"
    fi
}
try tests/style.sh
try "$build/test_units"
for seed in 1 2 3; do              # our own golden units, of other shapes
    $venv tests/ref.py units "$build/units-$seed.safetensors" --seed $seed
    try "$build/test_units" "$build/units-$seed.safetensors"
done
try "$build/test_kernels"
try "$build/test_text"
try "$build/test_chat"
try "$build/test_doc"
try "$build/test_offload"
try "$build/test_park"
try "$build/test_model"
if [ -e "$build/kernels.fatbin" ]; then    # a GPU in software, and the CUDA twins on it
    for t in ptx alu tensor shared memory exec driver kernels; do
        try sh -c "cd tests/softgpu && ../../build/softgpu/test_$t"
    done
    for cc in 8.0 8.9; do
        echo "softgpu, capability $cc"
        for t in test_cuda test_cuda_attend; do
            try env SOFTGPU=cc=$cc,seed=7 LD_LIBRARY_PATH=build/softgpu \
                "$build/$t" "$build/kernels.fatbin"
        done
        try env SOFTGPU=cc=$cc,seed=7 LD_LIBRARY_PATH=build/softgpu \
            "$build/test_model" tests/goldens cuda brief
    done
    try $venv tests/mutate.py "$build"
    try $venv tests/test_gpu.py "$dsv4" "$build/mkmodel"
else
    echo "skip CUDA: there is no nvcc" | tee -a "$log"
fi
try $venv tests/test_ref.py
try $venv tests/test_tokenizer.py "$build/tokenize"
try $venv tests/test_demo.py "$dsv4" "$build/mkmodel"
try $venv tests/test_cli.py "$dsv4" "$build/mkmodel"
try $venv tests/test_long.py "$dsv4" "$build/mkmodel"
try $venv tests/test_summarize.py "$dsv4" "$build/mkmodel"
try $venv tests/test_terminal.py "$dsv4" "$build/mkmodel"
try $venv tests/cachesim.py --selftest
passed=$(grep -c '^ok ' "$log")
failed=$(grep -c '^FAIL ' "$log")
skipped=$(grep -c '^skip ' "$log")
[ "$skipped" -eq 0 ] || { echo "$skipped skipped:"; grep '^skip ' "$log"; }
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
