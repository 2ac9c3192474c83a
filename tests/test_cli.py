"""What a person sees of dsv4: answers, errors, exit codes, budgets, files left behind.

usage: test_cli.py DSV4 MKMODEL.  Prints "ok   cli: NAME" or "FAIL cli: NAME: why" a test.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ref

DSV4, MKMODEL = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
HERE = os.path.dirname(os.path.abspath(__file__))
TINY_A = os.path.join(HERE, "goldens", "tiny-a")
SHADOW = 2**30 if "/san/" in DSV4 else 0               # ASan keeps its own books in memory
TESTS = []


def test(fn):
    TESTS.append(fn)
    return fn


def need(condition, why):
    if not condition:
        raise AssertionError(why)


def dsv4(*args, stdin=b"", code=0):
    """Run dsv4; demand the exit code; an error is one line on stderr and nothing on stdout."""
    p = subprocess.run([DSV4, *map(str, args)], input=stdin, capture_output=True, timeout=300)
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


def mkmodel(name, preset, *args):
    path = os.path.join(TMP, name)
    subprocess.run([MKMODEL, preset, path, *map(str, args)], check=True, capture_output=True)
    return path


def tiny():
    path = os.path.join(TMP, "tiny")
    return path if os.path.exists(path) else mkmodel("tiny", "tiny", "--mtp", "--seed", 3)


def ids_file(ids, name="ids.txt"):
    return write(name, " ".join(map(str, ids)) + "\n")


def eval_logits(model, ids, *flags):
    out = os.path.join(TMP, "logits.npy")
    stdout, _ = dsv4("eval", "-m", model, "--ids", ids_file(ids), "--logits", out, "-q", *flags)
    return np.load(out), stdout.decode()


def rel_rms(x, y):
    return np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)


# === answers ==================================================================================


@test
def eval_no_rounding_gives_golden_logits():
    g = ref.load(os.path.join(TINY_A, "golden.safetensors"))
    ids = list(g["prompt.tokens"]) + list(g["nq.decode.tokens"])
    want = np.concatenate([g["nq.logits"], g["nq.decode.logits"]])
    got, _ = eval_logits(TINY_A, ids, "--no-rounding", "--decode-from", 300, "--chunk", 64)
    need(got.shape == want.shape and got.dtype == np.float32, f"{got.shape} {got.dtype}")
    worst = rel_rms(got, want).max()
    need(worst <= 1e-4, f"worst row {worst}")


@test
def eval_perplexity_follows_from_its_logits():
    ids = np.random.default_rng(1).integers(0, 512, 50)
    logits, line = eval_logits(TINY_A, ids)
    x = logits[:-1].astype(np.float64)
    top = x.max(1, keepdims=True)
    logp = x - top - np.log(np.exp(x - top).sum(1, keepdims=True))
    nll = -logp[np.arange(49), ids[1:]].mean()
    words = line.split()
    need(abs(float(words[3]) - nll) <= 2e-6, f"{line!r} and not {nll}")
    need(abs(float(words[5]) / np.exp(nll) - 1) <= 1e-3, line)


@test
def eval_same_bits_for_chunk_decode_threads_and_ram():
    ids = np.random.default_rng(2).integers(0, 512, 150)
    whole, _ = eval_logits(TINY_A, ids)
    for flags in (["--chunk", 7], ["--decode-from", 20], ["-t", 1], ["--threads", 3],
                  ["--chunk", 1000], ["--ctx", 900], ["--ram", "64M"]):
        got, _ = eval_logits(TINY_A, ids, *flags)
        need(np.array_equal(got, whole), f"{flags} changes the logits")


@test
def eval_agrees_with_reference_on_new_shapes():
    for name, args in (("cut", ["--layers", 5, "--experts", 6, "--hash-layers", 1]),
                       ("wide", ["--experts", 40, "--hash-layers", 0, "--dtype", "f32"]),
                       ("f16", ["--layers", 4, "--dtype", "f16", "--seed", 9])):
        path = mkmodel(name, "tiny", *args)
        ids = np.random.default_rng(3).integers(0, 512, 140)
        want = ref_logits(path, ids)
        got, _ = eval_logits(path, ids, "--no-rounding")
        worst = rel_rms(got, want).max()
        need(worst <= 1e-4, f"{name}: worst row {worst}")


def ref_logits(path, ids):
    out = os.path.join(TMP, "ref.safetensors")
    subprocess.run([sys.executable, os.path.join(HERE, "ref.py"), "golden", path, out, "--ids",
                    ids_file(ids), "--decode", "1", "--no-rounding"], check=True,
                   capture_output=True)
    return ref.load(out)["nq.logits"]


@test
def split_and_unindexed_checkpoints_give_the_same_answer():
    ids = np.random.default_rng(4).integers(0, 512, 40)
    whole, _ = eval_logits(tiny(), ids)
    for flag in ("--split-experts", "--no-index"):
        path = mkmodel("variant", "tiny", "--mtp", "--seed", 3, flag)
        got, _ = eval_logits(path, ids)
        need(np.array_equal(got, whole), f"{flag} changes the logits")
        shutil.rmtree(path)


@test
def run_same_seed_same_text():
    text = write("text.txt", "It was a bright cold day in April.")
    flags = ["run", "-m", tiny(), "-f", text, "-n", 24, "-q"]
    one, _ = dsv4(*flags, "--seed", 5)
    need(one.decode(), "no answer")
    need(dsv4(*flags, "--seed", 5, "-t", 1)[0] == one, "threads change the text")
    need(dsv4(*flags, "--seed", 5, "--ram", "64M")[0] == one, "--ram changes the text")
    need(dsv4(*flags, "--seed", 6)[0] != one, "another seed gives the same text")
    need(dsv4(*flags, "--temp", 0, "--seed", 1)[0] == dsv4(*flags, "--temp", 0, "--seed", 2)[0],
         "greedy depends on the seed")


@test
def run_reads_text_files_stdin_and_flags_alike():
    text = "Some text, mit Umlaut: äöü."
    path = write("text.txt", text)
    args = ["-m", tiny(), "-n", 8, "-q", "--print-ids"]
    a = dsv4("run", *args, "-f", path)[0]
    need(a == dsv4("run", *args, "-p", text)[0], "-p differs from -f")
    need(a == dsv4("run", *args, "-f", "-", stdin=text.encode())[0], "stdin differs from -f")
    need(a != dsv4("run", *args, "-f", path, "--no-think")[0], "--no-think changes nothing")
    need(a != dsv4("run", *args, "-f", path, "--raw")[0], "--raw changes nothing")


@test
def run_print_ids_continues_what_eval_scores():
    """Greedy ids are the argmax of eval's logits over prompt and answer."""
    ids = list(np.random.default_rng(5).integers(2, 512, 30))
    out, _ = dsv4("run", "-m", TINY_A, "--ids", ids_file(ids), "-n", 12, "--temp", 0,
                  "--print-ids", "-q")
    need(out.endswith(b"\n") and b"  " not in out, repr(out))
    answer = list(map(int, out.split()))
    need(0 < len(answer) <= 12, f"{len(answer)} ids for -n 12")
    logits, _ = eval_logits(TINY_A, ids + answer)
    need(list(logits.argmax(1)[29:29 + len(answer)]) == answer, "not the argmax")


