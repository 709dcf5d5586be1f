// The backward pass of Mamba-2's scan, from the last chunk to the first; letters as in ssd.h, and dh is the gradient of the state
// after the chunk. Matrices over pairs of tokens are turned, (j, i) with j <= i, so that what belongs to x_j and B_j lies in a row.
#pragma once
#include "rms_norm.h"
#include "ssd.h"

namespace {

template <class M>
struct SsdBackwardPart : SsdPart<SsdBackward, M> {
    typedef SsdPart<SsdBackward, M> Base;
    typedef typename Base::Number Number;
    using Base::s, Base::Q, Base::N, Base::P, Base::b, Base::g, Base::part, Base::first, Base::count, Base::t0, Base::next_t0,
        Base::next_head, Base::tokens, Base::rows, Base::high, Base::low, Base::delta, Base::since, Base::until, Base::weight,
        Base::block, Base::floats, Base::numbers;
    float *scores = floats(Q * Q), *dscores = floats(Q * Q), *dM = floats(Q * Q);  // (j, i)
    float *C_turned = floats(N * Q), *dB = floats(N * Q), *dC = floats(N * Q), *hdy = floats(M::ROW_UNIT * Q);
    float *dx = floats(Q * P), *Bdh = floats(Q * P), *dh = floats(this->own_heads() * N * P);
    float *da = floats(Q), *ddelta = floats(Q), *norm_space = floats(s.norm ? norm_workspace(*s.norm) : 0);
    Number *B = numbers(Q * N), *B_left = numbers(N * Q), *C_left = numbers(N * Q), *C_right = numbers(N * Q);
    Number *x = numbers(Q * P), *xw_right = numbers(Q * P), *dy = numbers(Q * P), *dy_right = numbers(Q * P), *ye = numbers(Q * P);
    Number *mixing = numbers(Q * Q), *pairs = numbers(Q * Q), *h_left = numbers(M::ROW_UNIT * P), *dh_left = numbers(N * P),
           *dh_right = numbers(N * P);

    using Base::Base;

    // B and C, as they are and transposed, and their product, for all heads.
    void load_shared() {
        for (int t = 0; t < rows; t += W) {
            this->turn_tokens(s.B, t, [&](int n, const vf *turned) {
                for (int i = 0; i < W; i++) {
                    M::store_left(B + (t + i) * N + n, load(block + i * N + n));
                    M::store_left(B_left + (n + i) * Q + t, turned[i]);
                }
            });
            this->turn_tokens(s.C, t, [&](int n, const vf *turned) {
                for (int i = 0; i < W; i++) {
                    M::store_left(C_left + (n + i) * Q + t, turned[i]);
                    store(C_turned + (n + i) * Q + t, turned[i]);
                }
                for (int i = 0; i < W; i += 2) M::store_right(C_right, Q, n + i, t, turned[i], turned[i + 1]);
            });
        }
        M::template multiply<false>(rows, N, rows, B, N, C_right, Q, scores, Q, WHOLE, UPPER);
        memset(dscores, 0, rows * Q * sizeof(float));
        memset(dB, 0, N * Q * sizeof(float));
        memset(dC, 0, N * Q * sizeof(float));
    }

    // x, and turned and weighed; dy, and turned, and times exp(a). dx begins as D dy.
    void load_x_and_dy(int64_t head) {
        const float D = s.D ? s.D[head] : 0;
        for (int t = 0; t < rows; t += W) {
            for (int i = 0; i < W; i++) {
                float *row = block + i * P;
                this->load_token(s.x, t + i, head * s.width, s.width, P, row);
                for (int p = 0; p < P; p += W) {
                    M::store_left(x + (t + i) * P + p, load(row + p));
                    store(row + p, load(row + p) * weight[t + i]);
                }
            }
            M::store_right_turned(xw_right, Q, t, block, P, P);
            for (int i = 0; i < W; i++) this->load_token(s.dy, t + i, head * s.width, s.width, P, block + i * P);
            M::store_right_turned(dy_right, Q, t, block, P, P);
            for (int i = 0; i < W; i += 2)
                for (int p = 0; p < P; p += W) {
                    const vf even = load(block + i * P + p), odd = load(block + (i + 1) * P + p);
                    store(dx + (t + i) * P + p, even * D);
                    store(dx + (t + i + 1) * P + p, odd * D);
                    M::store_right(dy, P, t + i, p, even, odd);
                    M::store_right(ye, P, t + i, p, even * since[t + i], odd * since[t + i + 1]);
                }
        }
    }

