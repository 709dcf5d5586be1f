// Mamba-2's scan (arXiv 2405.21060, section 6) for some heads of one sequence, chunk after chunk, with everything in the cache.
// In a chunk of Q tokens, with a the running sum of delta A and h the state before it, head by head:
//
//   y_i = sum_(j <= i) M_ij x_j + exp(a_i) C_i h + D x_i,   M_ij = (C_i . B_j) exp(a_i - a_j) delta_j,
//   h  <- exp(a_Q) h + sum_j B_j exp(a_Q - a_j) delta_j x_j
//
// Here is what both directions need.
#pragma once
#include "products.h"

namespace {

template <class Arguments, class M>
struct SsdPart : Buffers<M> {
    using typename Buffers<M>::Number;
    using Buffers<M>::floats, Buffers<M>::numbers;
    const Arguments &s;
    const int Q, N, P;  // filled up to whole units
    int64_t b = 0, g = 0, part = 0, first = 0, count = 0, t0 = 0;  // sequence, group, its part, its heads; the chunk's first token
    int64_t next_head = 0, next_t0 = 0;                            // what comes after this head of this chunk
    int tokens = 0, rows = 0;                                      // of the chunk, and filled up
    // (Q): a in two floats, so that differences of large sums stay exact; delta; exp(a_i); exp(a_Q - a_i); that times delta_i
    float *high = floats(Q), *low = floats(Q), *delta = floats(Q), *since = floats(Q), *until = floats(Q), *weight = floats(Q);
    float *block = floats(W * (N > P ? N : P));  // some rows

    // Not inlined: the loops of the forward pass lose the registers that its results take, a tenth of their speed.
    __attribute__((noinline)) SsdPart(const Arguments &s_, float *space_)
        : Buffers<M>(space_), s(s_), Q(padded(s_.chunk, M::UNIT)), N(padded(s_.n, M::UNIT)), P(padded(s_.width, M::UNIT)) {}

    int64_t own_heads() const { return ceil_div(s.heads / s.groups, s.parts); }  // of an item; they share C . B
    void choose_item(int64_t item) {
        const int64_t shared = s.heads / s.groups;
        part = item % s.parts, g = item / s.parts % s.groups, b = item / s.parts / s.groups;
        first = g * shared + part * own_heads(), count = smaller(own_heads(), shared - part * own_heads());
    }
    int64_t chunks() const { return ceil_div(s.length, s.chunk); }
    int64_t reads_from() const { return s.initial ? 0 : 1; }  // the first chunk that reads a state
    void choose_chunk(int64_t k) {
        t0 = k * s.chunk, tokens = smaller(s.chunk, s.length - t0), rows = padded(tokens, M::UNIT);
    }
    // What a kernel with items of `size` tokens makes of the chunk, whose rows are in the cache; items do not cross chunks.
    template <class Other>
    void run_tiles(void (*run)(const Other &, int64_t, float *), const Other *other, int size, float *space) const {
        for (int t = 0; other && t < tokens; t += size) run(*other, b * ceil_div(s.length, size) + (t0 + t) / size, space);
    }
    // The item's head i; after the last one comes the first one of the chunk that lies `step` tokens on.
    int64_t choose_head(int64_t i, int64_t step) {
        const bool last = i + 1 == count;
        next_head = last ? first : first + i + 1, next_t0 = last ? t0 + step : t0;
        return first + i;
    }

    // The chunk's row t, channels from `from` on; zeros where there is none.
    void load_token(const Rows &r, int t, int64_t from, int64_t channels, int size, float *to) const {
        load_row(r, b, t0 + t, from, t < tokens ? (int)channels : 0, size, to);
    }
    // W of the chunk's rows of B or C: as they are in `block`, and turned, W channels at a time: each(channel, vectors).
    template <class Each>
    void turn_tokens(const Rows &r, int t, Each each) {
        for (int i = 0; i < W; i++) load_token(r, t + i, g * s.n, s.n, N, block + i * N);
        for (int n = 0; n < N; n += W) {
            vf turned[W];
            for (int i = 0; i < W; i++) turned[i] = load(block + i * N + n);
            transpose(turned);
            each(n, turned);
        }
    }

    void load_steps(int64_t head) {
        const double A2 = s.A2[head];
        double a = 0;
        for (int t = 0; t < rows; t++) {
            delta[t] = t < tokens ? s.delta[(b * s.length + t0 + t) * s.heads + head] : 0;
            a += A2 * delta[t];
            high[t] = (float)a;
            low[t] = (float)(a - high[t]);
        }
        for (int t = 0; t < rows; t += W) {
            vf e[2] = {load(high + t) + load(low + t), (high[rows - 1] - load(high + t)) + (low[rows - 1] - load(low + t))};
            exp2_clamped<2>(e);
            store(since + t, e[0]);
            store(until + t, e[1]);
            store(weight + t, e[1] * load(delta + t));
        }
    }
    float kept() const { return since[rows - 1]; }  // what the chunk keeps of the state before it

    // (B, H, P, N), for the heads of this item, to (heads, N, P) and back.
    void load_states(const float *from, float *h) const {
        memset(h, 0, count * N * P * sizeof(float));
        for (int64_t i = 0; from && i < count; i++) turn(from + state_at(i), s.n, s.width, s.n, h + i * N * P, P);
    }
    void store_states(const float *h, float *to) const {
        for (int64_t i = 0; to && i < count; i++) turn(h + i * N * P, P, s.n, s.width, to + state_at(i), s.n);
    }
    int64_t state_at(int64_t i) const { return (b * s.heads + first + i) * s.width * s.n; }

    // The states before the chunks that read one: (chunks, B, H, N, P), as rows of P.
    Rows before() const { return {(void *)s.before, 0, s.width, s.x.bfloat16}; }
    int64_t before_at(int64_t k, int64_t head) const { return (((k - reads_from()) * s.batch + b) * s.heads + head) * s.n * s.width; }
};

template <class Arguments>
int64_t ssd_items(const Arguments &s) {
    return s.batch * s.groups * s.parts;
}

}  // namespace
