// Behind the products of a Transformer that norms what it has added: bias, residual and LayerNorm in one pass over the rows, for scoring.
#pragma once
#include "rms_norm.h"

namespace {

int64_t add_norm_items(const AddNorm &s) { return ceil_div(s.rows, ITEM_ROWS); }
int64_t add_norm_workspace(const AddNorm &s) { return 2 * padded(s.inner, BLOCK); }

// 1 / the standard deviation of x.
inline float normalizer(const float *x, int count, float mean, float epsilon) {
    vf squares[VECTORS] = {};
    float rest = 0;
    int e = 0;
    for (; e + BLOCK <= count; e += BLOCK)
        EACH(c, VECTORS) {
            const vf centred = load(x + e + c * W) - mean;
            squares[c] = fma(centred, centred, squares[c]);
        }
    for (; e < count; e++) rest += (x[e] - mean) * (x[e] - mean);
    return inverse_root((rest + total(squares)) / count + epsilon);
}

void add_norm_run(const AddNorm &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int inner = (int)s.inner, size = padded(s.inner, BLOCK);
    float *bias = space, *added = bias + size;
    load_span(s.bias, inner, size, bias);
    const Rows weight{(void *)s.weight, 0, 0, 0}, shift{(void *)s.shift, 0, 0, 0};  // their ends are loaded as those of rows
    for (int64_t t = item * ITEM_ROWS; t < s.rows && t < (item + 1) * ITEM_ROWS; t++) {
        vf sums[VECTORS] = {};
        for (int e = 0; e < inner; e += BLOCK) {
            vf x[VECTORS], residual[VECTORS];
            prefetch_row(s.x, 0, t + 1, e), prefetch_row(s.residual, 0, t + 1, e);
            load_block(s.x, 0, t, e, smaller(BLOCK, inner - e), x);
            load_block(s.residual, 0, t, e, smaller(BLOCK, inner - e), residual);
            EACH(c, VECTORS) x[c] += load(bias + e + c * W) + residual[c];
            EACH(c, VECTORS) store(added + e + c * W, x[c]), sums[c] += x[c];
        }
        const float mean = total(sums) / inner, r = normalizer(added, inner, mean, s.epsilon);
        for (int e = 0; e < inner; e += BLOCK) {
            const int count = smaller(BLOCK, inner - e);
            vf out[VECTORS], scale[VECTORS], start[VECTORS];
            prefetch_row(s.out, 0, t + 1, e);
            load_block(weight, 0, 0, e, count, scale), load_block(shift, 0, 0, e, count, start);
            EACH(c, VECTORS) out[c] = fma((load(added + e + c * W) - mean) * r, scale[c], start[c]);
            store_block(s.out, 0, t, e, count, out);
        }
    }
}

}  // namespace
