/* fuzz_config.c -- any bytes as config.json: config_parse() must refuse them in one line, or give
 * sizes that the rest of the program can multiply and divide by.  The same bytes, as a file, are
 * generation_config.json: config_sampling() must refuse them or give what F32 keeps in range. */
#include "../dsv4.h"

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static void try_sampling(const uint8_t *data, size_t n) {
    static const char dir[] = "/dev/shm/dsv4-fuzz-config";
    static char path[64];
    sample_opts o = {.seed = 5};
    dsv4_err err = {""};
    if (!path[0]) {
        (void)mkdir(dir, 0700);
        snprintf(path, sizeof path, "%s/generation_config.json", dir);
    }
    FILE *f = fopen(path, "wb");
    assert(f && fwrite(data, 1, n, f) == n && !fclose(f));
    if (config_sampling(&o, dir, &err)) {
        assert(err.msg[0] && !strchr(err.msg, '\n'));
        return;
    }
    assert(o.temperature >= 0 && o.temperature <= 1e6f && o.top_p > 0 && o.top_p <= 1);
    assert(o.min_p >= 0 && o.min_p < 1 && o.repetition_penalty > 0);
    assert(isfinite(o.repetition_penalty) && o.top_k >= 0 && o.seed == 5);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    dsv4_config c;
    dsv4_err err = {""};
    try_sampling(data, n);
    if (config_parse(&c, (const char *)data, n, "fuzz", &err)) {
        assert(err.msg[0] && !strchr(err.msg, '\n'));
        return 0;
    }
    assert(c.hidden_size > 0 && c.hidden_size % 32 == 0);
    assert(c.moe_intermediate_size > 0 && c.moe_intermediate_size % 32 == 0);
    assert(c.num_hidden_layers > 0 && c.num_hidden_layers <= MAX_LAYERS);
    assert(c.qk_rope_head_dim % 2 == 0 && c.qk_rope_head_dim < c.head_dim);
    assert((int64_t)c.num_attention_heads * c.head_dim <= INT_MAX);
    assert((int64_t)c.num_attention_heads * c.head_dim % c.o_groups == 0);
    assert(c.num_experts_per_tok > 0 && c.num_experts_per_tok <= c.n_routed_experts);
    assert(c.num_experts_per_tok <= MAX_TOPK && c.n_routed_experts <= MAX_EXPERTS);
    assert(c.hc_mult > 0 && c.hc_mult <= MAX_HC && c.hc_sinkhorn_iters > 0);
    assert(c.bos_token_id < c.vocab_size && c.eos_token_id < c.vocab_size);
    assert(c.bos_token_id >= 0 && c.eos_token_id >= 0);
    for (int l = 0; l <= c.num_hidden_layers; l++)
        assert(c.compress_ratios[l] == 0 || c.compress_ratios[l] >= 2);
    const double positive[] = {c.rope_theta, c.compress_rope_theta, c.yarn_factor,
                               c.yarn_beta_fast, c.yarn_beta_slow, c.yarn_original,
                               (double)c.swiglu_limit, (double)c.routed_scaling_factor,
                               (double)c.hc_eps, (double)c.rms_norm_eps};
    for (size_t i = 0; i < sizeof positive / sizeof *positive; i++)
        assert(isfinite(positive[i]) && positive[i] > 0);
    return 0;
}
