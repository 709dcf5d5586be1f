// The forward pass of Mamba-2's scan; letters as in ssd.h.
#pragma once
#include "causal_conv1d.h"
#include "rms_norm.h"
#include "ssd.h"

namespace {

template <class M>
struct SsdForwardPart : SsdPart<SsdForward, M> {
    typedef SsdPart<SsdForward, M> Base;
    typedef typename Base::Number Number;
    using Base::s, Base::Q, Base::N, Base::P, Base::b, Base::g, Base::first, Base::count, Base::t0, Base::next_t0,
        Base::next_head, Base::tokens, Base::rows, Base::high, Base::low, Base::delta, Base::since, Base::weight, Base::block,
        Base::floats, Base::numbers;
    float *scores = floats(Q * Q), *y = floats(Q * P), *h = floats(this->own_heads() * N * P);  // C . B; y; (heads, N, P)
    Number *C = numbers(Q * N), *B = numbers(N * Q), *B_right = numbers(N * Q);   // left, left, right
    Number *mixing = numbers(Q * Q), *x = numbers(Q * P), *xw = numbers(Q * P), *h_right = numbers(N * P);
    float *norm_space = floats(s.norm ? norm_workspace(*s.norm) : 0);

    using Base::Base;

    // C, B transposed where the chunk adds to the state, and their product, for all heads.
    void load_shared(bool adds) {
        for (int t = 0; t < rows; t += W) {
            for (int i = 0; i < W; i++) {
                this->load_token(s.C, t + i, g * s.n, s.n, N, block);
                for (int n = 0; n < N; n += W) M::store_left(C + (t + i) * N + n, load(block + n));
            }
            this->turn_tokens(s.B, t, [&](int n, const vf *turned) {
                for (int i = 0; adds && i < W; i++) M::store_left(B + (n + i) * Q + t, turned[i]);
                for (int i = 0; i < W; i += 2) M::store_right(B_right, Q, n + i, t, turned[i], turned[i + 1]);
            });
        }
        M::template multiply<false>(rows, N, rows, C, N, B_right, Q, scores, Q, WHOLE, LOWER);
    }

    // x as it is, and weighed where the chunk adds to the state. y, which is C h if the chunk reads a state, becomes exp(a) C h + D x.
    void load_x(int64_t head, bool reads, bool adds) {
        const float D = s.D ? s.D[head] : 0;
        for (int t = 0; t < rows; t += 2) {
            float *next = block + P;
            this->load_token(s.x, t, head * s.width, s.width, P, block);
            this->load_token(s.x, t + 1, head * s.width, s.width, P, next);
            for (int p = 0; p < P; p += W) {
                const vf even = load(block + p), odd = load(next + p);
                float *to = y + t * P + p;
                store(to, reads ? fma(load(to), broadcast(since[t]), even * D) : even * D);
                store(to + P, reads ? fma(load(to + P), broadcast(since[t + 1]), odd * D) : odd * D);
                M::store_right(x, P, t, p, even, odd);
                if (adds) M::store_right(xw, P, t, p, even * weight[t], odd * weight[t + 1]);
            }
        }
    }

    void mix(int64_t head) {
        const vi lanes = lane_numbers();
        for (int i = 0; i < tokens; i++) {
            prefetch_row(s.y, b, t0 + i, head * s.width, s.width);
            if (s.norm) prefetch_row(s.norm->z, b, t0 + i, head * s.width, s.width);
            if (next_t0 + i < s.length) prefetch_row(s.x, b, next_t0 + i, next_head * s.width, s.width);
            Number *row = mixing + i * Q;
            int j = 0;
            for (; j <= i; j += W) {
                vf keep = (high[i] - load(high + j)) + (low[i] - load(low + j));
                exp2_up_to_1<1>(&keep);
                keep *= load(scores + i * Q + j) * load(delta + j);
                M::store_left(row + j, select(lanes <= i - j, keep, vf{}));
            }
            for (; j < padded(i + 1, M::ROW_UNIT); j += W) M::store_left(row + j, vf{});  // as far as products read
        }
        for (int i = tokens; i < rows; i++) memset(mixing + i * Q, 0, rows * sizeof(Number));
    }

    // y = C h, of the state before the chunk; what the chunk keeps of it stays in `own`.
    void read_state(float *own) {
        const float keep = this->kept();
        for (int n = 0; n < N; n += 2)
            for (int p = 0; p < P; p += W) {
                float *to = own + n * P + p;
                const vf even = load(to), odd = load(to + P);
                M::store_right(h_right, P, n, p, even, odd);
                store(to, even * keep);
                store(to + P, odd * keep);
            }
        M::template multiply<false>(rows, N, P, C, N, h_right, P, y, P);
    }

    void run(int64_t item) {
        const typename M::Session session;
        this->choose_item(item);
        this->load_states(s.initial, h);
        for (int64_t k = 0; k < this->chunks(); k++) {
            this->choose_chunk(k);
            const bool reads = k >= this->reads_from(), adds = s.final || k + 1 < this->chunks();
            this->run_tiles(conv_forward_run, s.conv, CONV_ROWS, nullptr);
            load_shared(adds);
            for (int64_t i = 0; i < count; i++) {
                const int64_t head = this->choose_head(i, s.chunk);
                float *own = h + i * N * P;
                this->load_steps(head);
                for (int64_t n = 0; s.before && reads && n < s.n; n++)
                    store_row(this->before(), 0, n, this->before_at(k, head), (int)s.width, own + n * P);
                if (reads) read_state(own);
                load_x(head, reads, adds);
                if (adds) M::template multiply<true>(N, rows, P, B, Q, xw, P, own, P);
                mix(head);
                M::template multiply<true>(rows, rows, P, mixing, Q, x, P, y, P, LOWER);
                for (int t = 0; t < tokens; t++) store_row(s.y, b, t0 + t, head * s.width, (int)s.width, y + t * P);
            }
            this->run_tiles(norm_forward_run, s.norm, ITEM_ROWS, norm_space);
        }
        this->store_states(h, s.final);
    }
};

}  // namespace
