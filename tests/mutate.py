"""Does the proof of the CUDA kernels see what is wrong with them?

usage: mutate.py OBJECTS_DIR        (a part of `make test`)

Each mutation of a copy of kernels.cu flips an index, drops a barrier or the like in one kernel; the
twin tests on the GPU in software must then fail, by a value or by a violation.  The copy as it is
must pass.
"""

import os
import subprocess
import sys
import tempfile

from cuda_report import NVCC

B = sys.argv[1]
MUTATIONS = (
    ("embed_cuda", "row[(size_t)i * w.cols + c] = x;", "row[(size_t)i * w.cols + (c ^ 1)] = x;"),
    ("rmsnorm_cuda", "sum[threadIdx.x / 32] = x;\n    __syncthreads();",
     "sum[threadIdx.x / 32] = x;"),
    ("rmsnorm_cuda", "for (int far = 16; far; far /= 2) x +=",
     "for (int far = 8; far; far /= 2) x +="),
    ("act_quant_cuda", "for (int i = threadIdx.x; i < n; i += 32) amax",
     "for (int i = threadIdx.x; i <= n; i += 32) amax"),
    ("act_codes_cuda", "if (threadIdx.x == 0) scale[", "if (threadIdx.x == 1) code["),
    ("act_values_cuda", "if (i < d) y[row + i]", "y[row + i]"),
    ("hc_post_cuda", "comb[(t * hc + i) * hc + j]", "comb[(t * hc + j) * hc + i]"),
    ("swiglu_cuda", "if (i < nd) a[i]", "if (i <= nd) a[i]"),
    ("linear_cuda", "min(t0 + i, n - 1) * step", "min(t0 + i, n) * step"),
    ("linear_cuda", "blocks = (cols + 127) / 128;", "blocks = cols / 128;"),
    ("hc_pre_cuda", "if (lane == 0) m[row] = sum;\n    }\n    __syncthreads();",
     "if (lane == 0) m[row] = sum;\n    }"),
    ("expert_up_cuda", "        __syncthreads();\n        int b = b0", "        int b = b0"),
    ("expert_down_cuda", "sum += __shfl_xor_sync(~0u, sum, 2);", "sum += sum;"),
    ("argmax_cuda", "x[other] == x[at] && other < at", "x[other] == x[at] && other > at"),
    ("index_scores_cuda", "in.w[head + h] * (in.w_scale", "in.w[head] * (in.w_scale"),
    ("topk_cuda", "u == bits && equal_before < need", "u == bits && equal_before <= need"),
    ("topk_cuda", "found[warp] = __popc(more) << 16 | __popc(same);\n        __syncthreads();",
     "found[warp] = __popc(more) << 16 | __popc(same);"),
    ("attend_cuda", "        int len = (int)min((int64_t)ITEMS, n_items - j0);\n"
     "        __syncthreads();", "        int len = (int)min((int64_t)ITEMS, n_items - j0);"),
    ("attend_cuda", "sum[i] * keep);", "sum[i]);"),
    ("add_cuda", "for (int c = 0; c < copies && i < d; c++)",
     "for (int c = 0; c < copies - 1 && i < d; c++)"),
)


def passes(source, folder):
    """Do the twin tests pass on this text?"""
    path, fatbin = os.path.join(folder, "kernels.cu"), os.path.join(folder, "kernels.fatbin")
    with open(path, "w") as f:
        f.write(source)
    subprocess.run([*NVCC, "-fatbin", "--no-compress", "-lineinfo", "-arch=compute_80",
                    "-code=compute_80", "-o", fatbin, path], check=True)
    tests = [name for name in ("test_cuda", "test_cuda_attend")
             if os.path.exists(os.path.join(B, name))]
    env = {**os.environ, "SOFTGPU": "cc=8.0,seed=5", "LD_LIBRARY_PATH": "build/softgpu"}
    return all(subprocess.run([os.path.join(B, t), fatbin], env=env, capture_output=True,
                              timeout=600).returncode == 0 for t in tests)


def main():
    source, failed = open("kernels.cu").read(), 0
    with tempfile.TemporaryDirectory() as folder:
        cases = [("nothing", "", "", True)] + [(*m, False) for m in MUTATIONS]
        for kernel, old, new, want in cases:
            if old not in source:
                print(f"FAIL mutate: {kernel}: {old!r} is not in kernels.cu any more")
                failed += 1
                continue
            ok = passes(source.replace(old, new, 1), folder) == want
            failed += not ok
            place = old.split("\n")[0].strip()[:60]
            print(f"{'ok  ' if ok else 'FAIL'} mutate: {kernel}: {place}", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
