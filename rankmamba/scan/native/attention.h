// Attention as a Transformer's layers have it: softmax(q k^T scale + bias) v, head by head, with a head's keys and values and
// the scores of some queries in the cache. For texts of some hundred tokens, as rerankers read them. Products are those of products.h,
// in the precision of v; what lies between them is float32.
#pragma once
#include "products.h"

namespace {

constexpr int QUERIES = 32;  // worked on together
constexpr int KEYS = 64;     // that serve them before the next ones: they stay near

inline float largest(vf v) {
    typedef float quarter __attribute__((vector_size(16)));
    quarter q[W / 4];
    memcpy(q, &v, sizeof v);
    for (int i = 1; i < W / 4; i++) q[0] = q[i] > q[0] ? q[i] : q[0];
    const float a = q[0][0] > q[0][1] ? q[0][0] : q[0][1], b = q[0][2] > q[0][3] ? q[0][2] : q[0][3];
    return a > b ? a : b;
}

// R vectors of scores -> 2^(factor score + offset), which are at most 1, as a left operand; added to the total, too.
template <class M, int R>
inline void weigh(const float *scores, vf factor, vf offset, typename M::Number *weights, vf *total) {
    vf x[R];
    for (int c = 0; c < R; c++) x[c] = fma(load(scores + c * W), factor, offset);
    exp2_up_to_1<R>(x);
    for (int c = 0; c < R; c++) {
        M::store_left(weights + c * W, x[c]);
        total[c] += x[c];
    }
}

// scores (count) -> their softmax, not divided by the sum, zeros up to a multiple of W; returns one over the sum. Where no key is seen
// both are zero.
template <class M>
inline float softmax(float *scores, float factor, const float *hidden, int count, typename M::Number *weights) {
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
    if (top == -__builtin_inff()) {
        memset(weights, 0, size * sizeof(typename M::Number));
        return 0;
    }
    const vf by = broadcast(factor), offset = broadcast(-top * factor);
    for (j = 0; j + BLOCK <= size; j += BLOCK) weigh<M, VECTORS>(scores + j, by, offset, weights + j, total);
    for (; j < size; j += W) weigh<M, 1>(scores + j, by, offset, weights + j, total);
    return 1.f / sum((total[0] + total[1]) + (total[2] + total[3]));
}

// What both directions need of a head.
template <class M>
struct AttentionHead : Buffers<M> {
    using typename Buffers<M>::Number;
    using Buffers<M>::floats, Buffers<M>::numbers;
    const Attention &s;
    const int width, P, K;  // P: width, K: keys, filled up to whole units
    float *scores = floats(QUERIES * K), *hidden = floats(K), *block = floats(W * P);
    Number *q = numbers(QUERIES * P), *k_turned = numbers(P * K);  // left, right

    AttentionHead(const Attention &s_, float *space_)
        : Buffers<M>(space_), s(s_), width((int)s_.width), P(padded(s_.width, M::UNIT)), K(padded(s_.keys, M::UNIT)) {}

    // Rows t, t + 1, ... of a head as floats, zeros behind the last one: where they lie, or in `block`.
    struct Floats {
        const float *data;
        int64_t stride;
    };
    Floats load_rows(const Rows &r, int64_t b, int64_t first, int64_t t, int count, int64_t last, const Rotation &rotation = {}) {
        if (!r.bfloat16 && width == P && t + count <= last && !rotation.cos)
            return {(const float *)r.data + b * r.batch_stride + t * r.row_stride + first, r.row_stride};
        for (int i = 0; i < count; i++) {
            load_row(r, b, t + i, first, t + i < last ? width : 0, P, block + i * P);
            if (rotation.cos && t + i < last) rotate(rotation, b, t + i, 1, block + i * P);
        }
        return {block, P};
    }
    // A row of a head (arXiv 2104.09864); direction -1: back, as gradients go.
    static void rotate(const Rotation &rotation, int64_t b, int64_t t, float direction, float *row) {
        const int pairs = (int)rotation.pairs;
        const float *cos = rotation.cos + b * rotation.batch_stride + t * pairs, *sin = rotation.sin + b * rotation.batch_stride + t * pairs;
        // four at a time: published models have 8 to 64 pairs
        typedef float four __attribute__((vector_size(16), aligned(4)));
        int i = 0;
        for (; i + 4 <= pairs; i += 4) {
            four *first = (four *)(row + i), *second = (four *)(row + pairs + i);
            const four x = *first, y = *second, along = *(const four *)(cos + i), across = *(const four *)(sin + i) * direction;
            *first = x * along - y * across;
            *second = y * along + x * across;
        }
        for (; i < pairs; i++) {
            const float x = row[i], y = row[pairs + i], across = direction * sin[i];
            row[i] = x * cos[i] - y * across;
            row[pairs + i] = y * cos[i] + x * across;
        }
    }
    // As a right operand, as they are, and turned; as a left one.
    void store_right(const Floats &rows, int t, int count, Number *to) const {
        for (int i = 0; i < count; i += 2)
            for (int p = 0; p < P; p += W) {
                const float *even = rows.data + i * rows.stride + p;
                M::store_right(to, P, t + i, p, load(even), load(even + rows.stride));
            }
    }
    void store_turned(const Floats &rows, int t, Number *to) const { M::store_right_turned(to, K, t, rows.data, P, rows.stride); }
    void store_left(const Floats &rows, int t, int count, Number *to) const {
        for (int i = 0; i < count; i++)
            for (int p = 0; p < P; p += W) M::store_left(to + (t + i) * P + p, load(rows.data + i * rows.stride + p));
    }

