"""What a person sees of dsv4: answers, errors, exit codes, budgets, files left behind.

usage: test_cli.py DSV4 MKMODEL.  Prints "ok   cli: NAME" or "FAIL cli: NAME: why" a test.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np

import ref
from harness import (DSV4, HERE, MKMODEL, TMP, dsv4, eval_logits, ids_file, mkmodel, need, refuses,
                     run, test, write)

TINY_A = os.path.join(HERE, "goldens", "tiny-a")
SHADOW = 2**30 if "/san/" in DSV4 else 0               # ASan keeps its own books in memory
COMMANDS = ("run", "chat", "eval", "prompt", "tokenize", "plan", "check", "bench", "sessions",
            "version", "help")
VECTORS = json.load(open(os.path.join(HERE, "..", "..", "shared", "chat", "vectors.json")))


def tiny():
    return mkmodel("tiny", "tiny", "--mtp", "--seed", 3)


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
    flags = ["run", "-m", tiny(), "-f", text, "-n", 24, "-q", "--no-think"]
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
    # embed, head and layers do not fit: read layer by layer, head in blocks
    out, err = dsv4("run", "-m", path, "-f", text, "-n", 2, "--ram", "3.2G", "--print-ids")
    need("read layer by layer" in err, err)
    need(out.split() == answers[0].split()[:2], f"{out} is not the start of {answers[0]}")
    # six experts a token: their sum has an order, in prefill and in decode the same
    whole, _ = eval_logits(path, [5, 6, 7, 8], "--ram", "8G")
    steps, _ = eval_logits(path, [5, 6, 7, 8], "--ram", "8G", "--decode-from", 1)
    need(whole.tobytes() == steps.tobytes(), "decode gives other bits than prefill")
    shutil.rmtree(path)
    need(answers[0] == answers[1], "--ram changes the answer")


# === what it says =============================================================================


@test
def check_describes_models():
    out, _ = dsv4("check", tiny())
    text = out.decode()
    for part in (r"\n +layers +6\n +window +2\n +csa +2\n +hca +2\n", r"\n +experts_a_layer +8\n",
                 r"\n +mtp +yes\n", "every tensor"):
        need(re.search(part, text), f"{part!r} is not in {text!r}")
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
    table = dsv4("plan", "-m", path, "--ram", "12G", "--ctx", 1000)[0].decode()
    need(" of 6880 experts\n" in table, table)
    for part in (r"\n +layers +43\n +window +2\n +csa +21\n +hca +20\n +hash_layers +3\n",
                 r"_layer +160\n", r"\n +mtp +no\n", r"\n +shards +48\n +tensors +45,821\n",
                 "every tensor"):
        need(re.search(part, text), f"{part!r} is not in {text!r}")
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
    rates = s["experts"]["hit_rate_by_layer"]
    need(len(rates) == 6 and all(0 <= r <= 1 for r in rates), str(rates))
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
    need(all(f"dsv4 {c} " in text for c in COMMANDS), text)
    for c in COMMANDS:
        need(dsv4("help", c)[0].decode().startswith(f"dsv4 {c} "), f"help {c}")
    need("--top-p" in dsv4("help", "run")[0].decode(), "run's help lacks --top-p")
    need("--decode-from" in dsv4("help", "eval")[0].decode(), "eval's help lacks --decode-from")
    need(dsv4("version")[0].startswith(b"dsv4 "), "version")


# === bad input ================================================================================


@test
def progress_without_a_terminal_is_plain_lines():
    flags = ["eval", "-m", tiny(), "--ids", ids_file([7] * 1000), "-t", 1, "--chunk", 1]
    lines = [s for s in dsv4(*flags)[1].splitlines() if s.startswith("scoring ")]
    need(lines and all("tokens/s" in s and "GB/s" in s and s.endswith("left") and "\r" not in s
                       and "\033" not in s for s in lines), str(lines))
    need(not dsv4(*flags, "-q")[1], "-q is not quiet")


@test
def usage_errors_exit_2():
    for fragment, *args in (
            ("no command", "walk"), ("perhaps chat", "chta"),
            ("perhaps --temp", "run", "--tmep", 1),
            ("does not take --fast", "run", "-m", "x", "--fast"),
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
            ("does not take -p", "eval", "-m", "x", "-p", "a"), ("needs -m", "chat"),
            ("needs -m", "plan"), ("needs -m", "tokenize"), ("needs -m", "prompt", "--ids"),
            ("not low, high or max", "chat", "-m", "x", "--effort", "hi"),
            ("not v4 or 0731", "prompt", "--generation", "v5"),
            ("1 to 255 bytes", "run", "-m", "x", "-p", "a", "--stop", ""),
            ("at most 8 times", "run", "-m", "x", "-p", "a", *["--stop", "s"] * 9),
            ("needs a directory", "check")):
        refuses(fragment, *args, code=2)


@test
def bad_files_exit_1():
    refuses("absent: No such file", "check", os.path.join(TMP, "absent"))
    refuses("is no model: it has no config.json", "check", HERE)
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
def dense_weights_stream_where_they_do_not_fit():
    """Between the least that works and what holds them: the same answer, and it says so."""
    flags = ["run", "-m", tiny(), "-p", "Hello there", "-n", 12, "--temp", 0, "--print-ids"]
    whole, err = dsv4(*flags, "--ram", "200M")
    need("layer by layer" not in err, err)
    least = int(re.search(r"at least (\d+)M", dsv4(*flags, "--ram", "1M", code=1))[1])
    for ram in (f"{least + 0.5}M", f"{least + 1}M"):     # the program's own size varies a little
        stats = os.path.join(TMP, "stats.json")
        out, err = dsv4(*flags, "--ram", ram, "--stats", stats)
        s = json.load(open(stats))
        need("read layer by layer" in err and s["plan"]["dense_streamed"] is True, err)
        need(out == whole, f"--ram {ram} changes the answer")
        need(s["bytes_read"]["dense_streamed"] > 10 * s["bytes_read"]["dense_from_disk"], str(s))


@test
def heat_is_kept_from_run_to_run_and_changes_nothing():
    path = os.path.join(TMP, "hot")
    shutil.copytree(tiny(), path)
    outs, misses = [], []
    stats = os.path.join(TMP, "stats.json")
    for _ in range(3):
        outs.append(dsv4("run", "-m", path, "-p", "Hello", "-n", 30, "--temp", 0, "--print-ids",
                         "--stats", stats)[0])
        misses.append(json.load(open(stats))["experts"]["disk_reads"])
    need(outs[0] == outs[1] == outs[2], "heat changes the answer")
    need(misses[1] < misses[0] and misses[2] < misses[0], f"misses {misses}")
    heat = [f for f in os.listdir(os.environ["XDG_CACHE_HOME"] + "/dsv4") if f.startswith("heat")]
    for name in heat:                                  # damaged ones are not used
        write(os.path.join(os.environ["XDG_CACHE_HOME"], "dsv4", name), b'{"groups": 3, "heat"')
    out = dsv4("run", "-m", path, "-p", "Hello", "-n", 30, "--temp", 0, "--print-ids", "--stats",
               stats)[0]
    need(out == outs[0] and json.load(open(stats))["experts"]["disk_reads"] == misses[0], "damaged")
    shutil.rmtree(path)


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
    for sig in (signal.SIGINT, signal.SIGTERM):
        interrupt_by(sig)


def interrupt_by(sig):
    out = os.path.join(TMP, "cut.npy")
    args = [DSV4, "eval", "-m", tiny(), "--ids", ids_file([7] * 1000), "--logits", out,
            "--decode-from", "0", "-t", "1", "-q"]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(500):
        if os.path.exists(out + ".part"):
            break
        time.sleep(0.01)
    time.sleep(0.05)
    p.send_signal(sig)
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


# === prompts, tokens, sampling, chat ==========================================================


def request_of(vector):
    """A vector's request in the form that `prompt` takes, and its generation."""
    r = dict(vector["request"])
    gen = r.pop("generation", "v4")
    if "thinking" in r:
        r["thinking"] = {"type": "enabled" if r["thinking"] else "disabled"}
    if "effort" in r:
        r["reasoning_effort"] = r.pop("effort")
    return json.dumps(r).encode(), gen