@test
def pro_shape_runs_within_its_budget():
    """V4-Pro's widths, 4 layers of 16 experts: the answer does not depend on --ram, and peak
    memory stays under the budget plus 64 MB."""
    path = mkmodel("pro", "pro", "--layers", 4, "--experts", 16)
    text = write("text.txt", "The quick brown fox jumps over the lazy dog.")
    answers = []
    for ram in (5.5, 8):
        stats = os.path.join(TMP, "stats.json")
        out, _ = dsv4("run", "-m", path, "-f", text, "-n", 4, "--ram", f"{ram}G", "-q",
                      "--print-ids", "--stats", stats)
        answers.append(out)
        peak = json.load(open(stats))["peak_rss"]
        need(peak <= ram * 2**30 + (64 << 20) + SHADOW, f"--ram {ram}G: peak {peak >> 20} MiB")
    shutil.rmtree(path)
    need(answers[0] == answers[1], "--ram changes the answer")


# === what it says =============================================================================


@test
def check_describes_models():
    out, _ = dsv4("check", tiny())
    text = out.decode()
    for part in ("6: 2 window, 2 CSA, 2 HCA", "8 a layer, 2 a token", "MTP block    yes",
                 "every tensor"):
        need(part in text, f"{part!r} is not in {text!r}")
    need(dsv4("check", tiny(), "-q")[0] == b"", "-q prints")


