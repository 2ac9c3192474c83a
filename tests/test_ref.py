"""test_ref.py -- holds ref.py to the golden data, by the table in goldens/README.md.

    python3 tests/test_ref.py [GOLDENS_DIR]

Prints one line a property, `ok   ref: NAME (figure)` or `FAIL ref: NAME: why`; exits 1 if any
failed. Every bound is asked for with <=, so that a NaN fails.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # other tests run on the other cores
import numpy as np

import ref

HERE = pathlib.Path(__file__).parent
GOLDENS = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "goldens"
TINY = GOLDENS / "tiny-a"
EXACT = 1e-6           # one operation with F64 sums, by the rms; the table's 5e-6 is for F32 sums
SHARP = 1e-4           # rel rms of a row, two correct programs without the roundings
NOISE = 1e-5           # the same program cut differently: only the order of F64 sums differs
failed = []

# --- what a property is ---

def report(name, good, figure):
    if not good:
        failed.append(name)
    print(f"ok   ref: {name} ({figure})" if good else f"FAIL ref: {name}: {figure}", flush=True)

def at_most(name, value, bound):
    report(name, value <= bound, f"{value:.2g}, at most {bound:g}")

def at_least(name, value, bound):
    report(name, value >= bound, f"{value:.3g}, at least {bound:g}")

def same(name, got, want):
    """Integers, and names."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        report(name, False, f"shape {got.shape}, not {want.shape}")
    else:
        report(name, (got == want).all(), f"{(got == want).sum()} of {got.size} equal")

def rel_rms(got, want):
    """|got - want| / |want| of each row, [n]; another shape is as wrong as a NaN"""
    if got.shape != want.shape:
        return np.array([np.nan])
    got, want = (x.reshape(len(x), -1).astype(np.float64) for x in (got, want))
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)

def rows_at_most(name, got, want, bound):
    at_most(name, rel_rms(got, want).max(), bound)

def as_sets(ids):
    """Rows of ids padded with -1: the order is no matter."""
    return np.sort(ids, axis=1)

# --- units ---

def unit_error(name, got, want):
    """(error, its bound) of one unit output, which must be the golden's bit for bit or to EXACT."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return np.nan, 0
    op, _, rest = name.partition(".")
    if op in ("e4m3", "e2m1", "e8m0", "act_quant128", "act_quant64", "fp4_act_quant"):
        equal = (got == want) & (np.signbit(got) == np.signbit(want))
        return (~(equal | np.isnan(got) & np.isnan(want))).sum(), 0
    if got.dtype == np.int64:
        return (got != want).sum(), 0
    error = np.abs(got.astype(np.float64) - want)
    if rest.endswith(("forward", "inverse")):            # the golden's are from F32 angles:
        error = error[[0, 1, 3]]                         # of use at positions 0, 1 and 65536
    rms = np.sqrt((want.astype(np.float64)**2).mean())
    return error.max() / (1 if op == "rope" else rms), EXACT

def test_units():
    """Every output in the golden unit file from its inputs: one line an operation."""
    golden = ref.load(GOLDENS / "units.safetensors")
    outputs = ref.unit_outputs(golden)
    inputs = ref.unit_inputs(0)
    for_information = {f"rope.{op}.{f}" for op in ("plain", "compressed") for f in ("cos", "sin")}
    same("units: every golden tensor is an input or is computed",
         sorted(set(inputs) | set(outputs)), sorted(set(golden) - for_information))
    results = {}
    for name, got in outputs.items():
        op, _, rest = name.rpartition(".")
        results.setdefault(op, []).append((rest, *unit_error(name, got, golden[name])))
    for op, rows in results.items():
        report(f"units {op}", all(error <= bound for _, error, bound in rows),
               ", ".join(f"{rest} {error:.2g} of {bound:g}" for rest, error, bound in rows))
    for op in ("rope.plain", "rope.compressed"):
        at_most(f"units {op}: angles in F64 at every position",
                np.abs(outputs[f"{op}.forward"] - turn_by_tables(golden, op)).max(), EXACT)
    x = golden["act_quant128.x"]                         # zeros do not change a block's scale
    padded = np.hstack([x[:, :200], np.zeros((len(x), 56), np.float32)])
    same("units aq128: a shorter last block is a block",
         ref.aq128(x[:, :200]), ref.aq128(padded)[:, :200])

def turn_by_tables(golden, op):
    """x turned by the golden's cosines and sines of F64 angles."""
    x, y = golden[f"{op}.x"], golden[f"{op}.x"].copy()
    cos, sin = (golden[f"{op}.{f}_f64angle"][:, None] for f in ("cos", "sin"))
    a, b = x[..., -64::2], x[..., -63::2]                # 64 = rope dims of the unit file
    y[..., -64::2], y[..., -63::2] = a * cos - b * sin, a * sin + b * cos
    return y

