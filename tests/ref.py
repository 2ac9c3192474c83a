"""ref.py -- all of DeepSeek-V4 in NumPy: MODEL.md as a program, in its order and its names.

    tokens -> embed -> hc streams -> [ hc_pre -> attention -> hc_post      x num_hidden_layers
                                       hc_pre -> moe       -> hc_post ]  -> head -> logits
    attention sees a window of raw KV and, where compress_ratios says so, compressed entries:
    every one of them (HCA), or the index_topk best ones that the indexer finds (CSA).

Numbers    F32 between operations, F64 sums inside one; shapes are [token][...], slowest first.
           Model(rounding=False) leaves out the three deliberate roundings (section 2 here);
           Model(rope_bf16=False) keeps the rotated dims of KV in F32, which no rounding implies.
Contents   1 files   2 number formats and roundings   3 linear, rmsnorm, rope, softmax
           4 hyper-connections   5 compressor, indexer, attend   6 moe   7 the model
           8 golden files   9 unit files   10 command line
Not here   text and chat (MODEL.md section 4), sampling, refusing bad checkpoints. Weights are
           dequantized to F64 in memory: for the small checkpoints of tests.

    python3 tests/ref.py golden DIR OUT.safetensors --ids FILE --decode N [--no-rounding]
    python3 tests/ref.py units OUT.safetensors [--seed S]
"""
import argparse
import json
import math
import pathlib
import re
from types import SimpleNamespace

import numpy as np

f32, f64 = np.float32, np.float64

# === 1. Files: safetensors, and a checkpoint directory ========================================

STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E8M0": "u1",
          "I8": "i1", "I64": "<i8"}                      # what lies in the file, for NumPy

def load(path):
    """name -> array. Floats of every size come back as F32 (exact), I8 and I64 as they are."""
    data = pathlib.Path(path).read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, t in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            count = math.prod(t["shape"])
            raw = np.frombuffer(data, STORED[t["dtype"]], count, begin + t["data_offsets"][0])
            tensors[name] = decode(raw, t["dtype"]).reshape(t["shape"])
    return tensors

def save(path, tensors, dtypes={}):
    """Write name -> array; a float array is F32 unless dtypes names a smaller type for it."""
    header, blobs, at = {}, [], 0
    for name, x in tensors.items():
        kind = dtypes.get(name) or {"float32": "F32", "int8": "I8", "int64": "I64"}[x.dtype.name]
        blobs.append(encode(x, kind).astype(STORED[kind]).tobytes())
        header[name] = {"dtype": kind, "shape": x.shape,
                        "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))

def decode(raw, dtype):
    """The values of stored numbers."""
    if dtype == "F8_E4M3":
        return E4M3[raw]
    if dtype == "F8_E8M0":
        return E8M0[raw]
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(f32)
    return raw.astype(f32) if dtype == "F16" else raw

def encode(x, dtype):
    """The stored form of values that dtype can hold exactly."""
    if dtype == "F8_E4M3":                               # sign bit, then the place in the table
        return np.searchsorted(E4M3[:127], np.abs(x)) + 128 * np.signbit(x)
    if dtype == "F8_E8M0":
        return np.searchsorted(E8M0[:255], x)
    return np.ascontiguousarray(x, f32).view(np.uint32) >> 16 if dtype == "BF16" else x

def load_checkpoint(path):
    """(config.json as a namespace, name -> array) of a directory with or without an index."""
    path = pathlib.Path(path)
    config = SimpleNamespace(**json.loads((path / "config.json").read_text()))
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(f.name for f in path.glob("model*.safetensors"))
    tensors = {}
    for file in files:
        tensors.update(load(path / file))
    return config, tensors

# === 2. Number formats, and the deliberate roundings ==========================================

_mantissa, _exponent = np.arange(128) % 8, np.arange(128) // 8
E4M3 = np.where(_exponent == 0, _mantissa * 2.0**-9, (8 + _mantissa) * 2.0**(_exponent - 10))
E4M3[127] = np.nan                                       # no infinity: 0x7e is the largest, 448
E4M3 = np.concatenate([E4M3, -E4M3]).astype(f32)
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], f32)
E2M1 = np.concatenate([E2M1, -E2M1])
E8M0 = np.append(2.0**np.arange(-127, 128), np.nan).astype(f32)

def round_to(x, largest, mantissa_bits, least_exponent):
    """Nearest value of a small float format, ties to the even code, clamped to +-largest."""
    x = np.clip(x, -largest, largest)
    exponent = np.frexp(x)[1] - 1                        # |x| is in [2^exponent, 2^(exponent+1))
    step = np.ldexp(f32(1), np.maximum(exponent, least_exponent) - mantissa_bits)
    return np.rint(x / step) * step

def e4m3(x):
    return round_to(x, 448, 3, -6)

def e2m1(x):
    return round_to(x, 6, 1, 0)

