// The depthwise causal convolution before the scan, with its bias and silu: one pass over the rows instead of three.
#pragma once
#include "vec.h"

namespace {

constexpr int TAPS = 4;          // of every Mamba; other filters run in PyTorch
constexpr int STRIP = 2;         // vectors of channels whose filter and inputs stay in registers, as far as there are any
constexpr int CONV_ROWS = 16;    // tokens of an item of the forward: more are more streams than a processor follows
constexpr int STRIPS_AHEAD = 4;  // what the forward asks for: a strip of a tile takes less time than memory
constexpr int AHEAD = 8;         // tokens that the backward asks for ahead

// A strip of a tensor's channels, from `first` on. WHOLE: all of them exist; else, at the end of a row, `count` do.
template <class Number, bool WHOLE>
struct Strip {
    const Rows &r;
    const int64_t b, first;
    const int count;

    Number *at(int64_t t) const { return (Number *)r.data + b * r.batch_stride + t * r.row_stride + first; }
    ALWAYS_INLINE void read(int64_t t, vf *to) const {
        if constexpr (WHOLE) {
            EACH(c, STRIP) to[c] = load(at(t) + c * W);
        } else {
            float row[STRIP * W];
            load_row(r, b, t, first, count, STRIP * W, row);
            EACH(c, STRIP) to[c] = load(row + c * W);
        }
    }
    ALWAYS_INLINE void write(int64_t t, const vf *from) const {
        if constexpr (WHOLE) {
            EACH(c, STRIP) store(at(t) + c * W, from[c]);
        } else {
            float row[STRIP * W];
            EACH(c, STRIP) store(row + c * W, from[c]);
            store_row(r, b, t, first, count, row);
        }
    }
    // As `prefetch_row`, from so many channels behind `first`.
    ALWAYS_INLINE void prefetch(int64_t t, int64_t channels) const {
        const char *from = (const char *)(at(t) + channels);
        for (int end = STRIP * W * sizeof(Number); end > 0; end -= 64) __builtin_prefetch(from + end - 1, 0, 2);
    }
};

// The filter of a strip and the last inputs that it has read.
template <class Number, bool WHOLE>
struct Filter {
    const Conv &s;
    const Strip<Number, WHOLE> input;
    const Strip<float, WHOLE> initial;
    vf weight[TAPS][STRIP], bias[STRIP], x[TAPS][STRIP];  // x_(t-3) to x_t

