"""data.py -- the text of the demo model: WordNet as chat, a recall task, and a tokenizer for both.

    /usr/share/wordnet -> entries (word, part of speech, hypernym, gloss) -> chat turns --.
                          names, codes, filler glosses -> recall documents ---------------+-> ids
    the same text -> byte-level BPE -> tokenizer.json (V4's pre-tokenizer and special tokens)

    python3 data.py tokenizer DIR     tokenizer.json and tokenizer_config.json of a checkpoint
    python3 data.py train DIR OUT     the rows that train.py reads, OUT/rows-LENGTH.npz
    python3 data.py heldout DIR OUT   OUT/heldout-N.ids: chat about words never trained on
    python3 data.py recall DIR OUT    OUT/recall-LENGTH-N.txt (a user's text), .code (its answer)

Invariants  1 all that is written depends on WordNet's files and the numbers here alone
            2 a word whose SHA-1 says so is held out, and so is every gloss such a word has:
              neither a training turn nor training filler holds one
Needs       the `tokenizers` package (build/venv has it), numpy, Debian's wordnet-base
Not here    the model and its training (train.py)
"""
import argparse
import hashlib
import json
import pathlib
import random
import re
from collections import Counter

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

WORDNET = pathlib.Path("/usr/share/wordnet")
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, THOUGHT = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
VOCAB = 2048
COMMON, CORE = 4000, 1200        # words that training comes back to, and again and again
FACT_TOKENS, ASK_TOKENS = 11, 18 # of "NAME has code 48213.", and of a question with its answer
ROWS = {256: 32000, 512: 9600, 2048: 2400}           # training rows by length
TOKENS_A_FACT = {256: 50, 512: 30, 2048: 30}         # how dense codes stand in them, at most
N_HELDOUT, HELDOUT_TOKENS = 8, 2048
N_RECALL, RECALL_LENGTHS = 50, (100, 250, 500, 1000, 2000, 4000)
WEIGHT = {"prompt": 20, "answer": 100, "code": 300, "first digit": 1200}  # of losses, in percent

# === 1. WordNet ===============================================================================

KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}

def synsets(pos):
    """offset -> (words as written, offsets of hypernyms, gloss without its examples)"""
    found = {}
    for line in (WORDNET / f"data.{pos}").read_text().splitlines():
        if line.startswith("  "):                    # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        fields = fields.split()
        n_words = int(fields[3], 16)
        words = [re.sub(r"\(.*\)", "", w).replace("_", " ") for w in fields[4:4 + 2 * n_words:2]]
        rest = fields[4 + 2 * n_words:]
        above = [rest[i + 1] for i in range(1, len(rest) - 3, 4) if rest[i] == "@"]
        found[fields[0]] = words, above, re.split(r'[;:]? *"|; ', gloss.strip())[0].strip(" ;:")
    return found

def held_out(word):
    return hashlib.sha1(word.encode()).digest()[0] % 20 == 0

def entries():
    """[(word, kind, hypernym or None, gloss)] of first senses, the most common words first."""
    text = Counter()                                 # how often a word stands in any gloss
    for pos in KINDS:
        text.update(re.findall(r"[a-z]+", (WORDNET / f"data.{pos}").read_text().partition(
            "\n0")[2].replace("_", "-").lower()))
    tagged = Counter()
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split()
        word, kind = key.split("%")
        tagged[word, "nvaras"[int(kind[0]) - 1].replace("s", "a")] += int(count)
    best = {}
    for pos, kind in KINDS.items():
        sets = synsets(pos)
        for line in (WORDNET / f"index.{pos}").read_text().splitlines():
            if line.startswith("  "):
                continue
            fields = line.split()
            words, above, gloss = sets[fields[-int(fields[2])]]
            word = fields[0].replace("_", " ")
            letters = re.fullmatch(r"[a-z]{2,}( [a-z]+)?", word)
            if word not in words or not letters or not 2 <= len(gloss.split()) <= 24:
                continue
            if not gloss.isascii() or re.search(rf"\d|\b{word}\b", gloss):
                continue
            tags = tagged[fields[0], {"adj": "a", "adv": "r"}.get(pos, pos[0])]
            rank = tags + (min(text[word], 60) if pos == "noun" else 0)
            if word not in best or rank > best[word][0]:
                best[word] = rank, (word, kind, sets[above[0]][0][0] if above else None, gloss)
    order = sorted(best.values(), key=lambda x: (-x[0], x[1]))
    return [entry for _, entry in order]