# --- the whole model, without the roundings ---

def test_no_rounding():
    """tiny-a/golden nq.*: every tensor of the family, row by row, as the golden writer makes it."""
    golden = ref.load(TINY / "golden.safetensors")
    ids = golden["prompt.tokens"]
    got = ref.golden(TINY, ids, len(golden["nq.decode.tokens"]), ["nq"])
    same("nq positions", got["positions"], golden["positions"])
    for name in [name for name in golden if name.startswith("nq.")]:
        want = golden[name]
        if name.endswith("index_topk"):
            same(name, as_sets(got[name]), as_sets(want))
        elif want.dtype == np.int64:
            same(name, got[name], want)
        else:
            rows_at_most(name, np.atleast_2d(got[name]), np.atleast_2d(want), SHARP)

def test_cross():
    """A decode that completes an HCA entry, at position 383."""
    golden = ref.load(TINY / "golden-cross.safetensors")
    want = golden["nq.decode.logits"]
    got = ref.golden(TINY, golden["prompt.tokens"], len(want), ["nq"])
    same("cross: decode tokens", got["nq.decode.tokens"], golden["nq.decode.tokens"])
    rows_at_most("cross: decode logits", got["nq.decode.logits"], want, SHARP)

def run_in_chunks(model, ids, sizes):
    """Prefill in chunks, MTP with it -> (state, logits, MTP logits, the traces' rows by name)."""
    state, logits, mtp, rows = model.start(), [], [], {}
    for begin, end in zip(np.cumsum([0] + sizes), np.cumsum(sizes)):
        trace = {}
        h = model.forward(state, ids[begin:end], trace)
        logits.append(model.head(h))
        mtp.append(model.head(model.mtp(state, h, ids[begin + 1:end + 1]), "mtp.0."))
        for name, x in trace.items():
            rows.setdefault(name, []).append(x)
    rows = {name: np.concatenate(x) for name, x in rows.items()}
    return state, np.concatenate(logits), np.concatenate(mtp), rows

def test_chunks():
    """Any chunking, and prefill continued by decode, give what one prefill gives."""
    model = ref.Model(TINY, rounding=False)
    ids = ref.load(TINY / "golden.safetensors")["prompt.tokens"][:281]
    whole = run_in_chunks(model, ids, [280])
    for label, sizes in (("chunked = whole", [1, 2, 3, 5, 16, 17, 83, 1, 128, 24]),
                         ("prefill + decode = prefill", [100] + 180 * [1])):
        state, logits, mtp, rows = run_in_chunks(model, ids, sizes)
        rows_at_most(f"{label}: logits", logits, whole[1], NOISE)
        rows_at_most(f"{label}: MTP logits", mtp, whole[2], NOISE)
        ints = [name for name in rows if rows[name].dtype == np.int64]
        same(f"{label}: expert and index ids", np.hstack([rows[name] for name in ints]),
             np.hstack([whole[3][name] for name in ints]))
        for kind in ("window", "compressed", "index_keys"):
            pairs = [(getattr(a, kind), getattr(b, kind)) for a, b in zip(state, whole[0])]
            at_most(f"{label}: {kind}",
                    max(rel_rms(a, b).max() for a, b in pairs if b.size), NOISE)

# --- the whole model, with the roundings ---

def test_short():
    """Short prompts, KV rope dims in BF16 as the program has them, and in F32."""
    for file, rope_bf16 in (("golden-ropebf16", True), ("golden", False)):
        golden, model = ref.load(TINY / f"{file}.safetensors"), ref.Model(TINY, True, rope_bf16)
        got = [model.head(model.forward(model.start(), ids))[-3:] for ids in golden["short.tokens"]]
        close = rel_rms(np.array(got), golden["short.logits_last3"]) <= SHARP
        at_least(f"{file}: short prompts of 10 within {SHARP:g}", close.sum(), 8)