def bf16(x):
    """Nearest BF16, ties to even, of finite F32."""
    u = np.ascontiguousarray(x, f32).view(np.uint32)
    return ((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000).view(f32)

def ceil_pow2(x):
    """The least power of two >= x, read off the exponent bits."""
    m, e = np.frexp(x)
    return np.ldexp(f32(1), e - (m == 0.5))

def in_blocks(x, size, round_block):
    """round_block on each run of `size` in the last axis; a shorter last one counts as a block."""
    cuts = range(size, x.shape[-1], size)
    return np.concatenate([round_block(b) for b in np.split(x, cuts, axis=-1)], axis=-1)

def e4m3_scale(block):
    amax = np.abs(block).max(-1, keepdims=True)
    return ceil_pow2(np.maximum(amax, f32(1e-4)) * f32(1 / 448))

def e4m3_block(block):
    s = e4m3_scale(block)
    return e4m3(block / s) * s

def e2m1_block(block):
    amax = np.abs(block).max(-1, keepdims=True)
    s = ceil_pow2(np.maximum(amax, f32(6 * 2.0**-126)) / f32(6))
    return e2m1(block / s) * s

def aq128(x):
    """What an FP8 or FP4 linear sees of its input."""
    return in_blocks(x, 128, e4m3_block)

def kv_round(kv, n_rope):
    """kv [n][hd] as stored, but for its last n_rope dims, which stay."""
    cut = kv.shape[-1] - n_rope
    return np.concatenate([in_blocks(kv[:, :cut], 64, e4m3_block), kv[:, cut:]], axis=-1)

def hadamard(x):
    """Walsh-Hadamard transform of the last axis in Sylvester order, scaled to keep the norm."""
    d, h = x.shape[-1], np.ones((1, 1))
    while len(h) < d:
        h = np.block([[h, h], [h, -h]])
    return (x @ h * d**-0.5).astype(f32)

# === 3. linear, rmsnorm, rope, softmax ========================================================

def dequant(w, scale):
    """F64 [out][in]: FP8 has a scale per 128x128, FP4 (I8 [out][in/2], low nibble first) per 32."""
    if w.dtype == np.int8:
        w = E2M1[np.stack([w & 15, w >> 4 & 15], axis=-1).reshape(len(w), -1)]
        return w.astype(f64) * np.repeat(scale, 32, axis=1)
    grid = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
    return w.astype(f64) * grid[:w.shape[0], :w.shape[1]]

def linear(x, w):
    """[n][in] @ [out][in]^T -> [n][out]"""
    return (x.astype(f64) @ w.T.astype(f64, copy=False)).astype(f32)

def rmsnorm(x, weight, eps):
    x = x.astype(f64)
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight).astype(f32)

def inv_freq(n_rope, theta, yarn=None):
    """Angle per position of each of the n_rope/2 pairs, F32; yarn = config's rope_scaling."""
    i = np.arange(n_rope // 2)
    f = f32(1) / (float(theta) ** (2 * i / n_rope)).astype(f32)
    if yarn is None:
        return f

    def pair_of(turns):                                  # the pair that turns so often in training
        length = yarn["original_max_position_embeddings"]
        return n_rope * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))
    low = min(max(math.floor(pair_of(yarn["beta_fast"])), 0), n_rope - 1)
    high = min(max(math.ceil(pair_of(yarn["beta_slow"])), 0), n_rope - 1)
    high += 0.001 if high == low else 0
    ramp = np.clip((i.astype(f32) - f32(low)) / f32(high - low), f32(0), f32(1))
    return f / f32(yarn["factor"]) * ramp + f * (f32(1) - ramp)

def rope(x, pos, freq, inverse=False):
    """Turn the adjacent pairs of the last 2*len(freq) dims of x [n][...][d] by pos[n]*freq."""
    angle = np.multiply.outer(pos.astype(f64), freq.astype(f64)) * (-1 if inverse else 1)
    angle = angle.reshape(len(x), *[1] * (x.ndim - 2), len(freq))
    cos, sin, cut = np.cos(angle), np.sin(angle), x.shape[-1] - 2 * len(freq)
    a, b, y = x[..., cut::2].astype(f64), x[..., cut + 1::2].astype(f64), x.copy()
    y[..., cut::2] = a * cos - b * sin
    y[..., cut + 1::2] = a * sin + b * cos
    return y

def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(f64)))

def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)

# === 4. Hyper-connections =====================================================================

def hc_mixes(h, fn, c):
    """m [n][rows of fn]: fn times the normalized concatenation of the streams h [n][hc][dim]."""
    x = h.reshape(len(h), -1).astype(f64)
    return (x @ fn.T.astype(f64) / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps)
            ).astype(f32)

