"""What every kernel of kernels.cu takes of a GPU: a table for each architecture; fails on a spill.

usage: cuda_report.py        (`make cuda-report`)

Occupancy is what registers, shared memory and threads leave of an SM's warps, for blocks of 256
threads, or of as many as the kernel always has.
"""

import os
import re
import subprocess
import sys
import tempfile

# as the Makefile has it: as DSV4's number formats are defined, nothing is contracted
NVCC = ["nvcc", "-fmad=false", "-DNDEBUG", "-I."]
# warps, registers, KiB of shared memory an SM (CUDA C++ Programming Guide, "Compute capabilities")
SM = {"sm_80": (64, 65536, 164), "sm_86": (48, 65536, 100), "sm_89": (48, 65536, 100),
      "sm_90": (64, 65536, 228), "sm_120": (48, 65536, 100)}
THREADS = {"act_quant_cuda": 32, "act_codes_cuda": 32, "act_values_cuda": 128, "linear_cuda": 128,
           "kv_round_cuda": 32, "compress_cuda": 128, "index_scores_cuda": 128}
BLOCKS = 32                                              # an SM has room for at most


def occupancy(sm, threads, registers, shared):
    warps, all_registers, kib = SM[sm]
    a_block = threads // 32
    by_registers = all_registers // (-(-registers * 32 // 256) * 256 * a_block)
    by_shared = kib * 1024 // (shared + 1024)            # a block's own kilobyte
    return min(warps, min(by_registers, by_shared, BLOCKS, warps // a_block) * a_block) / warps


def report(sm):
    with tempfile.TemporaryDirectory() as folder:
        p = subprocess.run([*NVCC, "-cubin", f"-arch={sm}", "-Xptxas", "-v", "-o",
                            os.path.join(folder, "x"), "kernels.cu"], capture_output=True,
                           text=True)
    if p.returncode:
        sys.exit(p.stderr)
    spilled = 0
    print(f"{sm:24} {'registers':>9} {'shared':>8} {'stack':>6} {'spills':>7} {'occupancy':>10}")
    for name, text in re.findall(r"entry function '(\w+)'(.*?)(?=Compile time|\Z)", p.stderr, re.S):
        figures = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
                            r"(\d+) bytes spill loads", text)
        stack, stores, loads = map(int, figures.groups())
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        shared = re.search(r"(\d+) bytes smem", text)
        shared = int(shared[1]) if shared else 0
        spilled += stores + loads
        share = occupancy(sm, THREADS.get(name, 256), registers, shared)
        print(f"  {name:22} {registers:9} {shared:8} {stack:6} {stores + loads:7} {share:10.0%}")
    return spilled


def main():
    spilled = sum(report(sm) for sm in SM)
    print("no kernel spills" if not spilled else f"FAIL: {spilled} bytes of spills")
    return spilled > 0


if __name__ == "__main__":
    sys.exit(main())
