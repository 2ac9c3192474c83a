"""train.py -- trains the demo model: DeepSeek-V4's whole graph, small, in PyTorch on a CPU.

    rows of ids (data.py) -> Model -> loss -> Muon (matrices) and AdamW (the rest) -> checkpoint
    Every forward runs on the weights as they will be stored, and rounds activations as inference
    will: gradients pass a rounding as if it were not there.  So what is exported is what was
    trained.  The indexer learns to imitate the attention: it alone has a loss of its own.

    python3 train.py train DIR ROWS STATE [--steps N]  train, or go on from STATE; export to DIR
    python3 train.py eval DIR --ids FILE...            mean NLL of a checkpoint, as `dsv4 eval`,
                                                       and how good the MTP block's drafts are
                     [--without acts|kv|index]...      with roundings of activations left out

Names and order are MODEL.md's.  Shapes: B rows of T tokens, N = B*T; streams are [hc][N][dim].
Contents   1 sizes   2 roundings   3 rope, norms, hyper-connections   4 attention   5 MoE
           6 the model   7 files   8 optimizers   9 training   10 command line
Needs      PyTorch 1.13 or later (Debian: python3-torch, with libopenblas0-openmp for speed)
Not here   text and tokenizer (data.py); number formats of files (tests/ref.py)
"""
import argparse
import json
import math
import pathlib
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import ref                                               # the NumPy reference: files, YaRN

# === 1. Sizes =================================================================================

CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4",
    "bos_token_id": 0, "eos_token_id": 1, "vocab_size": 2048, "hidden_size": 128,
    "num_hidden_layers": 5, "compress_ratios": [0, 0, 4, 32, 4, 0], "sliding_window": 64,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 80, "qk_rope_head_dim": 16,
    "q_lora_rank": 128, "o_lora_rank": 64, "o_groups": 2,
    "index_n_heads": 2, "index_head_dim": 64, "index_topk": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 128, "num_hash_layers": 1, "swiglu_limit": 10.0,
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "expert_dtype": "fp4", "hidden_act": "silu",
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-06, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "compress_rope_theta": 160000,
    "rope_scaling": {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 65536},
    "max_position_embeddings": 1048576, "num_nextn_predict_layers": 1,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
    "tie_word_embeddings": False, "torch_dtype": "bfloat16"}

# (rows of this length, rows a step, until this part of all steps); lengths are data.py's
PHASES = [(256, 24, .5), (512, 12, .8), (2048, 4, 1.)]
STEPS, WORKERS = 1600, 2
MUON_RATE, ADAM_RATE = 8e-3, 3e-3
MTP_LOSS, INDEX_LOSS, BIAS_STEP = .2, 1., 1e-3
FP8 = r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|shared_experts|[eh]_proj"
FP4 = r"\.experts\."
MUON = FP8 + "|" + FP4 + r"|compressor\.w"

# === 2. Roundings, straight-through ===========================================================

WITHOUT = set()                      # "acts", "kv", "index": left out by eval, never in training

