"""How good could the expert cache be?  LRU against Belady's optimum on traces of real use.

usage: cachesim.py TRACE... [-o OUT.svg]     table on stdout, hit rate over slots as an SVG plot
       cachesim.py --fake N [-o OUT.svg]     the same for a skewed trace of N tokens made up here
       cachesim.py --selftest                against brute force on tiny traces

A trace has one line per (token, layer): "TOKEN LAYER E1 E2 ... Ek", as `dsv4 bench --trace`
writes it.  A use is one (layer, expert) pair; one cache of S slots holds pairs of all layers, as
in offload.c.  Several traces are one after the other: the cache stays warm.
"""

import argparse
import heapq
import itertools
import os
import random
import sys


def read_trace(path):
    """Uses in order, and the most experts of one line."""
    uses, topk = [], 1
    with open(path) as f:
        for number, line in enumerate(f, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            try:
                layer, *experts = map(int, words[1:])
            except ValueError:
                sys.exit(f"{path}:{number}: not TOKEN LAYER EXPERT...: {line.strip()[:60]!r}")
            uses += [(layer, e) for e in experts]
            topk = max(topk, len(experts))
    return uses, topk


def fake_trace(n_tokens, layers=4, experts=64, topk=6, seed=1):
    """Zipf-like popularity, another order a layer, and some experts of the token before again."""
    rng, uses = random.Random(seed), []
    weights = [1 / (i + 4) for i in range(experts)]
    order = [rng.sample(range(experts), experts) for _ in range(layers)]
    last = [[] for _ in range(layers)]
    for _ in range(n_tokens):
        for l in range(layers):
            chosen = {e for e in last[l] if rng.random() < 0.3}
            while len(chosen) < topk:
                chosen.add(order[l][rng.choices(range(experts), weights)[0]])
            last[l] = sorted(chosen)
            uses += [(l, e) for e in last[l]]
    return uses, topk


# === the two policies =========================================================================


def lru_hits(uses):
    """Hits for every number of slots at once: a use hits where its stack distance fits.

    The distance is the number of different pairs since the last use of this one, itself among
    them: marks at the latest use of each pair, counted by a Fenwick tree.
    """
    n, last, tree = len(uses), {}, [0] * (len(uses) + 1)
    by_distance = [0] * (len(set(uses)) + 1)

    def mark(i, by):
        i += 1
        while i <= n:
            tree[i] += by
            i += i & -i

    def marks_before(i):
        total = 0
        while i:
            total += tree[i]
            i -= i & -i
        return total

    for i, use in enumerate(uses):
        if use in last:
            at = last[use]
            by_distance[marks_before(i) - marks_before(at)] += 1
            mark(at, -1)
        mark(i, 1)
        last[use] = i
    return list(itertools.accumulate(by_distance))


def next_uses(uses):
    """Where each use comes again; behind the end where it never does."""
    after, seen = [0] * len(uses), {}
    for i in range(len(uses) - 1, -1, -1):
        after[i] = seen.get(uses[i], len(uses))
        seen[uses[i]] = i
    return after


def belady_hits(uses, after, slots):
    """Out goes what is used again last.  Every use must be let in, as the engine computes from
    slots only.  Heap entries of pairs that were used since are stale: their next use has passed,
    so they lie below all living ones and never come up."""
    held, heap, hits = {}, [], 0
    for i, use in enumerate(uses):
        if use in held:
            hits += 1
        elif len(held) == slots:
            del held[heapq.heappop(heap)[1]]
        held[use] = after[i]
        heapq.heappush(heap, (-after[i], use))
    return hits


def sweep(topk, n_pairs, points=24):
    """Slots from topk to all pairs, evenly on a log scale."""
    low = min(topk, n_pairs)
    return sorted({round(low * (n_pairs / low) ** (i / (points - 1))) for i in range(points)})


def simulate(uses, topk):
    """[(slots, LRU's hit rate, Belady's)]"""
    after, lru, n = next_uses(uses), lru_hits(uses), len(uses)
    return [(s, lru[s] / n, belady_hits(uses, after, s) / n)
            for s in sweep(topk, len(set(uses)))]


# === what a person sees =======================================================================


def svg(rows, title):
    """Hit rate over slots: a plot without a plotting library."""
    left, top, width, height = 70, 40, 640, 360
    most = rows[-1][0]

    def x(slots):
        return left + width * slots / most

    def y(rate):
        return top + height * (1 - rate)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 40}" '
           f'height="{top + height + 70}" font-family="sans-serif" font-size="13">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left + width / 2}" y="24" text-anchor="middle">{title}</text>']
    for i in range(6):
        out += [f'<path d="M{left} {y(i / 5):.1f}h{width}" stroke="#ddd"/>',
                f'<text x="{left - 8}" y="{y(i / 5) + 4:.1f}" text-anchor="end">{20 * i}%</text>',
                f'<path d="M{x(most * i / 5):.1f} {top + height}v5" stroke="black"/>',
                f'<text x="{x(most * i / 5):.1f}" y="{top + height + 20}" '
                f'text-anchor="middle">{most * i / 5:.0f}</text>']
    out += [f'<path d="M{left} {top}v{height}h{width}" stroke="black" fill="none"/>',
            f'<text x="{left + width / 2}" y="{top + height + 45}" text-anchor="middle">'
            'slots, over all (layer, expert) pairs</text>',
            f'<text transform="translate(20 {top + height / 2}) rotate(-90)" '
            'text-anchor="middle">hit rate</text>']
    for column, name, colour in ((1, "LRU", "#c33"), (2, "Belady (optimum)", "#36c")):
        points = " ".join(f"{x(r[0]):.1f},{y(r[column]):.1f}" for r in rows)
        at = top + height - 50 + 20 * column
        out += [f'<polyline points="{points}" stroke="{colour}" stroke-width="2" fill="none"/>',
                f'<path d="M{left + width - 170} {at - 4}h25" stroke="{colour}" '
                'stroke-width="2"/>',
                f'<text x="{left + width - 138}" y="{at}">{name}</text>']
    return "\n".join(out + ["</svg>"]) + "\n"