@test
def prompt_writes_every_vector():
    for i, v in enumerate(VECTORS["encode"]):
        request, gen = request_of(v)
        out = dsv4("prompt", "--generation", gen, stdin=request)[0]
        need(out == v["prompt"].encode(), f"vector {i}: {out!r}")


@test
def prompt_ids_are_those_of_its_text():
    request, _ = request_of(VECTORS["encode"][9])
    text = dsv4("prompt", stdin=request)[0]
    ids = dsv4("prompt", "-m", tiny(), "--ids", stdin=request)[0]
    need(ids == dsv4("tokenize", "-m", tiny(), stdin=text)[0], "ids differ from the text's")
    inside = json.dumps({"messages": [{"role": "user", "content": "a</think>b"}]}).encode()
    text = dsv4("prompt", stdin=inside)[0]
    ids = dsv4("prompt", "-m", tiny(), "--ids", stdin=inside)[0]
    need(ids != dsv4("tokenize", "-m", tiny(), stdin=text)[0], "a message closes the thoughts")


@test
def prompt_takes_the_generation_of_the_model():
    path = os.path.join(TMP, "gen")
    shutil.copytree(tiny(), path)
    os.mkdir(os.path.join(path, "encoding"))
    with open(os.path.join(path, "encoding", "encoding_dsv4.py"), "w") as f:
        f.write("REASONING_EFFORT_PROMPTS = {}\n")
    v = VECTORS["encode"][6]
    request, gen = request_of(v)
    need(gen == "0731", "the vector")
    need(dsv4("prompt", "-m", path, stdin=request)[0] == v["prompt"].encode(), "0731 not seen")
    need(dsv4("prompt", "-m", tiny(), stdin=request)[0] != v["prompt"].encode(), "not v4")
    shutil.rmtree(path)