class Round(torch.autograd.Function):
    """x rounded by a function; its gradient is that of x."""

    @staticmethod
    def forward(ctx, x, how):
        return how(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None

def exponent(x):
    """2^floor(log2 |x|), read off the bits."""
    return (x.view(torch.int32) & 0x7f800000).view(torch.float32)

def ceil_pow2(x):
    return (x.view(torch.int32) + 0x7fffff & 0x7f800000).view(torch.float32)

def round_to(x, mantissa_bits, least):
    """Ties to even: adding 1.5 * 2^(23-bits) ulps leaves no bits below the mantissa's."""
    magic = exponent(x).clamp_min_(least).mul_(1.5 * 2**(23 - mantissa_bits))
    return (x + magic).sub_(magic)

def e4m3_blocks(x, size):
    """x [.., n*size or less than size] in blocks of its last axis"""
    b = x.contiguous().view(*x.shape[:-1], -1, min(size, x.shape[-1]))
    s = ceil_pow2(b.abs().amax(-1, keepdim=True).clamp_min_(1e-4) * np.float32(1 / 448).item())
    return (round_to((b / s).clamp_(-448, 448), 3, 2.**-6) * s).view(x.shape)

def e2m1_blocks(x):
    b = x.contiguous().view(*x.shape[:-1], -1, 32)
    s = ceil_pow2(b.abs().amax(-1, keepdim=True).clamp_min_(6 * 2.**-126) / 6)
    return (round_to(b / s, 1, 1.) * s).view(x.shape)

def aq128(x):
    return x if "acts" in WITHOUT else Round.apply(x, lambda x: e4m3_blocks(x, 128))

def kv_round(x, cut):
    """The first `cut` dims to e4m3, the rotated ones to BF16."""
    return x if "kv" in WITHOUT else Round.apply(x, lambda x: torch.cat(
        [e4m3_blocks(x[..., :cut], 64), x[..., cut:].bfloat16().float()], -1))

def fp8_scale(w):
    """A power of two for each 128x128 of w [out][in], shaped [rows/128][cols/128]"""
    rows, cols = (-(-n // 128) for n in w.shape)
    b = F.pad(w, (0, cols * 128 - w.shape[1], 0, rows * 128 - w.shape[0]))
    amax = b.view(rows, 128, cols, 128).abs().amax((1, 3))
    return ceil_pow2(amax.clamp_min(1e-4) / 448)

def fp8_round(w):
    s = fp8_scale(w).repeat_interleave(128, 0).repeat_interleave(128, 1)[:len(w), :w.shape[1]]
    return round_to((w / s).clamp_(-448, 448), 3, 2.**-6) * s

def bf16_round(w):
    return w.bfloat16().float()

def storage(name):
    """How a parameter is stored: a rounding, or None for F32."""
    if re.search(FP4, name):
        return e2m1_blocks
    if re.search(FP8, name):
        return fp8_round
    return None if re.search("hc_|sink|ape|bias|tid2eid", name) else bf16_round

# === 3. Rope, norms, hyper-connections ========================================================

def rope_table(freq, pos):
    angle = np.multiply.outer(pos.astype(np.float64), freq.astype(np.float64))
    return torch.from_numpy(np.cos(angle)).float(), torch.from_numpy(np.sin(angle)).float()

def rope(x, table, inverse=False):
    """Turn the last dims of x [B][T][..][d]; table is (cos, sin), each [T][rope/2]"""
    cos, sin = (t.view(len(t), *[1] * (x.dim() - 3), -1) for t in table)
    sin = -sin if inverse else sin
    cut = x.shape[-1] - 2 * cos.shape[-1]
    a, b = x[..., cut::2], x[..., cut + 1::2]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :cut], turned], -1)

def rmsnorm(x, weight, eps):
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight

class Mix(torch.autograd.Function):
    """mix [in][out][N], h [in][N][dim] -> [out][N][dim]: each token's own small matrix."""

    @staticmethod
    def forward(ctx, mix, h):
        ctx.save_for_backward(mix, h)
        out = mix[0, :, :, None] * h[0]
        for i in range(1, len(h)):
            for j in range(len(out)):
                out[j].addcmul_(mix[i, j, :, None], h[i])
        return out

    @staticmethod
    def backward(ctx, g):
        mix, h = ctx.saved_tensors
        dh, dmix = mix[:, 0, :, None] * g[0], torch.empty_like(mix)
        for i in range(len(h)):
            for j in range(len(g)):
                dmix[i, j] = (g[j] * h[i]).sum(-1)
                if j:
                    dh[i].addcmul_(mix[i, j, :, None], g[j])
        return dmix, dh

def hc_mixes(h, fn, c):
    """[rows of fn][N]: fn times the normalized concatenation of the streams"""
    r = torch.rsqrt(h.square().mean((0, 2)) + c.rms_norm_eps)
    fn = fn.view(len(fn), len(h), -1).transpose(0, 1)
    return (fn @ h.transpose(1, 2)).sum(0) * r

