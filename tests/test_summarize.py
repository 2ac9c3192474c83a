"""dsv4 summarize: documents of every kind in, counters and structure out; what the model says of
them is not looked at.

usage: test_summarize.py DSV4 MKMODEL
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

from harness import DSV4, TMP, dsv4, mkmodel, need, refuses, run, test, words, write

SEGMENT = 4096
QUESTIONS = [f"What does the document say about number {i}?" for i in range(10)]


def tiny():
    return mkmodel("tiny", "tiny", "--experts", 32)


def long():
    """Long contexts, and layers of every kind."""
    return mkmodel("1m", "1m", "--experts", 32, "--layers", 4)


def summarize(*args, model=None, stdin=b"", code=0, env=None):
    """stdout, stderr and what --stats says; `--jsonl` lines as objects."""
    stats = os.path.join(TMP, "stats.json")
    p = subprocess.run([DSV4, "summarize", "-m", model or tiny(), "--temp", "0", "-n", "6",
                        "--stats", stats, *map(str, args)], input=stdin, capture_output=True,
                       timeout=600, env=env)
    err = p.stderr.decode()
    need(p.returncode == code, f"{args}: exit {p.returncode}, not {code}: {err[-600:]}")
    out = p.stdout.decode()
    if "--jsonl" in args:
        out = [json.loads(line) for line in out.splitlines()]
    return out, err, json.load(open(stats)) if code == 0 else None


def park(name):
    return ("--kv-dir", os.path.join(TMP, name))


def asked(questions):
    return [word for q in questions for word in ("--ask", q)]


@test
def a_plan_comes_first_then_the_summary():
    path = write("plan.txt", words(100))
    out, err, s = summarize(path, *park("a"))
    need(out.strip(), "no summary")
    table = r"document +tokens +parts +spans +disk GB +about s\n\S*plan.txt +\d+ +1 +1 "
    need(re.search(table, err), f"no table of what it takes: {err}")
    need("predicted" in err and err.index("plan:") < err.index("document "), err)
    again, err, s2 = summarize(path, *park("a"), "--seed", 7)
    need(again == out, "the same bytes give another summary")
    need(re.search(r"reused \d+ of \d+ tokens", err), f"it was read again: {err}")
    need(s2["tokens"]["prefill"] < s["tokens"]["prefill"] / 2, "it was read again")
    plain, _, _ = summarize(path, "--no-cache")
    need(plain == out, "parked context changes the summary")


@test
def ten_questions_take_one_prefill():
    path = write("ten.txt", words(1500))
    flags = ("--jsonl", "-q", *asked(QUESTIONS))
    out, _, s = summarize(path, *flags, *park("ten"), model=long())
    need(len(out) == 1 and len(out[0]["answers"]) == 10, "not ten answers on one line")
    need([a["question"] for a in out[0]["answers"]] == QUESTIONS, "other questions")
    n, prefill = out[0]["tokens"], s["tokens"]["prefill"]
    need(n > SEGMENT and n < prefill < n + 10 * 250, f"{prefill} tokens read for {n} and questions")
    need(s["tokens"]["reused"] > 9 * n, "questions do not begin at the document's end")
    need(out[0]["reused"] == 0, "a new document was reused")
    again, _, s = summarize(path, *flags, *park("ten"), model=long())
    need(again[0]["answers"] == out[0]["answers"], "other answers")
    need(again[0]["reused"] >= n and s["tokens"]["prefill"] < 10 * 250, "it was read again")
    fresh, _, s = summarize(path, *flags, "--no-cache", model=long())
    need(fresh[0]["answers"] == out[0]["answers"], "parked context changes answers")
    need(s["tokens"]["prefill"] > 10 * n, "without parked context each question reads it all")
    return f"{prefill:,} tokens read for a document of {n:,}"


def parked_tokens(path):
    """How many tokens' KV a file holds (dsv4.h, park_info)."""
    with open(path, "rb") as f:
        f.seek(320)
        return int.from_bytes(f.read(4), "little")


@test
def a_damaged_tail_is_read_again():
    path, folder = write("tail.txt", words(1500)), os.path.join(TMP, "tail")
    flags = ("--jsonl", "-q", *asked(QUESTIONS[:2]), "--kv-dir", folder)
    want, _, _ = summarize(path, *flags, model=long())
    files = [os.path.join(folder, name) for name in os.listdir(folder)]
    tails = [f for f in files if parked_tokens(f) < SEGMENT]
    need(len(tails) == 1 and len(files) > 1, f"{len(tails)} tails among {len(files)} files")
    with open(tails[0], "r+b") as f:
        f.seek(-100, os.SEEK_END)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 4]))
    got, _, s = summarize(path, *flags, model=long())
    need(got[0]["answers"] == want[0]["answers"], "other answers")
    need(got[0]["reused"] == SEGMENT, f"{got[0]['reused']} tokens reused")
    again, _, _ = summarize(path, *flags, model=long())
    need(again[0]["reused"] >= got[0]["tokens"], "the tail was not parked anew")