@test
def prompt_names_what_is_wrong():
    for fragment, request in (("not JSON: line 2", b'{"messages":\n[}'), ("messages", b"{}"),
                              ("messages[0].role", b'{"messages": [{"role": "king"}]}'),
                              ("is empty", b"")):
        refuses(fragment, "prompt", stdin=request)


@test
def tokenize_and_back_gives_the_same_bytes():
    text = "Zwölf Boxkämpfer 🙂👨\u200d👩\u200d👧 \r\n\t  x<\uff5cUser\uff5c>y\n".encode()
    ids = dsv4("tokenize", "-m", tiny(), "-f", write("t.txt", text))[0]
    need(all(w.isdigit() for w in ids.split()) and ids.endswith(b"\n"), repr(ids))
    need(dsv4("tokenize", "-m", tiny(), "--decode", stdin=ids)[0] == text, "not the same bytes")
    refuses("outside of the vocabulary", "tokenize", "-m", tiny(), "--decode", stdin=b"999999")


@test
def sampling_defaults_come_from_the_model():
    path = os.path.join(TMP, "sampled")
    shutil.copytree(tiny(), path)
    flags = ["-p", "Hello", "-n", 16, "-q", "--print-ids", "--seed", 5]

    def answer(generation_config, *more):
        with open(os.path.join(path, "generation_config.json"), "w") as f:
            json.dump(generation_config, f)
        return dsv4("run", "-m", path, *flags, *more)[0]

    plain = dsv4("run", "-m", tiny(), *flags)[0]
    greedy = dsv4("run", "-m", tiny(), *flags, "--temp", 0)[0]
    need(plain != greedy, "the seed gives the greedy answer: choose another")
    need(answer({}) == plain and answer({"temperature": 1, "top_p": 1}) == plain, "plain")
    need(answer({"do_sample": False}) == greedy, "do_sample is not heard")
    need(answer({"top_k": 1}) == greedy and answer({}, "--top-k", 1) == greedy, "top-k 1")
    need(answer({"top_k": 1}, "--top-k", 0) == plain, "a flag does not win")
    need(answer({}, "--min-p", 1) == greedy, "min-p 1")
    need(answer({"repetition_penalty": 50}) != plain, "the penalty changes nothing")
    ids = answer({}, "--repetition-penalty", 100, "--temp", 0).split()
    need(len(set(ids)) == len(ids), "a penalty of 100 repeats tokens")
    with open(os.path.join(path, "generation_config.json"), "w") as f:
        f.write('{"temperature": "hot"}')
    refuses("generation_config.json", "run", "-m", path, *flags)
    shutil.rmtree(path)


