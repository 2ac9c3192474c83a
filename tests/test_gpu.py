"""dsv4 on a GPU: what a person sees, and what must not change a token.

usage: test_gpu.py DSV4 MKMODEL [CAPABILITY...]         (a part of `make test`: 8.0 and 8.9)

The GPU is the one in software (tests/softgpu): SOFTGPU says what kind and which of its faults, and
a violation of CUDA's rules ends the program with 86, so that every test here demands none.
"""
import contextlib
import json
import os
import subprocess
import sys

import numpy as np

from harness import DSV4, HERE, TMP, dsv4, eval_logits, ids_file, mkmodel, need, refuses, run, test

CAPABILITIES = sys.argv[3:] or ["8.0", "8.9"]
MODEL = os.path.join(HERE, "goldens", "tiny-a")
IDS = [1, 2, 3, 4, 5, 6, 7, 8]


@contextlib.contextmanager
def gpu(**options):
    """A GPU of that kind, until the end of the block."""
    os.environ["SOFTGPU"] = ",".join(f"{k}={v}" for k, v in options.items())
    os.environ["LD_LIBRARY_PATH"] = os.path.join(os.path.dirname(HERE), "build", "softgpu")
    yield
    del os.environ["SOFTGPU"], os.environ["LD_LIBRARY_PATH"]


def tokens(*flags, n=5):
    """Tokens that follow IDS, and what was said on the way."""
    out, err = dsv4("run", "-m", MODEL, "--ids", ids_file(IDS), "-n", n, "--print-ids", "--temp", 0,
                    *flags)
    return out.decode().split(), err


@test
def gpu_gives_the_same_logits_for_every_order_of_work():
    for cc in CAPABILITIES:
        seen = []
        for seed in (1, 2, 3):
            with gpu(cc=cc, seed=seed):
                seen.append(eval_logits(MODEL, IDS, "--decode-from", 6, "--backend", "cuda")[0])
        need(all(np.array_equal(seen[0], x) for x in seen), f"{cc}: a seed changes logits")
        with gpu(cc=cc):
            one = eval_logits(MODEL, IDS, "--backend", "cuda", "--chunk", 3, "--span", 5)[0]
        need(np.array_equal(seen[0], one), f"{cc}: chunk, span or decode change logits")


@test
def gpu_answers_with_the_cpu_s_tokens():
    want, _ = tokens("--backend", "cpu")
    for cc in CAPABILITIES:
        with gpu(cc=cc):
            got, err = tokens()
        need(got == want, f"{cc}: {got}, not {want}")
        need(f"on GPU 0, softgpu {cc} ({cc})" in err and "plan: VRAM" in err, err)


@test
def gpu_draws_like_the_cpu_and_counts_its_work():
    """Where logits come to the host, and what --stats says."""
    with gpu(cc=CAPABILITIES[0]):
        out, _ = dsv4("run", "-m", MODEL, "--ids", ids_file(IDS[:4]), "-n", 2, "--print-ids",
                      "--temp", 1, "--stats", os.path.join(TMP, "stats.json"), "-q")
    cpu, _ = dsv4("run", "-m", MODEL, "--ids", ids_file(IDS[:4]), "-n", 2, "--print-ids",
                  "--temp", 1, "-q")
    need(out == cpu, f"{out} and not {cpu}")
    with open(os.path.join(TMP, "stats.json")) as f:
        s = json.load(f)
    need(s["plan"]["vram"] > 8e6 and s["tokens"]["prefill"] == 4, s["plan"])
    need(s["experts"]["vram_hits"] == s["experts"]["uses"] > 0, s["experts"])


@test
def without_a_gpu_one_line_says_so_and_it_goes_on():
    want, _ = tokens("--backend", "cpu", n=1)
    cases = [({"driver": 11080}, "for CUDA 11.8 and this dsv4 needs 13.0"),
             ({"cc": "7.5"}, "compute capability 7.5 and 8.0 is needed"),
             ({"mem": "4M"}, "all weights must fit GPU 0 so far"),
             ({"cc": "8.0", "lost": 1}, "GPU 0 failed at")]
    for options, says in cases:
        with gpu(**options):
            got, err = tokens(n=1)
            need(got == want, f"{options}: {got}, not {want}")
            lines = [x for x in err.splitlines() if says in x]
            need(len(lines) == 1 and "on the CPU: " in lines[0], f"{options}: {err}")
            refuses(says, "run", "-m", MODEL, "--ids", ids_file(IDS), "-n", 1, "--print-ids",
                    "--backend", "cuda")
    with gpu(cc="8.0"):
        _, err = tokens("--gpu", 3, n=1)
        need("on the CPU: there is no GPU 3: 1 found, numbered from 0" in err, err)
    _, err = tokens(n=1)
    need("on the CPU: there is no NVIDIA driver (libcuda.so.1)" in err, err)
    refuses("there is no NVIDIA driver", "run", "-m", MODEL, "--ids", ids_file(IDS), "--backend",
            "cuda", "--print-ids")


@test
def a_lost_gpu_is_told_and_the_answer_goes_on():
    """Lost while reading, at the first token, and in the middle of an answer."""
    want, _ = tokens("--backend", "cpu")
    for launches in (20, 150, 233, 400):
        with gpu(cc="8.0", lost=launches):
            got, err = tokens()
        need(got == want, f"after {launches} launches: {got}, not {want}")
        need(err.count("on the CPU: GPU 0 failed at") == 1, f"after {launches} launches: {err}")


@test
def kv_in_a_file_changes_no_logit():
    """Rows come and go below a GPU that reads them."""
    model = mkmodel("file", "1m", "--layers", 7, "--experts", 4, "--seed", 5)
    seen = []
    for kv_ram in ("290M", "100M"):
        with gpu(cc=CAPABILITIES[0]):
            logits, _ = eval_logits(model, range(1, 15), "--decode-from", 12, "--chunk", 8,
                                    "--ctx", 1000000, "--kv-ram", kv_ram, "--stats",
                                    os.path.join(TMP, "stats.json"))
        with open(os.path.join(TMP, "stats.json")) as f:
            seen.append((logits, json.load(f)["kv_bytes"]["file"]))
    need(seen[0][1] == 0 and seen[1][1] > 1e8, f"{seen[0][1]} and {seen[1][1]} bytes in files")
    need(np.array_equal(seen[0][0], seen[1][0]), "the file changes logits")


@test
def a_chat_on_a_gpu_is_saved_and_goes_on():
    """What was parked there is found again, and not taken for the CPU's."""
    model = mkmodel("chat", "tiny", "--layers", 3, "--experts", 4, "--seed", 5)
    flags = ["chat", "-m", model, "-n", 3, "--temp", 0, "--no-think", "--kv-dir",
             os.path.join(TMP, "kv")]
    with gpu(cc=CAPABILITIES[-1]):
        _, said = dsv4(*flags, stdin=b"hi\n/save one\n")
        _, again = dsv4(*flags, stdin=b"/load one\n")
    n = said.split("saved one: ")[1].split()[0]
    need(f"{n} tokens" in again, f"{said}\n{again}")
    p = subprocess.run([DSV4, *map(str, flags), "--backend", "cpu"], input=b"/load one\n",
                       capture_output=True)
    need(b"is of another model or of another version" in p.stderr, p.stderr)


if __name__ == "__main__":
    sys.exit(run("test_gpu.py"))
