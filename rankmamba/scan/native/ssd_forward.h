// Mamba-2's scan (arXiv 2405.21060, section 6) for some heads of one sequence, chunk after chunk, with everything in the cache.
// In a chunk of Q tokens, with a the running sum of delta A and h the state before it, head by head:
//
//   y_i = sum_(j <= i) M_ij x_j + exp(a_i) C_i h + D x_i,   M_ij = (C_i . B_j) exp(a_i - a_j) delta_j,
//   h  <- exp(a_Q) h + sum_j B_j exp(a_Q - a_j) delta_j x_j
#pragma once
#include "products.h"

namespace {

constexpr int HEADS = 8;  // of one item; they share C . B, and few of them leave work for other threads

inline float exp2_of(float x) {
    vf v = broadcast(x);
    exp2_clamped<1>(&v);
    return v[0];
}

template <class M>
struct SsdForwardPart {
    typedef typename M::Number Number;
    const SsdForward &s;
    const int Q, N, P;  // filled up to whole units
    float *const space;
    int64_t used = 0;
    // (Q): a in two floats, so that differences of large sums stay exact; delta; exp(a_i); exp(a_Q - a_i) delta_i
    float *high = floats(Q), *low = floats(Q), *delta = floats(Q), *since = floats(Q), *weight = floats(Q);
    float *one = floats(N > P ? N : P), *other = floats(N > P ? N : P);                     // rows
    float *straight = floats(W * N);                                                        // rows of B
    float *scores = floats(Q * Q), *y = floats(Q * P), *carried = floats(Q * P);            // C . B, M x, C h
    float *h = floats(HEADS * N * P);                                                       // (HEADS, N, P)
    Number *C = numbers(Q * N), *B = numbers(N * Q), *B_right = numbers(N * Q);             // left, left, right
    Number *mixing = numbers(Q * Q), *x = numbers(Q * P), *xw = numbers(Q * P), *h_right = numbers(N * P);

    SsdForwardPart(const SsdForward &s_, float *space_)
        : s(s_), Q(padded(s_.chunk, M::UNIT)), N(padded(s_.n, M::UNIT)), P(padded(s_.width, M::UNIT)), space(space_) {}

    float *floats(int64_t count) {
        float *taken = space ? space + used : nullptr;
        used += padded(count, 16);
        return taken;
    }
    Number *numbers(int64_t count) { return (Number *)floats(count * sizeof(Number) / sizeof(float)); }

    // C, B transposed, and their product, for all heads.
    void load_shared(int64_t b, int64_t g, int64_t t0, int tokens, int rows) {
        for (int t = 0; t < rows; t++) {
            const int count = t < tokens ? (int)s.n : 0;
            load_row(s.C, b, t0 + t, g * s.n, count, N, one);
            load_row(s.B, b, t0 + t, g * s.n, count, N, straight + t % W * N);
            for (int n = 0; n < N; n += W) M::store_left(C + t * N + n, load(one + n));
            if (t % W < W - 1) continue;
            const int start = t + 1 - W;
            for (int n = 0; n < N; n += W) {
                vf turned[W];
                for (int i = 0; i < W; i++) turned[i] = load(straight + i * N + n);
                transpose(turned);
                for (int i = 0; i < W; i++) M::store_left(B + (n + i) * Q + start, turned[i]);
                for (int i = 0; i < W; i += 2) M::store_right(B_right, Q, n + i, start, turned[i], turned[i + 1]);
            }
        }
        M::template multiply<false>(rows, N, rows, C, N, B_right, Q, scores, Q);
    }

    void load_steps(int64_t b, int64_t head, int64_t t0, int tokens, int rows) {
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
            store(weight + t, e[1] * load(delta + t));
        }
    }

    // x as it is, and weighed for the state; y begins as D x.
    void load_x(int64_t b, int64_t head, int64_t t0, int tokens, int rows) {
        const float D = s.D ? s.D[head] : 0;
        for (int t = 0; t < rows; t += 2) {
            load_row(s.x, b, t0 + t, head * s.width, t < tokens ? (int)s.width : 0, P, one);
            load_row(s.x, b, t0 + t + 1, head * s.width, t + 1 < tokens ? (int)s.width : 0, P, other);
            for (int p = 0; p < P; p += W) {
                const vf even = load(one + p), odd = load(other + p);
                store(y + t * P + p, even * D);
                store(y + (t + 1) * P + p, odd * D);
                M::store_right(x, P, t, p, even, odd);
                M::store_right(xw, P, t, p, even * weight[t], odd * weight[t + 1]);
            }
        }
    }

    void mix(int tokens, int rows) {
        vi lanes;
        for (int i = 0; i < W; i++) lanes[i] = i;
        for (int i = 0; i < rows; i++) {
            Number *row = mixing + i * Q;
            const int end = i < tokens ? i + 1 : 0;
            int j = 0;
            for (; j < end; j += W) {
                vf keep = (high[i] - load(high + j)) + (low[i] - load(low + j));
                exp2_clamped<1>(&keep);
                keep *= load(scores + i * Q + j) * load(delta + j);
                M::store_left(row + j, select(lanes < end - j, keep, vf{}));
            }
            memset(row + j, 0, (rows - j) * sizeof(Number));
        }
    }

    // The state before the chunk, for the product with C and for the backward; what the chunk keeps of it stays in `h`.
    void decay(float *h, float keep) {
        for (int n = 0; n < N; n += 2)
            for (int p = 0; p < P; p += W) {
                float *to = h + n * P + p;
                const vf even = load(to), odd = load(to + P);
                M::store_right(h_right, P, n, p, even, odd);
                store(to, even * keep);
                store(to + P, odd * keep);
            }
    }

