"""The demo model as it is shipped: whole, small, and what it says.

usage: test_demo.py DSV4 MKMODEL

Held-out ids and recall texts are copies of what tests/demo/data.py writes (`make quality` compares
them); the figures are those of tests/demo/README.md.
"""

import math
import pathlib
import re
import sys

from harness import HERE, dsv4, need, run, test

MODEL = pathlib.Path(HERE, "demo", "model")
HELDOUT = pathlib.Path(HERE, "demo", "heldout")
MOST_BYTES = 8 << 20
QUESTION = "What is a river?"               # a word that training came back to
PERPLEXITY = 17.90                       # of heldout-0.ids
RECALLED = 5                             # of the recall texts behind 250 tokens, at least

FLAGS = ("-m", MODEL, "--temp", 0, "--no-cache", "-q")


def answer(*flags):
    out, _ = dsv4("run", *FLAGS, "-p", QUESTION, "--no-think", *flags)
    return out.decode()


@test
def demo_model_is_whole_and_small():
    out, _ = dsv4("check", "--hash", MODEL)
    need(b"every tensor that it needs is there" in out, out)
    size = sum(f.stat().st_size for f in MODEL.iterdir())
    need(size <= MOST_BYTES, f"{size} bytes")
    return f"{size / 1e6:.1f} MB"


@test
def demo_model_says_what_a_word_means_and_ends():
    ids = answer("--print-ids", "-n", 64).split()
    need(1 < len(ids) < 64, f"{len(ids)} tokens")
    text = answer("-n", 64).strip()
    need(re.fullmatch(r"[a-z][ -~]+", text), f"{text!r} is no gloss")
    return text


@test
def demo_model_thinks_first():
    """A thought names the part of speech; stdout has the answer behind it alone."""
    flags = ("run", *FLAGS, "-p", QUESTION, "-n", 64)
    ids, _ = dsv4(*flags, "--print-ids")
    text, _ = dsv4("tokenize", "-m", MODEL, "--decode", stdin=ids)
    thought, end, said = text.decode().partition("</think>")
    need(thought.startswith("a noun") and end and said.strip(), text)
    need(dsv4(*flags)[0].decode().strip() == said.strip(), "the answer is another")
    return thought


@test
def demo_model_says_the_same_with_few_experts_in_memory():
    want = answer()
    need(answer("-t", 1) == want, "-t 1 changes the answer")
    line = dsv4("run", "-m", MODEL, "-p", QUESTION, "--ram", "1M", code=1)
    least = int(re.search(r"at least (\d+)M", line).group(1))
    out, err = dsv4("run", "-m", MODEL, "--temp", 0, "--no-cache", "-p", QUESTION, "--no-think",
                    "--ram", f"{least + 1}M")
    need(out.decode() == want, f"--ram {least + 1}M changes the answer")
    slots, experts = map(int, re.search(r"(\d+) of (\d+) experts", err).groups())
    need(slots < experts and not re.search(r"experts +0 from disk", err), err)
    return f"{slots} of {experts} experts"


@test
def demo_model_finds_codes_again():
    texts = sorted(HELDOUT.glob("recall-250-*.txt"))
    right = 0
    for text in texts:
        out, _ = dsv4("run", *FLAGS, "-f", text, "--no-think", "-n", 16)
        right += out.decode().strip() == text.with_suffix(".code").read_text().strip()
    need(right >= RECALLED, f"{right} of {len(texts)}")
    return f"{right} of {len(texts)}"


@test
def demo_model_s_perplexity_is_what_the_readme_says():
    out, _ = dsv4("eval", "-m", MODEL, "--ids", HELDOUT / "heldout-0.ids", "-q")
    got = float(re.search(r"perplexity ([\d.]+)", out.decode()).group(1))
    need(math.isclose(got, PERPLEXITY, rel_tol=.01), f"{got}")
    return f"{got:.2f}"


if __name__ == "__main__":
    sys.exit(run("test_demo.py"))