def split():
    """(training entries, held-out entries), each the most common words first."""
    everything = entries()
    test = [e for e in everything if held_out(e[0])]
    hidden = {gloss for _, _, _, gloss in test}
    return [e for e in everything if not held_out(e[0]) and e[3] not in hidden], test

# === 2. Chat: parts (text, weight) of a conversation ==========================================

def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word

def question(entry, rng):
    """(what the user asks, the answer)"""
    word, kind, _, gloss = entry
    if rng.random() < .25:
        ask = rng.choice(["Give me a word for: {}", "Which word means: {}?"])
        return ask.format(gloss), word
    asks = [f"Define: {word}", f"What does {word} mean?"]
    if kind == "noun":
        asks += [f"What is {article(word)}?"] * 3
    if kind == "verb":
        asks += [f"What does it mean to {word}?"] * 2
    return rng.choice(asks), gloss

def thought(entry):
    _, kind, above, _ = entry
    return f"{article(kind)}, a kind of {above}" if above else article(kind)

def chat(pick, rng):
    """One to four turns; V4 keeps no reasoning of past turns, so only the last may think."""
    parts, n = [(BOS, "prompt")], rng.choice([1, 1, 2, 4])
    for i in range(n):
        entry = pick()
        ask, answer = question(entry, rng)
        think = i == n - 1 and rng.random() < .5
        parts += [(USER + ask + ASSISTANT + (THINK if think else THOUGHT), "prompt"),
                  ((thought(entry) + THOUGHT if think else "") + answer + EOS, "answer")]
    return parts

# === 3. Recall: codes among filler ============================================================

def name_list(words):
    """256 capitalized words to have codes; the tokenizer gives each a piece of its own."""
    nouns = [w for w, kind, _, _ in words if kind == "noun" and re.fullmatch("[a-z]{4,7}", w)]
    return [w.capitalize() for w in nouns[100:356]]

