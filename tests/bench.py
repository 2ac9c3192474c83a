"""What dsv4 reaches, against what this machine can: one table, and build/bench.json.

usage: bench.py BENCH DSV4 MKMODEL [--quick]      (`make bench`; at most 10 minutes)
       bench.py --blas THREADS                    experts a second by NumPy's OpenBLAS

Each figure is the median of 7 repetitions; a ratio is the median of ratios of neighbours in time,
since a shared machine changes from minute to minute.  The spread is (largest - smallest) / median.
What takes long is repeated as often as the time allows; the table says how often.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = "build/flash4"
REPS = 7
EXPERTS = 100                      # read by one repetition: 1.3 GB
WINDOWS = 4                        # of four tokens: decoded, and then asked for again
LIMIT = 480                        # seconds since the start: no new run after
START = time.monotonic()


def note(text):
    print(f"[{time.monotonic() - START:4.0f} s] {text}", file=sys.stderr, flush=True)


# === measuring ================================================================================


def add(results, key, value):
    results.setdefault(key, []).append(value)


def bench(results, *args):
    """Run the C program once; its lines become one more repetition."""
    p = subprocess.run([BENCH, *map(str, args)], capture_output=True, text=True, check=True)
    for line in p.stdout.splitlines():
        name, value, _ = line.split()
        add(results, name, float(value))


def blas(threads, repetitions=30):
    """One process: F32 matrices of three experts in turn, w @ x as a decode step would do."""
    import numpy as np
    shape = [(2048, 4096), (4096, 2048), (2048, 4096)]
    w = [np.ones(s, np.float32) for _ in range(3) for s in shape]
    x = {n: np.ones(n, np.float32) for n in (2048, 4096)}
    for m in w:
        m @ x[m.shape[1]]
    best = 1e9                     # the fastest counts, as in bench.c
    for n in range(repetitions * threads):
        begin = time.perf_counter()
        for m in w[n % 3 * 3:n % 3 * 3 + 3]:
            m @ x[m.shape[1]]
        best = min(best, time.perf_counter() - begin)
    print(1 / best)


def measure_blas(results):
    for name, threads in (("1", 1), ("n", os.cpu_count())):
        env = dict(os.environ, OPENBLAS_NUM_THREADS=str(threads))
        p = subprocess.run([sys.executable, __file__, "--blas", str(threads)], env=env,
                           capture_output=True, text=True)
        if p.returncode == 0:
            add(results, f"blas.experts.{name}", float(p.stdout))


def dsv4(ram, prompt, n):
    """One run: its ids and its counters.  A cache directory of its own, so without any heat."""
    with tempfile.TemporaryDirectory() as tmp:
        stats = os.path.join(tmp, "stats.json")
        env = dict(os.environ, XDG_CACHE_HOME=tmp)
        p = subprocess.run([DSV4, "run", "-m", MODEL, *prompt, "-n", str(n), "--ram", ram,
                            "--print-ids", "--stats", stats, "-q"],
                           env=env, capture_output=True, text=True)
        if p.returncode:
            sys.exit(f"bench: dsv4 run --ram {ram}: {p.stderr[-400:]}")
        with open(stats) as f:
            return p.stdout.split(), json.load(f)


def real_headers(path):
    """Sparse files under the true headers of a published 48-shard checkpoint."""
    with tarfile.open(os.path.join(HERE, "goldens", "real-headers.tar.xz")) as tar:
        tar.extractall(path)
    for name in os.listdir(path):
        if not name.endswith(".safetensors.json"):
            continue
        with open(os.path.join(path, name), "rb") as f:
            header = f.read()
        end = max(v["data_offsets"][1] for k, v in json.loads(header).items()
                  if k != "__metadata__")
        with open(os.path.join(path, name[:-5]), "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            f.truncate(8 + len(header) + end)


def measure_kernels(results, reps):
    for _ in range(reps):
        bench(results, "read", "fp4", "fp4l2", "fp8", "fp8l2", "bf16", "index", "fma", "gemm")
        measure_blas(results)


def measure_disk(results, reps):
    """Whoever reads second may find the host's caches warm: take turns."""
    for i in range(reps):
        pair = [("raw", MODEL, EXPERTS, i + 1), ("cache", MODEL, EXPERTS, i + 1)]
        for args in pair if i % 2 else pair[::-1]:
            bench(results, *args)


