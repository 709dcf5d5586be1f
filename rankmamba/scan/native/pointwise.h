// What a Transformer computes between two matrix products, for scoring: each of these in one pass over the rows.
#pragma once
#include "rms_norm.h"

namespace {

constexpr int POINTWISE_ROWS = 32;  // of one item

int64_t gelu_items(const Gelu &s) { return ceil_div(s.rows, POINTWISE_ROWS); }
int64_t gelu_workspace(const Gelu &s) { return ceil_div(s.inner, BLOCK) * BLOCK; }

// x = x Phi(x) = x/2 (1 + erf(x / sqrt(2))), erf as a quotient of polynomials on [-4, 4] (Eigen's): errors as PyTorch's. Below, x
// stays where the quotient ends, which is as good as 0: what it lacks of -1 would grow with x.
template <int M>
inline void gelu(vf *x) {
    vf t[M], t2[M], p[M], q[M];
    for (int i = 0; i < M; i++) x[i] = at_least(x[i], broadcast(-5.6568542f)), t[i] = at_most(x[i] * 0.70710678f, broadcast(4.f));
    for (int i = 0; i < M; i++) t2[i] = t[i] * t[i];
    for (int i = 0; i < M; i++) p[i] = t2[i] * -2.72614226e-10f + 2.77068142e-8f;
    for (int i = 0; i < M; i++) p[i] = p[i] * t2[i] - 2.10102402e-6f;
    for (int i = 0; i < M; i++) p[i] = p[i] * t2[i] - 5.69250639e-5f;
    for (int i = 0; i < M; i++) p[i] = p[i] * t2[i] - 7.34990631e-4f;
    for (int i = 0; i < M; i++) p[i] = p[i] * t2[i] - 2.9545998e-3f;
    for (int i = 0; i < M; i++) p[i] = p[i] * t2[i] - 1.60960333e-2f;
    for (int i = 0; i < M; i++) q[i] = t2[i] * -1.45660718e-5f - 2.13374055e-4f;
    for (int i = 0; i < M; i++) q[i] = q[i] * t2[i] - 1.68282697e-3f;
    for (int i = 0; i < M; i++) q[i] = q[i] * t2[i] - 7.37332917e-3f;
    for (int i = 0; i < M; i++) q[i] = q[i] * t2[i] - 1.42647390e-2f;
    for (int i = 0; i < M; i++) x[i] = 0.5f * x[i] * (1.f + t[i] * p[i] * reciprocal(q[i]));
}

void gelu_run(const Gelu &s, int64_t item, float *bias) {
    const FlushDenormals flush;
    const int inner = (int)s.inner;
    load_span(s.bias, inner, (int)gelu_workspace(s), bias);
    for (int64_t t = item * POINTWISE_ROWS; t < s.rows && t < (item + 1) * POINTWISE_ROWS; t++)
        for (int e = 0; e < inner; e += BLOCK) {
            vf x[VECTORS];
            load_block(s.x, 0, t, e, smaller(BLOCK, inner - e), x);
            for (int c = 0; c < VECTORS; c++) x[c] += load(bias + e + c * W);
            gelu<VECTORS>(x);
            store_block(s.x, 0, t, e, smaller(BLOCK, inner - e), x);
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
    return rest + total(sums);
}

int64_t add_norm_items(const AddNorm &s) { return ceil_div(s.rows, POINTWISE_ROWS); }
int64_t add_norm_workspace(const AddNorm &s) { return 3 * (ceil_div(s.inner, BLOCK) * BLOCK); }

void add_norm_run(const AddNorm &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int inner = (int)s.inner, size = (int)(ceil_div(inner, BLOCK) * BLOCK);
    float *bias = space, *x = bias + size, *residual = x + size;
    load_span(s.bias, inner, size, bias);
    for (int64_t t = item * POINTWISE_ROWS; t < s.rows && t < (item + 1) * POINTWISE_ROWS; t++) {
        load_row(s.x, 0, t, 0, inner, size, x);
        load_row(s.residual, 0, t, 0, inner, size, residual);
        vf sums[VECTORS] = {};
        for (int e = 0; e < size; e += BLOCK)
            for (int c = 0; c < VECTORS; c++) {
                const int at = e + c * W;
                const vf added = load(x + at) + load(bias + at) + load(residual + at);
                store(x + at, added);
                sums[c] += added;
            }
        const float mean = total(sums) / inner;
        for (int e = 0; e < inner; e++) x[e] -= mean;
        const float r = inverse_root(dot(x, x, inner) / inner + s.epsilon);
        for (int e = 0; e < inner; e++) x[e] = x[e] * r * s.weight[e] + s.shift[e];
        store_row(s.out, 0, t, 0, inner, x);
    }
}

}  // namespace