    Filter(const Conv &s_, int64_t b, int64_t first)
        : s(s_), input{s.x, b, first, smaller(STRIP * W, s.inner - first)}, initial{s.initial, b, first, input.count} {
        const Rows weights{(void *)s.weight, 0, s.inner, 0}, biases{(void *)s.bias, 0, 0, 0};
        EACH(k, TAPS) Strip<float, WHOLE>{weights, 0, first, input.count}.read(k, weight[k]);
        if (s.bias)
            Strip<float, WHOLE>{biases, 0, first, input.count}.read(0, bias);
        else
            EACH(c, STRIP) bias[c] = vf{};
    }
    // Where a tensor with the same channels has this strip.
    template <class Other>
    Strip<Other, WHOLE> of(const Rows &r) const {
        return {r, input.b, input.first, input.count};
    }
    // x_t as x[k]; before the sequence that is the initial state.
    ALWAYS_INLINE void read(int64_t t, int k) {
        if (t >= 0)
            input.read(t, x[k]);
        else if (s.initial.data)
            initial.read(t + TAPS - 1, x[k]);
        else
            EACH(c, STRIP) x[k][c] = vf{};
    }
    // y_t before the silu, and the silu's gate.
    ALWAYS_INLINE void apply(vf *y, vf *gate) const {
        EACH(c, STRIP) y[c] = bias[c];
        EACH(k, TAPS)
            EACH(c, STRIP) y[c] = fma(weight[k][c], x[k][c], y[c]);
        if (s.silu) sizeof(Number) == 2 ? sigmoid_bf16<STRIP>(y, gate) : sigmoid<STRIP>(y, gate);
    }
};

// An item of the forward is a tile of tokens with all channels: rows are read along, whose strips would each ask for the cache lines
// that they share with their neighbours.
int64_t conv_forward_items(const Conv &s) { return s.batch * ceil_div(s.length, CONV_ROWS); }
int64_t conv_workspace(const Conv &) { return 0; }

template <class Number, bool WHOLE>
inline void convolve(const Conv &s, int64_t b, int64_t t0, int64_t first) {
    Filter<Number, WHOLE> filter(s, b, first);
    const auto output = filter.template of<Number>(s.y);
    EACH(k, TAPS - 1) filter.read(t0 - TAPS + 1 + k, k);
    const int64_t end = t0 + CONV_ROWS < s.length ? t0 + CONV_ROWS : s.length;
    for (int64_t t = t0; t < end; t++) {
        filter.input.prefetch(t, STRIPS_AHEAD * STRIP * W), output.prefetch(t, STRIPS_AHEAD * STRIP * W);
        vf y[STRIP], gate[STRIP];
        filter.input.read(t, filter.x[TAPS - 1]);
        filter.apply(y, gate);
        if (s.silu) EACH(c, STRIP) y[c] *= gate[c];
        output.write(t, y);
        EACH(k, TAPS - 1)
            EACH(c, STRIP) filter.x[k][c] = filter.x[k + 1][c];
    }
}

template <class Number>
void convolve_tile(const Conv &s, int64_t b, int64_t t0) {
    int64_t first = 0;
    for (; first + STRIP * W <= s.inner; first += STRIP * W) convolve<Number, true>(s, b, t0, first);
    if (first < s.inner) convolve<Number, false>(s, b, t0, first);
}

void conv_forward_run(const Conv &s, int64_t item, float *) {
    const FlushDenormals flush;
    const int64_t tiles = ceil_div(s.length, CONV_ROWS), b = item / tiles, t0 = item % tiles * CONV_ROWS;
    s.x.bfloat16 ? convolve_tile<uint16_t>(s, b, t0) : convolve_tile<float>(s, b, t0);
}

// An item of the backward is a strip of channels of one sequence, from its last token to its first: the gradient of its filter is summed
// in registers.
int64_t conv_backward_items(const Conv &s) { return s.batch * ceil_div(s.inner, STRIP * W); }

template <class Number, bool WHOLE>
inline void convolve_back(const Conv &s, int64_t b, int64_t first) {
    Filter<Number, WHOLE> filter(s, b, first);
    const auto dy = filter.template of<Number>(s.dy), dx = filter.template of<Number>(s.dx);
    vf dweight[TAPS][STRIP], dbias[STRIP], d[TAPS][STRIP], out[STRIP];  // d: the gradients before the silu, of y_t to y_(t+3)
    EACH(c, STRIP) {
        dbias[c] = vf{};
        EACH(k, TAPS) dweight[k][c] = d[k][c] = vf{};
    }
    // x_t was used by y_t with the last tap, by y_(t+1) with the one before it, and so on.
    const auto spread = [&] {
        EACH(c, STRIP) out[c] = filter.weight[0][c] * d[TAPS - 1][c];
        for (int k = 1; k < TAPS; k++)
            EACH(c, STRIP) out[c] = fma(filter.weight[k][c], d[TAPS - 1 - k][c], out[c]);
    };
    const auto step_back = [&] {
        for (int k = TAPS - 1; k > 0; k--)
            EACH(c, STRIP) d[k][c] = d[k - 1][c], filter.x[k][c] = filter.x[k - 1][c];
    };
    EACH(k, TAPS - 1) filter.read(s.length - TAPS + 1 + k, k);
    for (int64_t t = s.length - 1; t >= 0; t--) {
        if (t >= AHEAD) filter.input.prefetch(t - AHEAD, 0), dy.prefetch(t - AHEAD, 0), dx.prefetch(t - AHEAD, 0);
        step_back();
        filter.read(t - TAPS + 1, 0);
        dy.read(t, d[0]);
        if (s.silu) {
            vf y[STRIP], gate[STRIP];
            filter.apply(y, gate);
            EACH(c, STRIP) d[0][c] *= fma(y[c] * gate[c], 1.f - gate[c], gate[c]);
        }
        EACH(c, STRIP) dbias[c] += d[0][c];
        EACH(k, TAPS)
            EACH(c, STRIP) dweight[k][c] = fma(d[0][c], filter.x[k][c], dweight[k][c]);
        spread();
        dx.write(t, out);
    }
    for (int64_t t = TAPS - 2; s.dinitial.data && t >= 0; t--) {
        step_back();
        EACH(c, STRIP) d[0][c] = vf{};
        spread();
        filter.template of<float>(s.dinitial).write(t, out);
    }
    const Rows dweights{s.dweight, TAPS * s.inner, s.inner, 0}, dbiases{s.dbias, s.inner, 0, 0};
    EACH(k, TAPS) filter.template of<float>(dweights).write(k, dweight[k]);
    filter.template of<float>(dbiases).write(0, dbias);
}

template <class Number>
void convolve_back_strip(const Conv &s, int64_t b, int64_t first) {
    first + STRIP * W <= s.inner ? convolve_back<Number, true>(s, b, first) : convolve_back<Number, false>(s, b, first);
}

void conv_backward_run(const Conv &s, int64_t item, float *) {
    const FlushDenormals flush;
    const int64_t strips = ceil_div(s.inner, STRIP * W), b = item / strips, first = item % strips * STRIP * W;
    s.x.bfloat16 ? convolve_back_strip<uint16_t>(s, b, first) : convolve_back_strip<float>(s, b, first);
}

}  // namespace