def table(rows):
    lines = [f"{'slots':>8}{'LRU':>9}{'Belady':>9}{'LRU/Belady':>12}"]
    for slots, lru, best in rows:
        share = f"{lru / best:12.2f}" if best else f"{'-':>12}"
        lines.append(f"{slots:8d}{lru:9.1%}{best:9.1%}{share}")
    return "\n".join(lines)


# === test =====================================================================================


def brute_lru(uses, slots):
    held, hits = [], 0                                         # coldest first
    for use in uses:
        if use in held:
            hits += 1
            held.remove(use)
        elif len(held) == slots:
            held.pop(0)
        held.append(use)
    return hits


def brute_best(uses, slots, held=frozenset()):
    """The most hits that any choice of victims gives."""
    if not uses:
        return 0
    use, rest = uses[0], uses[1:]
    if use in held:
        return 1 + brute_best(rest, slots, held)
    if len(held) < slots:
        return brute_best(rest, slots, held | {use})
    return max(brute_best(rest, slots, held - {out} | {use}) for out in held)


def selftest():
    rng, compared = random.Random(7), 0
    for _ in range(150):
        pairs = rng.randint(1, 5)
        uses = [(0, rng.randrange(pairs)) for _ in range(rng.randint(1, 11))]
        lru, after = lru_hits(uses), next_uses(uses)
        for slots in range(1, len(set(uses)) + 1):
            got = lru[slots], belady_hits(uses, after, slots)
            want = brute_lru(uses, slots), brute_best(uses, slots)
            if got != want:
                return f"{uses} in {slots} slots: (LRU, Belady) is {got} and not {want}"
            compared += 1
    rows = simulate(*fake_trace(60))
    if not all(0 <= a <= b <= 1 for _, a, b in rows) or rows[-1][1] != rows[-1][2]:
        return f"a made-up trace gives {rows}"
    if svg(rows, "t").count("<polyline") != 2:
        return "the plot lacks a curve"
    print(f"ok   cachesim: LRU and Belady are those of brute force  {compared} cases")
    return None


def main():
    p = argparse.ArgumentParser(description="LRU against Belady's optimum on traces of experts")
    p.add_argument("trace", nargs="*")
    p.add_argument("--fake", type=int, metavar="N", help="a made-up trace of N tokens")
    p.add_argument("--selftest", action="store_true")
    p.add_argument("-o", metavar="OUT.svg", default="build/cachesim.svg")
    a = p.parse_args()
    if a.selftest:
        why = selftest()
        if why:
            print(f"FAIL cachesim: {why}")
        return 1 if why else 0
    if bool(a.trace) == bool(a.fake):
        p.error("name traces, or --fake N")
    traces = [fake_trace(a.fake)] if a.fake else [read_trace(t) for t in a.trace]
    uses, topk = sum((t[0] for t in traces), []), max(t[1] for t in traces)
    if not uses:
        p.error("nothing is used in these traces")
    rows = simulate(uses, topk)
    name = f"{a.fake} made-up tokens" if a.fake else ", ".join(map(os.path.basename, a.trace))
    with open(a.o, "w") as f:
        title = f"{name}: {len(uses)} uses of {len(set(uses))} experts"
        f.write(svg(rows, title.replace("&", "&amp;").replace("<", "&lt;")))
    print(table(rows))
    print(f"plot: {a.o}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