def measure_start(results, reps):
    with tempfile.TemporaryDirectory() as tmp:
        real_headers(tmp)
        for _ in range(reps):
            bench(results, "start", tmp)


def measure_run(results, reps):
    """Decoding under a quarter of the model's size."""
    size = sum(os.path.getsize(os.path.join(MODEL, f)) for f in os.listdir(MODEL))
    for i in range(reps):
        if i and time.monotonic() - START > LIMIT:
            break
        bench(results, "run", MODEL, size // 4, WINDOWS)


def measure_answer(results, reps):
    """The same answer from streamed weights, and neither over its budget."""
    prompt = ["-f", os.path.join(HERE, "demo.txt")]
    runs = [dsv4(ram, prompt, 16) for ram in ("4G", "1.5G")]
    for _, s in runs:
        add(results, "over_budget", (s["peak_rss"] - s["plan"]["budget"]) / 2**20)
    add(results, "same_ids", float(runs[0][0] == runs[1][0] and
                                   runs[1][1]["plan"]["dense_streamed"]))


# === the table ================================================================================


def ratio(results, what, bound, times=1):
    """Of each pair of neighbours; of the medians where the repetitions are not pairs."""
    a, b = results[what], results[bound]
    if len(a) == len(b):
        return statistics.median(x / (y * times) for x, y in zip(a, b))
    return statistics.median(a) / statistics.median(b) / times


def row(results, title, what, bound, target, unit, below=False, times=1, scale=None):
    """A line of the table; `below`: the ratio may be at most the target."""
    if what not in results or bound not in results:
        return None
    r = ratio(results, what, bound, times)
    values = results[what]
    middle = statistics.median(values)
    return {"what": title, "measured": middle, "unit": unit, "n": len(values),
            "spread": (max(values) - min(values)) / middle if middle else 0,
            "bound": scale or bound, "bound_value": statistics.median(results[bound]) * times,
            "ratio": r, "target": target, "below": below,
            "ok": r <= target if below else r >= target}


def limit(results, title, key, most, unit, name, worst=False):
    """A line whose bound is a number."""
    if key not in results:
        return None
    values = results[key]
    middle = max(values) if worst else statistics.median(values)
    return {"what": title, "measured": middle, "unit": unit, "n": len(values),
            "spread": None if worst or not middle else (max(values) - min(values)) / middle,
            "bound": name, "bound_value": most, "ratio": None, "target": None, "below": True,
            "ok": middle <= most}


def matvec_rows(results, title, key):
    """60% of memory's rate, or 90% of the kernel's own on 1 MB that stays in the caches, where that
    is 8 GB/s a core: then it is the arithmetic that binds.  The second line has no verdict."""
    rows, cores = [], os.cpu_count()
    core = statistics.median(results[key + "l2.1"])
    for name, times in (("1", 1), ("n", cores)):
        label = f"{title}, {times} thread{'s' if times > 1 else ''}"
        a = row(results, label, f"{key}.{name}", f"read.{name}", 0.6, "GB/s",
                scale="memory read")
        b = row(results, "  or", f"{key}.{name}", f"{key}l2.1", 0.9, "GB/s", times=times,
                scale="1 MB in cache" if core >= 8 else "1 MB in cache (<8)")
        if a and b:
            a["ok"] |= b["ok"] and core >= 8
            b["ok"] = None
        rows += [a, b]
    return rows


def table_rows(r):
    rows = matvec_rows(r, "FP4 expert", "fp4") + matvec_rows(r, "FP8 dense", "fp8")
    rows += [row(r, f"BF16 dense, {t}", f"bf16.{n}", f"read.{n}", 0.6, "GB/s",
                 scale="memory read") for n, t in NAMES]
    for kind, key in (("FP4 expert", "gemm4"), ("FP8 dense", "gemm8")):
        rows += [row(r, f"{kind}, 64 tokens, {t}", f"{key}.{n}", f"fma.{n}", 0.4, "GMAC/s",
                     scale="F32 FMA peak") for n, t in NAMES]
    rows += [row(r, f"index scores, {t}", f"index.{n}", f"fma.{n}", 1, "GMAC/s",
                 scale="F32 FMA peak") for n, t in NAMES]
    rows += [row(r, f"experts by us, {t}", f"fp4.experts.{n}", f"blas.experts.{n}", 1, "1/s",
                 scale="OpenBLAS F32") for n, t in NAMES]
    rows += [
        row(r, "expert reads, 12 pinned", "cache", "raw", 0.9, "GB/s", scale="raw io_uring"),
        row(r, "expert reads of decoding (*)", "replay", "replay.raw", 0.9, "GB/s",
            scale="raw io_uring"),
        row(r, "4 tokens decoded", "decode.wall", "decode.least", 1.1, "s", below=True,
            scale="dense + max(**)"),
        limit(r, "peak RSS over --ram", "over_budget", 64, "MB", "64 MB, worst", worst=True),
        limit(r, "start to first expert", "start", 1, "s", "1 s"),
    ]
    if "same_ids" in r:
        same = all(r["same_ids"])
        rows.append({"what": "ids of 1.5G (streamed) and 4G", "measured": same, "unit": "",
                     "n": 1, "spread": None, "bound": "the same", "bound_value": None,
                     "ratio": None, "target": None, "below": False, "ok": same})
    return [x for x in rows if x]


def show(rows):
    print(f"{'what':32}{'measured':>10} {'unit':7}{'n':>2}{'spread':>8}  {'bound':18}"
          f"{'median':>9}{'ratio':>7}{'target':>8}")
    for x in rows:
        if isinstance(x["measured"], bool):
            measured = "same" if x["measured"] else "DIFFER"
        else:
            measured = f"{x['measured']:.4g}"
        target = "" if x["target"] is None else f"{'<=' if x['below'] else '>='} {x['target']:g}"
        value = "" if x["bound_value"] is None else f"{x['bound_value']:.4g}"
        r = "" if x["ratio"] is None else f"{x['ratio']:.2f}"
        spread = "" if x["spread"] is None else f"{x['spread']:.0%}"
        verdict = {None: "", True: "ok", False: "short"}[x["ok"]]
        print(f"{x['what']:32}{measured:>10} {x['unit']:7}{x['n']:2d}{spread:>8}  "
              f"{x['bound']:18}{value:>9}{r:>7}{target:>8}  {verdict}".rstrip())
    print("(*) --ram a quarter of the model: the experts of a run asked for again in its order, "
          "with\n    nothing computed between; while something is, nobody sees when a read lands\n"
          "(**) the sum over tokens and layers of what is not experts, and the longer of computing "
          "experts\n    and reading those that were missed at the raw rate of the same minute")


def show_cores(results):
    """Whether there were as many cores as threads: else no row of all threads means much."""
    cores = ratio(results, "fma.n", "fma.1")
    print(f"{os.cpu_count()} threads did {cores:.2f} times one thread's FMA"
          + ("" if cores >= 0.8 * os.cpu_count() else
             ": others use these processors, and rows of all threads are no verdict"))


def model_fits():
    """Experts that are known before the token starts would be read before they are missed."""
    try:
        with open(os.path.join(MODEL, "config.json")) as f:
            return json.load(f)["num_hash_layers"] == 0
    except OSError:
        return False


def main():
    global START
    reps = 1 if "--quick" in sys.argv else REPS
    results = {}
    if not model_fits():
        note(f"writing {MODEL}, 16 GB")
        shutil.rmtree(MODEL, ignore_errors=True)
        subprocess.run([MKMODEL, "flash", MODEL, "--layers", "4", "--seed", "1",
                        "--hash-layers", "0"], check=True)
        START = time.monotonic()                     # the 10 minutes are for measuring
    for name, step in (("kernels", measure_kernels), ("disk", measure_disk),
                       ("start", measure_start), ("answer", measure_answer),
                       ("run", measure_run)):
        note(name)
        step(results, reps)
    rows = table_rows(results)
    show(rows)
    show_cores(results)
    with open("build/bench.json", "w") as f:
        json.dump({"seconds": time.monotonic() - START, "threads": os.cpu_count(),
                   "rows": rows, "repetitions": results}, f, indent=1)
    verdicts = [x["ok"] for x in rows]
    print(f"{verdicts.count(True)} ok, {verdicts.count(False)} short; "
          "every repetition: build/bench.json")


if len(sys.argv) == 3 and sys.argv[1] == "--blas":
    blas(int(sys.argv[2]))
else:
    BENCH, DSV4, MKMODEL = map(os.path.abspath, sys.argv[1:4])
    NAMES = (("1", "1 thread"), ("n", f"{os.cpu_count()} threads"))
    main()