def sinkhorn(m, scale, base, c):
    """m [n][(2+hc)*hc] -> pre [n][hc], post [n][hc], comb [n][hc][hc], rows and columns sum to 1"""
    hc = math.isqrt(m.shape[1] + 1) - 1
    m = m.astype(f64)
    pre = sigmoid(m[:, :hc] * scale[0] + base[:hc]) + c.hc_eps
    post = 2 * sigmoid(m[:, hc:2 * hc] * scale[1] + base[hc:2 * hc])
    comb = (m[:, 2 * hc:] * scale[2] + base[2 * hc:]).reshape(-1, hc, hc)
    comb = softmax(comb, axis=2) + c.hc_eps
    comb /= comb.sum(1, keepdims=True) + c.hc_eps
    for _ in range(c.hc_sinkhorn_iters - 1):
        comb /= comb.sum(2, keepdims=True) + c.hc_eps
        comb /= comb.sum(1, keepdims=True) + c.hc_eps
    return pre.astype(f32), post.astype(f32), comb.astype(f32)

def hc_pre(h, fn, scale, base, c):
    """Streams h [n][hc][dim] -> the sublayer's input [n][dim], and post, comb for hc_post."""
    pre, post, comb = sinkhorn(hc_mixes(h, fn, c), scale, base, c)
    return weighted_sum(pre, h), post, comb

def hc_post(y, h, post, comb):
    """new h_j = post_j*y + sum_i comb_ij h_i"""
    kept = comb.transpose(0, 2, 1).astype(f64) @ h
    return (post[:, :, None].astype(f64) * y[:, None] + kept).astype(f32)

def hc_head(h, fn, scale, base, c):
    """The last streams -> one vector a token [n][dim]."""
    return weighted_sum(sigmoid(hc_mixes(h, fn, c) * scale.astype(f64) + base) + c.hc_eps, h)

def weighted_sum(weight, h):
    """[n][hc], [n][hc][dim] -> [n][dim]"""
    return (weight[:, None].astype(f64) @ h)[:, 0].astype(f32)

# === 5. Compressor, indexer, attend ===========================================================

def fresh_pending(ratio, d):
    """What a compressor carries between calls: (kv, score) rows of tokens not yet used up.

    At ratio 4 these begin with the group before the open one, for an entry looks at both; the
    group before the first has weight 0, which a score of -inf gives.
    """
    rows, width = (ratio, 2 * d) if ratio == 4 else (0, d)
    return np.zeros((rows, width), f32), np.full((rows, width), -np.inf, f32)