def recall_text(names, lines, n_tokens, n_facts, rng):
    """(text of about n_tokens, [(name, code)] in its order); lines: filler's (text, tokens)"""
    n_facts = max(1, min(n_facts, n_tokens // FACT_TOKENS))
    facts = [(name, f"{rng.randrange(100000):05}") for name in rng.sample(names, n_facts)]
    parts, left = facts.copy(), n_tokens - n_facts * FACT_TOKENS
    while left > 0:
        text, size = rng.choice(lines)
        parts.append(text)
        left -= size
    rng.shuffle(parts)
    text = " ".join(p if isinstance(p, str) else "{} has code {}.".format(*p) for p in parts)
    return "Remember: " + text, [p for p in parts if not isinstance(p, str)]

def ask_code(name):
    return f"What is the code of {name}?"

def recall(names, lines, n_tokens, n_facts, rng):
    """A conversation: a text with codes, a question about one of them, and a few more."""
    asked = min(n_facts, 16, n_tokens // 40 + 1)
    text, facts = recall_text(names, lines, n_tokens - asked * ASK_TOKENS - 8, n_facts, rng)
    parts = [(BOS + USER + text, "prompt")]
    for i, (name, code) in enumerate(rng.sample(facts, min(len(facts), asked))):
        before = USER if i else rng.choice("\n ")        # cut from a whole text, it is " What"
        parts += [(before + ask_code(name) + ASSISTANT + THOUGHT, "prompt"),
                  (code[0], "first digit"), (code[1:] + EOS, "code")]
    return parts

def filler(tokenizer, words):
    """[(a line, its tokens)]: glosses as a dictionary has them"""
    lines = [f"{word}: {gloss}." for word, _, _, gloss in words]
    batch = tokenizer.encode_batch([" " + s for s in lines], add_special_tokens=False)
    return [(s, len(e.ids)) for s, e in zip(lines, batch)]

# === 4. Tokenizer =============================================================================

SPLITS = [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
          r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
          r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+"]

def make_tokenizer(words, directory):
    """Numbers stay single digits: no training text holds any."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(s.replace(r"\r\n", "\r\n")), "isolated") for s in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng, text = random.Random(1), []
    for rank, entry in enumerate(words):
        for _ in range(8 if rank < COMMON else 1):
            ask, answer = question(entry, rng)
            text += [ask, answer, thought(entry)]
    text += [f"Remember: {n} has code . What is the code of {n}?" for n in name_list(words)] * 400
    named = [USER, ASSISTANT, THINK, THOUGHT, "｜DSML｜"]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=VOCAB - len(named), special_tokens=[BOS, EOS, PAD], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_tokens([AddedToken(t, normalized=True, special=False) for t in named])
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    config = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
              "model_max_length": 1048576, "tokenizer_class": "PreTrainedTokenizerFast",
              "unk_token": None} | {role: {"__type": "AddedToken", "content": t, "lstrip": False,
                                           "normalized": True, "rstrip": False,
                                           "single_word": False} for role, t in roles.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

# === 5. Rows of ids ===========================================================================

def encode(tokenizer, parts):
    """(ids, weight of each as a target)"""
    batch = tokenizer.encode_batch([text for text, _ in parts], add_special_tokens=False)
    ids = [i for e in batch for i in e.ids]
    return ids, [WEIGHT[kind] for e, (_, kind) in zip(batch, parts) for _ in e.ids]

def rows(tokenizer, n_rows, length, pick, names, lines, rng):
    """Conversations one after the other, most rows with a recall first: [n_rows][length] twice."""
    ids, weights = np.zeros((n_rows, length), np.uint16), np.zeros((n_rows, length), np.uint16)
    for r in range(n_rows):
        parts = []
        if rng.random() < .65:
            n_tokens = int(length * rng.uniform(.15, .93))
            n_facts = rng.randint(1, 4 + n_tokens // TOKENS_A_FACT[length])
            parts = recall(names, lines, n_tokens, n_facts, rng)
        row, w = encode(tokenizer, parts) if parts else ([], [])
        while len(row) < length:
            more = encode(tokenizer, chat(pick, rng))
            row, w = row + more[0], w + more[1]
        ids[r], weights[r] = row[:length], w[:length]
    return ids, weights

def picker(words, length, rng):
    """Most draws are of common words; in the longer rows, which come later, of fewer still."""
    def pick():
        luck = rng.random()
        common = luck < .6 if length == 256 else luck < .7
        core = length > 256 and luck < .45
        return rng.choice(words[:CORE] if core else words[:COMMON] if common else words)
    return pick

# === 6. What is measured ======================================================================

def write_heldout(tokenizer, test, out):
    """Chat about held-out words only, N_HELDOUT files of HELDOUT_TOKENS ids"""
    rng = random.Random(3)
    for i in range(N_HELDOUT):
        ids = []
        while len(ids) < HELDOUT_TOKENS:
            ids += encode(tokenizer, chat(lambda: rng.choice(test), rng))[0]
        text = " ".join(str(x) for x in ids[:HELDOUT_TOKENS])
        (out / f"heldout-{i}.ids").write_text(text + "\n")

def write_recall(names, lines, out):
    """Texts of about LENGTH tokens that end in a question, and the code that answers it"""
    for length in RECALL_LENGTHS:
        rng = random.Random(length)
        for i in range(N_RECALL):
            n_facts = rng.randint(2, 4 + length // 50)
            text, facts = recall_text(names, lines, length - ASK_TOKENS, n_facts, rng)
            name, code = rng.choice(facts)
            (out / f"recall-{length}-{i}.txt").write_text(f"{text}\n{ask_code(name)}")
            (out / f"recall-{length}-{i}.code").write_text(code + "\n")

def main():
    parser = argparse.ArgumentParser(description="the text of the demo model")
    parser.add_argument("what", choices=["tokenizer", "train", "heldout", "recall"])
    parser.add_argument("dir", type=pathlib.Path, help="the checkpoint with tokenizer.json")
    parser.add_argument("out", type=pathlib.Path, nargs="?", help="where to write the rest")
    args = parser.parse_args()
    words, test = split()
    (args.out or args.dir).mkdir(parents=True, exist_ok=True)
    if args.what == "tokenizer":
        return make_tokenizer(words, args.dir)
    tokenizer = Tokenizer.from_file(str(args.dir / "tokenizer.json"))
    if args.what == "heldout":
        return write_heldout(tokenizer, test, args.out)
    names, lines = name_list(words), filler(tokenizer, words)
    if args.what == "recall":
        return write_recall(names, lines, args.out)
    for length, n_rows in ROWS.items():
        rng = random.Random(length)
        pick = picker(words, length, rng)
        ids, weights = rows(tokenizer, n_rows, length, pick, names, lines, rng)
        np.savez(args.out / f"rows-{length}.npz", ids=ids, weights=weights)


if __name__ == "__main__":
    main()