def test_rounding():
    """tiny-a/golden-ropebf16: a chaotic comparison, so only its statistics; the golden's tokens."""
    golden, model = ref.load(TINY / "golden-ropebf16.safetensors"), ref.Model(TINY)
    state = model.start()
    prefill = model.head(model.forward(state, golden["prompt.tokens"]))
    decode = [model.head(model.forward(state, t[None])) for t in golden["q.decode.tokens"]]
    for name, got in (("q.logits", prefill), ("q.decode.logits", np.concatenate(decode))):
        error = rel_rms(got, golden[name])
        at_most(f"{name}: median row", np.median(error), .25)
        at_least(f"{name}: share of rows within 0.7", (error <= .7).mean(), .9)
        agree = got.argmax(1) == golden[name].argmax(1)
        at_least(f"{name}: share of argmax equal", agree.mean(), .55)

def run_block(model, l, golden, sizes):
    """Block l alone over the given streams -> (streams after attention or None, streams)"""
    h, tokens = golden["input_streams"], golden["tokens"]
    state, after_attn, out = model.start(), [], []
    for begin, end in zip(np.cumsum([0] + sizes), np.cumsum(sizes)):
        seen, part = {}, slice(begin, end)
        if l == model.c.num_hidden_layers:
            out.append(model.mtp(state, h[part], golden["mtp.next_tokens"][part]))
        else:
            out.append(model.block(l, h[part], tokens[part], state[l], seen))
            after_attn.append(seen["after_attn"])
    return after_attn and np.concatenate(after_attn), np.concatenate(out)

def test_layers():
    """tiny-a-layers-ropebf16: each block alone on given streams, whole and in chunks."""
    golden, model = ref.load(GOLDENS / "tiny-a-layers-ropebf16.safetensors"), ref.Model(TINY)
    positions, n_layers = golden["positions"], model.c.num_hidden_layers
    for label, sizes in (("", [144]), (" in chunks", [1, 4, 14, 63, 1, 1, 60])):
        shares = []
        for l in range(n_layers + 1):
            name = f"out.layer{l}" if l < n_layers else "out.mtp0"
            after_attn, out = run_block(model, l, golden, sizes)
            error = rel_rms(out[positions], golden[name])
            if f"{name}.after_attn" in golden:
                attn = rel_rms(after_attn[positions], golden[f"{name}.after_attn"])
                error = np.concatenate([error, attn])
            at_most(f"{name}{label}: worst row", error.max(), .25)
            shares.append((error <= 2e-4).mean())
            at_least(f"{name}{label}: share of rows within 2e-4", shares[-1], .8)
        at_least(f"layers{label}: blocks with 95% of rows within 2e-4",
                 (np.array(shares) >= .95).sum(), 6)
        every4th = positions[::4]
        rows_at_most(f"mtp0.logits{label}", model.head(out[every4th], "mtp.0."),
                     golden["mtp0.logits_every4th"], 2e-4)
    rows_at_most("head", model.head(golden["input_streams"][every4th]),
                 golden["head_every4th"], 2e-4)

# --- files ---

def raw(path):
    """name -> (dtype, shape, bytes), read without ref.py."""
    data = pathlib.Path(path).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[begin:][slice(*t["data_offsets"])])
            for name, t in header.items()}

def test_files(tmp):
    """Every tensor read and written again keeps its bytes; an index is not needed."""
    files = [GOLDENS / "units.safetensors", GOLDENS / "tiny-a-layers-ropebf16.safetensors",
             *sorted(TINY.glob("model-*.safetensors"))]
    half = np.array([0, 2**-24, -1.5, 65504], np.float16)    # no golden holds F16
    ref.save(tmp / "f16", {"x": half.astype(np.float32)}, {"x": "F16"})
    kept = raw(tmp / "f16")["x"] == ("F16", [4], half.tobytes())
    report("F16 is written and read", kept and (ref.load(tmp / "f16")["x"] == half).all(), half)
    for file in files:
        before = raw(file)
        ref.save(tmp / "again", ref.load(file), {name: t[0] for name, t in before.items()})
        report(f"{file.name} keeps its bytes", raw(tmp / "again") == before,
               f"{len(before)} tensors, {' '.join(sorted({t[0] for t in before.values()}))}")

    bare = tmp / "bare"
    bare.mkdir()
    for file in ("config.json", *(f.name for f in files[2:])):
        (bare / file).symlink_to((TINY / file).resolve())
    same("a directory without an index has the same tensors",
         sorted(ref.load_checkpoint(bare)[1]), sorted(ref.load_checkpoint(TINY)[1]))
    ref.save(bare / "model-dspark.safetensors", {"mtp.1.norm.weight": np.ones(1, np.float32)})
    drafts = [name for name in ref.golden(bare, np.arange(3), 1, ["nq"]) if "mtp" in name]
    report("a checkpoint with mtp.1. runs without MTP", not drafts, drafts or "no mtp.* rows")