@test
def stop_strings_cut_the_answer():
    flags = ["run", "-m", tiny(), "-p", "Hello", "-n", 40, "--raw", "-q", "--seed", 2]
    whole = dsv4(*flags)[0].decode().rstrip("\n")
    for word in (whole[20:24], whole[-3:], whole[:2]):
        out = dsv4(*flags, "--stop", "never there", "--stop", word)[0].decode()
        need(out == whole[:whole.index(word)] + "\n", f"{word!r}: {out!r}")
    for never in ("\U0001f980", whole[-3:] + "?"):      # the second is held up to the end
        need(dsv4(*flags, "--stop", never)[0].decode() == whole + "\n", f"cut by {never!r}")


@test
def loop_guard_ends_a_generation_in_circles():
    """A penalty below 1 rewards what is there already: the likeliest token comes for ever."""
    flags = ["run", "-m", TINY_A, "--ids", ids_file([100]), "-n", 1000, "--temp", 0,
             "--print-ids", "--repetition-penalty", 0.01]
    free, err = dsv4(*flags, "--no-loop-guard")
    need("circles" not in err and len(free.split()) == 1000, f"{len(free.split())} ids")
    cut, err = dsv4(*flags)
    need("circles" in err and free.startswith(cut[:-1]), err)
    need(512 < len(cut.split()) < 1000, f"{len(cut.split())} ids")


@test
def thoughts_stay_out_of_stdout():
    out, err = dsv4("run", "-m", tiny(), "-p", "Hi", "-n", 6, "--temp", 0)
    need(out == b"\n" and "before the answer began" in err, f"{out!r} {err!r}")


@test
def chat_in_a_pipe_answers_as_run_does():
    """Each line is a turn; its answer is that of run on the conversation so far."""
    flags = ["-m", tiny(), "-n", 6, "-q", "--temp", 0]
    lines = ["Hello there.", "And what now?", "Zum Schluß?"]
    for think in ([], ["--no-think"]):
        out = dsv4("chat", *flags, *think, "--system", "Be brief.",
                   stdin="\n".join(lines).encode())[0].decode()
        messages, want = [{"role": "system", "content": "Be brief."}], ""
        for line in lines:
            messages.append({"role": "user", "content": line})
            request = {"messages": messages, "thinking": not think}
            ids = dsv4("prompt", "-m", tiny(), "--ids", stdin=json.dumps(request).encode())[0]
            got = "" if not think else dsv4("run", *flags, "--ids", write("p.txt", ids))[0].decode()
            want += got or "\n"
            messages.append({"role": "assistant", "content": got.rstrip("\n")})
        need(out == want, f"{think}: {out!r} is not {want!r}")


@test
def chat_in_a_pipe_goes_on_behind_errors():
    out, err = b"", ""
    p = subprocess.run([DSV4, "chat", "-m", tiny(), "-n", "3", "-q", "--no-think"],
                       input=b"/file /no/file\n/file ~/none\n\nHello\n/walk\n", capture_output=True,
                       timeout=60, env={**os.environ, "HOME": "/at/home"})
    out, err = p.stdout, p.stderr.decode()
    need(p.returncode == 1 and out.count(b"\n") == 1, f"{p.returncode} {out!r}")
    need("/no/file: No such file" in err and "/at/home/none: No such" in err and
         "no command /walk" in err and
         "not every line" in err, err)


@test
def chat_says_when_the_context_is_full():
    p = subprocess.run([DSV4, "chat", "-m", tiny(), "-n", "3", "-q", "--ctx", "40", "--no-think"],
                       input=b"Hi\n" + b"words " * 40 + b"\n/clear\nHi\n", capture_output=True,
                       timeout=60)
    need(p.returncode == 1 and p.stdout.count(b"\n") == 2, f"{p.stdout!r} {p.stderr!r}")
    need(b"the context holds 40" in p.stderr and b"/clear" in p.stderr, f"{p.stderr!r}")


