"""Long contexts against what they may take: tables, and build/bench_long.json for curves.py.

usage: bench_long.py DSV4 MKMODEL MKPARK BENCH [--quick]        (`make bench-long`; 20 minutes)
       bench_long.py DSV4 MKMODEL MKPARK BENCH --1m [--quick]   (`make bench-1m`; 25 minutes)

Contexts that decoding begins with are noise that mkpark wrote; it costs what a real one costs.
What is repeated is a median; a ratio is the median of ratios of neighbours in time, since a
shared machine changes from minute to minute.  --quick takes a sixteenth of every length, once.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

QUICK, WHOLE = "--quick" in sys.argv, "--1m" in sys.argv
DSV4, MKMODEL, MKPARK, BENCH = map(os.path.abspath, sys.argv[1:5])
LESS, REPS = (16, 1) if QUICK else (1, 3)
TOP = (1 << 20) // LESS
SEGMENT, MORE, ANSWER = 4096, 8, 16                 # MORE: ids that mkpark writes behind its own
LENGTHS = sorted({max(n // LESS, SEGMENT) for n in (8 << 10, 64 << 10, 256 << 10, 1 << 20)})
WORK = "build/long"
FLASH, FLASH_BYTES = "build/flash4", 17 << 30
START = time.monotonic()
ROWS, DATA = [], {"quick": QUICK, "seconds": 0}


def note(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def row(what, measured, unit, bound="", limit=None, ok=None):
    """A line of the table, shown at once.  ok: None where nobody demands anything."""
    verdict = {None: "", True: "ok", False: "SHORT"}[ok]
    most = "" if limit is None else f"{limit:.4g}"
    print(f"{what:52}{measured:10.4g} {unit:9} {bound:24}{most:>9}  {verdict}".rstrip(), flush=True)
    ROWS.append({"what": what, "measured": measured, "unit": unit, "bound": bound,
                 "limit": limit, "ok": ok})
    save()


def save():
    """What is known so far: curves can be drawn of a run that was stopped."""
    DATA.update(rows=ROWS, seconds=time.monotonic() - START)
    with open("build/bench_1m.json" if WHOLE else "build/bench_long.json", "w") as f:
        json.dump(DATA, f, indent=1)


# === models, ids, runs ========================================================================


def config(model):
    with open(os.path.join(model, "config.json")) as f:
        return json.load(f)


def make_room(model):
    """Let a model take TOP tokens and an answer: its own limit counts both."""
    c = config(model)
    c["max_position_embeddings"] = (1 << 20) + SEGMENT
    os.remove(os.path.join(model, "config.json"))
    with open(os.path.join(model, "config.json"), "w") as f:
        json.dump(c, f)
    return model


def narrow(name, *flags):
    path = os.path.join(WORK, name)
    subprocess.run([MKMODEL, "1m", path, *map(str, flags)], check=True, capture_output=True)
    return make_room(path)


def flash():
    """V4-Flash's widths, 4 layers; a folder of its own, whose shards are those of `make bench`."""
    if not os.path.exists(os.path.join(FLASH, "config.json")):
        if shutil.disk_usage("build").free < FLASH_BYTES:
            sys.exit(f"bench_long: {FLASH} takes {FLASH_BYTES >> 30} GB and there is less free")
        note(f"writing {FLASH}, 16 GB")
        shutil.rmtree(FLASH, ignore_errors=True)
        subprocess.run([MKMODEL, "flash", FLASH, "--layers", "4", "--seed", "1"], check=True)
    path = os.path.join(WORK, "flash4")
    os.makedirs(path)
    for name in os.listdir(FLASH):
        if name != "config.json":
            os.symlink(os.path.abspath(os.path.join(FLASH, name)), os.path.join(path, name))
    shutil.copy(os.path.join(FLASH, "config.json"), path)
    return make_room(path)


def parked(model, n):
    """(ids, directory) of n parked tokens."""
    ids, place = model + ".ids", model + ".kv"
    note(f"{model}: parking {n:,} tokens")
    subprocess.run([MKPARK, model, place, str(n), ids], check=True, stderr=subprocess.DEVNULL)
    with open(ids) as f:
        return f.read().split(), place