    // Rows of the state before the chunk as a left operand: as they lie in memory if nothing has to be filled up or widened.
    const Number *state_rows(int64_t at, int n) {
        const bool whole = s.width == P && n + M::ROW_UNIT <= s.n;
        if (whole && sizeof(Number) == (s.x.bfloat16 ? 2 : 4)) return (const Number *)s.before + at + n * P;
        for (int i = 0; i < M::ROW_UNIT; i++) {
            load_row(this->before(), 0, n + i, at, n + i < s.n ? (int)s.width : 0, P, block);
            for (int p = 0; p < P; p += W) M::store_left(h_left + i * P + p, load(block + p));
        }
        return h_left;
    }

    // What the chunk reads of the state before, whose rows begin `at`: the gradients of C and a.
    void through_reading(int64_t at) {
        for (int n = 0; n < N; n += M::ROW_UNIT) {
            M::template multiply<false>(M::ROW_UNIT, P, rows, state_rows(at, n), P, dy_right, Q, hdy, Q);
            for (int t = 0; t < rows; t += W) {
                const vf decay = load(since + t);
                vf by_decay = load(da + t);
                EACH(i, M::ROW_UNIT) {
                    float *sum = dC + (n + i) * Q + t;
                    const vf d = load(hdy + i * Q + t) * decay;
                    store(sum, load(sum) + d);
                    by_decay = fma(d, load(C_turned + (n + i) * Q + t), by_decay);
                }
                store(da + t, by_decay);
            }
        }
    }

    // What the chunk adds to the state: the gradients of B, and B dh for those of x and delta. And what it keeps of the state before:
    // dh becomes that part of the gradient of the state before.
    void through_adding(bool reads, int64_t at, float *own) {
        const float keep = this->kept();
        vf by_keep[2] = {};
        for (int n = 0; n < N; n += 2) {
            for (int i = 0; reads && i < 2; i++)
                load_row(this->before(), 0, n + i, at, n + i < s.n ? (int)s.width : 0, P, block + i * P);
            for (int p = 0; p < P; p += W) {
                vf d[2];
                EACH(i, 2) {
                    float *from = own + (n + i) * P + p;
                    d[i] = load(from);
                    M::store_left(dh_left + (n + i) * P + p, d[i]);
                    store(from, d[i] * keep);
                    if (reads) by_keep[i] = fma(d[i], load(block + i * P + p), by_keep[i]);
                }
                M::store_right(dh_right, P, n, p, d[0], d[1]);
            }
        }
        da[tokens - 1] += sum(by_keep[0] + by_keep[1]) * keep;
        M::template multiply<true>(N, P, rows, dh_left, P, xw_right, Q, dB, Q);
        M::template multiply<false>(rows, N, P, B, N, dh_right, P, Bdh, P);
    }

    // Within the chunk: the gradients of C . B, a and delta; M is left for that of x. Returns the gradient of D.
    // next_before: where the states begin that the next head reads, which come from far away; negative if it reads none.
    float through_mixing(int64_t head, int64_t next_before) {
        const vi lanes = lane_numbers();
        float dD = 0;
        M::template multiply<false>(rows, P, rows, x, P, dy_right, Q, dM, Q, WHOLE, UPPER);
        for (int j = 0; j < rows; j++) {
            prefetch_row(s.dx, b, t0 + j, head * s.width, s.width);
            if (next_t0 >= 0) {
                prefetch_row(s.x, b, next_t0 + j, next_head * s.width, s.width);
                prefetch_row(s.dy, b, next_t0 + j, next_head * s.width, s.width);
            }
            for (int64_t n = j * s.n / rows; next_before >= 0 && n < (j + 1) * s.n / rows; n++)
                prefetch_row(this->before(), 0, n, next_before, s.width);
            Number *row = mixing + j * Q;
            const int start = j / W * W;
            vf row_sum = {};
            for (int i = j / M::ROW_UNIT * M::ROW_UNIT; i < start; i += W) M::store_left(row + i, vf{});  // products begin to read here
            for (int i = start; i < rows; i += W) {
                const int at = j * Q + i;
                vf keep = (load(high + i) - high[j]) + (load(low + i) - low[j]);
                exp2_clamped<1>(&keep);
                keep = select((lanes >= j - i) & (lanes < tokens - i), keep, vf{});
                const vf score = load(scores + at), d = load(dM + at) * keep, by_step = d * score;
                M::store_left(row + i, score * keep * delta[j]);
                store(dscores + at, load(dscores + at) + d * delta[j]);
                store(da + i, load(da + i) + by_step * delta[j]);
                row_sum += by_step;
            }
            const float by_step = sum(row_sum);
            ddelta[j] += by_step;
            da[j] -= by_step * delta[j];
            if (j < tokens) dD += dM[j * Q + j];
        }
        M::template multiply<true>(rows, rows, P, mixing, Q, dy, P, dx, P, UPPER);
        return dD;
    }

