// Root mean square norm, before Mamba's blocks, and with a gate behind Mamba-2's scan (arXiv 2405.21060, figure 6): all in one pass
// over the rows.
#pragma once
#include "vec.h"

namespace {

int64_t norm_items(const Norm &s) { return s.batch * ceil_div(s.length, ITEM_ROWS); }
inline int norm_padded(const Norm &s) { return (int)(ceil_div(s.inner, BLOCK) + 1) * BLOCK; }  // a group may begin inside a block
int64_t norm_workspace(const Norm &s) { return 3 * norm_padded(s); }

inline float total(const vf *sums) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }
inline float inverse_root(float mean_square) { return 1.f / __builtin_sqrtf(mean_square); }

// A group of a row, which is normed by itself.
struct Group {
    const Norm &s;
    const int64_t b, t, first;
    const int width = (int)(s.inner / s.groups);

    int count(int e) const { return smaller(BLOCK, width - e); }
    // A block of the next row, one at a time between other work: a row's all at once would have to wait.
    ALWAYS_INLINE void prefetch(const Rows &r, int e) const { prefetch_row(r, b, t + 1, first + e); }
    // A block of z and of silu's gate, its sigmoid.
    ALWAYS_INLINE void load_gate(int e, vf *z, vf *gate) const {
        load_block(s.z, b, t, first + e, count(e), z);
        s.z.bfloat16 ? sigmoid_bf16<VECTORS>(z, gate) : sigmoid<VECTORS>(z, gate);
    }
};

void norm_forward_run(const Norm &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int64_t tiles = ceil_div(s.length, ITEM_ROWS), b = item / tiles, t0 = item % tiles * ITEM_ROWS;
    const int size = norm_padded(s);
    float *gated = space, *weight = gated + size;
    load_span(s.weight, (int)s.inner, size, weight);
    for (int64_t t = t0; t < s.length && t < t0 + ITEM_ROWS; t++) {
        for (int64_t first = 0; first < s.inner; first += s.inner / s.groups) {
            const Group group{s, b, t, first};
            vf squares[VECTORS] = {};
            for (int e = 0; e < group.width; e += BLOCK) {
                vf row[VECTORS], z[VECTORS], gate[VECTORS];
                group.prefetch(s.y, e), group.prefetch(s.z, e);
                load_block(s.y, b, t, first + e, group.count(e), row);
                if (s.z.data) {
                    group.load_gate(e, z, gate);
                    EACH(c, VECTORS) row[c] *= z[c] * gate[c];
                }
                EACH(c, VECTORS) store(gated + e + c * W, row[c]), squares[c] = fma(row[c], row[c], squares[c]);
            }
            const float r = inverse_root(total(squares) / group.width + s.epsilon);
            for (int e = 0; e < group.width; e += BLOCK) {
                vf out[VECTORS];
                group.prefetch(s.out, e);
                EACH(c, VECTORS) out[c] = load(gated + e + c * W) * r * load(weight + first + e + c * W);
                store_block(s.out, b, t, first + e, group.count(e), out);
            }
        }
    }
}

void norm_backward_run(const Norm &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int64_t tiles = ceil_div(s.length, ITEM_ROWS), b = item / tiles, t0 = item % tiles * ITEM_ROWS;
    const int size = norm_padded(s);
    float *gates = space, *weight = gates + size, *dweight = weight + size;
    load_span(s.weight, (int)s.inner, size, weight);
    memset(dweight, 0, size * sizeof(float));
    for (int64_t t = t0; t < s.length && t < t0 + ITEM_ROWS; t++) {
        for (int64_t first = 0; first < s.inner; first += s.inner / s.groups) {
            const Group group{s, b, t, first};
            vf squares[VECTORS] = {}, products[VECTORS] = {};
            for (int e = 0; e < group.width; e += BLOCK) {
                vf row[VECTORS], z[VECTORS], gate[VECTORS], d[VECTORS];
                group.prefetch(s.y, e), group.prefetch(s.z, e), group.prefetch(s.dout, e);
                load_block(s.y, b, t, first + e, group.count(e), row);
                load_block(s.dout, b, t, first + e, group.count(e), d);
                if (s.z.data) {
                    group.load_gate(e, z, gate);
                    EACH(c, VECTORS) store(gates + e + c * W, gate[c]), row[c] *= z[c] * gate[c];
                }
                EACH(c, VECTORS) squares[c] = fma(row[c], row[c], squares[c]);
                EACH(c, VECTORS) products[c] = fma(row[c], d[c] * load(weight + first + e + c * W), products[c]);
            }
            const float r = inverse_root(total(squares) / group.width + s.epsilon), along = total(products) / group.width * r * r;
            for (int e = 0; e < group.width; e += BLOCK) {
                vf y[VECTORS], z[VECTORS], d[VECTORS], gate[VECTORS], dz[VECTORS];
                group.prefetch(s.dy, e), group.prefetch(s.dz, e);
                load_block(s.y, b, t, first + e, group.count(e), y);
                load_block(s.dout, b, t, first + e, group.count(e), d);
                if (s.z.data) load_block(s.z, b, t, first + e, group.count(e), z);
                EACH(c, VECTORS) {
                    gate[c] = s.z.data ? load(gates + e + c * W) : broadcast(1.f);
                    const vf silu = s.z.data ? z[c] * gate[c] : gate[c], gated = y[c] * silu;
                    float *sums = dweight + first + e + c * W;
                    store(sums, load(sums) + d[c] * gated * r);
                    d[c] = r * (d[c] * load(weight + first + e + c * W) - gated * along);  // the gradient of `gated`
                    dz[c] = d[c] * y[c] * fma(silu, 1.f - gate[c], gate[c]);
                    d[c] *= silu;
                }
                store_block(s.dy, b, t, first + e, group.count(e), d);
                if (s.z.data) store_block(s.dz, b, t, first + e, group.count(e), dz);
            }
        }
    }
    memcpy(s.dweight + item * s.inner, dweight, s.inner * sizeof(float));
}

}  // namespace
