// Mamba's selective scan (arXiv 2312.00752, algorithm 2), channels in the lanes.
//
// A block of channels takes a tile of tokens at a time, and within the tile one state index n after the other: so the state of
// one n stays in registers for the whole tile, and the tile's steps, inputs and outputs stay in the first-level cache for all
// n. The backward pass starts from the state before each tile, makes the tile's states again and walks back through them.
#pragma once
#include "vec.h"

namespace {

// Tokens. With AVX-512 a block is twice as wide, and the buffers of 32 tokens leave the first-level cache in the backward pass.
constexpr int TILE = W == 16 ? 16 : 32;
// The forward takes fewer tokens at a time: a row of each is a stream, and a processor follows only so many.
constexpr int STEP = 8;
static_assert(TILE % STEP == 0);
// One (TILE, BLOCK) buffer. Not a multiple of 4 kB: the same place in several buffers would compete for the same lines of the
// cache.
constexpr int BUFFER = TILE * BLOCK + 2 * 16;

struct ScanShape {
    int64_t blocks, tiles, groups;
    explicit ScanShape(const Scan &s) : blocks(ceil_div(s.inner, BLOCK)), tiles(ceil_div(s.length, TILE)), groups(s.groups) {}
    int64_t own() const { return ceil_div(blocks, groups); }  // the blocks of an item
    int64_t checkpoint(const Scan &s, int64_t b, int64_t block, int64_t tile) const {
        return ((b * blocks + block) * tiles + tile) * s.states * BLOCK;
    }
};

// One block of channels: what stays the same for all its tokens, kept in `space`.
struct Block {
    int64_t b, first;
    int count;                          // channels that exist, at most BLOCK
    float *A2, *D, *bias, *largest_A2;  // (N, BLOCK), (BLOCK), (BLOCK), one number

