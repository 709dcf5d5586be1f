// Root mean square norm, before Mamba's blocks, and with a gate behind Mamba-2's scan (arXiv 2405.21060, figure 6): all in one pass
// over the rows.
#pragma once
#include "vec.h"

namespace {

constexpr int NORM_ROWS = 32;  // tokens of one item

inline int64_t norm_padded(const Norm &s) { return ceil_div(s.inner, BLOCK) * BLOCK; }
int64_t norm_items(const Norm &s) { return s.batch * ceil_div(s.length, NORM_ROWS); }
int64_t norm_workspace(const Norm &s) { return 7 * norm_padded(s); }

// One row as gated = y silu(z), or y alone without a gate. For the backward, y, z and the gate's sigmoids are kept, too.
inline void gate_row(const Norm &s, int64_t b, int64_t t, int size, float *gated, float *y, float *z, float *sigmoids) {
    for (int e = 0; e < size; e += BLOCK) {
        const int count = smaller(BLOCK, s.inner - e);
        vf row[VECTORS], x[VECTORS], gate[VECTORS];
        load_block(s.y, b, t, e, count, row);
        if (s.z.data) {
            load_block(s.z, b, t, e, count, x);
            s.z.bfloat16 && !sigmoids ? sigmoid_bf16<VECTORS>(x, gate) : sigmoid<VECTORS>(x, gate);
            for (int c = 0; sigmoids && c < VECTORS; c++) {
                store(y + e + c * W, row[c]);
                store(z + e + c * W, x[c]);
                store(sigmoids + e + c * W, gate[c]);
            }
            for (int c = 0; c < VECTORS; c++) row[c] *= x[c] * gate[c];
        }
        for (int c = 0; c < VECTORS; c++) store(gated + e + c * W, row[c]);
    }
}

// sum a b over [first, first + count)
inline float dot(const float *a, const float *b, int count) {
    vf sums[VECTORS] = {};
    int i = 0;
    for (; i + BLOCK <= count; i += BLOCK)
        for (int c = 0; c < VECTORS; c++) sums[c] += load(a + i + c * W) * load(b + i + c * W);
    float rest = 0;
    for (; i < count; i++) rest += a[i] * b[i];
    return rest + sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline float inverse_root(float mean_square) { return 1.f / __builtin_sqrtf(mean_square); }

void norm_forward_run(const Norm &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int size = (int)norm_padded(s), width = (int)(s.inner / s.groups);
    const int64_t tiles = ceil_div(s.length, NORM_ROWS), b = item / tiles, t0 = item % tiles * NORM_ROWS;
    float *gated = space, *weight = gated + size;
    load_span(s.weight, (int)s.inner, size, weight);
    for (int64_t t = t0; t < s.length && t < t0 + NORM_ROWS; t++) {
        prefetch_row(s.y, b, t + 2, 0, s.inner), prefetch_row(s.z, b, t + 2, 0, s.inner), prefetch_row(s.out, b, t + 1, 0, s.inner);
        gate_row(s, b, t, size, gated, nullptr, nullptr, nullptr);
        for (int first = 0; first < s.inner; first += width) {
            const float r = inverse_root(dot(gated + first, gated + first, width) / width + s.epsilon);
            for (int e = first; e < first + width; e += BLOCK) {
                vf out[VECTORS];
                for (int c = 0; c < VECTORS; c++) out[c] = load(gated + e + c * W) * r * load(weight + e + c * W);
                store_block(s.out, b, t, e, smaller(BLOCK, first + width - e), out);
            }
        }
    }
}

void norm_backward_run(const Norm &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int size = (int)norm_padded(s), width = (int)(s.inner / s.groups);
    const int64_t tiles = ceil_div(s.length, NORM_ROWS), b = item / tiles, t0 = item % tiles * NORM_ROWS;
    float *y = space, *z = y + size, *gated = z + size, *gates = gated + size, *dout = gates + size, *dz = dout + size,
          *dw = dz + size;
    memset(dw, 0, size * sizeof(float));
    for (int64_t t = t0; t < s.length && t < t0 + NORM_ROWS; t++) {
        prefetch_row(s.y, b, t + 2, 0, s.inner), prefetch_row(s.z, b, t + 2, 0, s.inner), prefetch_row(s.dout, b, t + 2, 0, s.inner);
        prefetch_row(s.dy, b, t + 1, 0, s.inner), prefetch_row(s.dz, b, t + 1, 0, s.inner);
        gate_row(s, b, t, size, gated, y, z, gates);
        load_row(s.dout, b, t, 0, (int)s.inner, size, dout);
        for (int g = 0; g < s.groups; g++) {
            const float *weight = s.weight + g * width, *own = gated + g * width;
            float *d = dout + g * width, *sums = dw + g * width;
            const float r = inverse_root(dot(own, own, width) / width + s.epsilon);
            for (int e = 0; e < width; e++) {
                sums[e] += d[e] * own[e] * r;
                d[e] *= weight[e];
            }
            const float along = dot(d, own, width) / width * r * r;
            for (int e = 0; e < width; e++) d[e] = r * (d[e] - own[e] * along);  // the gradient of `gated`
        }
        for (int e = 0; s.z.data && e < size; e += W) {
            const vf gate = load(gates + e), x = load(z + e), d = load(dout + e), silu = x * gate;
            store(dz + e, d * load(y + e) * (gate + silu * (1.f - gate)));
            store(dout + e, d * silu);
        }
        store_row(s.dy, b, t, 0, (int)s.inner, dout);
        if (s.z.data) store_row(s.dz, b, t, 0, (int)s.inner, dz);
    }
    memcpy(s.dweight + item * s.inner, dw, s.inner * sizeof(float));
}

}  // namespace
