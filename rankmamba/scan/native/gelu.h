// Between the two products of a Transformer's feed-forward network: bias and GELU in one pass over the rows.
#pragma once
#include "vec.h"

namespace {

int64_t gelu_items(const Gelu &s) { return ceil_div(s.rows, ITEM_ROWS); }
int64_t gelu_workspace(const Gelu &s) { return padded(s.inner, BLOCK); }
int64_t gelu_backward_workspace(const Gelu &s) { return 2 * padded(s.inner, BLOCK); }

// Phi(-a) = p exp(-a^2 / 2) for a >= 0, where p is next to a polynomial in 1 / (1 + NEARNESS a), highest power first (the form of Abramowitz and
// Stegun 7.1.26; fitted for the least relative error on [0, 6]): to 2e-4 of it, and to 3e-7.
template <bool BF16>
struct Tail;
template <>
struct Tail<true> {
    static constexpr float NEARNESS = 0.34f, q[] = {0.355434946f, -0.0399446062f, 0.19096181f, -0.00637382307f};
};
template <>
struct Tail<false> {
    static constexpr float NEARNESS = 0.28f, q[] = {-0.112295628f,  0.420144086f, -0.294953386f, 0.327136193f,
                                                    0.0351740219f, 0.125906061f, -0.00111121847f};
};

// a = |x|, power = exp(-a^2 / 2), p as above. Beyond 13, where Phi(-a) is 1e-38, a stays there.
template <bool BF16, int M>
ALWAYS_INLINE void normal_tail(const vf *x, vf *a, vf *power, vf *p) {
    typedef Tail<BF16> Tail;
    vf scaled[M], t[M];
    for (int i = 0; i < M; i++) power[i] = a[i] = at_most(magnitude(x[i]), broadcast(13.f));
    for (int i = 0; i < M; i++) scaled[i] = a[i] * (-0.5f * LOG2E);
    BF16 ? exp2_product_bf16<M>(power, scaled) : exp2_product<5, M>(power, scaled);
    for (int i = 0; i < M; i++) t[i] = fma(a[i], broadcast(Tail::NEARNESS), broadcast(1.f));
    for (int i = 0; i < M; i++) t[i] = BF16 ? reciprocal_bf16(t[i]) : reciprocal(t[i]);
    for (int i = 0; i < M; i++) p[i] = fma(t[i], broadcast(Tail::q[0]), broadcast(Tail::q[1]));
    for (int k = 2; k < (int)(sizeof(Tail::q) / sizeof(float)); k++)
        for (int i = 0; i < M; i++) p[i] = fma(p[i], t[i], broadcast(Tail::q[k]));
}

// x = x Phi(x) = max(x, 0) - |x| Phi(-|x|)
template <bool BF16, int M>
ALWAYS_INLINE void gelu(vf *x) {
    vf a[M], power[M], p[M];
    normal_tail<BF16, M>(x, a, power, p);
    for (int i = 0; i < M; i++) x[i] = at_least(x[i], vf{}) - a[i] * power[i] * p[i];
}

// slope = Phi(x) + x phi(x), phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
template <bool BF16, int M>
ALWAYS_INLINE void gelu_slope(const vf *x, vf *slope) {
    vf a[M], power[M], p[M];
    normal_tail<BF16, M>(x, a, power, p);
    for (int i = 0; i < M; i++) p[i] = power[i] * fma(a[i], broadcast(-0.39894228f), p[i]);  // where x is negative
    for (int i = 0; i < M; i++) slope[i] = select(x[i] > 0.f, 1.f - p[i], p[i]);
}

void gelu_forward_run(const Gelu &s, int64_t item, float *bias) {
    const FlushDenormals flush;
    const int inner = (int)s.inner;
    load_span(s.bias, inner, padded(s.inner, BLOCK), bias);
    for (int64_t t = item * ITEM_ROWS; t < s.rows && t < (item + 1) * ITEM_ROWS; t++)
        for (int e = 0; e < inner; e += BLOCK) {
            const int count = smaller(BLOCK, inner - e);
            vf x[VECTORS];
            prefetch_row(s.x, 0, t + 1, e), prefetch_row(s.y, 0, t + 1, e);
            load_block(s.x, 0, t, e, count, x);
            EACH(c, VECTORS) x[c] += load(bias + e + c * W);
            s.x.bfloat16 ? gelu<true, VECTORS>(x) : gelu<false, VECTORS>(x);
            store_block(s.y, 0, t, e, count, x);
        }
}

void gelu_backward_run(const Gelu &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int inner = (int)s.inner, size = padded(s.inner, BLOCK);
    float *bias = space, *dbias = space + size;
    load_span(s.bias, inner, size, bias);
    memset(dbias, 0, size * sizeof(float));
    for (int64_t t = item * ITEM_ROWS; t < s.rows && t < (item + 1) * ITEM_ROWS; t++)
        for (int e = 0; e < inner; e += BLOCK) {
            const int count = smaller(BLOCK, inner - e);
            vf x[VECTORS], slope[VECTORS], d[VECTORS];
            prefetch_row(s.x, 0, t + 1, e), prefetch_row(s.dy, 0, t + 1, e), prefetch_row(s.dx, 0, t + 1, e);
            load_block(s.x, 0, t, e, count, x);
            load_block(s.dy, 0, t, e, count, d);
            EACH(c, VECTORS) x[c] += load(bias + e + c * W);
            s.x.bfloat16 ? gelu_slope<true, VECTORS>(x, slope) : gelu_slope<false, VECTORS>(x, slope);
            EACH(c, VECTORS) d[c] *= slope[c];
            EACH(c, VECTORS) store(dbias + e + c * W, load(dbias + e + c * W) + d[c]);
            store_block(s.dx, 0, t, e, count, d);
        }
    memcpy(s.dbias + item * s.inner, dbias, s.inner * sizeof(float));
}

}  // namespace