    void store_dx(int64_t head, bool adds) {
        for (int t = 0; t < tokens; t++) {
            float *out = dx + t * P;
            if (adds) {
                vf by_weight = {};
                for (int p = 0; p < P; p += W) {
                    const vf d = load(Bdh + t * P + p);
                    by_weight += d * load(x + t * P + p);
                    store(out + p, load(out + p) + d * weight[t]);
                }
                const float dw = sum(by_weight);
                ddelta[t] += dw * until[t];
                da[t] -= dw * weight[t];
                da[tokens - 1] += dw * weight[t];
            }
            store_row(s.dx, b, t0 + t, head * s.width, (int)s.width, out);
        }
    }

    // A token's delta A goes into all later sums of its chunk. Returns the gradient of A.
    float store_ddelta(int64_t head) {
        float later = 0, dA = 0;
        for (int t = tokens - 1; t >= 0; t--) {
            later += da[t];
            dA += later * delta[t];
            s.ddelta[(b * s.length + t0 + t) * s.heads + head] = ddelta[t] + later * s.A[head];
        }
        return dA;
    }

    // The gradients of B and C: through their product, and out.
    void store_shared() {
        for (int j = 0; j < rows; j += 2)
            for (int i = 0; i < rows; i += W) M::store_right(pairs, Q, j, i, load(dscores + j * Q + i), load(dscores + (j + 1) * Q + i));
        M::template multiply<true>(N, rows, rows, B_left, Q, pairs, Q, dC, Q);
        for (int j = 0; j < rows; j += W) M::store_right_turned(pairs, Q, j, dscores + j * Q, rows, Q);
        M::template multiply<true>(N, rows, rows, C_left, Q, pairs, Q, dB, Q);
        store_turned(dB, s.dB);
        store_turned(dC, s.dC);
    }
    // (N, Q) to (parts, B, L, G, N).
    void store_turned(const float *from, float *to) {
        for (int t = 0; t < rows; t += W)
            for (int n = 0; n < N; n += W) {
                vf turned[W];
                for (int i = 0; i < W; i++) turned[i] = load(from + (n + i) * Q + t);
                transpose(turned);
                for (int i = 0; i < W && t + i < tokens; i++) {
                    const int64_t at = (((part * s.batch + b) * s.length + t0 + t + i) * s.groups + g) * s.n + n;
                    for (int64_t m = 0; m < W && n + m < s.n; m++) to[at + m] = turned[i][m];
                }
            }
    }

    void run(int64_t item) {
        const typename M::Session session;
        this->choose_item(item);
        this->load_states(s.dfinal, dh);
        float *dA = s.dA + b * s.heads + first, *dD = s.dD + b * s.heads + first;
        for (int64_t i = 0; i < count; i++) dA[i] = dD[i] = 0;
        for (int64_t k = this->chunks(); k-- > 0;) {
            this->choose_chunk(k);
            const bool reads = k >= this->reads_from(), adds = s.dfinal || k + 1 < this->chunks();
            this->run_tiles(norm_backward_run, s.norm, ITEM_ROWS, norm_space);
            load_shared();
            for (int64_t i = 0; i < count; i++) {
                const int64_t head = this->choose_head(i, -s.chunk);
                float *own = dh + i * N * P;
                memset(da, 0, rows * sizeof(float));
                memset(ddelta, 0, rows * sizeof(float));
                this->load_steps(head);
                load_x_and_dy(head);
                const int64_t at = this->before_at(k, head), next_k = next_t0 == t0 ? k : k - 1;
                const int64_t next_before = next_k < this->reads_from() ? -1 : this->before_at(next_k, next_head);
                if (reads) through_reading(at);
                if (adds) through_adding(reads, at, own);
                dD[i] += through_mixing(head, next_before);
                store_dx(head, adds);
                if (reads) M::template multiply<true>(N, rows, P, C_left, Q, ye, P, own, P);
                dA[i] += store_ddelta(head);
            }
            store_shared();
        }
        this->store_states(dh, s.dinitial);
    }
};

}  // namespace