@test
def special_tokens_in_a_document_are_text():
    added = json.load(open(os.path.join(tiny(), "tokenizer.json")))["added_tokens"]
    path = write("special.txt", "".join(t["content"] + " " for t in added) * 4)
    extra = []
    for name in (path, write("common.txt", words(40))):
        out, _, s = summarize(name, "-q", "--jsonl", "--no-cache")
        extra.append(s["tokens"]["prefill"] - out[0]["tokens"])
        if name == path:                                 # as text each takes several
            need(out[0]["tokens"] > 3 * 4 * len(added), f"{out[0]['tokens']} tokens")
    need(abs(extra[0] - extra[1]) < 8, f"the prompt adds {extra}: some were taken for special")


@test
def longer_than_the_context_it_is_cut_and_that_is_said():
    path = write("cut.txt", words(1500))
    out, err, s = summarize(path, "--jsonl", "--ctx", 900, *park("cut"))
    need(re.search(r"tokens are more than a context of 900 holds .* read in \d+ parts", err), err)
    n = out[0]["parts"]
    need(n > 2 and s["passes"] > n, f"{n} parts, {s['passes']} passes")
    out, _, _ = summarize(path, "--jsonl", "-q", "--ctx", 900, *park("cut"), *asked(QUESTIONS[:2]))
    need(len(out[0]["answers"]) == 2 and out[0]["parts"] >= n - 1, "questions on parts")
    refuses("too small for a document", "summarize", "-m", tiny(), path, "--ctx", 300)


@test
def files_are_parts_of_one_document_or_each_its_own():
    a, b = write("a.txt", words(40)), write("b.md", "# Title\n\n" + words(40, 2))
    one, _, _ = summarize(a, b, "--jsonl", "-q")
    need(len(one) == 1 and one[0]["source"] == [a, b], f"{one}")
    two, _, _ = summarize(a, b, "--jsonl", "-q", "--each")
    need([o["source"] for o in two] == [a, b], f"{two}")
    need(one[0]["tokens"] == two[0]["tokens"] + two[1]["tokens"], "tokens of the parts")
    need(set(two[0]) == {"source", "tokens", "parts", "summary", "seconds", "reused"}, f"{two[0]}")
    text, _, _ = summarize(a, b, "-q", "--each")
    need(f"==> {a} <==\n" in text and f"\n==> {b} <==\n" in text, text)
    piped, _, _ = summarize("-", "--jsonl", "-q", stdin=words(40).encode())
    need(piped[0]["source"] == "-" and piped[0]["summary"], f"{piped}")


@test
def forms_of_output():
    path = write("form.txt", words(40))
    json.loads(summarize(path, "-q", "--format", "json")[0])["summary"]["summary"]
    both = json.loads(summarize(path, "-q", "--format", "json", *asked(QUESTIONS[:2]))[0])
    need(len(both["answers"]) == 2, f"{both}")
    text, _, _ = summarize(path, "-q", "--format", "markdown", *asked(QUESTIONS[:2]))
    need(text.startswith(f"## {QUESTIONS[0]}\n\n") and f"\n\n## {QUESTIONS[1]}\n\n" in text, text)
    out = os.path.join(TMP, "summary.txt")
    nothing, _, _ = summarize(path, "-q", "--out", out, "--length", 50, "--focus", "ice")
    need(nothing == "" and open(out).read().strip(), "--out")
    for fragment, *flags in (("not short", "--length", "tiny"), ("not text", "--format", "pdf"),
                             ("not both", "--think", "--no-think"), ("1 to", "--ask", "")):
        refuses(fragment, "summarize", "-m", tiny(), path, *flags, code=2)
    refuses("needs a file", "summarize", "-m", tiny(), code=2)


