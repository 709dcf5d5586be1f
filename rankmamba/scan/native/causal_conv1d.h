// The depthwise causal convolution before the scan, with its bias and silu: one pass over the rows instead of three.
#pragma once
#include "vec.h"

namespace {

constexpr int CONV_ROWS = 8;   // tokens of an item of the forward: more are more streams than a processor follows
constexpr int CONV_TILE = 32;  // tokens that the backward takes at a time

// A block of channels of one sequence, and its filter (K, BLOCK).
struct Filter {
    int64_t b, first;
    int count, taps;
    float *weight, *bias;

    Filter(const Conv &s, int64_t b, int64_t block, float *space)
        : b(b),
          first(block * BLOCK),
          count(smaller(BLOCK, s.inner - first)),
          taps((int)s.taps),
          weight(space),
          bias(space + s.taps * BLOCK) {
        for (int k = 0; k < taps; k++) load_span(s.weight + k * s.inner + first, count, BLOCK, weight + k * BLOCK);
        load_span(s.bias ? s.bias + first : nullptr, count, BLOCK, bias);
    }
    static int64_t workspace(const Conv &s) { return (s.taps + 1) * BLOCK; }

    // The input at time t; before the sequence that is the initial state.
    void load_input(const Conv &s, int64_t t, float *to) const {
        if (t >= 0)
            load_row(s.x, b, t, first, count, BLOCK, to);
        else if (s.initial.data)
            load_row(s.initial, b, t + taps - 1, first, count, BLOCK, to);
        else
            memset(to, 0, BLOCK * sizeof(float));
    }
    // bias + sum_k weight_k x_(t-K+1+k), from the rows of x that begin at t-K+1.
    void apply(const float *x, vf *y) const {
        for (int c = 0; c < VECTORS; c++) y[c] = load(bias + c * W);
        for (int k = 0; k < taps; k++)
            for (int c = 0; c < VECTORS; c++) y[c] += load(weight + k * BLOCK + c * W) * load(x + k * BLOCK + c * W);
    }
};

// An item of the forward is a tile of tokens with all channels: rows are read along, whose blocks would each ask for the cache lines
// that they share with their neighbours.
int64_t conv_forward_items(const Conv &s) { return s.batch * ceil_div(s.length, CONV_ROWS); }
int64_t conv_forward_workspace(const Conv &s) { return Filter::workspace(s) + (CONV_ROWS + s.taps - 1) * BLOCK; }

void conv_forward_run(const Conv &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int64_t tiles = ceil_div(s.length, CONV_ROWS), b = item / tiles, t0 = item % tiles * CONV_ROWS;
    const int past = (int)s.taps - 1, tokens = smaller(CONV_ROWS, s.length - t0);
    float *x = space + Filter::workspace(s);
    for (int64_t block = 0; block < ceil_div(s.inner, BLOCK); block++) {
        const Filter filter(s, b, block, space);
        for (int t = -past; t < tokens; t++) {
            if (t >= 0) prefetch_row(s.y, b, t0 + t, filter.first);
            if (t0 + t >= 0 && filter.first + BLOCK < s.inner) prefetch_row(s.x, b, t0 + t, filter.first + BLOCK);
            filter.load_input(s, t0 + t, x + (past + t) * BLOCK);
        }
        for (int t = 0; t < tokens; t++) {
            vf y[VECTORS], gate[VECTORS];
            filter.apply(x + t * BLOCK, y);
            if (s.silu) {
                s.y.bfloat16 ? sigmoid_bf16<VECTORS>(y, gate) : sigmoid<VECTORS>(y, gate);
                for (int c = 0; c < VECTORS; c++) y[c] *= gate[c];
            }
            store_block(s.y, b, t0 + t, filter.first, filter.count, y);
        }
    }
}

// An item of the backward is a block of channels of one sequence, which sums the gradient of its own filter.
int64_t conv_backward_items(const Conv &s) { return s.batch * ceil_div(s.inner, BLOCK); }
int64_t conv_backward_workspace(const Conv &s) {
    return Filter::workspace(s) + (2 * (CONV_TILE + s.taps - 1) + s.taps + 1) * BLOCK;
}

void conv_backward_run(const Conv &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int64_t blocks = ceil_div(s.inner, BLOCK);
    const Filter filter(s, item / blocks, item % blocks, space);
    const int past = filter.taps - 1;
    const int64_t b = filter.b, first = filter.first, tiles = ceil_div(s.length, CONV_TILE);
    // x begins K-1 tokens before the tile; dy, the gradient before the silu, goes on K-1 tokens after it.
    float *x = space + Filter::workspace(s), *dy = x + (past + CONV_TILE) * BLOCK, *dweight = dy + (past + CONV_TILE) * BLOCK;
    float *dbias = dweight + filter.taps * BLOCK;
    memset(dy, 0, (past + CONV_TILE + filter.taps + 1) * BLOCK * sizeof(float));
    for (int64_t tile = tiles - 1; tile >= 0; tile--) {
        const int64_t t0 = tile * CONV_TILE;
        const int tokens = smaller(CONV_TILE, s.length - t0);
        memmove(dy + tokens * BLOCK, dy, past * BLOCK * sizeof(float));
        for (int t = -past; t < tokens; t++) {
            if (t >= 0 && tile)
                prefetch_row(s.x, b, t0 - CONV_TILE + t, first), prefetch_row(s.dy, b, t0 - CONV_TILE + t, first),
                    prefetch_row(s.dx, b, t0 - CONV_TILE + t, first);
            filter.load_input(s, t0 + t, x + (past + t) * BLOCK);
        }
        for (int t = 0; t < tokens; t++) {
            vf d[VECTORS];
            load_block(s.dy, b, t0 + t, first, filter.count, d);
            if (s.silu) {
                vf y[VECTORS], gate[VECTORS];
                filter.apply(x + t * BLOCK, y);
                sigmoid<VECTORS>(y, gate);
                for (int c = 0; c < VECTORS; c++) d[c] *= gate[c] + y[c] * gate[c] * (1.f - gate[c]);
            }
            for (int c = 0; c < VECTORS; c++) store(dy + t * BLOCK + c * W, d[c]);
            for (int c = 0; c < VECTORS; c++) store(dbias + c * W, load(dbias + c * W) + d[c]);
            for (int k = 0; k < filter.taps; k++)
                for (int c = 0; c < VECTORS; c++) {
                    float *sum = dweight + k * BLOCK + c * W;
                    store(sum, load(sum) + d[c] * load(x + (t + k) * BLOCK + c * W));
                }
        }
        // x_t was used by y_t with the last tap, by y_(t+1) with the one before it, and so on.
        for (int t = tile ? 0 : -past; t < tokens; t++) {
            vf d[VECTORS] = {};
            for (int k = 0; k < filter.taps; k++) {
                const int later = t + past - k;
                if (later < 0) continue;  // no output there
                for (int c = 0; c < VECTORS; c++)
                    d[c] += load(filter.weight + k * BLOCK + c * W) * load(dy + later * BLOCK + c * W);
            }
            if (t >= 0)
                store_block(s.dx, b, t0 + t, first, filter.count, d);
            else
                store_block(s.dinitial, b, t + past, first, filter.count, d);
        }
    }
    for (int k = 0; k < filter.taps; k++)
        memcpy(s.dweight + (b * s.taps + k) * s.inner + first, dweight + k * BLOCK, filter.count * sizeof(float));
    memcpy(s.dbias + b * s.inner + first, dbias, filter.count * sizeof(float));
}

}  // namespace
