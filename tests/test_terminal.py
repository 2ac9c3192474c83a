"""dsv4 as a person at a terminal meets it: tmux types the keys and reads the screen.

usage: test_terminal.py DSV4 MKMODEL.  Prints "ok   terminal: NAME" or "FAIL terminal: NAME: why".
"""

import glob
import json
import os
import subprocess
import sys
import time

from harness import DSV4, TMP, mkmodel, need, run, test

TINY = mkmodel("tiny", "tiny", "--seed", "3")


def endless():
    """A model with room for a long answer, whose likeliest token is never EOS: its row of the head
    is zero, and so its logit."""
    model = mkmodel("endless", "1m", "--seed", "3")
    with open(os.path.join(model, "config.json")) as f:
        config = json.load(f)
    row = 2 * config["hidden_size"]                    # bytes: BF16
    for shard in glob.glob(os.path.join(model, "*.safetensors")):
        with open(shard, "r+b") as f:
            size = int.from_bytes(f.read(8), "little")
            head = json.loads(f.read(size)).get("head.weight")
            if head:
                f.seek(8 + size + head["data_offsets"][0] + row * config["eos_token_id"])
                f.write(bytes(row))
                return model
    raise AssertionError("no head.weight")


class Terminal:
    """One shell in one tmux window; a private server, so that nobody else's is touched."""

    def __init__(self, columns=100, rows=40, **env):
        self.socket = os.path.join(TMP, f"tmux-{time.monotonic_ns()}")
        home = os.path.join(TMP, "home")
        os.makedirs(home, exist_ok=True)
        clean = {k: v for k, v in os.environ.items() if k not in ("TMUX", "NO_COLOR")}
        clean.update(HOME=home, PS1="$ ", SHELL="/bin/sh", LC_ALL="C.UTF-8", ENV="", **env)
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows),
                  "-c", TMP, "/bin/sh", env=clean)
        self.tmux("set-option", "-g", "history-limit", "20000")
        self.n_commands = 0
        self.wait("$ ")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["tmux", "-S", self.socket, "kill-server"], capture_output=True)

    def tmux(self, *args, env=None, stdin=None):
        return subprocess.run(["tmux", "-S", self.socket, *args], check=True, env=env,
                              input=stdin, capture_output=True).stdout.decode()

    def type(self, text, enter=True):
        self.tmux("send-keys", "-l", text)
        if enter:
            self.key("Enter")

    def key(self, name):
        self.tmux("send-keys", name)

    def paste(self, text):
        self.tmux("load-buffer", "-", stdin=text.encode())
        self.tmux("paste-buffer", "-p")

    def screen(self, colours=False):
        return self.tmux("capture-pane", "-p", "-J", "-S", "-5000", *(["-e"] if colours else []))

    def wait(self, what, seconds=60, times=1):
        """Wait until `what` stands on the screen (so many times)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            text = self.screen()
            if text.count(what) >= times:
                return text
            time.sleep(0.05)
        raise AssertionError(f"{what!r} never came; the screen: {text.strip()[-1500:]!r}")

    def wait_behind(self, mark, what="", seconds=60):
        """Wait until `what`, or anything at all, stands behind the mark."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            text = self.screen()
            behind = text.partition(mark)[2]
            if (what or behind.strip()) and what in behind:
                return text
            time.sleep(0.05)
        raise AssertionError(f"{what!r} never came behind {mark!r}: {text.strip()[-1500:]!r}")

    def prompts(self, times):
        """Wait for so many lines that begin with chat's prompt."""
        self.wait("\n>", times=times)

    def command(self, line, seconds=60):
        """Run a shell command to its end; what it printed, and its exit status."""
        self.n_commands += 1
        mark = f"END{self.n_commands}"                 # split below: only echo joins it
        self.type(f"clear; {line}; echo {mark[:3]}''{mark[3:]}=$?.")
        text = self.wait(mark + "=", seconds)
        body, _, code = text.rpartition(mark + "=")
        return body, int(code.split(".")[0])

    def chat(self, *flags, model=TINY):
        self.type(" ".join(["clear;", DSV4, "chat", "-m", model, "--ram", "200M", *flags]))
        self.wait("Ctrl-D leaves")
        self.prompts(1)


@test
def first_run_explains_itself():
    with Terminal() as t:
        text, code = t.command(DSV4)
        need(code == 0, f"exit {code}")
        for name in ("run", "chat", "prompt", "tokenize", "plan", "check", "help COMMAND"):
            need(name in text, f"no {name}: {text}")
        text, code = t.command(f"{DSV4} help chat")
        need(code == 0 and "--system" in text, text)


@test
def wrong_things_get_one_line():
    with Terminal(columns=160) as t:
        for line, status, parts in (
                (f"{DSV4} chat -m /no/such/place", 1, ("/no/such/place",)),
                (f"{DSV4} chat -m /usr", 1, ("/usr", "config.json")),
                (f"{DSV4} chat -m {TINY} --sistem x", 2, ("perhaps --system",)),
                (f"{DSV4} caht -m {TINY}", 2, ("perhaps chat",)),
                (f"{DSV4} run -m {TINY} -f /no/file", 1, ("/no/file", "No such file"))):
            text, code = t.command(line)
            said = [s for s in text.splitlines() if s.startswith("dsv4: ")]
            need(code == status, f"{line}: exit {code}")
            need(len(said) == 1 and all(p in said[0] for p in parts), f"{line}: {text!r}")