def hc_pre(h, fn, scale, base, c):
    """Streams -> the sublayer's input [N][dim], and post [hc][N], comb [hc][hc][N]"""
    hc, m, base = c.hc_mult, hc_mixes(h, fn, c), base[:, None]
    pre = torch.sigmoid(m[:hc] * scale[0] + base[:hc]) + c.hc_eps
    post = 2 * torch.sigmoid(m[hc:2 * hc] * scale[1] + base[hc:2 * hc])
    comb = (m[2 * hc:] * scale[2] + base[2 * hc:]).view(hc, hc, -1)
    comb = torch.softmax(comb, 1) + c.hc_eps
    comb = comb / (comb.sum(0, keepdim=True) + c.hc_eps)
    for _ in range(c.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
        comb = comb / (comb.sum(0, keepdim=True) + c.hc_eps)
    return Mix.apply(pre[:, None], h)[0], post, comb

def hc_post(y, h, post, comb):
    return post[:, :, None] * y + Mix.apply(comb, h)

def hc_head(h, fn, scale, base, c):
    pre = torch.sigmoid(hc_mixes(h, fn, c) * scale + base[:, None]) + c.hc_eps
    return Mix.apply(pre[:, None], h)[0]

# === 4. Attention: window, compressed entries, indexer ========================================

def compressor(x, w, name, ratio, table, c):
    """x [B][T][dim] -> entries [B][T/ratio][d], rotated, not yet rounded"""
    B, T, _ = x.shape
    norm = w[f"{name}.norm.weight"]
    shape = (B, T // ratio, ratio, -1)
    kv = (x @ w[f"{name}.wkv.weight"].t()).view(shape)
    score = (x @ w[f"{name}.wgate.weight"].t()).view(shape) + w[f"{name}.ape"]
    if ratio == 4:                                       # the group before through the low half
        d = len(norm)
        kv = torch.cat([F.pad(kv[:, :-1, :, :d], (0, 0, 0, 0, 1, 0)), kv[..., d:]], 2)
        score = torch.cat([F.pad(score[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=-1e30),
                           score[..., d:]], 2)
    entries = (torch.softmax(score, 2) * kv).sum(2)
    first = tuple(t[::ratio] for t in table)
    return rope(rmsnorm(entries, norm, c.rms_norm_eps), first)

def window_scores(q, kv, W):
    """(q.k [B][T][H][2W], the keys [B][T/W][2W][hd]): a block of W sees itself and the one before

    Query i of a block may see keys i+1 .. i+W of its 2W, in the first block only the last W.
    """
    B, T, H, hd = q.shape
    own = kv.view(B, -1, W, hd)
    keys = torch.cat([F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own], 2)
    s = (q.view(B, -1, W * H, hd) @ keys.transpose(2, 3)).view(B, -1, W, H, 2 * W)
    i, j = torch.arange(W)[:, None], torch.arange(2 * W)
    hidden = ((j <= i) | (j > i + W)).expand(T // W, W, 2 * W).clone()
    hidden[0, :, :W] = True
    return s.masked_fill(hidden[None, :, :, None], -1e30).view(B, T, H, 2 * W), keys

def store_index(x, hadamard):
    return x if "index" in WITHOUT else Round.apply(x @ hadamard, e2m1_blocks)

class Model:
    """The graph; weights come in as a dict, as quantized() makes it."""

    def __init__(self, c):
        self.c = c
        d = c.index_head_dim
        self.hadamard = torch.from_numpy(ref.hadamard(np.eye(d, dtype=np.float32)))
        self.tables = {}
        self.load, self.kept = {}, {}                    # of the last forward: tokens by expert,
                                                         # the share of attention not cut off

    def table(self, ratio, T):
        """Of rotation at positions 0..T-1; layers that compress have their own angles."""
        c, key = self.c, (ratio > 0, T)
        if key not in self.tables:
            freq = ref.inv_freq(c.qk_rope_head_dim, c.compress_rope_theta, c.rope_scaling) \
                if ratio else ref.inv_freq(c.qk_rope_head_dim, c.rope_theta)
            self.tables[key] = rope_table(freq, np.arange(T))
        return self.tables[key]

    def attention(self, w, name, x, ratio):
        """x [B][T][dim], normalized -> [B][T][dim], and the indexer's loss"""
        c = self.c
        B, T, _ = x.shape
        H, hd, table, eps = c.num_attention_heads, c.head_dim, self.table(ratio, T), c.rms_norm_eps
        cut = hd - c.qk_rope_head_dim
        xq = aq128(x)
        qr = rmsnorm(xq @ w[f"{name}.wq_a.weight"].t(), w[f"{name}.q_norm.weight"], eps)
        q = (aq128(qr) @ w[f"{name}.wq_b.weight"].t()).view(B, T, H, hd)
        q = rope(rmsnorm(q, None, eps), table) * hd**-0.5
        kv = rmsnorm(xq @ w[f"{name}.wkv.weight"].t(), w[f"{name}.kv_norm.weight"], eps)
        kv = kv_round(rope(kv, table), cut)

        scores, keys = window_scores(q, kv, c.sliding_window)
        sink = w[f"{name}.attn_sink"][None, None, :, None].expand(B, T, H, 1)
        loss, n_window = x.new_zeros(()), scores.shape[-1]
        if ratio:
            entries = kv_round(compressor(x, w, f"{name}.compressor", ratio, table, c), cut)
            more = (q.view(B, T * H, hd) @ entries.transpose(1, 2)).view(B, T, H, -1)
            visible = torch.arange(T // ratio) < (torch.arange(1, T + 1) // ratio)[:, None]
            chosen = visible
            if ratio == 4:
                chosen, loss = self.indexer(w, f"{name}.indexer", x.detach(), qr.detach(), visible,
                                            table, torch.cat([scores, more, sink], -1).detach())
                chosen = chosen[:, :, None]
            else:
                chosen = chosen[None, :, None]
            scores = torch.cat([scores, more.masked_fill(~chosen, -1e30)], -1)
        p = torch.softmax(torch.cat([scores, sink], -1), -1)
        o = (p[..., :n_window].reshape(B, keys.shape[1], -1, n_window) @ keys).view(B, T * H, hd)
        if ratio:
            o = o + p[..., n_window:-1].reshape(B, T * H, -1) @ entries
        o = rope(o.view(B, T, H, hd), table, inverse=True)

        o = o.reshape(B * T, c.o_groups, -1).transpose(0, 1)
        o = o @ w[f"{name}.wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1).transpose(1, 2)
        o = o.transpose(0, 1).reshape(B, T, -1)
        return aq128(o) @ w[f"{name}.wo_b.weight"].t(), loss

    def indexer(self, w, name, x, qr, visible, table, scores):
        """(which entries each token attends to [B][T][E], its loss)

        scores are the attention's, over window, all entries and sink: the share that they give
        to each visible entry is what the indexer's own softmax should be.
        """
        c, (B, T, _), E = self.c, x.shape, visible.shape[1]
        q = (aq128(qr) @ w[f"{name}.wq_b.weight"].t()).view(B, T, c.index_n_heads, -1)
        q = store_index(rope(q, table), self.hadamard)
        k = store_index(compressor(x, w, f"{name}.compressor", 4, table, c), self.hadamard)
        by = (x @ w[f"{name}.weights_proj.weight"].t()) * (c.index_head_dim * c.index_n_heads)**-0.5
        dots = (q.view(B, -1, c.index_head_dim) @ k.transpose(1, 2)).view(B, T, -1, E)
        own = (torch.relu(dots) * by[..., None]).sum(2).masked_fill(~visible, -1e30)
        with torch.no_grad():
            best = torch.sort(own, dim=-1, descending=True, stable=True).indices[..., :c.index_topk]
            chosen = torch.zeros_like(own, dtype=torch.bool).scatter_(-1, best, True) & visible
            n_window = scores.shape[-1] - E - 1
            scores[..., n_window:-1].masked_fill_(~visible[None, :, None], -1e30)
            share = torch.softmax(scores, -1)[..., n_window:-1].mean(2)
            self.kept[name] = (share * chosen).sum() / share.sum().clamp_min(1e-9)
        return chosen, -(share * torch.log_softmax(own, -1)).sum(-1).mean()

    # === 5. MoE ===

    def moe(self, w, name, x, tokens):
        """x [N][dim], normalized -> [N][dim]; tokens [N] in hash layers, else None"""
        c, xq, k = self.c, aq128(x), self.c.num_experts_per_tok
        s = torch.sqrt(F.softplus(x @ w[f"{name}.gate.weight"].t()))
        if tokens is not None:
            ids = w[f"{name}.gate.tid2eid"][tokens]
        else:
            biased = s.detach() + w[f"{name}.gate.bias"]
            ids = torch.sort(biased, dim=-1, descending=True, stable=True).indices[:, :k]
        weight = s.gather(1, ids)
        weight = weight / weight.sum(-1, keepdim=True) * c.routed_scaling_factor

        order = torch.sort(ids.flatten(), stable=True).indices  # the tokens of each expert together
        counts = torch.bincount(ids.flatten(), minlength=c.n_routed_experts)
        self.load[name] = counts.float()
        row, n = order // k, counts.tolist()

        def experts(x, which):
            parts = [p @ m.t() for p, m in zip(x.split(n), w[f"{name}.experts.{which}"])]
            return torch.cat(parts)
        xs = xq[row]
        a = swiglu(experts(xs, "w1"), experts(xs, "w3"), c.swiglu_limit)
        a = aq128(a * weight.flatten()[order][:, None])
        y = torch.zeros_like(x).index_add(0, row, experts(a, "w2"))
        shared = f"{name}.shared_experts"
        a = swiglu(xq @ w[f"{shared}.w1.weight"].t(), xq @ w[f"{shared}.w3.weight"].t(),
                   c.swiglu_limit)
        return y + aq128(a) @ w[f"{shared}.w2.weight"].t()

    # === 6. The model ===

    def block(self, w, name, h, tokens, ratio, hashed):
        """streams [hc][N][dim] of tokens [B][T] -> (streams, the indexer's loss)"""
        c = self.c
        x, post, comb = hc_pre(h, *hc_weights(w, f"{name}.hc_attn"), c)
        x = rmsnorm(x, w[f"{name}.attn_norm.weight"], c.rms_norm_eps)
        y, loss = self.attention(w, f"{name}.attn", x.view(*tokens.shape, -1), ratio)
        h = hc_post(y.reshape(x.shape), h, post, comb)
        x, post, comb = hc_pre(h, *hc_weights(w, f"{name}.hc_ffn"), c)
        x = rmsnorm(x, w[f"{name}.ffn_norm.weight"], c.rms_norm_eps)
        y = self.moe(w, f"{name}.ffn", x, tokens.flatten() if hashed else None)
        return hc_post(y, h, post, comb), loss

    def forward(self, w, tokens, mtp=True):
        """tokens [B][T], T a multiple of window and ratios -> logits of t+1 [N][vocab], of t+2
        by the MTP block (or None), and the indexers' loss"""
        c, loss = self.c, 0
        h = w["embed.weight"][tokens.flatten()].expand(c.hc_mult, -1, -1).contiguous()
        for l in range(c.num_hidden_layers):
            h, more = self.block(w, f"layers.{l}", h, tokens, c.compress_ratios[l],
                                 l < c.num_hash_layers)
            loss = loss + more
        logits = self.head(w, "", h)
        if not mtp:
            return logits, None, loss
        later = F.pad(tokens[:, 1:], (0, 1))             # the last has none: no loss looks there
        e = rmsnorm(w["embed.weight"][later.flatten()], w["mtp.0.enorm.weight"], c.rms_norm_eps)
        h = rmsnorm(h, w["mtp.0.hnorm.weight"], c.rms_norm_eps)
        h = aq128(h) @ w["mtp.0.h_proj.weight"].t() + aq128(e) @ w["mtp.0.e_proj.weight"].t()
        h, more = self.block(w, "mtp.0", h, later, c.compress_ratios[-1], False)
        return logits, self.head(w, "mtp.0.", h), loss + more

    def head(self, w, prefix, h):
        y = hc_head(h, *hc_weights(w, f"{prefix}hc_head"), self.c)
        return rmsnorm(y, w[f"{prefix}norm.weight"], self.c.rms_norm_eps) @ w["head.weight"].t()

def hc_weights(w, name):
    return [w[f"{name}_{part}"] for part in ("fn", "scale", "base")]

def swiglu(gate, up, limit):
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

# === 7. Parameters and files ==================================================================

def compressor_shapes(at, ratio, d, dim):
    wide = 2 * d if ratio == 4 else d
    return {f"{at}.wkv.weight": (wide, dim), f"{at}.wgate.weight": (wide, dim),
            f"{at}.ape": (ratio, wide), f"{at}.norm.weight": (d,)}

def block_shapes(c, ratio, hashed):
    dim, hd, H, q_lora = c.hidden_size, c.head_dim, c.num_attention_heads, c.q_lora_rank
    inter, experts, mix = c.moe_intermediate_size, c.n_routed_experts, (2 + c.hc_mult) * c.hc_mult
    b = {}
    for part in ("hc_attn", "hc_ffn"):
        b |= {f"{part}_fn": (mix, c.hc_mult * dim), f"{part}_scale": (3,), f"{part}_base": (mix,)}
    b |= {"attn_norm.weight": (dim,), "ffn_norm.weight": (dim,), "attn.wq_a.weight": (q_lora, dim),
          "attn.q_norm.weight": (q_lora,), "attn.wq_b.weight": (H * hd, q_lora),
          "attn.wkv.weight": (hd, dim), "attn.kv_norm.weight": (hd,),
          "attn.wo_a.weight": (c.o_groups * c.o_lora_rank, H * hd // c.o_groups),
          "attn.wo_b.weight": (dim, c.o_groups * c.o_lora_rank), "attn.attn_sink": (H,)}
    if ratio:
        b |= compressor_shapes("attn.compressor", ratio, hd, dim)
    if ratio == 4:
        b |= {"attn.indexer.wq_b.weight": (c.index_n_heads * c.index_head_dim, q_lora),
              "attn.indexer.weights_proj.weight": (c.index_n_heads, dim)}
        b |= compressor_shapes("attn.indexer.compressor", 4, c.index_head_dim, dim)
    b["ffn.gate.weight"] = experts, dim
    b |= {"ffn.gate.tid2eid": (c.vocab_size, c.num_experts_per_tok)} if hashed else \
         {"ffn.gate.bias": (experts,)}
    for w, shape in (("w1", (inter, dim)), ("w2", (dim, inter)), ("w3", (inter, dim))):
        b |= {f"ffn.experts.{w}": (experts, *shape), f"ffn.shared_experts.{w}.weight": shape}
    return b

def shapes(c):
    """name -> shape of all parameters; experts of a layer are one [experts][out][in]."""
    dim, hc = c.hidden_size, c.hc_mult
    out = {"embed.weight": (c.vocab_size, dim), "head.weight": (c.vocab_size, dim)}
    head = {"norm.weight": (dim,), "hc_head_fn": (hc, hc * dim), "hc_head_base": (hc,),
            "hc_head_scale": (1,)}
    mtp = {"e_proj.weight": (dim, dim), "h_proj.weight": (dim, dim), "enorm.weight": (dim,),
           "hnorm.weight": (dim,)}
    for l, ratio in enumerate(c.compress_ratios[:-1]):
        block = block_shapes(c, ratio, l < c.num_hash_layers)
        out |= {f"layers.{l}.{name}": shape for name, shape in block.items()}
    block = block_shapes(c, c.compress_ratios[-1], False) | mtp | head
    return out | head | {f"mtp.0.{name}": shape for name, shape in block.items()}

def initial(c):
    """Every sublayer reads a stream of its own, writes to all, and keeps the streams apart."""
    params, n_read = {}, 0
    for name, shape in shapes(c).items():
        if re.search(r"norm\.weight|scale", name):
            p = torch.ones(shape)
        elif name.endswith("_base"):
            p = torch.zeros(shape)
            p[:c.hc_mult] = -2.
            p[n_read % c.hc_mult] = 2.
            n_read += 1
            if len(p) > c.hc_mult:
                p[2 * c.hc_mult:] = 4 * torch.eye(c.hc_mult).flatten()
        elif re.search("sink|bias", name):
            p = torch.zeros(shape)
        elif "tid2eid" in name:                          # different experts, drawn once
            order = torch.rand(shape[0], c.n_routed_experts,
                               generator=torch.Generator().manual_seed(2)).argsort(1)
            params[name] = order[:, :shape[1]].contiguous()
            continue
        else:
            std = .3 if "embed" in name else .02 if "head.w" in name else .005 if "_fn" in name \
                else 1. if "ape" in name else shape[-1]**-.5
            p = torch.randn(shape) * std
        params[name] = p.requires_grad_("bias" not in name)
    return params

def quantized(params):
    """The weights as they are stored; gradients go to params."""
    how = {name: storage(name) for name in params}
    return {name: Round.apply(p, how[name]) if how[name] else p for name, p in params.items()}

def export(directory, params, c):
    """config.json, generation_config.json and the safetensors, by their official names"""
    tensors, dtypes = {}, {}

    def put(name, x, dtype):
        tensors[name], dtypes[name] = x, dtype
    for name, p in sorted(params.items()):
        x = p.detach()
        how = storage(name)
        if how is fp8_round:
            s = fp8_scale(x)
            grid = s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:len(x), :x.shape[1]]
            put(name, (fp8_round(x) / grid).numpy(), "F8_E4M3")
            put(name.replace(".weight", ".scale"), s.numpy(), "F8_E8M0")
        elif how is e2m1_blocks:
            at, which = name.rsplit(".", 1)
            for e, m in enumerate(x):
                s = ceil_pow2(m.view(len(m), -1, 32).abs().amax(-1).clamp_min(6 * 2.**-126) / 6)
                value = (e2m1_blocks(m) / s.repeat_interleave(32, 1)).numpy()
                code = np.searchsorted(ref.E2M1[:8], np.abs(value)) + 8 * np.signbit(value)
                put(f"{at}.{e}.{which}.weight",
                    (code[:, ::2] | code[:, 1::2] << 4).astype(np.uint8).view(np.int8), "I8")
                put(f"{at}.{e}.{which}.scale", s.numpy(), "F8_E8M0")
        else:
            kind = "BF16" if how else "F32" if x.is_floating_point() else "I64"
            put(name, (how(x) if how else x).numpy(), kind)
    directory.mkdir(parents=True, exist_ok=True)
    file = "model-00001-of-00001.safetensors"
    ref.save(directory / file, tensors, dtypes)
    data = (directory / file).read_bytes()
    index = {"metadata": {"total_size": len(data) - 8 - int.from_bytes(data[:8], "little")},
             "weight_map": {name: file for name in sorted(tensors)}}
    general = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1,
               "do_sample": False}
    for name, data in (("model.safetensors.index.json", index), ("config.json", vars(c)),
                       ("generation_config.json", general)):
        (directory / name).write_text(json.dumps(data, indent=1) + "\n")

def import_weights(directory):
    """(config, weights) of a checkpoint: what quantized() gave when it was exported"""
    c, tensors = ref.load_checkpoint(directory)

    def matrix(name):
        x, scale = tensors[name], tensors.get(re.sub(r"\.weight$|$", ".scale", name, count=1))
        return torch.tensor(x if scale is None else ref.dequant(x, scale).astype(np.float32))

    def experts(name):
        at, which = name.rsplit(".", 1)
        return torch.stack([matrix(f"{at}.{e}.{which}.weight") for e in range(c.n_routed_experts)])
    return c, {n: experts(n) if ".experts." in n else matrix(n) for n in shapes(c)}

# === 8. Optimizers ============================================================================

def orthogonal(g):
    """Newton-Schulz: g [..][rows][cols] with all its singular values near 1"""
    tall = g.shape[-2] > g.shape[-1]
    x = g.transpose(-1, -2) if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(-1, -2) if tall else x

class Optimizer:
    """Muon with Nesterov momentum for matrices, AdamW for the rest; state is name -> tensors."""

    def __init__(self, params):
        self.muon = {n: p for n, p in params.items() if re.search(MUON, n) and p.dim() > 1}
        self.adam = {n: p for n, p in params.items() if p.requires_grad and n not in self.muon}
        self.m = {n: torch.zeros_like(p) for n, p in {**self.muon, **self.adam}.items()}
        self.v = {n: torch.zeros_like(p) for n, p in self.adam.items()}

    @torch.no_grad()
    def step(self, t, rate):
        for n, p in self.muon.items():
            if p.grad is None:                           # the MTP block has its turn each 2nd step
                continue
            self.m[n].mul_(.95).add_(p.grad)
            o = orthogonal(p.grad + .95 * self.m[n])
            p.mul_(1 - .05 * rate * MUON_RATE)
            p.sub_(o, alpha=rate * MUON_RATE * .2 * max(p.shape[-2:])**.5)
        for n, p in self.adam.items():
            if p.grad is None:
                continue
            m, v = self.m[n].lerp_(p.grad, .1), self.v[n].lerp_(p.grad.square(), .02)
            step = m / (1 - .9**t) / ((v / (1 - .98**t)).sqrt() + 1e-8)
            p.sub_(step, alpha=rate * ADAM_RATE * (2 if "embed" in n or "ape" in n else 1))
        for p in (*self.muon.values(), *self.adam.values()):
            p.grad = None

# === 9. Training ==============================================================================

def batches(rows, steps, worker):
    """(tokens [B][T], weights [B][T]) of each step, this worker's share: always the same"""
    begin = 0
    for length, size, until in PHASES:
        data = np.load(rows / f"rows-{length}.npz")
        ids, weights, at = data["ids"], data["weights"], worker
        for _ in range(begin, int(until * steps)):
            take = (at + np.arange(0, size, WORKERS)) % len(ids)
            at += size
            yield (torch.from_numpy(ids[take].astype(np.int64)),
                   torch.from_numpy(weights[take].astype(np.float32)) / 100)
        begin = int(until * steps)

def losses(model, w, tokens, weights, mtp):
    """(loss to minimize, mean NLL of answers, share of the tokens of codes that are right)"""
    def ahead(logits, n):
        logits = logits.view(*tokens.shape, -1)[:, :-n].flatten(0, 1)
        nll = F.cross_entropy(logits, tokens[:, n:].flatten(), reduction="none")
        by = weights[:, n:].flatten()
        return logits, nll, by, (nll * by).sum() / by.sum()
    logits, drafts, loss_index = model.forward(w, tokens, mtp)
    logits, nll, by, loss = ahead(logits, 1)
    if mtp:
        loss = loss + MTP_LOSS * ahead(drafts, 2)[3]
    with torch.no_grad():
        code = by > 1.5
        right = (logits[code].argmax(-1) == tokens[:, 1:].flatten()[code]).float().mean()
        answers = nll[by == 1].mean()
    return loss + INDEX_LOSS * loss_index, answers, right

def share(tensors):
    """Each becomes its mean over the workers."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= WORKERS
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(mean.view(t.shape))

def balance(model, params):
    """Routing without an auxiliary loss: the bias of a busy expert sinks."""
    for name, load in model.load.items():
        bias = params.get(f"{name}.gate.bias")
        if bias is not None:
            bias += BIAS_STEP * torch.sign(load.mean() - load)

def rate_at(part):
    """Rises over the first 4 % of the steps, falls over the second half."""
    return min(1, part / .04, max(.02, (1 - part) / .5))

def train(worker, directory, rows, state, steps):
    """One of WORKERS processes of one thread each: they hold the same, and share gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{state.absolute()}.meet", rank=worker,
                            world_size=WORKERS)
    torch.manual_seed(1)
    c = SimpleNamespace(**CONFIG)
    model, params, done = Model(c), initial(c), 0
    optimizer = Optimizer(params)
    if state.exists():
        saved = torch.load(state)
        done, optimizer.m, optimizer.v = saved["step"], saved["m"], saved["v"]
        for name, p in saved["params"].items():
            params[name].data.copy_(p)
    log = Log()
    for t, (tokens, weights) in enumerate(batches(rows, steps, worker), 1):
        if t <= done:
            continue
        loss, answers, right = losses(model, quantized(params), tokens, weights, t % 2 == 0)
        loss.backward()
        with torch.no_grad():
            share([p.grad for p in params.values() if p.grad is not None]
                  + list(model.load.values()))
            optimizer.step(t, rate_at(t / steps))
            balance(model, params)
        kept = sum(map(float, model.kept.values())) / max(1, len(model.kept))
        log.add(tokens.numel() * WORKERS, loss, answers, right, kept)
        if worker == 0 and (t % 20 == 0 or t == steps):
            log.show(f"step {t} length {tokens.shape[1]}")
        if worker == 0 and (t % 100 == 0 or t == steps):
            torch.save({"step": t, "m": optimizer.m, "v": optimizer.v, "params": params},
                       f"{state}.new")
            pathlib.Path(f"{state}.new").replace(state)
            export(directory, params, c)

class Log:
    """Means since the last line."""

    def __init__(self):
        self.began, self.tokens, self.rows = time.time(), 0, []

    def add(self, tokens, *row):
        self.tokens += tokens
        self.rows.append([float(x) for x in row])

    def show(self, at):
        means = "loss %.3f answers %.3f codes %.3f kept %.3f" % tuple(np.nanmean(self.rows, 0))
        speed = self.tokens / (time.time() - self.began)
        print(time.strftime("%H:%M:%S"), at, means, f"{speed:.0f} tokens/s", flush=True)
        self.__init__()

# === 10. Command line =========================================================================

@torch.no_grad()
def evaluate(directory, files):
    """Mean NLL per token of the ids in each file and of all, and how often the MTP block's draft
    of the token after next is the one that the model then finds likeliest."""
    c, w = import_weights(directory)
    model, unit = Model(c), math.lcm(c.sliding_window, *filter(None, c.compress_ratios))
    total = count = agree = drafted = 0
    for file in files:
        ids = torch.tensor([int(i) for i in re.findall(r"\d+", file.read_text())])
        padded = F.pad(ids, (0, -len(ids) % unit))[None]
        logits, drafts, _ = model.forward(w, padded, True)
        n = len(ids) - 1
        nll = F.cross_entropy(logits[:n], ids[1:], reduction="none").double()
        print(f"{file.name}: {n} tokens, mean NLL {nll.mean():.6f}")
        total, count = total + float(nll.sum()), count + n
        agree += int((drafts[:n - 1].argmax(-1) == logits[1:n].argmax(-1)).sum())
        drafted += n - 1
    print(f"all: {count} tokens, mean NLL {total / count:.6f}, "
          f"perplexity {math.exp(total / count):.4f}, drafts {agree / drafted:.3f}")

def main():
    parser = argparse.ArgumentParser(description="train the demo model, or score ids with it")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="train, or go on from STATE")
    p.add_argument("dir", type=pathlib.Path)
    p.add_argument("rows", type=pathlib.Path)
    p.add_argument("state", type=pathlib.Path)
    p.add_argument("--steps", type=int, default=STEPS)
    p = commands.add_parser("eval", help="mean NLL of files of ids")
    p.add_argument("dir", type=pathlib.Path)
    p.add_argument("--ids", type=pathlib.Path, nargs="+", required=True)
    p.add_argument("--without", choices=["acts", "kv", "index"], action="append", default=[],
                   help="leave out a rounding of activations; repeatable")
    args = parser.parse_args()
    if args.command == "train":
        pathlib.Path(f"{args.state}.meet").unlink(missing_ok=True)
        mp.spawn(train, (args.dir, args.rows, args.state, args.steps), WORKERS)
    else:
        WITHOUT.update(args.without)
        evaluate(args.dir, args.ids)


if __name__ == "__main__":
    main()