    // The share of query `at` in a head's keys and values, ahead of their use. Rows are asked for query by query between other work:
    // many at once would have to wait.
    ALWAYS_INLINE void prefetch_keys(int64_t b, int64_t head, int64_t at) const {
        for (int64_t t = at * s.keys / s.queries; t < (at + 1) * s.keys / s.queries; t++) {
            prefetch_row(s.k, b, t, head * s.k_head, width);
            prefetch_row(s.v, b, t, head * s.v_head, width);
        }
    }

    // To a query's scores, which are still to be scaled.
    void add_bias(int64_t head, int64_t query, int own, float *score) const {
        if (!s.bias) return;
        const float *bias = s.bias + (head * s.queries + query) * s.keys, unscaled = 1.f / s.scale;
        for (int j = 0; j < own; j++) score[j] += bias[j] * unscaled;
    }

    // out (rows, columns) = left (rows, depth) right (depth, columns), some columns for all rows before the next ones.
    void multiply(int rows, int depth, int columns, const Number *left, int left_stride, const Number *right, int right_stride, float *out,
                  int out_stride) const {
        for (int j = 0; j < columns; j += KEYS)
            M::template multiply<false>(rows, depth, smaller(KEYS, columns - j), left, left_stride, M::column(right, j), right_stride, out + j,
                                        out_stride);
    }
};

template <class M>
struct AttentionForward : AttentionHead<M> {
    typedef AttentionHead<M> Base;
    typedef typename Base::Number Number;
    using Base::s, Base::width, Base::P, Base::K, Base::scores, Base::hidden, Base::q, Base::k_turned, Base::floats, Base::numbers;
    float *out = floats(QUERIES * P);
    Number *v = numbers(K * P);  // right
    // left; numbers that are not rounded take the place of the scores
    Number *weights = sizeof(Number) == sizeof(float) ? (Number *)scores : numbers(QUERIES * K);

    using Base::Base;

    void load_keys_and_values(int64_t b, int64_t head) {
        for (int t = 0; t < K; t += W) {
            this->store_turned(this->load_rows(s.k, b, head * s.k_head, t, W, s.keys, s.k_rotation), t, k_turned);
            this->store_right(this->load_rows(s.v, b, head * s.v_head, t, W, s.keys), t, W, v);
        }
        if (s.hidden) load_span(s.hidden + b * s.keys, (int)s.keys, K, hidden);
    }

    void run(int64_t item) {
        const typename M::Session session;
        const int64_t b = item / s.heads, head = item % s.heads, shared = head / s.shared, ahead = s.keys - s.queries;
        const int64_t next = item + 1 < s.batch * s.heads ? item + 1 : item;
        load_keys_and_values(b, shared);
        for (int64_t first = 0; first < s.queries; first += QUERIES) {
            const int count = smaller(QUERIES, s.queries - first), rows = padded(count, M::ROW_UNIT);
            const int seen = (int)(s.causal ? first + count + ahead : s.keys);
            const int columns = padded(seen, M::UNIT), depth = padded(seen, M::DEPTH_UNIT);
            for (int t = 0; t < rows; t++)
                this->store_left(this->load_rows(s.q, b, head * s.q_head, first + t, 1, s.queries, s.q_rotation), t, 1, q);
            this->multiply(rows, P, columns, q, P, k_turned, K, scores, K);
            float shares[QUERIES];
            for (int i = 0; i < count; i++) {
                const int64_t at = first + i;
                this->prefetch_keys(next / s.heads, next % s.heads / s.shared, at);
                prefetch_row(s.out, b, at, head * s.width, width);
                if (at + QUERIES < s.queries) prefetch_row(s.q, b, at + QUERIES, head * s.q_head, width);
                const int own = s.causal ? seen - count + i + 1 : seen;
                this->add_bias(head, at, own, scores + i * K);
                shares[i] = softmax<M>(scores + i * K, s.scale * LOG2E, s.hidden ? hidden : nullptr, own, weights + i * K);
                for (int j = padded(own, W); j < columns; j += W) M::store_left(weights + i * K + j, vf{});
            }
            memset(weights + count * K, 0, (rows - count) * K * sizeof(Number));
            this->multiply(rows, depth, P, weights, K, v, P, out, P);
            for (int i = 0; i < count; i++) {
                float *row = out + i * P;
                const vf share = broadcast(shares[i]);
                for (int p = 0; p < P; p += W) store(row + p, load(row + p) * share);
                store_row(s.out, b, first + i, head * s.width, width, row);
            }
        }
    }
};

int64_t attention_items(const Attention &s) { return s.batch * s.heads; }

}  // namespace
