"""What tests that run the program share: a folder, dsv4 as a person runs it, small models.

usage: TEST.py DSV4 MKMODEL.  run(NAME) prints "ok   NAME: TEST" or "FAIL NAME: TEST: why" a test,
or "skip NAME: TEST: why" for what this machine does not let a test do.
"""

import os
import random
import subprocess
import sys
import tempfile

import numpy as np

DSV4, MKMODEL = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = tempfile.TemporaryDirectory(prefix="dsv4-test-")
TMP = FOLDER.name
TESTS = []
os.environ["XDG_CACHE_HOME"] = os.path.join(TMP, "cache")
os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # these tests are of the CPU; test_gpu.py


class Skip(Exception):
    """Neither passed nor failed."""


def test(fn):
    TESTS.append(fn)
    return fn


def need(condition, why):
    if not condition:
        raise AssertionError(why)


def dsv4(*args, stdin=b"", code=0):
    """Run dsv4; demand the exit code; an error is one line on stderr and nothing on stdout."""
    p = subprocess.run([DSV4, *map(str, args)], input=stdin, capture_output=True, timeout=600)
    err = p.stderr.decode(errors="replace")
    need(p.returncode == code, f"{args}: exit {p.returncode}, not {code}: {err[-600:]}")
    if code:
        last = [s for s in err.splitlines() if s.startswith("dsv4: ")]
        need(len(last) == 1, f"{args}: not one line of error: {err!r}")
        need(not p.stdout, f"{args}: error with output {p.stdout[:80]!r}")
        return last[0]
    return p.stdout, err


def refuses(fragment, *args, code=1, stdin=b""):
    line = dsv4(*args, code=code, stdin=stdin)
    need(fragment in line, f"{args}: {line!r} lacks {fragment!r}")


def write(name, data):
    path = os.path.join(TMP, name)
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    return path


def words(n, seed=1):
    """About n words of text: sentences of twelve, paragraphs of four."""
    rng = random.Random(seed)
    some = "glacier river stone light house winter bird song night day water ice".split()
    text = [" ".join(rng.choice(some) for _ in range(12)).capitalize() + "."
            for _ in range(n // 12)]
    return "\n\n".join(" ".join(text[i:i + 4]) for i in range(0, len(text), 4))


def mkmodel(name, preset, *args):
    """A model of that name, made the first time."""
    path = os.path.join(TMP, name)
    if not os.path.exists(path):
        subprocess.run([MKMODEL, preset, path, *map(str, args)], check=True, capture_output=True)
    return path


def ids_file(ids, name="ids.txt"):
    return write(name, " ".join(map(str, ids)) + "\n")


def eval_logits(model, ids, *flags):
    out = os.path.join(TMP, "logits.npy")
    stdout, _ = dsv4("eval", "-m", model, "--ids", ids_file(ids), "--logits", out, "-q", *flags)
    return np.load(out), stdout.decode()


def run(name):
    failed = 0
    for fn in TESTS:
        try:
            figure = fn()
            print(f"ok   {name}: {fn.__name__}" + (f"  {figure}" if figure else ""), flush=True)
        except Skip as e:
            print(f"skip {name}: {fn.__name__}: {e}", flush=True)
        except Exception as e:
            failed += 1
            print(f"FAIL {name}: {fn.__name__}: {type(e).__name__}: {e}", flush=True)
    return failed > 0