# === plan, check, what make install writes ====================================================


@test
def plan_adds_up_and_names_what_binds():
    text, _ = dsv4("plan", "-m", tiny(), "--ram", "64M", "--ctx", 500)
    p = json.loads(dsv4("plan", "-m", tiny(), "--ram", "64M", "--ctx", 500, "--json")[0])
    names = [f"{k}.{inner}" if isinstance(v, dict) else k
             for k, v in p.items() for inner in (v if isinstance(v, dict) else [k])]
    shown = [line.split()[0] for line in text.decode().splitlines()]
    need(shown[7:] == names[names.index("disk.fs"):], f"{shown}\n{names}")
    for part in (r"\nplan: --ram 64.0M holds\n", r"\n  KV +0.4M  500 tokens of context",
                 r"\n  expert slots +2.8M  48 of 48 experts\n",
                 r"\n  prefill.binds +(the disk|the processor|memory)\n"):
        need(re.search(part, text.decode()), f"{part!r} is not in {text!r}")
    need(p["program"] + p["dense"] + p["kv"] + p["buffers"] + p["slots"] <= p["ram"] == 64 << 20,
         str(p))
    need(p["slots"] == p["n_slots"] * p["slot_bytes"] and p["ctx"] == 500, str(p))
    c = json.load(open(os.path.join(tiny(), "config.json")))
    entry, key = 64 + 2 * 64 + 8, 64 // 2 + 4           # the formats' sizes, padding included
    per_token = sum((entry + key) / 4 if r == 4 else entry / r
                    for r in c["compress_ratios"][:c["num_hidden_layers"]] if r)
    need(p["kv_per_token"] == per_token and p["kv"] > 500 * per_token, f"{p['kv_per_token']}")
    for phase in ("decode", "prefill"):
        b = p[phase]
        longest = max(b["memory_s"], b["processor_s"], b["disk_s"])
        need(abs(b["tokens"] / longest / b["tokens_per_s"] - 1) < 1e-6, str(b))
        need(b["seconds"] == longest, str(b))
        binds = {"the disk": "disk_s", "the processor": "processor_s", "memory": "memory_s"}
        need(b[binds[b["binds"]]] == longest, str(b))
    need(all(v > 0 for v in p["measured"].values()), str(p["measured"]))
    refuses("too small: at least", "plan", "-m", tiny(), "--ram", "3M")


