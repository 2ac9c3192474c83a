"""Curves of what `make bench-long` measured: tests/curves/decode.svg and tests/curves/experts.svg.

usage: curves.py [build/bench_long.json]

Both axes are logarithmic.  The plots carry their own background, dark where the reader's is.
"""

import json
import math
import os
import sys

LEFT, TOP, WIDTH, HEIGHT = 80, 40, 560, 320
COLOURS = (("#c2410c", "#fb923c"), ("#1d4ed8", "#7aa2ff"), ("#15803d", "#4ade80"))
STYLE = """<style>
.back { fill: #fff } text { fill: #222 } path.grid { stroke: #ddd } path.axis { stroke: #222 }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } text { fill: #ddd } path.grid { stroke: #333 } path.axis { stroke: #ddd } }
"""


def short(n):
    """8192 as 8K, 1e6 as 1M: of tokens by 1,024, of bytes by 1,000."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:g}{unit}"
    return f"{n:g}"


def style():
    out = [STYLE]
    for i, (light, dark) in enumerate(COLOURS):
        out.append(f".s{i} {{ stroke: {light} }} @media (prefers-color-scheme: dark) "
                   f"{{ .s{i} {{ stroke: {dark} }} }}\n")
    return "".join(out) + "</style>"


def plot(title, x_label, y_label, series):
    """SVG of [(name, colour's number, dashed, [(x, y)])]."""
    xs = sorted({p[0] for s in series for p in s[3]})
    ys = [p[1] for s in series for p in s[3]]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    high = max(high, low + 1)

    def x(v):
        return LEFT + WIDTH * math.log(v / xs[0]) / (math.log(xs[-1] / xs[0]) or 1)

    def y(v):
        return TOP + HEIGHT * (1 - (math.log10(v) - low) / (high - low))

    height = TOP + HEIGHT + 60 + 20 * len(series)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 40}" '
           f'height="{height}" font-family="sans-serif" font-size="13">', style(),
           '<rect class="back" width="100%" height="100%"/>',
           f'<text x="{LEFT + WIDTH / 2}" y="24" text-anchor="middle">{title}</text>']
    steps = (1, 2, 5) if high - low < 3 else (1,)
    for v in (m * 10.0**e for e in range(low, high + 1) for m in steps):
        if v <= 10.0**high:
            out += [f'<path class="grid" d="M{LEFT} {y(v):.1f}h{WIDTH}"/>',
                    f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{short(v)}</text>']
    last = -99
    for v in xs:
        out.append(f'<path class="axis" d="M{x(v):.1f} {TOP + HEIGHT}v5"/>')
        if x(v) - last > 40:                        # else labels would touch
            last = x(v)
            out.append(f'<text x="{last:.1f}" y="{TOP + HEIGHT + 20}" '
                       f'text-anchor="middle">{short(v)}</text>')
    out += [f'<path class="axis" d="M{LEFT} {TOP}v{HEIGHT}h{WIDTH}" fill="none"/>',
            f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 42}" text-anchor="middle">'
            f'{x_label}</text>',
            f'<text transform="translate(18 {TOP + HEIGHT / 2}) rotate(-90)" '
            f'text-anchor="middle">{y_label}</text>']
    for i, (name, colour, dashed, points) in enumerate(series):
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in sorted(points))
        at = TOP + HEIGHT + 65 + 20 * i
        out += [f'<polyline class="s{colour}" points="{line}" stroke-width="2" fill="none"{dash}/>',
                f'<path class="s{colour}" d="M{LEFT} {at - 4}h30" stroke-width="2"{dash}/>',
                f'<text x="{LEFT + 40}" y="{at}">{name}</text>']
    return "\n".join(out + ["</svg>"]) + "\n"


def decode(data):
    series = []
    for i, (name, points) in enumerate(data["decode"].items()):
        series.append((name, i, False, [(n, 1e3 * t) for n, t, _ in points]))
        if name == "flash width":
            series.append((f"{name}, the most it may be", i, True,
                           [(n, 1e3 * most) for n, _, most in points[1:]]))
    return plot("Decoding behind a long context", "tokens of context", "ms a token", series)


def experts(data):
    """Two measures, for what the narrow model's passes ask for its RAM holds."""
    n = max(p[0] for p in data["prefill"])
    narrow = [(span, asked) for span, asked in data["asked"]]
    wide = [(span, read) for tokens, span, _, read in data["prefill"] if tokens == n]
    long = short(max(span for span, _ in narrow))
    return plot("Experts over the span", "tokens a span", "bytes a token of the prompt",
                [(f"narrow, {long} tokens: asked for", 1, False, narrow),
                 (f"flash width, {short(n)} tokens: read from disk", 2, False, wide)])


def main():
    with open(sys.argv[1] if len(sys.argv) > 1 else "build/bench_long.json") as f:
        data = json.load(f)
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "curves")
    os.makedirs(folder, exist_ok=True)
    for name, draw in (("decode", decode), ("experts", experts)):
        path = os.path.join(folder, f"{name}.svg")
        with open(path, "w") as f:
            f.write(draw(data))
        print(os.path.relpath(path))


main()
