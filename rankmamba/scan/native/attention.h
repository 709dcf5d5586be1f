// Attention as a Transformer's layers have it, for scoring in float32: softmax(q k^T scale + bias) v, head by head, with a head's keys and
// values and the scores of some queries in the cache. For texts of some hundred tokens, as rerankers read them.
#pragma once
#include "products.h"

namespace {

constexpr int QUERIES = 32;  // worked on together

int64_t attention_items(const Attention &s) { return s.batch * s.heads; }
int64_t attention_workspace(const Attention &s) {
    const int64_t P = padded(s.width, W), K = padded(s.keys, W);
    return 2 * K * P + QUERIES * (P + K) + K;
}

// out (rows, columns) = left (rows, depth) right (depth, columns), any number of rows: the last ones may be computed twice. Some
// columns of `right` for all rows, so that they stay near.
inline void multiply_rows(int rows, int depth, int columns, const float *left, int left_stride, const float *right, int right_stride,
                          float *out, int out_stride) {
    for (int j = 0; j < columns; j += COLUMNS * W) {
        const int vectors = smaller(COLUMNS, (columns - j) / W);
        for (int i = 0; rows >= ROWS && i < rows; i += ROWS) {
            const int at = smaller(i, rows - ROWS);
            product<false>(depth, vectors, left + at * left_stride, left_stride, right + j, right_stride, out + at * out_stride + j,
                           out_stride);
        }
        for (int i = 0; rows < ROWS && i < rows; i++)
            product<false, 1>(depth, vectors, left + i * left_stride, left_stride, right + j, right_stride, out + i * out_stride + j,
                              out_stride);
    }
}

inline float largest(vf v) {
    typedef float quarter __attribute__((vector_size(16)));
    quarter q[W / 4];
    memcpy(q, &v, sizeof v);
    for (int i = 1; i < W / 4; i++) q[0] = q[i] > q[0] ? q[i] : q[0];
    const float a = q[0][0] > q[0][1] ? q[0][0] : q[0][1], b = q[0][2] > q[0][3] ? q[0][2] : q[0][3];
    return a > b ? a : b;
}

// M vectors of scores -> 2^(factor score + offset), which are at most 1
template <int M>
inline void weigh(float *scores, vf factor, vf offset, vf *total) {
    vf x[M];
    for (int c = 0; c < M; c++) x[c] = fma(load(scores + c * W), factor, offset);
    exp2_up_to_1<M>(x);
    for (int c = 0; c < M; c++) {
        store(scores + c * W, x[c]);
        total[c] += x[c];
    }
}

// scores (count) -> their softmax, not divided by the sum, zeros up to a multiple of W; returns the sum.
inline float softmax(float *scores, float factor, const float *hidden, int count) {
    const vf lowest = broadcast(-__builtin_inff());
    const int whole = count / W * W, size = padded(count, W);
    if (hidden)
        for (int j = 0; j < size; j += W) store(scores + j, load(scores + j) + load(hidden + j));
    if (whole < size) store(scores + whole, select(lane_numbers() < count - whole, load(scores + whole), lowest));
    vf most[VECTORS], total[VECTORS] = {};
    for (int c = 0; c < VECTORS; c++) most[c] = lowest;
    int j = 0;
    for (; j + BLOCK <= size; j += BLOCK)
        for (int c = 0; c < VECTORS; c++) most[c] = at_least(load(scores + j + c * W), most[c]);
    for (; j < size; j += W) most[0] = at_least(load(scores + j), most[0]);
    const float top = largest(at_least(at_least(most[0], most[1]), at_least(most[2], most[3])));
    const vf by = broadcast(factor), offset = broadcast(-top * factor);
    for (j = 0; j + BLOCK <= size; j += BLOCK) weigh<VECTORS>(scores + j, by, offset, total);
    for (; j < size; j += W) weigh<1>(scores + j, by, offset, total);
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

void attention_run(const Attention &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int width = (int)s.width, P = padded(width, W), all = padded(s.keys, W);
    const int64_t b = item / s.heads, head = item % s.heads, shared = head / s.shared, ahead = s.keys - s.queries;
    float *k = space, *v = k + P * all, *scores = v + all * P, *out = scores + QUERIES * all, *hidden = out + QUERIES * P;
    const int64_t next = item + 1 < attention_items(s) ? item + 1 : item;
    const float *q = (const float *)s.q.data + b * s.q.batch_stride + head * s.q_head;
    turn((const float *)s.k.data + b * s.k.batch_stride + shared * s.k_head, s.k.row_stride, s.keys, width, k, all);
    for (int64_t t = 0; t < s.keys; t++) load_row(s.v, b, t, shared * s.v_head, width, P, v + t * P);
    if (s.hidden) load_span(s.hidden + b * s.keys, (int)s.keys, all, hidden);
    for (int64_t first = 0; first < s.queries; first += QUERIES) {
        const int count = smaller(QUERIES, s.queries - first), seen = (int)(s.causal ? first + count + ahead : s.keys);
        multiply_rows(count, width, padded(seen, W), q + first * s.q.row_stride, (int)s.q.row_stride, k, all, scores, all);
        for (int64_t t = first * s.keys / s.queries; t < (first + count) * s.keys / s.queries; t++) {
            prefetch_row(s.k, next / s.heads, t, next % s.heads / s.shared * s.k_head, width);
            prefetch_row(s.v, next / s.heads, t, next % s.heads / s.shared * s.v_head, width);
        }
        for (int64_t t = first; t < first + count; t++) {
            prefetch_row(s.out, b, t, head * s.width, width);
            if (t + QUERIES < s.queries) prefetch_row(s.q, b, t + QUERIES, head * s.q_head, width);
        }
        float sums[QUERIES];
        for (int i = 0; i < count; i++) {
            const int own = s.causal ? seen - count + i + 1 : seen;
            if (s.bias) {
                const float *bias = s.bias + (head * s.queries + first + i) * s.keys, unscaled = 1.f / s.scale;
                for (int j = 0; j < own; j++) scores[i * all + j] += bias[j] * unscaled;
            }
            sums[i] = softmax(scores + i * all, s.scale * LOG2E, s.hidden ? hidden : nullptr, own);
            for (int j = padded(own, W); j < seen; j++) scores[i * all + j] = 0;
        }
        multiply_rows(count, seen, P, scores, all, v, P, out, P);
        for (int i = 0; i < count; i++) {
            float *row = out + i * P;
            const vf share = broadcast(1.f / sums[i]);
            for (int p = 0; p < P; p += W) store(row + p, load(row + p) * share);
            store_row(s.out, b, first + i, head * s.width, width, row);
        }
    }
}

}  // namespace
