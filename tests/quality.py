"""What the demo model says, and how true dsv4 is to it: one table, and build/quality.json.

usage: quality.py DSV4 QUALITY                    (`make quality`; about 4 minutes)

    tests/demo/data.py -> held-out ids, recall texts --.
    tests/demo/model ----------------------------------+-> dsv4, tests/quality.c, train.py -> rows

Held-out ids are of words that were never trained on.  PyTorch's model is train.py's, on the same
checkpoint and ids.  "off by" is the measured against the other, less 1; "ok" is a target met.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
DEMO, MODEL, WORK = HERE / "demo", HERE / "demo" / "model", pathlib.Path("build/heldout")
TORCH = "/usr/bin/python3"                       # Debian's, for its python3-torch
TRAINED_LENGTH = 2048                            # tokens of the longest training rows
AGREE = 0.005                                    # how far perplexities may be apart
GPU_TOKENS = 128                                 # a GPU in software computes about 3 a second
DRAFT_PROMPTS = 100
ROUNDINGS = {"acts": "activations", "kv": "KV", "index": "index"}
START = time.monotonic()
os.environ["CUDA_VISIBLE_DEVICES"] = ""          # what follows is of the CPU, but for one line


def note(text):
    print(f"[{time.monotonic() - START:4.0f} s] {text}", file=sys.stderr, flush=True)


def call(*args, **more):
    p = subprocess.run([*map(str, args)], capture_output=True, text=True, **more)
    if p.returncode:
        sys.exit(f"quality: {' '.join(map(str, args))}: {p.stderr[-400:]}")
    return p.stdout


# === measuring ================================================================================


def dsv4_nll(files, *flags, env=None):
    """(mean NLL, tokens scored) of files of ids"""
    total, n = 0., 0
    for file in files:
        out = call(DSV4, "eval", "-m", MODEL, "--ids", file, "-q", *flags, env=env)
        tokens, nll = re.match(r"tokens (\d+)  nll ([\d.]+)", out).groups()
        total, n = total + (int(tokens) - 1) * float(nll), n + int(tokens) - 1
    return total / n, n


def torch_nll(files, without=()):
    flags = [x for name in without for x in ("--without", name)]
    out = call(TORCH, "-B", DEMO / "train.py", "eval", MODEL, "--ids", *files, *flags)
    return float(re.search(r"^all: .* mean NLL ([\d.]+)", out, re.M).group(1))


def perplexity_rows(files):
    ours, n = dsv4_nll(files)
    bare, _ = dsv4_nll(files, "--no-rounding")
    note("held-out perplexity by PyTorch")
    theirs = torch_nll(files)
    rows = [compare("held-out perplexity", ours, n, "PyTorch", theirs, AGREE)]
    for name, what in ROUNDINGS.items():
        rows.append(compare(f"PyTorch, {what} not rounded", torch_nll(files, [name]), n,
                            "PyTorch", theirs))
    exact = torch_nll(files, ROUNDINGS)
    rows.append(compare("PyTorch, none of these rounded", exact, n, "PyTorch", theirs))
    rows.append(compare("dsv4 --no-rounding", bare, n, "PyTorch, none", exact, AGREE))
    return rows


def recall_row(length):
    """Exact answers to questions about one line of a text of that length."""
    texts = sorted(WORK.glob(f"recall-{length}-*.txt"))
    right = sum(call(DSV4, "run", "-m", MODEL, "-f", text, "--no-think", "--temp", 0, "-n", 16,
                     "--no-cache", "-q").strip() == text.with_suffix(".code").read_text().strip()
                for text in texts)
    beyond = " (*)" if length > TRAINED_LENGTH else ""
    return row(f"recall behind {length:,} tokens{beyond}", 100 * right / len(texts), "%",
               len(texts))


def draft_row(files):
    """By tests/quality.c, of the first turns of conversations about held-out words."""
    added = json.loads((MODEL / "tokenizer.json").read_text())["added_tokens"]
    named = {t["content"]: t["id"] for t in added}
    bos, ends = named["<｜begin▁of▁sentence｜>"], (named["<think>"], named["</think>"])
    prompts = []
    for file in files:
        ids = [int(x) for x in file.read_text().split()]
        for begin in (i for i, x in enumerate(ids) if x == bos):
            end = next((i for i in range(begin, len(ids)) if ids[i] in ends), None)
            prompts += [] if end is None else [ids[begin:end + 1]]
    text = "".join(" ".join(map(str, p)) + "\n" for p in prompts[:DRAFT_PROMPTS])
    drafts, accepted = re.findall(r"\d+", call(QUALITY, MODEL, input=text))
    return row("MTP drafts that came true", 100 * int(accepted) / int(drafts), "%", int(drafts))


def gpu_rows(file):
    """The first held-out tokens, by the CPU and by a GPU in software."""
    ids = WORK / "gpu.ids"
    ids.write_text(" ".join(file.read_text().split()[:GPU_TOKENS]) + "\n")
    gpu = dict(os.environ, SOFTGPU="cc=8.9", LD_LIBRARY_PATH="build/softgpu")
    nll, best = {}, {}
    for backend, env in (("cpu", None), ("cuda", gpu)):
        logits = WORK / f"{backend}.npy"
        nll[backend], n = dsv4_nll([ids], "--backend", backend, "--logits", logits, env=env)
        best[backend] = np.load(logits).argmax(-1)
    same = best["cpu"] == best["cuda"]
    return [compare("perplexity on a GPU in software", nll["cuda"], n, "the CPU", nll["cpu"],
                    AGREE),
            row("the same likeliest token there", 100 * same.mean(), "%", len(same))]


def samples_row():
    """What tests/test_demo.py reads is what data.py writes."""
    stale = [f.name for f in sorted((DEMO / "heldout").iterdir())
             if f.read_bytes() != (WORK / f.name).read_bytes()]
    for name in stale:
        note(f"tests/demo/heldout/{name} is not what data.py writes")
    return row("tests/demo/heldout: stale files", len(stale), "", ok=not stale)


# === the table ================================================================================


def row(what, measured, unit, n=None, ok=None):
    return {"what": what, "measured": measured, "unit": unit, "n": n, "ok": ok}


def compare(what, nll, n, against, other, target=None):
    """Two mean NLLs, as perplexities."""
    ratio = math.exp(nll - other) - 1
    return row(what, math.exp(nll), "", n, None if target is None else abs(ratio) <= target) | {
        "against": against, "value": math.exp(other), "off": ratio, "target": target}


def show(rows):
    print(f"{'what':34}{'measured':>9} {'unit':5}{'n':>6}  {'against':14}{'value':>8}{'off by':>9}"
          f"{'target':>9}")
    for x in rows:
        value = off = target = ""
        if "against" in x:
            value, off = f"{x['value']:.3f}", f"{x['off']:+.3%}"
            target = "" if x["target"] is None else f"<= {x['target']:.1%}"
        measured = f"{x['measured']:.0f}" if x["n"] is None else \
            f"{x['measured']:.{1 if x['unit'] else 3}f}"
        verdict = {None: "", True: "ok", False: "short"}[x["ok"]]
        print(f"{x['what']:34}{measured:>9} {x['unit']:5}{x['n'] or '':>6}  "
              f"{x.get('against', ''):14}{value:>8}{off:>9}{target:>9}  {verdict}".rstrip())
    print("n: tokens of perplexities, prompts of recall, drafts\n"
          f"(*) longer than any training row ({TRAINED_LENGTH:,} tokens)")


def main():
    note("held-out ids and recall texts")
    for what in ("heldout", "recall"):
        call(sys.executable, "-B", DEMO / "data.py", what, MODEL, WORK)
    files = sorted(WORK.glob("heldout-*.ids"))
    note("held-out perplexity by dsv4")
    rows = perplexity_rows(files)
    lengths = sorted({int(f.name.split("-")[1]) for f in WORK.glob("recall-*.txt")})
    for length in lengths:
        note(f"recall behind {length} tokens")
        rows.append(recall_row(length))
    note("drafts")
    rows.append(draft_row(files))
    if os.path.exists("build/kernels.fatbin"):
        note("a GPU in software")
        rows += gpu_rows(files[0])
    else:
        note("no GPU in software: there is no nvcc")
    rows.append(samples_row())
    show(rows)
    with open("build/quality.json", "w") as f:
        json.dump({"seconds": time.monotonic() - START, "rows": rows}, f, indent=1)
    verdicts = [x["ok"] for x in rows]
    print(f"{verdicts.count(True)} ok, {verdicts.count(False)} short; build/quality.json")


DSV4, QUALITY = map(os.path.abspath, sys.argv[1:3])
main()