    void store_y(int64_t b, int64_t head, int64_t t0, int tokens, bool reads) {
        for (int t = 0; t < tokens; t++) {
            float *out = y + t * P;
            for (int p = 0; reads && p < P; p += W) store(out + p, load(out + p) + load(carried + t * P + p) * since[t]);
            store_row(s.y, b, t0 + t, head * s.width, (int)s.width, out);
        }
    }

    void run(int64_t item) {
        const typename M::Session session;
        const int64_t shared = s.heads / s.groups, parts = ceil_div(shared, HEADS);
        const int64_t part = item % parts, g = item / parts % s.groups, b = item / parts / s.groups;
        const int64_t first = g * shared + part * HEADS, count = smaller(HEADS, shared - part * HEADS);
        const int64_t chunks = ceil_div(s.length, s.chunk), reads_from = s.initial ? 0 : 1;
        memset(h, 0, count * N * P * sizeof(float));
        for (int64_t i = 0; s.initial && i < count; i++)
            for (int64_t p = 0; p < s.width; p++)
                for (int64_t n = 0; n < s.n; n++)
                    h[(i * N + n) * P + p] = s.initial[((b * s.heads + first + i) * s.width + p) * s.n + n];
        for (int64_t k = 0; k < chunks; k++) {
            const int64_t t0 = k * s.chunk;
            const int tokens = smaller(s.chunk, s.length - t0), rows = padded(tokens, M::UNIT);
            const bool reads = k >= reads_from, adds = s.final || k + 1 < chunks;
            load_shared(b, g, t0, tokens, rows);
            for (int64_t i = 0; i < count; i++) {
                float *own = h + i * N * P;
                for (int t = 0; t < tokens; t++) {  // for the end of this head, and for the next one
                    prefetch_row(s.y, b, t0 + t, (first + i) * s.width, s.width);
                    if (i + 1 < count) prefetch_row(s.x, b, t0 + t, (first + i + 1) * s.width, s.width);
                    if (i + 1 == count && t0 + t + s.chunk < s.length) {
                        prefetch_row(s.x, b, t0 + t + s.chunk, first * s.width, s.width);
                        prefetch_row(s.B, b, t0 + t + s.chunk, g * s.n, s.n);
                        prefetch_row(s.C, b, t0 + t + s.chunk, g * s.n, s.n);
                    }
                }
                if (s.before && reads) {
                    const Rows to = before_rows();
                    for (int64_t n = 0; n < s.n; n++) prefetch_row(to, 0, n, before_at(k - reads_from, b, first + i), s.width);
                }
                load_steps(b, first + i, t0, tokens, rows);
                load_x(b, first + i, t0, tokens, rows);
                mix(tokens, rows);
                M::template multiply<true>(rows, rows, P, mixing, Q, x, P, y, P, true);
                if (reads) {
                    if (s.before) store_before(own, k - reads_from, b, first + i);
                    decay(own, since[rows - 1]);
                    M::template multiply<false>(rows, N, P, C, N, h_right, P, carried, P);
                }
                if (adds) M::template multiply<true>(N, rows, P, B, Q, xw, P, own, P);
                store_y(b, first + i, t0, tokens, reads);
            }
        }
        for (int64_t i = 0; s.final && i < count; i++)
            for (int64_t p = 0; p < s.width; p++)
                for (int64_t n = 0; n < s.n; n++)
                    s.final[((b * s.heads + first + i) * s.width + p) * s.n + n] = h[(i * N + n) * P + p];
    }

    // before: (chunks that read a state, B, G, N, H/G P)
    Rows before_rows() const { return {s.before, 0, s.heads / s.groups * s.width, s.x.bfloat16}; }
    int64_t before_at(int64_t chunk, int64_t b, int64_t head) const {
        const int64_t shared = s.heads / s.groups, line = shared * s.width;
        return ((chunk * s.batch + b) * s.groups + head / shared) * s.n * line + head % shared * s.width;
    }
    void store_before(const float *h, int64_t chunk, int64_t b, int64_t head) {
        const Rows to = before_rows();
        const int64_t at = before_at(chunk, b, head);
        for (int64_t n = 0; n < s.n; n++) store_row(to, 0, n, at, (int)s.width, h + n * P);
    }
};

int64_t ssd_forward_items(const SsdForward &s) { return s.batch * s.groups * ceil_div(s.heads / s.groups, HEADS); }

#ifdef __AMX_BF16__
int64_t ssd_forward_workspace(const SsdForward &s) {
    return s.x.bfloat16 ? SsdForwardPart<Tiles>(s, nullptr).used : SsdForwardPart<Vectors>(s, nullptr).used;
}
void ssd_forward_run(const SsdForward &s, int64_t item, float *space) {
    const FlushDenormals flush;
    s.x.bfloat16 ? SsdForwardPart<Tiles>(s, space).run(item) : SsdForwardPart<Vectors>(s, space).run(item);
}
#else
int64_t ssd_forward_workspace(const SsdForward &s) { return SsdForwardPart<Vectors>(s, nullptr).used; }
void ssd_forward_run(const SsdForward &s, int64_t item, float *space) {
    const FlushDenormals flush;
    SsdForwardPart<Vectors>(s, space).run(item);
}
#endif

}  // namespace