@test
def bench_compares_with_the_machine_and_traces():
    trace = os.path.join(TMP, "trace.txt")
    text, _ = dsv4("bench", "-m", tiny(), "--tokens", 20, "--trace", trace)
    for part in ("reads.ratio", "decode.tokens_s", "decode.bound", "decode.ratio"):
        need(part in text.decode(), text)
    lines = [list(map(int, s.split())) for s in open(trace)]
    need(len(lines) == 20 * 6, f"{len(lines)} lines")
    for i, (pos, layer, *experts) in enumerate(lines):
        need((pos, layer) == (64 + i // 6, i % 6), f"line {i}: {lines[i]}")
        need(len(experts) == 2 and 0 <= experts[0] < experts[1] < 8, f"line {i}: {lines[i]}")


@test
def partial_downloads_are_named_shard_by_shard():
    path = os.path.join(TMP, "partial")
    shutil.copytree(tiny(), path)
    shards = sorted(f for f in os.listdir(path) if f.startswith("model-"))
    os.remove(os.path.join(path, shards[0]))
    os.truncate(os.path.join(path, shards[2]), os.path.getsize(os.path.join(path, shards[2])) // 2)
    for args in (("plan", "-m", path), ("check", path)):
        p = subprocess.run([DSV4, *args], capture_output=True, timeout=60)
        err = p.stderr.decode()
        need(p.returncode == 1 and "2 shards are missing or cut short" in err, err)
        need(f"{shards[0]}: missing" in err and f"{shards[2]}: " in err and shards[1] not in err,
             err)
    shutil.rmtree(path)


@test
def check_json_says_what_the_table_says():
    c = json.loads(dsv4("check", tiny(), "--json")[0])
    need((c["layers"], c["window"], c["csa"], c["hca"]) == (6, 2, 2, 2), str(c))
    need(c["experts_a_layer"] == 8 and c["experts_a_token"] == 2 and c["mtp"] is True, str(c))
    need(c["expert_bytes"] > 0 and c["dense_bytes"] > 0 and c["context"] == 1024, str(c))


@test
def check_hash_remembers_and_says_what_changed():
    path = os.path.join(TMP, "hashed")
    shutil.copytree(tiny(), path)
    shards = sorted(f for f in os.listdir(path) if f.startswith("model-"))

    def lines():
        p = subprocess.run([DSV4, "check", path, "--hash", "-q"], capture_output=True, timeout=60)
        said = [s for s in p.stdout.decode().splitlines() if s.startswith("model-")]
        need(len(said) == len(shards), f"{said} {p.stderr!r}")
        return p.returncode, said

    code, first = lines()
    need(code == 0 and all(s.endswith(" new") for s in first), str(first))
    code, again = lines()
    need(code == 0 and all("as on" in s for s in again), str(again))
    need([s.split()[1] for s in first] == [s.split()[1] for s in again], "hashes differ")
    need(all(len(s.split()[1]) == 32 for s in first), str(first))
    with open(os.path.join(path, shards[1]), "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x5a")
    code, now = lines()
    need(code == 1 and ["CHANGED" in s for s in now] == [s == shards[1] for s in shards], str(now))
    hashes = json.loads(dsv4("check", path, "--hash", "--json", "-q")[0])["hashes"]
    need(len(hashes) == len(shards) and "as on" in hashes[1], str(hashes))
    shutil.rmtree(path)


def help_flags(command):
    """The flags that help lists for a command."""
    return [s.split()[0] for s in dsv4("help", command)[0].decode().splitlines()
            if s.startswith("  -")]


@test
def manual_and_completions_say_what_help_says():
    made = {form: subprocess.run([os.path.join(HERE, "manual.sh"), form, DSV4], check=True,
                                 capture_output=True).stdout.decode()
            for form in ("man", "bash", "zsh")}
    for c in COMMANDS:
        for name in help_flags(c):
            need("\n.B " + name.replace("-", "\\-") in made["man"].split(f".SS {c}\n")[1], name)
            need(f"'*{name}[" in made["zsh"].split(f"\n{c})")[1].split(";;")[0], f"zsh: {c} {name}")
        script = made["bash"] + (f"COMP_WORDS=(dsv4 {c} -); COMP_CWORD=2; _dsv4; "
                                 "echo ${COMPREPLY[@]}")
        said = subprocess.run(["bash", "-c", script], capture_output=True).stdout.decode().split()
        need(said == (help_flags(c) if c != "help" else []), f"bash completes {c} - to {said}")
    script = made["bash"] + "COMP_WORDS=(dsv4 p); COMP_CWORD=1; _dsv4; echo ${COMPREPLY[@]}"
    said = subprocess.run(["bash", "-c", script], capture_output=True).stdout.decode().split()
    need(said == ["prompt", "plan"], str(said))
    subprocess.run(["zsh", "-n", write("_dsv4", made["zsh"])], check=True)
    subprocess.run(["mandoc", "-T", "lint", "-W", "error", write("dsv4.1", made["man"])],
                   check=True)


@test
def make_install_puts_everything_in_its_place():
    path = os.path.join(TMP, "install")
    san = ["SAN=1"] if "/san/" in DSV4 else []
    subprocess.run(["make", "-C", os.path.dirname(HERE), "install", f"DESTDIR={path}", *san],
                   check=True, capture_output=True)
    for name in ("bin/dsv4", "share/man/man1/dsv4.1", "share/bash-completion/completions/dsv4",
                 "share/zsh/site-functions/_dsv4"):
        need(os.path.getsize(os.path.join(path, "usr/local", name)) > 500, name)


if __name__ == "__main__":
    sys.exit(run("cli"))