    Block(const Scan &s, int64_t b_, int64_t block, float *space)
        : b(b_),
          first(block * BLOCK),
          count(smaller(BLOCK, s.inner - block * BLOCK)),
          A2(space),
          D(space + s.states * BLOCK),
          bias(D + BLOCK),
          largest_A2(bias + BLOCK) {}
    void read(const Scan &s) const {
        for (int64_t n = 0; n < s.states; n++) load_span(s.A2 + n * s.inner + first, count, BLOCK, A2 + n * BLOCK);
        load_span(s.D ? s.D + first : nullptr, count, BLOCK, D);
        load_span(s.delta_bias ? s.delta_bias + first : nullptr, count, BLOCK, bias);
        vf largest = vf{};
        for (int64_t i = 0; i < s.states * BLOCK; i += W) largest = at_least(largest, magnitude(load(A2 + i)));
        *largest_A2 = 0;
        for (int i = 0; i < W; i++) *largest_A2 = largest[i] > *largest_A2 ? largest[i] : *largest_A2;
    }
    static int64_t workspace(const Scan &s) { return s.states * BLOCK + 2 * BLOCK + W; }
};

// B or C of a tile as floats, (tokens, N).
inline void load_states(const Rows &r, int64_t b, int64_t t0, int tokens, int n, float *to) {
    for (int t = 0; t < tokens; t++) load_row(r, b, t0 + t, 0, n, n, to + t * n);
}

// A sequence's state (E, N), null for zero, turned into the block's (N, BLOCK), and back.
inline void turn_state(const float *from, const Scan &s, const Block &block, float *to) {
    memset(to, 0, s.states * BLOCK * sizeof(float));
    if (from) turn(from + (block.b * s.inner + block.first) * s.states, s.states, block.count, s.states, to, BLOCK);
}
inline void turn_back_state(const float *from, const Scan &s, const Block &block, float *to) {
    turn(from, BLOCK, s.states, block.count, to + (block.b * s.inner + block.first) * s.states, s.states);
}

// How the decays exp2(delta A2) of a tile are computed. A step so large that 2^x underflows is rare: only then is x clamped.
enum class Decay { float32, bfloat16, clamped };

inline Decay choose_decay(const Scan &s, const Block &block, vf largest_delta) {
    float largest = 0;
    for (int i = 0; i < W; i++) largest = largest_delta[i] > largest ? largest_delta[i] : largest;
    if (!(largest * *block.largest_A2 < 125.f)) return Decay::clamped;
    return s.delta.bfloat16 ? Decay::bfloat16 : Decay::float32;
}

template <Decay HOW, int DEGREE>
ALWAYS_INLINE void decays(const float *delta, const vf *A2, vf *a) {
    for (int c = 0; c < VECTORS; c++) a[c] = load(delta + c * W);
    if (HOW == Decay::clamped) {
        for (int c = 0; c < VECTORS; c++) a[c] *= A2[c];
        exp2_clamped<VECTORS>(a);
    } else if (HOW == Decay::bfloat16) {
        exp2_product_bf16<VECTORS>(a, A2);
    } else {
        exp2_product<DEGREE, VECTORS>(a, A2);
    }
}

// A tile of tokens for one n. delta, du = delta u, y: (tokens, BLOCK); B, C: one number per token, `stride` apart; h: (BLOCK).
template <Decay HOW>
void forward_state(int tokens, int64_t stride, const float *A2, const float *__restrict delta, const float *__restrict du,
                   const float *__restrict B, const float *__restrict C, float *h, float *__restrict y) {
    vf state[VECTORS], a2[VECTORS];
    for (int c = 0; c < VECTORS; c++) state[c] = load(h + c * W), a2[c] = load(A2 + c * W);
    for (int t = 0; t < tokens; t++, delta += BLOCK, du += BLOCK, y += BLOCK) {
        vf a[VECTORS];
        decays<HOW, 5>(delta, a2, a);
        const vf b = broadcast(B[t * stride]), weight = broadcast(C[t * stride]);
        for (int c = 0; c < VECTORS; c++) state[c] = a[c] * state[c] + load(du + c * W) * b;
        for (int c = 0; c < VECTORS; c++) store(y + c * W, load(y + c * W) + state[c] * weight);
    }
    for (int c = 0; c < VECTORS; c++) store(h + c * W, state[c]);
}

int64_t scan_items(const Scan &s) { return s.batch * s.groups; }
int64_t forward_workspace(const Scan &s) {
    return ScanShape(s).own() * (Block::workspace(s) + s.states * BLOCK) + 2 * s.states * TILE + 3 * BUFFER;
}

void forward_run(const Scan &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const ScanShape shape(s);
    const int64_t b = item / s.groups, from = item % s.groups * shape.own(), to = smaller(from + shape.own(), shape.blocks);
    const int states = (int)s.states;
    const int64_t state_size = states * BLOCK, fixed_size = Block::workspace(s);
    float *fixed = space, *states_before = fixed + shape.own() * fixed_size;  // of each block; (N, BLOCK)
    float *delta = states_before + shape.own() * state_size, *du = delta + BUFFER, *y = du + BUFFER;
    float *B = y + BUFFER, *C = B + TILE * states;
    for (int64_t i = from; i < to; i++) {
        const Block block(s, b, i, fixed + (i - from) * fixed_size);
        block.read(s);
        turn_state(s.initial, s, block, states_before + (i - from) * state_size);
    }
    for (int64_t t0 = 0; t0 < s.length; t0 += STEP) {
        const int tokens = smaller(STEP, s.length - t0);
        load_states(s.B, b, t0, tokens, states, B);
        load_states(s.C, b, t0, tokens, states, C);
        for (int64_t i = from; i < to; i++) {
            const Block block(s, b, i, fixed + (i - from) * fixed_size);
            const int64_t first = block.first, next = i + 1 < to ? t0 : t0 + STEP, ahead = (i + 1 < to ? i + 1 : from) * BLOCK;
            const int count = block.count;
            float *h = states_before + (i - from) * state_size;
            if (s.checkpoints && t0 % TILE == 0)
                memcpy(s.checkpoints + shape.checkpoint(s, b, i, t0 / TILE), h, state_size * sizeof(float));
            vf largest = vf{};
            for (int t = 0; t < tokens; t++) {
                vf d[VECTORS], u[VECTORS];
                load_block(s.delta, b, t0 + t, first, count, d);
                load_block(s.u, b, t0 + t, first, count, u);
                for (int c = 0; c < VECTORS; c++) d[c] += load(block.bias + c * W);
                softplus<VECTORS>(d, nullptr);
                for (int c = 0; c < VECTORS; c++) {
                    const int at = t * BLOCK + c * W;
                    largest = at_least(largest, d[c]);
                    store(delta + at, d[c]);
                    store(du + at, d[c] * u[c]);
                    store(y + at, u[c] * load(block.D + c * W));
                }
            }
            const Decay how = choose_decay(s, block, largest);
            const auto run = how == Decay::clamped    ? forward_state<Decay::clamped>
                             : how == Decay::bfloat16 ? forward_state<Decay::bfloat16>
                                                      : forward_state<Decay::float32>;
            for (int n = 0; n < states; n++) {
                for (int t = n * STEP / states; t < (n + 1) * STEP / states; t++) {  // a few at a time: many would have to wait
                    prefetch_row(s.delta, b, next + t, ahead), prefetch_row(s.u, b, next + t, ahead);
                    prefetch_row(s.z, b, next + t, ahead), prefetch_row(s.y, b, next + t, ahead);
                }
                run(tokens, states, block.A2 + n * BLOCK, delta, du, B + n, C + n, h + n * BLOCK, y);
            }
            for (int t = 0; t < tokens; t++) {
                vf out[VECTORS];
                for (int c = 0; c < VECTORS; c++) out[c] = load(y + t * BLOCK + c * W);
                if (s.z.data) {
                    vf z[VECTORS], gate[VECTORS];
                    load_block(s.z, b, t0 + t, first, count, z);
                    s.z.bfloat16 ? sigmoid_bf16<VECTORS>(z, gate) : sigmoid<VECTORS>(z, gate);
                    for (int c = 0; c < VECTORS; c++) out[c] *= z[c] * gate[c];
                }
                store_block(s.y, b, t0 + t, first, count, out);
            }
        }
    }
    for (int64_t i = from; s.final && i < to; i++)
        turn_back_state(states_before + (i - from) * state_size, s, Block(s, b, i, fixed), s.final);
}

// The buffers of one tile in the backward pass, (TILE, BLOCK) each.
struct Tile {
    float *delta, *slope, *u, *du, *dy, *dz, *y, *ddelta, *ddu;
    static constexpr int COUNT = 9;
    explicit Tile(float *space) {
        float **all[COUNT] = {&delta, &slope, &u, &du, &dy, &dz, &y, &ddelta, &ddu};
        for (float **buffer : all) *buffer = space, space += BUFFER;
    }
};

// States that the backward pass takes at a time: two share the loads and stores of steps, inputs and their gradients, where there
// are registers for both.
constexpr int STATES = W == 16 ? 2 : 1;
constexpr int SCRATCH = BUFFER + BLOCK;

// A tile for S states n, there and back. A2, before, carry, dA: (S, BLOCK), B, C: (S) for each token, `stride` apart; before: the
// state before the tile; carry: in, the gradient of the state after the tile, out, of `before`; dA: added to; dB, dC: (S, TILE, W),
// added to, still to be summed over the lanes; a: (TILE, BLOCK) and h: (TILE + 1, BLOCK) for each state, SCRATCH apart. With GATED,
// y becomes the output before the gate.
template <Decay HOW, bool GATED, int S>
void backward_state(int tokens, int64_t stride, const float *A2, const Tile &tile, const float *__restrict B,
                    const float *__restrict C, const float *before, float *carry, float *dA, float *__restrict dB,
                    float *__restrict dC, float *__restrict a, float *__restrict h) {
    const float *__restrict delta = tile.delta, *__restrict du = tile.du, *__restrict dy = tile.dy;
    float *__restrict y = tile.y, *__restrict ddelta = tile.ddelta, *__restrict ddu = tile.ddu;
    vf state[S][VECTORS], a2[S][VECTORS];
    EACH(s, S)
        EACH(c, VECTORS) {
            state[s][c] = load(before + s * BLOCK + c * W), a2[s][c] = load(A2 + s * BLOCK + c * W);
            store(h + s * SCRATCH + c * W, state[s][c]);
        }
    for (int t = 0; t < tokens; t++) {
        const int at = t * BLOCK;
        vf out[VECTORS];
        if (GATED)
            EACH(c, VECTORS) out[c] = load(y + at + c * W);
        EACH(s, S) {
            vf decay[VECTORS];
            decays<HOW, 6>(delta + at, a2[s], decay);  // sums of gradients over all tokens notice the sixth
            const vf b = broadcast(B[t * stride + s]), weight = broadcast(C[t * stride + s]);
            EACH(c, VECTORS) store(a + s * SCRATCH + at + c * W, decay[c]);
            EACH(c, VECTORS) state[s][c] = decay[c] * state[s][c] + load(du + at + c * W) * b;
            EACH(c, VECTORS) store(h + s * SCRATCH + at + BLOCK + c * W, state[s][c]);
            if (GATED)
                EACH(c, VECTORS) out[c] += state[s][c] * weight;
        }
        if (GATED)
            EACH(c, VECTORS) store(y + at + c * W, out[c]);
    }
    vf g[S][VECTORS], da[S][VECTORS] = {};  // a sum per tile first: it is more exact than one long sum
    EACH(s, S)
        EACH(c, VECTORS) g[s][c] = load(carry + s * BLOCK + c * W);
    for (int t = tokens - 1; t >= 0; t--) {
        const int at = t * BLOCK;
        vf db[S], dc[S], b[S], weight[S];
        EACH(s, S) {
            b[s] = broadcast(B[t * stride + s]), weight[s] = broadcast(C[t * stride + s]);
            db[s] = load(dB + (s * TILE + t) * W), dc[s] = load(dC + (s * TILE + t) * W);
        }
        EACH(c, VECTORS) {
            const int i = at + c * W;
            const vf dy_c = load(dy + i), du_c = load(du + i), delta_c = load(delta + i);
            vf ddu_c = load(ddu + i), ddelta_c = load(ddelta + i);
            EACH(s, S) {
                g[s][c] += dy_c * weight[s];  // the gradient of h_t
                dc[s] += dy_c * load(h + s * SCRATCH + i + BLOCK);
                db[s] += g[s][c] * du_c;
                ddu_c += g[s][c] * b[s];
                g[s][c] *= load(a + s * SCRATCH + i);
                const vf dlog = g[s][c] * load(h + s * SCRATCH + i);  // the gradient of delta_t A
                ddelta_c += dlog * a2[s][c];
                da[s][c] += dlog * delta_c;
            }
            store(ddu + i, ddu_c);
            store(ddelta + i, ddelta_c);
        }
        EACH(s, S) {
            store(dB + (s * TILE + t) * W, db[s]);
            store(dC + (s * TILE + t) * W, dc[s]);
        }
    }
    EACH(s, S)
        EACH(c, VECTORS) {
            float *sum = dA + s * BLOCK + c * W;
            store(carry + s * BLOCK + c * W, g[s][c]);
            store(sum, load(sum) + da[s][c]);
        }
}

template <bool GATED, int S>
auto choose_backward(Decay how) {
    return how == Decay::clamped    ? backward_state<Decay::clamped, GATED, S>
           : how == Decay::bfloat16 ? backward_state<Decay::bfloat16, GATED, S>
                                    : backward_state<Decay::float32, GATED, S>;
}

int64_t backward_workspace(const Scan &s) {
    const int64_t blocks = ScanShape(s).own();
    return blocks * ((2 * s.states + 2) * BLOCK + Block::workspace(s)) + s.states * 2 * TILE * (1 + W) +
           Tile::COUNT * BUFFER + 2 * STATES * SCRATCH;
}

void backward_run(const Scan &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const ScanShape shape(s);
    const int64_t b = item / s.groups, group = item % s.groups, blocks = shape.own();
    const int64_t from = group * blocks, to = smaller(from + blocks, shape.blocks);
    const int states = (int)s.states;
    const int64_t state_size = states * BLOCK, fixed_size = Block::workspace(s);
    // What runs along with the tiles, for each block of the group: carry, dA (N, BLOCK), dD, dbias (BLOCK).
    float *carry = space, *dA = carry + blocks * state_size, *dD = dA + blocks * state_size, *dbias = dD + blocks * BLOCK;
    float *fixed = dbias + blocks * BLOCK;
    const Tile tile(fixed + blocks * fixed_size);
    float *a = tile.delta + Tile::COUNT * BUFFER, *h = a + STATES * SCRATCH;
    float *B = h + STATES * SCRATCH, *C = B + TILE * states, *dB = C + TILE * states, *dC = dB + states * TILE * W;
    memset(dA, 0, blocks * (state_size + 2 * BLOCK) * sizeof(float));
    for (int64_t i = from; i < to; i++) {
        const Block block(s, b, i, fixed + (i - from) * fixed_size);
        block.read(s);
        turn_state(s.dfinal, s, block, carry + (i - from) * state_size);
    }

    for (int64_t index = shape.tiles - 1; index >= 0; index--) {
        const int64_t t0 = index * TILE;
        const int tokens = smaller(TILE, s.length - t0);
        load_states(s.B, b, t0, tokens, states, B);
        load_states(s.C, b, t0, tokens, states, C);
        memset(dB, 0, 2 * states * TILE * W * sizeof(float));
        for (int64_t i = from; i < to; i++) {
            const Block block(s, b, i, fixed + (i - from) * fixed_size);
            const int64_t first = block.first, own = (i - from) * state_size;
            const int64_t next = i + 1 < to ? t0 : t0 - TILE, ahead = (i + 1 < to ? i + 1 : from) * BLOCK;
            const int count = block.count;
            vf largest = vf{};
            for (int t = 0; t < tokens; t++) {
                const int64_t row_t = t0 + t;
                vf u[VECTORS], d[VECTORS], slope[VECTORS], dy[VECTORS];
                load_block(s.u, b, row_t, first, count, u);
                load_block(s.delta, b, row_t, first, count, d);
                load_block(s.dy, b, row_t, first, count, dy);
                for (int c = 0; c < VECTORS; c++) d[c] += load(block.bias + c * W);
                softplus<VECTORS>(d, slope);
                if (s.z.data) {
                    // y was gated: dz = dy y silu'(z), of which y is still to come; then dy becomes the gradient before the
                    // gate.
                    vf z[VECTORS], gate[VECTORS];
                    load_block(s.z, b, row_t, first, count, z);
                    sigmoid<VECTORS>(z, gate);
                    for (int c = 0; c < VECTORS; c++) {
                        const vf silu = z[c] * gate[c];
                        store(tile.dz + t * BLOCK + c * W, dy[c] * (gate[c] + silu * (1.f - gate[c])));
                        dy[c] *= silu;
                    }
                }
                for (int c = 0; c < VECTORS; c++) {
                    const int at = t * BLOCK + c * W;
                    largest = at_least(largest, d[c]);
                    store(tile.delta + at, d[c]);
                    store(tile.slope + at, slope[c]);
                    store(tile.u + at, u[c]);
                    store(tile.du + at, d[c] * u[c]);
                    store(tile.dy + at, dy[c]);
                    store(tile.y + at, u[c] * load(block.D + c * W));
                    store(tile.ddelta + at, vf{});
                    store(tile.ddu + at, vf{});
                }
            }
            const Decay how = choose_decay(s, block, largest);
            const auto run = s.z.data ? choose_backward<true, STATES>(how) : choose_backward<false, STATES>(how);
            const auto run_last = s.z.data ? choose_backward<true, 1>(how) : choose_backward<false, 1>(how);
            const float *before = s.checkpoints + shape.checkpoint(s, b, i, index);
            // The next block's checkpoint comes from far away: asked for state by state, too. The very last one asks for its own again.
            const int64_t next_index = i + 1 < to || index == 0 ? index : index - 1;
            const Rows next_before{s.checkpoints + shape.checkpoint(s, b, i + 1 < to ? i + 1 : from, next_index), 0, BLOCK, 0};
            for (int n = 0, taken; n < states; n += taken) {
                taken = n + STATES <= states ? STATES : 1;
                for (int t = n * TILE / states; t < (n + taken) * TILE / states; t++) {
                    prefetch_row(s.du, b, t0 + t, first), prefetch_row(s.ddelta, b, t0 + t, first), prefetch_row(s.dz, b, t0 + t, first);
                    prefetch_row(s.delta, b, next + t, ahead), prefetch_row(s.u, b, next + t, ahead);
                    prefetch_row(s.z, b, next + t, ahead), prefetch_row(s.dy, b, next + t, ahead);
                }
                prefetch_row(next_before, 0, n, 0, taken * BLOCK);
                (taken == STATES ? run : run_last)(tokens, states, block.A2 + n * BLOCK, tile, B + n, C + n, before + n * BLOCK,
                                                   carry + own + n * BLOCK, dA + own + n * BLOCK, dB + n * TILE * W,
                                                   dC + n * TILE * W, a, h);
            }
            vf sum_D[VECTORS] = {}, sum_bias[VECTORS] = {};
            for (int t = 0; t < tokens; t++) {
                vf du[VECTORS], ddelta[VECTORS], dz[VECTORS];
                for (int c = 0; c < VECTORS; c++) {
                    const int at = t * BLOCK + c * W;
                    const vf dy = load(tile.dy + at), u = load(tile.u + at), ddu = load(tile.ddu + at);
                    du[c] = ddu * load(tile.delta + at) + dy * load(block.D + c * W);
                    ddelta[c] = (ddu * u + load(tile.ddelta + at) * LN2) * load(tile.slope + at);
                    sum_D[c] += dy * u;
                    sum_bias[c] += ddelta[c];
                }
                store_block(s.du, b, t0 + t, first, count, du);
                store_block(s.ddelta, b, t0 + t, first, count, ddelta);
                if (s.z.data) {
                    for (int c = 0; c < VECTORS; c++)
                        dz[c] = load(tile.dz + t * BLOCK + c * W) * load(tile.y + t * BLOCK + c * W);
                    store_block(s.dz, b, t0 + t, first, count, dz);
                }
            }
            for (int c = 0; c < VECTORS; c++) {
                float *total_D = dD + (i - from) * BLOCK + c * W, *total_bias = dbias + (i - from) * BLOCK + c * W;
                store(total_D, load(total_D) + sum_D[c]);
                store(total_bias, load(total_bias) + sum_bias[c]);
            }
        }
        float *dB_out = s.dB + ((group * s.batch + b) * s.length + t0) * states;
        float *dC_out = s.dC + ((group * s.batch + b) * s.length + t0) * states;
        for (int t = 0; t < tokens; t++)
            for (int n = 0; n < states; n++) {
                dB_out[t * states + n] = sum(load(dB + (n * TILE + t) * W));
                dC_out[t * states + n] = sum(load(dC + (n * TILE + t) * W));
            }
    }
    for (int64_t i = from; i < to; i++) {
        const Block block(s, b, i, fixed);
        const int64_t own = (i - from) * state_size, at = b * s.inner + block.first;
        turn_back_state(carry + own, s, block, s.dinitial);
        for (int n = 0; n < states; n++)
            memcpy(s.dA + (b * states + n) * s.inner + block.first, dA + own + n * BLOCK, block.count * sizeof(float));
        memcpy(s.dD + at, dD + (i - from) * BLOCK, block.count * sizeof(float));
        memcpy(s.ddelta_bias + at, dbias + (i - from) * BLOCK, block.count * sizeof(float));
    }
}

}  // namespace