@test
def check_takes_the_real_48_shards_in_2_seconds():
    """Sparse files under the true headers of a published checkpoint: their data is all holes."""
    path = os.path.join(TMP, "real")
    with tarfile.open(os.path.join(HERE, "goldens", "real-headers.tar.xz")) as tar:
        tar.extractall(path)
    for name in os.listdir(path):
        if not name.endswith(".safetensors.json"):
            continue
        header = open(os.path.join(path, name), "rb").read()
        end = max(v["data_offsets"][1] for k, v in json.loads(header).items()
                  if k != "__metadata__")
        with open(os.path.join(path, name[:-5]), "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            f.truncate(8 + len(header) + end)
    began = time.monotonic()
    text = dsv4("check", path)[0].decode()
    seconds = time.monotonic() - began
    need(seconds < 2 or SHADOW, f"{seconds:.2f} s")
    for part in ("43: 2 window, 21 CSA, 20 HCA; 3 route", "160 a layer", "MTP block    none",
                 "48, 45821 tensors", "every tensor"):
        need(part in text, f"{part!r} is not in {text!r}")
    return f"{seconds:.2f} s"


@test
def stats_hold_every_counter():
    path = os.path.join(TMP, "stats.json")
    dsv4("run", "-m", tiny(), "-p", "Hello", "-n", 6, "-q", "--stats", path, "--temp", 0)
    s = json.load(open(path))
    for key in ("tokens", "seconds", "op_seconds", "bytes_read", "experts", "passes", "kv_bytes",
                "peak_rss", "plan", "io"):
        need(key in s, f"no {key}")
    need(s["tokens"]["prefill"] > 4 and s["tokens"]["decode"] <= 5, str(s["tokens"]))
    need(s["experts"]["ram_hits"] + s["experts"]["disk_reads"] == s["experts"]["uses"],
         str(s["experts"]))
    need(not os.path.exists(path + ".part"), "a .part file is left")


@test
def stdout_holds_the_answer_only():
    out, err = dsv4("run", "-m", tiny(), "-p", "Hi", "-n", 4, "--print-ids")
    need(all(w.isdigit() for w in out.decode().split()), repr(out))
    need("plan:" in err and "tier" in err and "tokens/s" in err, err)
    need(dsv4("run", "-m", tiny(), "-p", "Hi", "-n", 4, "-q")[1] == "", "-q is not quiet")


@test
def help_lists_commands_and_flags():
    text = dsv4("help")[0].decode()
    need(all(f"dsv4 {c} " in text for c in ("run", "eval", "check", "version", "help")), text)
    need("--top-p" in dsv4("help", "run")[0].decode(), "run's help lacks --top-p")
    need("--decode-from" in dsv4("help", "eval")[0].decode(), "eval's help lacks --decode-from")
    need(dsv4("version")[0].startswith(b"dsv4 "), "version")


# === bad input ================================================================================


@test
def usage_errors_exit_2():
    for fragment, *args in (
            ("no command", "walk"), ("does not take --fast", "run", "-m", "x", "--fast"),
            ("needs -m", "run", "-p", "x"), ("needs one of", "run", "-m", "x"),
            ("needs one of", "run", "-m", "x", "-p", "a", "-f", "b"),
            ("needs DIR behind it", "run", "-m"),
            ("not a size", "run", "-m", "x", "-p", "a", "--ram", "12Q"),
            ("not a size", "run", "-m", "x", "-p", "a", "--ram", "-1G"),
            ("whole number", "run", "-m", "x", "-p", "a", "-n", "1.5"),
            ("whole number", "run", "-m", "x", "-p", "a", "-n", "0"),
            ("whole number", "run", "-m", "x", "-p", "a", "--seed", "-1"),
            ("number from", "run", "-m", "x", "-p", "a", "--top-p", "1.5"),
            ("number from", "run", "-m", "x", "-p", "a", "--temp", "nan"),
            ("does not take -p", "eval", "-m", "x", "-p", "a"),
            ("needs a directory", "check")):
        refuses(fragment, *args, code=2)


@test
def bad_files_exit_1():
    refuses("config.json", "check", os.path.join(TMP, "absent"))
    refuses("config.json", "check", HERE)
    refuses("absent.txt", "run", "-m", tiny(), "-f", os.path.join(TMP, "absent.txt"))
    refuses("is empty", "run", "-m", tiny(), "-f", write("empty", b""))
    refuses("directory", "run", "-m", tiny(), "-f", TMP)
    refuses("token id", "run", "-m", tiny(), "--ids", write("bad.txt", "1 2 x"))
    refuses("token id", "run", "-m", tiny(), "--ids", write("bad.txt", "1 -2"))
    refuses("token id", "run", "-m", tiny(), "--ids", write("bad.txt", b"1 2\0"))
    refuses("holds no ids", "eval", "-m", tiny(), "--ids", write("bad.txt", " \n"))
    refuses("outside of the vocabulary", "eval", "-m", tiny(), "--ids", ids_file([1, 512]))
    refuses("outside of the vocabulary", "run", "-m", tiny(), "--ids", ids_file([1, 512]))


@test
def budgets_that_cannot_work_are_refused_with_numbers():
    refuses("too small: at least", "run", "-m", tiny(), "-p", "x", "--ram", "3M")
    refuses("more than the", "run", "-m", tiny(), "-p", "x", "--ram", "900T")
    refuses("context", "run", "-m", tiny(), "-p", "some words", "--ctx", 5)
    refuses("context", "eval", "-m", tiny(), "--ids", ids_file([1] * 50), "--ctx", 40)
    refuses("context", "eval", "-m", tiny(), "--ids", ids_file([1] * 1100))


@test
def other_architectures_are_refused_by_name():
    for name in ("deepseek_v41", "deepseek_v3", "llama"):
        path = os.path.join(TMP, "other")
        shutil.copytree(tiny(), path)
        config = json.load(open(os.path.join(path, "config.json")))
        config["model_type"] = name
        json.dump(config, open(os.path.join(path, "config.json"), "w"))
        refuses(name, "check", path)
        refuses(name, "run", "-m", path, "-p", "x")
        shutil.rmtree(path)


@test
def damaged_checkpoints_are_named():
    path = os.path.join(TMP, "damaged")
    shutil.copytree(tiny(), path)
    shards = sorted(f for f in os.listdir(path) if f.startswith("model-"))
    victim = os.path.join(path, shards[1])
    size = os.path.getsize(victim)
    os.truncate(victim, size - 1)
    refuses(shards[1], "check", path)
    os.truncate(victim, size)                          # whole again, its last byte zero
    dsv4("check", path, "-q")
    os.remove(victim)
    refuses(shards[1], "check", path)
    shutil.rmtree(path)


@test
def failures_leave_no_partial_files():
    out = os.path.join(TMP, "never.npy")
    refuses("outside of the vocabulary", "eval", "-m", tiny(), "--ids", ids_file([1, 999]),
            "--logits", out)
    refuses("No such file", "eval", "-m", tiny(), "--ids", ids_file([1, 2]), "--logits",
            os.path.join(TMP, "no", "dir.npy"))
    refuses("No such file", "run", "-m", tiny(), "--ids", ids_file([1, 2]), "--stats",
            os.path.join(TMP, "no", "stats.json"), "-n", 1)
    need(not os.path.exists(out) and not os.path.exists(out + ".part"), "a partial file is left")


@test
def interrupt_exits_130_and_cleans_up():
    out = os.path.join(TMP, "cut.npy")
    args = [DSV4, "eval", "-m", tiny(), "--ids", ids_file([7] * 1000), "--logits", out,
            "--decode-from", "0", "-t", "1", "-q"]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(500):
        if os.path.exists(out + ".part"):
            break
        time.sleep(0.01)
    time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    stdout, err = p.communicate(timeout=60)
    need(p.returncode == 130, f"exit {p.returncode}: {err!r}")
    need(err == b"dsv4: interrupted\n" and stdout == b"", f"{err!r} {stdout!r}")
    need(not os.path.exists(out) and not os.path.exists(out + ".part"), "a partial file is left")


@test
def closed_stdout_is_an_error_not_a_death():
    read_end, write_end = os.pipe()
    os.close(read_end)
    p = subprocess.run([DSV4, "run", "-m", tiny(), "-p", "x", "-n", "4", "-q"], stdout=write_end,
                       stderr=subprocess.PIPE, timeout=60)
    os.close(write_end)
    need(p.returncode == 1 and b"stdout" in p.stderr, f"{p.returncode} {p.stderr!r}")
    with open("/dev/full", "w") as full:
        p = subprocess.run([DSV4, "version"], stdout=full, stderr=subprocess.PIPE)
    need(p.returncode == 1 and b"stdout" in p.stderr, f"{p.returncode} {p.stderr!r}")


def main():
    global TMP
    failed = 0
    with tempfile.TemporaryDirectory(prefix="dsv4-cli-") as TMP:
        for fn in TESTS:
            try:
                figure = fn()
                print(f"ok   cli: {fn.__name__}" + (f"  {figure}" if figure else ""), flush=True)
            except Exception as e:
                failed += 1
                print(f"FAIL cli: {fn.__name__}: {type(e).__name__}: {e}", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
