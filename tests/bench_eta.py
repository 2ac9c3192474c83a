"""Is the time left that `dsv4 summarize` shows true?  And the time that its plan predicts?

usage: bench_eta.py DSV4 MKMODEL        (a part of `make bench`; 3 minutes)

A document is read by a narrow model with many layers and by one of Flash's widths (`make bench` has
made it).  Each line of progress after the first tenth gives an end: the time so far and the time
left.  The worst of these ends against the true one is demanded to be within 20%.
"""

import json
import os
import re
import subprocess
import sys
import time

from harness import DSV4, TMP, mkmodel, words, write

FLASH = "build/flash4"
LINE = re.compile(r"reading (\d+)%.* (\d+):(\d\d) left")


def watch(model, n_words, *flags):
    """Worst error of the time left, predicted seconds, seconds, tokens."""
    path, stats = write("document.txt", words(n_words)), os.path.join(TMP, "stats.json")
    command = [DSV4, "summarize", "-m", model, path, "--no-cache", "-n", "2", "--stats", stats]
    p = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         text=True, bufsize=1)
    seen, predicted = [], 0
    for line in p.stderr:
        now, found = time.monotonic(), LINE.match(line)
        if line.startswith(f"{path[:32]} "):
            predicted = float(line.split()[-1])
        if found:
            seen.append((now, int(found[1]), 60 * int(found[2]) + int(found[3])))
    p.wait()
    s = json.load(open(stats))
    began = seen[0][0] - 0.25                            # the first line comes then
    true = s["seconds"]["prefill"]
    ends = [now - began + left for now, share, left in seen if 10 <= share < 100]
    worst = max(ends, key=lambda end: abs(end - true))
    return worst / true - 1, predicted, true, s["tokens"]["prefill"], len(ends)


def main():
    failed = 0
    narrow = mkmodel("narrow", "1m", "--experts", 32, "--layers", 9)
    models = [("narrow, 9 layers", narrow, 12000, "--ram", "1G")]
    if os.path.exists(os.path.join(FLASH, "config.json")):
        models.append(("Flash's widths, 4 layers", FLASH, 900, "--ram", "8G"))
    for name, model, n_words, *flags in models:
        worst, predicted, true, n, lines = watch(model, n_words, *flags)
        ok = abs(worst) <= 0.2
        failed += not ok
        print(f"{name:26} {n:7,} tokens {true:7.1f} s  plan {predicted:7.0f} s  time left "
              f"{100 * worst:+5.1f}% at worst in {lines} lines  {'ok' if ok else 'short'}",
              flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