def dsv4(command, model, ids, *flags, loud=False):
    """One run in a cache directory of its own, so without any heat: its output and counters.
    Peak memory is held to the budget every time."""
    note(f"dsv4 {command} -m {model}, {len(ids):,} tokens: {' '.join(map(str, flags))}")
    with tempfile.TemporaryDirectory(dir=WORK) as tmp:
        stats, file = os.path.join(tmp, "stats.json"), os.path.join(tmp, "ids")
        with open(file, "w") as f:
            f.write("\n".join(ids))
        p = subprocess.run([DSV4, command, "-m", model, "--ids", file, "--stats", stats,
                            *map(str, flags), *([] if loud else ["-q"])],
                           env=dict(os.environ, XDG_CACHE_HOME=tmp), stdout=subprocess.PIPE,
                           stderr=None if loud else subprocess.PIPE, text=True)
        if p.returncode:
            sys.exit(f"bench_long: dsv4 {command}: exit {p.returncode}: {(p.stderr or '')[-400:]}")
        with open(stats) as f:
            s = json.load(f)
    over = (s["peak_rss"] - s["plan"]["budget"]) / 2**20
    DATA["over_budget"] = max(over, DATA.get("over_budget", over))
    return p.stdout, s


def answer(model, ids, place, n, ram, *flags, loud=False):
    return dsv4("run", model, ids, "--print-ids", "--temp", 0, "-n", n, "--ram", ram, "--kv-dir",
                place, *flags, loud=loud)


def lines(*command):
    """What a program prints as "name value unit": name -> values."""
    out = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True).stdout
    values = {}
    for line in out.splitlines():
        name, value, _ = line.split()
        values.setdefault(name, []).append(float(value))
    return values


# === steps ====================================================================================


def measure_index():
    """What the indexer reaches: decode may take its multiply-adds' time on top."""
    note("index scores")
    seen = [lines(BENCH, "index") for _ in range(REPS)]
    DATA["index_macs_s"] = statistics.median(s.get("index.n", s["index.1"])[0] for s in seen) * 1e9
    one = statistics.median(s["index.1"][0] for s in seen)
    row("index scores, 1 thread", one, "GMAC/s", "60 a core", 60, one >= 60)
    row("index scores, all threads", DATA["index_macs_s"] / 1e9, "GMAC/s")