@test
def bad_files_are_named_and_the_others_done():
    good = write("good.txt", words(40))
    huge = os.path.join(TMP, "huge.txt")
    with open(huge, "wb") as f:
        f.truncate(1 << 30)
    bad = {huge: "over 64 MB", write("empty.txt", ""): "it is empty", TMP: "a directory",
           write("nul.txt", b"a\0b"): "byte 1 is a NUL", os.path.join(TMP, "none"): "No such file",
           write("white.txt", " \n \n"): "no text", write("bad.pdf", b"%PDF-1.4 none"): "pdftotext"}
    began = time.monotonic()
    out, err, _ = summarize(*bad, good, "--each", "--jsonl", "-q", code=1)
    need(time.monotonic() - began < 20, "it took too long to refuse")
    for o, (path, why) in zip(out, bad.items()):
        need(o["source"] == path and why in o["error"] and len(o) == 2, f"{o} lacks {why!r}")
        need(sum(path in line and why in line for line in err.splitlines()) == 1, err)
    need(out[-1]["source"] == good and out[-1]["summary"], f"{out[-1]}")
    need(f"{len(bad)} of {len(bad) + 1} documents" in err.splitlines()[-1], err)
    kept = os.path.join(TMP, "kept.jsonl")
    summarize(good, huge, "--each", "--jsonl", "-q", "--out", kept, code=1)
    need(len(open(kept).readlines()) == 2, "the file of those that were done")
    refuses("is empty", "summarize", "-m", tiny(), good, os.path.join(TMP, "empty.txt"))


def pdf(text):
    """A PDF of one page."""
    page = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
               "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
               " /Resources << /Font << /F1 5 0 R >> >> >>",
               f"<< /Length {len(page)} >>\nstream\n{page}\nendstream",
               "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    out, at = "%PDF-1.4\n", []
    for i, o in enumerate(objects):
        at.append(len(out))
        out += f"{i + 1} 0 obj\n{o}\nendobj\n"
    rows = "".join(f"{x:010} 00000 n \n" for x in at)
    return (f"{out}xref\n0 6\n0000000000 65535 f \n{rows}trailer\n<< /Size 6 /Root 1 0 R >>\n"
            f"startxref\n{len(out)}\n%%EOF\n")


@test
def a_pdf_is_read_by_pdftotext():
    os.mkdir(os.path.join(TMP, "of-text"))
    text = "Glaciers are rivers of ice"
    path = write("p.pdf", pdf(text))
    got, _, _ = summarize(path, "--jsonl", "-q")
    want, _, _ = summarize(write("of-text/p.pdf", text + "\n\n\n"), "--jsonl", "-q")
    need(got[0]["tokens"] == want[0]["tokens"], f"{got} is not {want}")
    _, err, _ = summarize(path, "-q", code=1, env={**os.environ, "PATH": "/nowhere"})
    need("install pdftotext (Debian: poppler-utils)" in err, err)
    _, err, _ = summarize(write("scan.pdf", pdf("")), "-q", code=1)
    need("OCR" in err, err)


@test
def interrupted_it_goes_on_from_what_is_parked():
    path = write("long.txt", words(14000))
    flags = ("--ram", "96M", "--ask", QUESTIONS[0], "-n", 6, "--temp", 0)
    want, _, s = summarize(path, *flags, "--no-cache", model=long())
    folder = os.path.join(TMP, "stop")
    command = [DSV4, "summarize", "-m", long(), path, *map(str, flags), "--kv-dir", folder]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while p.poll() is None and not (os.path.isdir(folder) and
                                    any(n.endswith(".seg") for n in os.listdir(folder))):
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate()
    err = err.decode()
    need(p.returncode == 130 and not out.strip().endswith(want.encode()), f"{p.returncode}: {err}")
    found = re.search(r"interrupted; ([\d,]+) of ([\d,]+) tokens are parked, and the same command "
                      r"goes on", err)
    need(found, err)
    n = int(found.group(1).replace(",", ""))
    need(n >= SEGMENT, f"only {n} tokens parked")
    got, err, again = summarize(path, *flags, "--kv-dir", folder, model=long())
    need(got == want, "it goes on to something else")
    need(f"reused {n:,} of" in err and again["tokens"]["reused"] == n, err)
    return f"{n:,} of {found.group(2)} tokens"


@test
def many_documents_by_gnu_parallel():
    files = [write(f"many-{i}.txt", words(30, i)) for i in range(4)]
    out = subprocess.run(["parallel", "-j", "2", "-k", DSV4, "summarize", "-q", "--jsonl", "-m",
                          tiny(), "--temp", "0", "-n", "6", "--ram", "256M", "-t", "1", "{}", ":::",
                          *files], capture_output=True, timeout=300)
    lines = [json.loads(line) for line in out.stdout.splitlines()]
    need(out.returncode == 0 and [o["source"] for o in lines] == files, f"{out}")


if __name__ == "__main__":
    sys.exit(run("summarize"))
