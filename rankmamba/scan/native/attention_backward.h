// The backward pass of attention. The weights are made again from queries and keys, so the forward pass keeps nothing:
//
//   dV = weights^T dO,   dweights = dO V^T,   dscores = weights (dweights - sum_j weights dweights) scale,   dQ = dscores K,   dK = dscores^T Q
#pragma once
#include "attention.h"

namespace {

// All heads that read the same keys and values: their gradients are summed here.
template <class M>
struct AttentionBackward : AttentionHead<M> {
    typedef AttentionHead<M> Base;
    typedef typename Base::Number Number;
    using Base::s, Base::width, Base::P, Base::K, Base::scores, Base::hidden, Base::q, Base::k_turned, Base::floats, Base::numbers;
    float *dscores = floats(QUERIES * K), *dq = floats(QUERIES * P), *dk = floats(K * P), *dv = floats(K * P);
    Number *k = numbers(K * P), *v_turned = numbers(P * K), *q_right = numbers(QUERIES * P), *dout_right = numbers(QUERIES * P);  // right
    Number *dout = numbers(QUERIES * P), *left = numbers(QUERIES * K);                                                            // left

    using Base::Base;

    void load_keys_and_values(int64_t b, int64_t head) {
        for (int t = 0; t < K; t += W) {
            const auto keys = this->load_rows(s.k, b, head * s.k_head, t, W, s.keys, s.k_rotation);
            this->store_turned(keys, t, k_turned);
            this->store_right(keys, t, W, k);
            this->store_turned(this->load_rows(s.v, b, head * s.v_head, t, W, s.keys), t, v_turned);
        }
        if (s.hidden) load_span(s.hidden + b * s.keys, (int)s.keys, K, hidden);
        memset(dk, 0, (int64_t)K * P * sizeof(float));
        memset(dv, 0, (int64_t)K * P * sizeof(float));
    }

    void load_queries(int64_t b, int64_t head, int64_t first) {
        for (int t = 0; t < QUERIES; t += 2) {
            const auto queries = this->load_rows(s.q, b, head * s.q_head, first + t, 2, s.queries, s.q_rotation);
            this->store_left(queries, t, 2, q);
            this->store_right(queries, t, 2, q_right);
            const auto gradients = this->load_rows(s.dout, b, head * s.dout_head, first + t, 2, s.queries);
            this->store_left(gradients, t, 2, dout);
            this->store_right(gradients, t, 2, dout_right);
        }
    }

    // A query's scores and the gradients of its weights -> its weights and the gradients of its scores; `own` keys count.
    void through_softmax(float *score, float *dscore, int own, int columns) const {
        const vf share = broadcast(softmax<Vectors>(score, s.scale * LOG2E, s.hidden ? hidden : nullptr, own, score));
        const int size = padded(own, W);
        vf products = {};
        for (int j = 0; j < size; j += W) {
            const vf weight = load(score + j) * share;
            store(score + j, weight);
            products += weight * load(dscore + j);
        }
        const vf mean = broadcast(sum(products));
        for (int j = 0; j < size; j += W) store(dscore + j, load(score + j) * (load(dscore + j) - mean) * s.scale);
        memset(score + size, 0, (columns - size) * sizeof(float));
        memset(dscore + size, 0, (columns - size) * sizeof(float));
    }

    // (QUERIES, columns), turned, as a left operand.
    void turn_left(const float *from, int columns) const {
        for (int j = 0; j < columns; j += W)
            for (int i = 0; i < QUERIES; i += W) {
                vf turned[W];
                for (int t = 0; t < W; t++) turned[t] = load(from + (i + t) * K + j);
                transpose(turned);
                for (int t = 0; t < W; t++) M::store_left(left + (j + t) * QUERIES + i, turned[t]);
            }
    }

    void run(int64_t item) {
        const typename M::Session session;
        const int64_t sharing = s.heads / s.shared, b = item / sharing, shared = item % sharing, ahead = s.keys - s.queries;
        const int64_t next = item + 1 < s.batch * sharing ? item + 1 : item;
        load_keys_and_values(b, shared);
        for (int64_t head = shared * s.shared; head < (shared + 1) * s.shared; head++)
            for (int64_t first = 0; first < s.queries; first += QUERIES) {
                const int count = smaller(QUERIES, s.queries - first), rows = padded(count, M::ROW_UNIT);
                const int seen = (int)(s.causal ? first + count + ahead : s.keys);
                const int columns = padded(seen, M::UNIT), depth = padded(seen, M::DEPTH_UNIT);
                load_queries(b, head, first);
                this->multiply(rows, P, columns, q, P, k_turned, K, scores, K);
                this->multiply(rows, P, columns, dout, P, v_turned, K, dscores, K);
                for (int i = 0; i < count; i++) {
                    const int64_t at = first + i;
                    this->prefetch_keys(next / sharing, next % sharing, at);
                    prefetch_row(s.dq, b, at, head * s.width, width);
                    if (at + QUERIES < s.queries) {
                        prefetch_row(s.q, b, at + QUERIES, head * s.q_head, width);
                        prefetch_row(s.dout, b, at + QUERIES, head * s.dout_head, width);
                    }
                    const int own = s.causal ? seen - count + i + 1 : seen;
                    this->add_bias(head, at, own, scores + i * K);
                    through_softmax(scores + i * K, dscores + i * K, own, columns);
                }
                memset(scores + count * K, 0, (QUERIES - count) * K * sizeof(float));
                memset(dscores + count * K, 0, (QUERIES - count) * K * sizeof(float));
                turn_left(scores, columns);
                M::template multiply<true>(columns, QUERIES, P, left, QUERIES, dout_right, P, dv, P);
                turn_left(dscores, columns);
                M::template multiply<true>(columns, QUERIES, P, left, QUERIES, q_right, P, dk, P);
                for (int i = 0; i < rows; i++)
                    for (int j = 0; j < columns; j += W) M::store_left(left + i * K + j, load(dscores + i * K + j));
                this->multiply(rows, depth, P, left, K, k, P, dq, P);
                for (int i = 0; i < count; i++) {
                    if (s.q_rotation.cos) Base::rotate(s.q_rotation, b, first + i, -1, dq + i * P);
                    store_row(s.dq, b, first + i, head * s.width, width, dq + i * P);
                }
            }
        for (int64_t t = 0; t < s.keys; t++) {
            if (s.k_rotation.cos) Base::rotate(s.k_rotation, b, t, -1, dk + t * P);
            store_row(s.dk, b, t, shared * s.width, width, dk + t * P);
            store_row(s.dv, b, t, shared * s.width, width, dv + t * P);
        }
    }
};

int64_t attention_backward_items(const Attention &s) { return s.batch * s.heads / s.shared; }

}  // namespace