def measure_passes(ids):
    """128K tokens by several spans through a narrow model of 256 experts a layer.  `asked` is what
    passes ask for, experts times their bytes: so narrow are these that all fit the RAM which a long
    span needs, so that the disk sees each of them only once."""
    n = (128 << 10) // LESS
    model, asked = narrow("narrow256", "--experts", 256), {}
    for span in (512, 4096, 32768, None):
        span = span and span // LESS
        _, s = dsv4("eval", model, ids[:n], "--ram", "3400M", *(["--span", span] if span else []))
        used = span or s["plan"]["span"]
        asked[span] = s["experts"]["uses"] * s["plan"]["slot_bytes"] / n
        name = f"{n:,} tokens by {'auto: ' if not span else ''}{used:,}"
        want = -(-n // used)
        row(f"{name}: passes", s["passes"], "", "n over span", want, s["passes"] == want)
        row(f"{name}: experts asked for", asked[span], "B/token")
        row(f"{name}: experts from disk", s["bytes_read"]["experts_from_disk"] / n, "B/token")
        row(f"{name}: time", s["seconds"]["prefill"], "s")
        DATA.setdefault("asked", []).append([used, asked[span]])
    least = asked[4096 // LESS] / 16
    row("experts asked for, auto", asked[None], "B/token", "1/16 of 4,096's", least,
        asked[None] <= least)
    shutil.rmtree(model)


def measure_disk():
    """128K tokens where a third of the experts fits RAM: the bytes that the disk gives for them,
    with the same --ram for a short span and for the one that dsv4 chooses.  The streams are as
    narrow as can be, since a long span takes four times their room and a short one gets it for
    experts; no expert is busier than another, so that a span needs nearly all, as at true widths.
    """
    n, ram = (128 << 10) // LESS, "140M" if QUICK else "900M"
    model, read = narrow("disk", "--even", "--experts", 1024 // LESS, "--hidden", 64, "--inter",
                         8192, "--hash-layers", 0, "--shard-bytes", "256M"), {}
    rng = random.Random(1)
    ids = [str(rng.randrange(3, 507)) for _ in range(n)]
    for span in (4096 // LESS, None):
        _, s = dsv4("eval", model, ids, "--ram", ram, *(["--span", span] if span else []))
        plan, experts = s["plan"], 3 * (1024 // LESS) * s["plan"]["slot_bytes"]
        read[span] = s["bytes_read"]["experts_from_disk"] / n
        name = f"--ram {ram}, {n:,} tokens by {span or 'auto'}"
        row(f"{name}: passes", s["passes"], "", "n over span", n / (span or n),
            s["passes"] == n // (span or n))
        row(f"{name}: experts that fit", plan["slots"] * plan["slot_bytes"] / experts, "of all",
            "not all", 1, plan["slots"] * plan["slot_bytes"] < experts)
        row(f"{name}: experts from disk", read[span], "B/token")
        row(f"{name}: time", s["seconds"]["prefill"], "s")
    least = read[4096 // LESS] / 16                     # small lengths: small spans get more room
    row("experts from disk, auto", read[None], "B/token", "1/16 of 4,096's", least,
        None if QUICK else read[None] <= least)
    shutil.rmtree(model)


def measure_prefill(model, ids):
    """Wall time at true widths: short spans read all experts again and again."""
    for n in (4096 // LESS, 8192 // LESS):
        took = {}
        for span in (512 // LESS, None):
            _, s = dsv4("eval", model, ids[:n], "--ram", "7G", *(["--span", span] if span else []))
            took[span], used = s["seconds"]["prefill"], span or s["plan"]["span"]
            read = s["bytes_read"]["experts_from_disk"] / n
            name = f"flash width, {n:,} by {'auto: ' if not span else ''}{used:,}"
            row(f"{name}: prefill", took[span], "s")
            row(f"{name}: experts from disk", read / 1e6, "MB/token")
            DATA.setdefault("prefill", []).append([n, used, took[span], read])
        row(f"flash width, {n:,}: auto over short", took[None] / took[512 // LESS], "",
            "side by side")


def index_macs(model, n):
    c = config(model)
    layers = c["compress_ratios"][:c["num_hidden_layers"]].count(4)
    return layers * (n // 4) * c["index_n_heads"] * c["index_head_dim"]


def measure_decode(title, model, ids, place, ram, n_answer, *flags):
    """Seconds a token behind each length of context, against 1.5 times that behind the shortest and
    the indexer's multiply-adds.  Demanded at true widths and with all KV in RAM: where heads are
    narrow it is choosing and HCA that grow."""
    took, ratios = {n: [] for n in LENGTHS}, {n: [] for n in LENGTHS}
    for _ in range(REPS):
        for n in LENGTHS:
            _, s = answer(model, ids[:n + MORE], place, n_answer, ram, *flags)
            if s["tokens"]["reused"] != n or (s["kv_bytes"]["file"] > 0) != bool(flags):
                sys.exit(f"bench_long: KV is not where it should be: {s['tokens']}, {s['plan']}")
            took[n].append(s["seconds"]["decode"] / s["tokens"]["decode"])
            most = 1.5 * took[LENGTHS[0]][-1] + index_macs(model, n) / DATA["index_macs_s"]
            ratios[n].append(took[n][-1] / most)
    points = DATA.setdefault("decode", {}).setdefault(title, [])
    for n in LENGTHS:
        t, r = statistics.median(took[n]), statistics.median(ratios[n])
        first, demanded = n == LENGTHS[0], title == "flash width"
        row(f"{title}, behind {n:,}", 1e3 * t, "ms/token", "" if first else "1.5 x first + index",
            None if first else 1e3 * t / r, r <= 1 if demanded and not first else None)
        points.append([n, t, t / r])


def measure_restore(model):
    """100K tokens of all 43 layers of V4-Flash, 25 segments: what a conversation waits for.  The
    first time memory is made on the way, which on a virtual machine can take longer than reading,
    so that what restoring itself adds to disk and zstd shows the second time."""
    n, place = 25 * SEGMENT if not QUICK else 2 * SEGMENT, os.path.join(WORK, "restore")
    note(f"restoring {n:,} tokens of 43 layers")
    v = lines(MKPARK, "--restore", 43, model, place, n)
    shutil.rmtree(place)
    for name, what in (("cold", "into fresh memory"), ("warm", "into memory in use")):
        took = statistics.median(v[f"restore.{name}"])
        least = [b / raw + z for b, raw, z in zip(v[f"read.{name}"], v["raw"],
                                                  v[f"unpack.{name}"])]
        ratio = statistics.median(t / x for t, x in zip(v[f"restore.{name}"], least))
        row(f"{n:,} tokens restored, {what}", took, "s", "2 s", 2, took <= 2)
        row("  the same", took, "s", "1.5 x (raw read + zstd)", 1.5 * took / ratio,
            ratio <= 1.5 if name == "warm" else None)
    row("  raw direct reads of these files", statistics.median(v["raw"]) / 1e9, "GB/s")
    DATA["restore"] = v


def bench():
    wide, deep = flash(), narrow("narrow9", "--layers", 9)
    measure_index()
    measure_restore(wide)
    ids, place = parked(deep, TOP)
    measure_passes(ids)
    measure_disk()
    measure_decode("narrow", deep, ids, place, "1500M", 64)
    _, s = answer(deep, ids[:MORE], place, 1, "1500M", "--ctx", TOP + MORE + 64)
    measure_decode("narrow, KV in a file", deep, ids, place, "1500M", 64, "--ctx", TOP + MORE + 64,
                   "--kv-ram", s["plan"]["kv_least"])
    ids, place = parked(wide, TOP)
    measure_decode("flash width", wide, ids, place, "4G", ANSWER)
    measure_prefill(wide, ids)


def measure_same(model, ids, place, n):
    """Behind n parked tokens, KV in RAM and the least of it: the same answer, and every bit of the
    logits it was drawn from.  dsv4 shows none behind parked context; mkpark has the same code."""
    said, bits = [], []
    want, s = answer(model, ids, place, ANSWER, "1500M")
    least = s["plan"]["kv_least"]
    row(f"{n:,} parked, KV in RAM", s["kv_bytes"]["ram"] / 2**20, "MiB", "nothing in a file",
        None, s["kv_bytes"]["file"] == 0 and s["tokens"]["reused"] == n)
    got, s = answer(model, ids, place, ANSWER, "1500M", "--kv-ram", least)
    kv, blocks = s["kv_bytes"], s["kv_blocks"]
    row("  --kv-ram at the least", kv["ram"] / 2**20, "MiB", "read from the file", None,
        kv["file"] > 0 and kv["read"] > 0 and blocks["read"] > 0 and s["tokens"]["reused"] == n)
    row("  read from the file", kv["read"] / 2**20, "MiB")
    row("  blocks of entries read", blocks["read"], "", "and found in RAM", blocks["found"])
    row(f"  ids of {len(want.split())} tokens", len(got.split()), "", "the same", None, got == want)
    for ram in (0, least):
        out = os.path.join(WORK, "logits")
        said.append(lines(MKPARK, "--logits", 1500 << 20, ram, model, place, n, out))
        with open(out, "rb") as f:
            bits.append(f.read())
    whole_file = 4 * (MORE + ANSWER - 1) * config(model)["vocab_size"]
    row("  their logits, bit for bit", len(bits[1]) // 4, "floats", "the same", None,
        bits[0] == bits[1] and len(bits[1]) == whole_file and said[0]["kv.file"] == [0] and
        said[1]["kv.file"][0] > 0 and said[1]["kv.blocks"][0] > 0)
    drew = [int(x) for x in said[1]["id"]]
    answered = [int(x) for x in got.split()]            # dsv4 may end its answer early
    row("  ids drawn from them", len(drew), "", "dsv4's", None,
        said[0]["id"] == said[1]["id"] and drew[:len(answered)] == answered)


def whole():
    """A prompt of 1,048,576 tokens read from the first to the last; then, behind what mkpark wrote,
    the same from KV in RAM and from the least of it."""
    model, deep, minutes = narrow("1m"), narrow("narrow9", "--layers", 9), 20
    ids, place = parked(deep, TOP)
    begin = time.monotonic()
    out, s = answer(model, ids[:TOP], os.path.join(WORK, "1m.kv"), ANSWER, "1G", loud=True)
    took = time.monotonic() - begin
    row(f"{TOP:,} tokens in, {len(out.split())} out, --ram 1G", took / 60, "min", f"{minutes} min",
        minutes, took <= 60 * minutes and s["tokens"]["prefill"] == TOP)
    row("  passes", s["passes"], "")
    row("  prefill", TOP / s["seconds"]["prefill"], "tokens/s")
    DATA["whole"] = s
    for n in sorted({64 << 10, TOP}):                   # less than that goes to no file
        measure_same(deep, ids[:n + MORE], place, n)


# === all of it ================================================================================


def main():
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    print(f"{'what':52}{'measured':>10} {'unit':9} {'bound':24}{'limit':>9}", flush=True)
    try:
        (whole if WHOLE else bench)()
    finally:
        shutil.rmtree(WORK)
    over = DATA["over_budget"]
    row("peak RSS over --ram, the worst of all", over, "MiB", "64 MiB", 64, over <= 64)
    verdicts = [x["ok"] for x in ROWS]
    print(f"{verdicts.count(True)} ok, {verdicts.count(False)} short")
    return False in verdicts


if __name__ == "__main__":
    sys.exit(main())