@test
def chat_answers_remembers_and_leaves():
    with Terminal() as t:
        t.chat("--no-think", "-n", "5", "--temp", "0")
        t.type("Hello there")
        t.prompts(2)
        t.type("/stats")
        text = t.wait("context: ")
        need("tokens/s" in text, text)
        used = int(text.split("context: ")[1].split()[0])
        t.type("And again")
        t.prompts(4)
        t.type("/stats")
        text = t.wait("context: ", times=2)
        need(int(text.split("context: ")[2].split()[0]) > used, "the second turn forgot the first")
        t.key("Up")
        t.key("Up")
        need("> And again" in t.wait("> And again", times=2), "no history")
        t.key("C-u")
        t.key("C-d")
        t.wait("$ ")
    with Terminal() as t:                              # the history outlives the program
        t.chat("--no-think", "-n", "5")
        t.key("Up")
        t.key("Up")
        t.wait("> And again")


@test
def chat_takes_a_file_and_commands():
    with open(os.path.join(TMP, "doc.txt"), "w") as f:
        f.write("The harbour was quiet. " * 20)
    with Terminal() as t:
        t.chat("-n", "4", "--no-think")
        t.type("/file doc.txt")
        n = int(t.wait("goes with your next message").split("doc.txt: ")[1].split()[0])
        need(n == os.path.getsize(os.path.join(TMP, "doc.txt")), f"{n} bytes")
        tokens = len(subprocess.run([DSV4, "tokenize", "-m", TINY, "-f", os.path.join(
            TMP, "doc.txt")], capture_output=True, check=True).stdout.split())
        t.type("What was quiet?")
        t.prompts(3)
        t.type("/stats")
        used = int(t.wait("context: ").split("context: ")[1].split()[0])
        need(used > tokens, f"a context of {used} for a file of {tokens}")
        for line, answer in (("/file no.txt", "open no.txt: No such file"),
                             ("/effort high", ">"), ("/effort loud", "not low, high or max"),
                             ("/sistem x", "perhaps /system"), ("/nothink", ">"),
                             ("/think", ">"), ("/help", "/effort"), ("/clear", ">")):
            t.type(line)
            t.wait(answer)
        t.type("/quit")
        t.wait("$ ")


@test
def ctrl_c_stops_the_answer_not_the_program():
    story = "Tell me a long story"
    with Terminal() as t:
        t.chat("-n", "300000", "--ctx", "300100", "--temp", "0", "--no-think", "--no-loop-guard",
               model=endless())
        t.type(story)                                  # for minutes, if nobody stops it
        t.wait_behind(story)
        t.key("C-c")
        t.wait_behind("note: stopped", "\n>")
        t.type("half a line", enter=False)
        t.wait_behind("note: stopped", "\n> half a line")
        t.key("C-c")                                   # at the prompt it drops the line
        t.wait_behind("> half a line", "\n>")
        t.type("/help")
        t.wait("/nothink")
        t.key("C-d")
        t.wait("$ ")


@test
def thoughts_are_dimmed_unless_NO_COLOR():
    for env, dim in (({}, True), ({"NO_COLOR": "1"}, False)):
        with Terminal(**env) as t:
            t.chat("-n", "12", "--temp", "0")
            t.type("Hello")
            t.prompts(2)
            need(("\033[2m" in t.screen(colours=True)) == dim, f"{env}: {t.screen(True)!r}")


@test
def a_paste_of_many_lines_is_one_message():
    with Terminal() as t:
        t.chat("-n", "3", "--no-think")
        t.paste("one\ntwo\nthree\n")
        t.type(" and more", enter=False)
        t.wait("[paste 1: 4 lines] and more")
        t.key("Enter")
        t.prompts(2)
        t.type("/clear")
        t.paste("four\nfive")
        t.wait("[paste 2: 2 lines]")
        t.key("Enter")
        t.prompts(4)
        t.type("/stats")
        used = int(t.wait("context: ").split("context: ")[1].split()[0])
        request = '{"messages": [{"role": "user", "content": "four\\nfive"}], "thinking": false}'
        ids = subprocess.run([DSV4, "prompt", "-m", TINY, "--ids"], input=request.encode(),
                             capture_output=True, check=True).stdout.split()
        need(used == len(ids) + 2, f"{used} tokens: a prompt of {len(ids)} and two of the answer")
        t.paste("a single line")
        t.wait("> a single line")
        t.key("C-u")
        t.type("/stats")
        t.wait("context: ")
        t.key("C-d")
        t.wait("$ ")


@test
def a_resized_terminal_keeps_the_line():
    with Terminal() as t:
        t.chat("-n", "3", "--no-think")
        t.type("words before", enter=False)
        t.tmux("resize-window", "-x", "60", "-y", "20")
        time.sleep(0.7)
        t.type(" and behind", enter=False)
        t.wait("words before and behind")
        t.key("Enter")
        t.prompts(2)


@test
def progress_is_a_bar_on_a_terminal():
    with Terminal() as t:
        with open(os.path.join(TMP, "long.txt"), "w") as f:
            f.write("The harbour was quiet. " * 50)
        t.type(f"clear; {DSV4} eval -m {TINY} -f long.txt -t 1 --chunk 1; echo EN''D=$?.")
        text = t.wait(" left", 60)
        need("scoring" in text and "tokens/s" in text and "GB/s" in text and "[" in text, text)
        text = t.wait("END=0")
        need(" left" not in text, "the bar stays behind")


if __name__ == "__main__":
    sys.exit(run("terminal"))