def compressor(x, first, pending, weights, ratio, freq, eps):
    """x [n][dim] at positions first.. -> (the entries [m][d] that they complete, pending)

    Entry g covers tokens g*ratio.. and is rotated at the first of them. Not yet rounded.
    """
    wkv, wgate, ape, norm = weights
    kv = np.concatenate([pending[0], linear(x, wkv)])
    score = linear(x, wgate) + ape[(first + np.arange(len(x))) % ratio]
    score = np.concatenate([pending[1], score])
    d, overlap = len(norm), ratio == 4
    m = len(kv) // ratio - overlap                       # groups completed now
    used = m * ratio

    def candidates(rows):                                # [m][ratio or 2*ratio][d]
        if not overlap:
            return rows[:used].reshape(m, ratio, d)
        before, own = rows[:used, :d], rows[ratio:used + ratio, d:]
        return np.concatenate([r.reshape(m, ratio, d) for r in (before, own)], axis=1)
    p = softmax(candidates(score).astype(f64), axis=1)
    entries = rmsnorm((p * candidates(kv)).sum(1).astype(f32), norm, eps)
    pos = (first // ratio + np.arange(m)) * ratio
    return rope(entries, pos, freq), (kv[used:], score[used:])

def index_scores(q, k, w):
    """q [n][h][d], k [entries][d], w [n][h] -> sum over h of w*relu(q.k), [n][entries]"""
    dots = np.maximum(q.astype(f64) @ k.T.astype(f64), 0)
    return (w[:, None].astype(f64) @ dots)[:, 0].astype(f32)

def index_topk(scores, n_visible, k):
    """The k best of the first n_visible[t] entries, ties to the lower: ascending, -1 = none."""
    n, n_entries = scores.shape
    scores = np.where(np.arange(n_entries) < n_visible[:, None], scores, -np.inf)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.sort(np.where(best < n_visible[:, None], best, n_entries), axis=1)
    out = np.full((n, k), -1)
    out[:, :best.shape[1]] = np.where(best < n_entries, best, -1)
    return out

def attend(q, kv, sink, idx):
    """q [n][h][hd] over the rows idx [n][k] of kv [rows][hd] (-1 = none) -> o [n][h][hd]

    One row is key and value of all heads; sink [h] is a logit that adds to the denominator.
    """
    k = kv[idx].astype(f64)
    score = q.astype(f64) @ k.transpose(0, 2, 1) * q.shape[-1]**-0.5
    score = np.where(idx[:, None] < 0, -np.inf, score)
    top = np.maximum(score.max(-1), sink)[:, :, None]
    p = np.exp(score - top)
    return (p @ k / (p.sum(-1, keepdims=True) + np.exp(sink[:, None] - top))).astype(f32)

# === 6. MoE ===================================================================================

def gate_scores(x, w):
    """sqrt(softplus(x W^T)), [n][experts]"""
    return np.sqrt(np.logaddexp(0, linear(x, w).astype(f64))).astype(f32)

def top_experts(biased, k):
    """The k best of s + bias, descending, ties to the lower expert."""
    return np.argsort(-biased, axis=1, kind="stable")[:, :k]

def gate_weights(scores, ids, scaling):
    """[n][k]: the chosen scores to sum `scaling`; the bias has no part in them."""
    s = np.take_along_axis(scores, ids, axis=1).astype(f64)
    return (s / s.sum(1, keepdims=True) * scaling).astype(f32)

def swiglu(gate, up, limit):
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (gate * sigmoid(gate) * up).astype(f32)

# === 7. The model =============================================================================

class LayerState:
    """What one block remembers of the tokens before: all its KV."""

    def __init__(self, c, ratio):
        self.n_tok = 0
        self.window = np.zeros((0, c.head_dim), f32)         # the last sliding_window - 1 rows
        self.compressed = np.zeros((0, c.head_dim), f32)     # one row an entry
        self.index_keys = np.zeros((0, c.index_head_dim), f32)
        self.pending = fresh_pending(ratio, c.head_dim)
        self.index_pending = fresh_pending(ratio, c.index_head_dim)

class Model:
    """One checkpoint; sessions are lists of LayerState that start() makes.

    A `trace` is a dict that a call fills with what it saw of its tokens, by golden-file names.
    """

    def __init__(self, path, rounding=True, rope_bf16=True):
        self.c, self.t = load_checkpoint(path)
        self.rounding = rounding
        self.rope_bf16 = rounding and rope_bf16
        blocks = {name[:6] for name in self.t if name.startswith("mtp.")}
        self.has_mtp = blocks == {"mtp.0."}              # with mtp.1. they are DSpark's: not ours
        self.matrices = {}                               # dequantized, F64, as they are needed
        c = self.c
        self.freq_window = inv_freq(c.qk_rope_head_dim, c.rope_theta)
        self.freq_compressed = inv_freq(c.qk_rope_head_dim, c.compress_rope_theta, c.rope_scaling)

    def start(self):
        """Fresh state: one LayerState a layer, then the MTP block's if there is one."""
        n_blocks = self.c.num_hidden_layers + self.has_mtp
        return [LayerState(self.c, ratio) for ratio in self.c.compress_ratios[:n_blocks]]

    def forward(self, state, tokens, trace=None):
        """Run tokens [n] after those that state has seen -> streams after the last layer."""
        h = np.repeat(self.t["embed.weight"][tokens][:, None], self.c.hc_mult, axis=1)
        for l in range(self.c.num_hidden_layers):
            seen = {}
            h = self.block(l, h, tokens, state[l], seen)
            if trace is not None:
                trace.update({f"layer{l}.{name}": x for name, x in seen.items()})
        return h

    def mtp(self, state, h, next_tokens):
        """Streams h at positions t and the tokens at t+1 -> streams that predict t+2."""
        e = self.norm(self.t["embed.weight"][next_tokens], "mtp.0.enorm")
        e = self.linear_aq(e, "mtp.0.e_proj")
        h = self.linear_aq(self.norm(h, "mtp.0.hnorm"), "mtp.0.h_proj") + e[:, None]
        return self.block(self.c.num_hidden_layers, h, next_tokens, state[-1])

    def head(self, h, prefix=""):
        """Streams -> logits [n][vocab]; prefix "mtp.0." for the MTP block's."""
        y = hc_head(h, *self.hc_weights(prefix + "hc_head"), self.c)
        return linear(self.norm(y, prefix + "norm"), self.matrix("head"))

    # --- one block: hc around attention, hc around moe ---

    def block(self, l, h, tokens, st, seen=None):
        """h [n][hc][dim] -> h; l = num_hidden_layers is the MTP block. seen: trace of one block."""
        seen = {} if seen is None else seen
        is_mtp = l == self.c.num_hidden_layers
        name = "mtp.0" if is_mtp else f"layers.{l}"
        x, post, comb = hc_pre(h, *self.hc_weights(f"{name}.hc_attn"), self.c)
        x = self.norm(x, f"{name}.attn_norm")
        y = self.attention(f"{name}.attn", x, self.c.compress_ratios[l], st, seen)
        h = seen["after_attn"] = hc_post(y, h, post, comb)

        x, post, comb = hc_pre(h, *self.hc_weights(f"{name}.hc_ffn"), self.c)
        x = self.norm(x, f"{name}.ffn_norm")
        y = self.moe(f"{name}.ffn", x, tokens, l < self.c.num_hash_layers, seen)
        h = seen["streams"] = hc_post(y, h, post, comb)
        return h

    def attention(self, name, x, ratio, st, seen):
        """x [n][dim], normalized, at positions st.n_tok.. -> [n][dim]; appends their KV to st."""
        c, n = self.c, len(x)
        pos = st.n_tok + np.arange(n)
        freq = self.freq_compressed if ratio else self.freq_window
        qr = self.norm(self.linear_aq(x, f"{name}.wq_a"), f"{name}.q_norm")
        q = self.linear_aq(qr, f"{name}.wq_b").reshape(n, c.num_attention_heads, c.head_dim)
        q = rope(rmsnorm(q, 1, c.rms_norm_eps), pos, freq)
        kv = self.norm(self.linear_aq(x, f"{name}.wkv"), f"{name}.kv_norm")
        window = np.concatenate([st.window, self.store_kv(rope(kv, pos, freq))])

        idx = pos[:, None] - np.arange(c.sliding_window)     # visible positions, then their rows
        idx = np.where(idx >= 0, idx - (st.n_tok - len(st.window)), -1)
        if ratio:
            self.compress(name, x, ratio, st)
            n_visible = (pos + 1) // ratio
            if ratio == 4:
                entries = seen["index_topk"] = self.indexer(name, x, qr, pos, n_visible, st)
            else:
                entries = np.tile(np.arange(len(st.compressed)), (n, 1))
                entries = np.where(entries < n_visible[:, None], entries, -1)
            idx = np.hstack([idx, np.where(entries >= 0, len(window) + entries, -1)])
        kv = np.concatenate([window, st.compressed])
        o = rope(attend(q, kv, self.t[f"{name}.attn_sink"], idx), pos, freq, inverse=True)
        st.window = window[max(0, len(window) - c.sliding_window + 1):]
        st.n_tok += n

        o = o.reshape(n, c.o_groups, -1).transpose(1, 0, 2)  # [g][n][heads/g*hd]
        wo_a = self.matrix(f"{name}.wo_a").reshape(c.o_groups, c.o_lora_rank, -1)
        o = (o.astype(f64) @ wo_a.transpose(0, 2, 1)).astype(f32)
        return self.linear_aq(o.transpose(1, 0, 2).reshape(n, -1), f"{name}.wo_b")

    def compress(self, name, x, ratio, st):
        """Append to st the compressed entries, and at ratio 4 the index keys, that x completes."""
        c, freq = self.c, self.freq_compressed
        entries, st.pending = compressor(
            x, st.n_tok, st.pending, self.compressor_weights(f"{name}.compressor"),
            ratio, freq, c.rms_norm_eps)
        st.compressed = np.concatenate([st.compressed, self.store_kv(entries)])
        if ratio == 4:
            keys, st.index_pending = compressor(
                x, st.n_tok, st.index_pending,
                self.compressor_weights(f"{name}.indexer.compressor"),
                ratio, freq, c.rms_norm_eps)
            st.index_keys = np.concatenate([st.index_keys, self.store_index(keys)])

    def indexer(self, name, x, qr, pos, n_visible, st):
        """The entries that each token attends to, [n][index_topk] ascending, -1 = none."""
        c = self.c
        q = self.linear_aq(qr, f"{name}.indexer.wq_b")
        q = q.reshape(len(x), c.index_n_heads, c.index_head_dim)
        q = self.store_index(rope(q, pos, self.freq_compressed))
        w = linear(x, self.matrix(f"{name}.indexer.weights_proj"))
        w = w * f32((c.index_head_dim * c.index_n_heads)**-0.5)
        return index_topk(index_scores(q, st.index_keys, w), n_visible, c.index_topk)

    def moe(self, name, x, tokens, by_token_id, seen):
        """x [n][dim], normalized -> [n][dim]: the routed experts of each token and the shared."""
        c = self.c
        scores = gate_scores(x, self.matrix(f"{name}.gate"))
        if by_token_id:
            ids = self.t[f"{name}.gate.tid2eid"][tokens]
        else:
            ids = top_experts(scores + self.t[f"{name}.gate.bias"], c.num_experts_per_tok)
        weights = gate_weights(scores, ids, c.routed_scaling_factor)
        seen["expert_ids"], seen["expert_weights"] = ids, weights
        y = np.zeros_like(x)
        for e in np.unique(ids):
            row, place = np.nonzero(ids == e)
            y[row] += self.expert(f"{name}.experts.{e}", x[row], weights[row, place, None])
        return y + self.expert(f"{name}.shared_experts", x, f32(1))

    def expert(self, name, x, weight):
        gate, up = self.linear_aq(x, f"{name}.w1"), self.linear_aq(x, f"{name}.w3")
        return self.linear_aq(swiglu(gate, up, self.c.swiglu_limit) * weight, f"{name}.w2")

    # --- weights by name, and the roundings that the switches rule ---

    def matrix(self, name):
        """{name}.weight in F64 [out][in], scales multiplied in."""
        if name not in self.matrices:
            w, scale = self.t[f"{name}.weight"], self.t.get(f"{name}.scale")
            self.matrices[name] = w.astype(f64) if scale is None else dequant(w, scale)
        return self.matrices[name]

    def linear_aq(self, x, name):
        """An FP8 or FP4 linear: its input is rounded first."""
        return linear(aq128(x) if self.rounding else x, self.matrix(name))

    def norm(self, x, name):
        return rmsnorm(x, self.t[f"{name}.weight"], self.c.rms_norm_eps)

    def hc_weights(self, name):
        return [self.t[f"{name}_{part}"] for part in ("fn", "scale", "base")]

    def compressor_weights(self, name):
        return (self.matrix(f"{name}.wkv"), self.matrix(f"{name}.wgate"),
                self.t[f"{name}.ape"], self.t[f"{name}.norm.weight"])

    def store_kv(self, kv):
        """kv [n][hd] after rope, as the cache holds it."""
        cut = self.c.head_dim - self.c.qk_rope_head_dim
        if self.rounding:
            kv = kv_round(kv, self.c.qk_rope_head_dim)
        if self.rope_bf16:
            kv = np.concatenate([kv[:, :cut], bf16(kv[:, cut:])], axis=-1)
        return kv

    def store_index(self, x):
        """Index queries or keys [...][index_hd] after rope: rotated, then rounded."""
        x = hadamard(x)
        return in_blocks(x, 32, e2m1_block) if self.rounding else x

# === 8. Golden files: what a checkpoint answers to a prompt ===================================

def golden_positions(c, n):
    """Rows worth keeping of n: both ends, and around the first full window and HCA group."""
    edges = {0, 1, n - 1}
    for size in (c.sliding_window, *c.compress_ratios):
        edges |= {size - 1, size, size + 1} if size > 4 else set()
        edges |= {2 * size - 1} if size > c.sliding_window else set()
    return np.array(sorted(p for p in edges if 0 <= p < n))

def run_golden(model, ids, n_decode, positions):
    """Prefill ids, decode greedily: the arrays of one family (q or nq) of a golden file."""
    state, trace = model.start(), {}
    h = model.forward(state, ids, trace)
    out = {name: x[positions] for name, x in trace.items() if not name.endswith("after_attn")}
    out["logits"] = model.head(h)
    for l in range(model.c.num_hidden_layers):
        if model.c.compress_ratios[l]:
            out[f"layer{l}.compressed"] = state[l].compressed
        if model.c.compress_ratios[l] == 4:
            out[f"layer{l}.index_keys"] = state[l].index_keys
    token = out["logits"][-1].argmax()
    if model.has_mtp:
        out["mtp.next_token"] = np.array([token])
        h = model.mtp(state, h, np.append(ids[1:], token))
        out["mtp.logits_last"] = model.head(h, "mtp.0.")[-1]
    tokens, logits = [], np.zeros((0, model.c.vocab_size), f32)
    for _ in range(n_decode):
        tokens.append(token)
        logits = np.vstack([logits, model.head(model.forward(state, np.array([token])))])
        token = logits[-1].argmax()
    return out | {"decode.tokens": np.array(tokens, np.int64), "decode.logits": logits}

def golden(path, ids, n_decode, families):
    """Everything a golden file holds; q with the deliberate roundings, nq without them."""
    out = {"prompt.tokens": ids}
    for family in families:
        model = Model(path, rounding=family == "q")
        out["positions"] = golden_positions(model.c, len(ids))
        rows = run_golden(model, ids, n_decode, out["positions"])
        out |= {f"{family}.{name}": x for name, x in rows.items()}
    return out

# === 9. Unit files: every operation alone, on random inputs ===================================

FLASH = SimpleNamespace(
    rms_norm_eps=1e-6, hc_eps=1e-6, hc_sinkhorn_iters=20, qk_rope_head_dim=64, rope_theta=10000,
    compress_rope_theta=160000, routed_scaling_factor=1.5,
    rope_scaling={"factor": 16, "beta_fast": 32, "beta_slow": 1,
                  "original_max_position_embeddings": 65536})

def unit_outputs(u):
    """The inputs u of a unit file -> its outputs, by name."""
    c, out = FLASH, {"e4m3.table": E4M3, "e2m1.table": E2M1, "e8m0.table": E8M0}
    out["e4m3.round.y"] = e4m3(u["e4m3.round.x"])
    out["e2m1.round.y"] = e2m1(u["e2m1.round.x"])
    out["act_quant128.y"] = aq128(u["act_quant128.x"])
    out["act_quant128.scale"] = in_blocks(u["act_quant128.x"], 128, e4m3_scale)
    out["act_quant64.y"] = in_blocks(u["act_quant64.x"], 64, e4m3_block)
    out["fp4_act_quant.y"] = in_blocks(u["fp4_act_quant.x"], 32, e2m1_block)
    for op in ("fp8_linear", "fp4_linear"):
        w = dequant(u[f"{op}.weight"], u[f"{op}.scale"])
        out[f"{op}.y"] = linear(aq128(u[f"{op}.x"]), w)
        out[f"{op}.y_noquant"] = linear(u[f"{op}.x"], w)
    out["rmsnorm.y"] = rmsnorm(u["rmsnorm.x"], u["rmsnorm.weight"], c.rms_norm_eps)
    out["rmsnorm.y_no_weight"] = rmsnorm(u["rmsnorm.x"], 1, c.rms_norm_eps)
    out["hadamard.y"] = hadamard(u["hadamard.x"])

    freqs = {"plain": inv_freq(c.qk_rope_head_dim, c.rope_theta),
             "compressed": inv_freq(c.qk_rope_head_dim, c.compress_rope_theta, c.rope_scaling)}
    for op, freq in freqs.items():
        pos, x = u["rope.positions"], u[f"rope.{op}.x"]
        angle = np.multiply.outer(pos.astype(f64), freq.astype(f64))
        out[f"rope.{op}.inv_freq"] = freq
        out[f"rope.{op}.cos_f64angle"] = np.cos(angle).astype(f32)
        out[f"rope.{op}.sin_f64angle"] = np.sin(angle).astype(f32)
        out[f"rope.{op}.forward"] = rope(x, pos, freq)
        out[f"rope.{op}.inverse"] = rope(x, pos, freq, inverse=True)

    for name, x in zip(("pre", "post", "comb"), sinkhorn(
            u["sinkhorn.mixes"], u["sinkhorn.scale"], u["sinkhorn.base"], c)):
        out[f"sinkhorn.{name}"] = x
    out["hc.mixed_in"], post, comb = hc_pre(
        u["hc.streams"], u["hc.fn"], u["hc.scale"], u["hc.base"], c)
    out["hc.new_streams"] = hc_post(u["hc.sublayer_out"], u["hc.streams"], post, comb)
    out["hc_head.y"] = hc_head(
        u["hc_head.streams"], u["hc_head.fn"], u["hc_head.scale"], u["hc_head.base"], c)

    scores = out["gate.scores"] = gate_scores(u["gate.x"], u["gate.weight"])
    k = u["gate_hash.tid2eid"].shape[1]
    out["gate.ids"] = top_experts(scores + u["gate.bias"], k)
    out["gate_hash.ids"] = u["gate_hash.tid2eid"][u["gate_hash.tokens"]]
    for op in ("gate", "gate_hash"):
        out[f"{op}.weights"] = gate_weights(scores, out[f"{op}.ids"], c.routed_scaling_factor)
    out["swiglu.y"] = swiglu(u["swiglu.gate"], u["swiglu.up"], u["swiglu.limit"])
    out["swiglu.y_nolimit"] = swiglu(u["swiglu.gate"], u["swiglu.up"], np.inf)

    out["attention.o"] = attend(*(u[f"attention.{x}"] for x in ("q", "kv", "sink", "idx")))
    scores = out["index.scores"] = index_scores(u["index.q"], u["index.k"], u["index.w"])
    out["index.top8"] = index_topk(scores, np.full(len(scores), scores.shape[1]), 8)
    for op in ("overlap", "plain", "indexer"):
        x, *weights = (u[f"compressor.{op}.{w}"] for w in ("x", "wkv", "wgate", "ape", "norm"))
        ratio, d = len(weights[2]), len(weights[3])
        entries, _ = compressor(
            x, 0, fresh_pending(ratio, d), weights, ratio, freqs["compressed"], c.rms_norm_eps)
        if op == "indexer":
            entries = hadamard(entries)
        out[f"compressor.{op}.entries_noquant"] = entries
        out[f"compressor.{op}.entries"] = in_blocks(entries, 32, e2m1_block) \
            if op == "indexer" else kv_round(entries, c.qk_rope_head_dim)
    return out

UNIT_DTYPES = {"fp8_linear.weight": "F8_E4M3", "fp8_linear.scale": "F8_E8M0",
               "fp4_linear.scale": "F8_E8M0"}

def unit_inputs(seed):
    """Random inputs by name; the seed chooses shapes as well as values."""
    rng, u = np.random.default_rng(seed), {}

    def pick(*choices):
        return int(rng.choice(choices))

    def put(op, **arrays):
        u.update({f"{op}.{name}": np.asarray(x) for name, x in arrays.items()})

    def normal(*shape, std=1.0):
        return (rng.standard_normal(shape) * std).astype(f32)

    def round_cases(values):                             # each, halfway between two, and beside it
        half = (values[1:] + values[:-1]) / 2
        x = np.concatenate([values, half, np.nextafter(half, f32(0)), np.nextafter(half, f32(1e9)),
                            np.array([1e6, 1e-9], f32)])
        return np.concatenate([x, -x])

    def quant_cases(cols, largest):                      # zeros, tiny, huge, amax = largest * 2^k
        x = normal(10, cols) * f32(10) ** rng.uniform(-3, 3, (10, 1)).astype(f32)
        x[0], x[1], x[2] = 0, x[1] * f32(1e-6), x[2] * f32(1e27)
        for row, amax in ((3, largest * 32), (4, largest / 128)):
            x[row] = np.clip(x[row], -amax, amax)
            x[row, ::32] = amax
        return x

    put("e4m3.round", x=round_cases(E4M3[:127]))
    put("e2m1.round", x=round_cases(E2M1[:8]))
    put("act_quant128", x=quant_cases(pick(256, 320, 448), 448))
    put("act_quant64", x=quant_cases(pick(192, 256, 448), 448))
    put("fp4_act_quant", x=quant_cases(pick(64, 128), 6))
    rows, cols = pick(96, 192, 200), pick(192, 320, 384)
    put("fp8_linear", x=normal(pick(1, 5), cols),
        weight=E4M3[rng.integers(0, 127, (rows, cols)) + 128 * rng.integers(0, 2, (rows, cols))],
        scale=E8M0[rng.integers(115, 122, (-(-rows // 128), -(-cols // 128)))])
    rows, cols = pick(64, 96, 130), pick(128, 256, 320)
    put("fp4_linear", x=normal(pick(1, 5), cols),
        weight=rng.integers(-128, 128, (rows, cols // 2)).astype(np.int8),
        scale=E8M0[rng.integers(119, 125, (rows, cols // 32))])
    cols = pick(64, 200, 384)
    put("rmsnorm", x=normal(4, cols), weight=1 + normal(cols, std=.2))
    put("hadamard", x=normal(4, pick(64, 128)))
    put("rope", positions=np.append([0, 1, 65536, 2**20 - 1], rng.integers(2, 2**20, 3)))
    for op in ("rope.plain", "rope.compressed"):
        put(op, x=normal(7, 3, pick(64, 128, 192)))

    put("sinkhorn", mixes=normal(7, 24), scale=.5 + rng.random(3, f32), base=normal(24))
    dim = pick(64, 96, 160)
    put("hc", streams=normal(6, 4, dim, std=2), fn=normal(24, 4 * dim, std=.05),
        scale=.5 + rng.random(3, f32), base=normal(24), sublayer_out=normal(6, dim))
    put("hc_head", streams=u["hc.streams"], fn=normal(4, 4 * dim, std=.05),
        scale=.5 + rng.random(1, f32), base=normal(4))

    n_experts, k, cols = pick(8, 16, 40), pick(2, 4, 6), pick(64, 128)
    put("gate", x=normal(9, cols), weight=normal(n_experts, cols, std=.15), bias=normal(n_experts))
    u["gate.bias"][2] = u["gate.bias"].max()             # experts 2 and 5: often chosen, always
    for name in ("gate.weight", "gate.bias"):            # a tie
        u[name][5] = u[name][2]
    put("gate_hash", tokens=rng.integers(0, 32, 9),
        tid2eid=rng.permuted(np.tile(np.arange(n_experts), (32, 1)), axis=1)[:, :k])
    put("swiglu", gate=normal(4, 64, std=3), up=normal(4, 64, std=3), limit=np.array([2], f32))

    heads, d = pick(2, 4, 8), pick(64, 128, 192)
    idx = rng.permuted(np.tile(np.arange(40), (6, 1)), axis=1)[:, :24]
    idx[np.arange(24) >= np.array([1, 2, 10, 23, 24, 24])[:, None]] = -1
    put("attention", q=normal(6, heads, d), kv=normal(40, d), sink=normal(heads), idx=idx)
    heads, d = pick(1, 2, 4), pick(64, 128)
    put("index", q=normal(6, heads, d), k=normal(30, d), w=normal(6, heads))
    for op, ratio, d in (("overlap", 4, pick(128, 192, 256)), ("plain", pick(8, 32, 128), 128),
                         ("indexer", 4, pick(64, 128))):
        width = 2 * d if ratio == 4 else d
        put(f"compressor.{op}", x=normal(2 * ratio + pick(0, 1, 14), 32),
            wkv=normal(width, 32, std=.2), wgate=normal(width, 32, std=.3),
            ape=normal(ratio, width), norm=.5 + rng.random(d, f32))
    return u

# === 10. Command line =========================================================================

def main():
    parser = argparse.ArgumentParser(description="NumPy reference of DeepSeek-V4")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("golden", help="what a checkpoint directory answers to a prompt")
    p.add_argument("dir")
    p.add_argument("out")
    p.add_argument("--ids", required=True, metavar="FILE", help="token ids, as decimal text")
    p.add_argument("--decode", required=True, type=int, metavar="N", help="tokens to decode")
    p.add_argument("--no-rounding", action="store_true", help="the nq family alone")
    p = commands.add_parser("units", help="every operation alone, on random inputs")
    p.add_argument("out")
    p.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "golden":
        ids = np.array([int(i) for i in re.findall(r"\d+", pathlib.Path(args.ids).read_text())])
        families = ["nq"] if args.no_rounding else ["q", "nq"]
        save(args.out, golden(args.dir, ids, args.decode, families))
    else:
        u = unit_inputs(args.seed)
        save(args.out, u | unit_outputs(u), UNIT_DTYPES)


if __name__ == "__main__":
    main()