def command(*args):
    subprocess.run([sys.executable, HERE / "ref.py", *args], check=True)

def test_golden_command(tmp):
    """`golden` on the first 40 tokens: the golden file's names, and its rows."""
    golden = ref.load(TINY / "golden.safetensors")
    ids = golden["prompt.tokens"][:40]
    (tmp / "ids").write_text(" ".join(map(str, ids)) + "\n")
    command("golden", TINY, tmp / "both", "--ids", tmp / "ids", "--decode", "3")
    command("golden", TINY, tmp / "nq", "--ids", tmp / "ids", "--decode", "3", "--no-rounding")
    both, nq = ref.load(tmp / "both"), ref.load(tmp / "nq")
    missing = {name for name in golden if not name.startswith("short.")} - set(both)
    report("golden command: names", not missing, f"missing: {' '.join(sorted(missing)) or 'none'}")
    same("golden command: --no-rounding is the nq family alone", sorted(nq),
         sorted(name for name in both if not name.startswith("q.")))
    same("golden command: tokens", both["prompt.tokens"], ids)
    same("golden command: decode starts at the last row's argmax", nq["nq.decode.tokens"][:1],
         golden["nq.logits"][39:40].argmax(1))
    rows_at_most("golden command: logits", nq["nq.logits"], golden["nq.logits"][:40], SHARP)
    n = (both["positions"] < 39).sum()                   # row 39 is not in the golden file
    rows_at_most("golden command: streams", both["nq.layer5.streams"][:n],
                 golden["nq.layer5.streams"][:n], SHARP)
    differ = rel_rms(both["q.logits"], both["nq.logits"]).min()
    at_least("golden command: q is not nq", differ, SHARP)

def test_units_command(tmp):
    """`units` files hold what they say, hold ties, and have other shapes for other seeds."""
    names = {name for name in raw(GOLDENS / "units.safetensors")
             if not name.endswith((".cos", ".sin"))}
    seeds, wrong, named, infinite, ties, shapes = range(4), [], [], [], [], set()
    for seed in seeds:
        command("units", tmp / "units", "--seed", str(seed))
        u = ref.load(tmp / "units")
        wrong += [name for name, x in ref.unit_outputs(u).items()
                  if x.tobytes() != u[name].tobytes()]
        named.append(set(u) == names)
        infinite += [name for name, x in u.items()
                     if not name.endswith("table") and not np.isfinite(x).all()]
        ids, scores = u["gate.ids"], u["gate.scores"] + u["gate.bias"]
        chosen = np.take_along_axis(scores, ids, 1)
        tied = chosen[:, 1:] == chosen[:, :-1]
        ties.append(tied.sum() if (ids[:, :-1] < ids[:, 1:])[tied].all() else -1)
        shapes.add(tuple(x.shape for x in u.values()))
    report("units command: outputs follow from inputs", not wrong, f"{wrong or 'all'}")
    report("units command: the golden's names", all(named), f"{sum(named)} of {len(seeds)} seeds")
    report("units command: finite", not infinite, f"{infinite or 'all'}")
    at_least("units command: gate ties, in the order of the experts", min(ties), 1)
    at_least("units command: shapes that differ by seed", len(shapes), len(seeds))


if __name__ == "__main__":
    test_units()
    test_no_rounding()
    test_cross()
    test_chunks()
    test_short()
    test_rounding()
    test_layers()
    with tempfile.TemporaryDirectory() as directory:
        test_files(pathlib.Path(directory))
        test_golden_command(pathlib.Path(directory))
        test_units_command(pathlib.Path(directory))
    sys.exit(1 if failed else 0)
