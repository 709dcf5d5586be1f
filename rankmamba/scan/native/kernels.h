// What the caller hands over and what each build of the kernels offers. Plain C types: read by Python through ctypes.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

// A (B, L, channels) tensor whose channels lie together; strides count elements. data is null where the tensor is left out.
struct Rows {
    void *data;
    int64_t batch_stride, row_stride;
    int64_t bfloat16;  // 1: bfloat16, 0: float32
};

// Mamba's scan, arXiv 2312.00752, algorithm 2; letters as there. Everything that is not Rows is float32 and contiguous.
struct Scan {
    int64_t batch, length, inner, states;  // B, L, E, N
    Rows u, delta, B, C, z;
    const float *A2;              // (N, E): A log2(e), transposed
    const float *D, *delta_bias;  // (E) or null
    const float *initial;         // (B, E, N) or null
    Rows y;
    float *final;        // (B, E, N) or null
    float *checkpoints;  // the state before each tile of tokens, or null; (B, blocks, tiles, N, block)
    int64_t groups;      // channel blocks are dealt to this many items; in the backward each sums dB and dC over its own channels
    // backward only
    Rows dy, du, ddelta, dz;
    const float *dfinal;      // (B, E, N) or null
    float *dinitial;          // (B, E, N)
    float *dA;                // (B, N, E), to be summed over B
    float *dD, *ddelta_bias;  // (B, E), to be summed over B
    float *dB, *dC;           // (groups, B, L, N), to be summed over the groups
};

// The convolution before the scan, with four taps. weight: (4, E). x, y, dy and dx are all float32 or all bfloat16.
struct Conv {
    int64_t batch, length, inner;  // B, L, E
    int64_t silu;
    Rows x, y, initial;          // initial (B, 3, E), float32; or absent
    const float *weight, *bias;  // bias (E) or null
    // backward only
    Rows dy, dx, dinitial;   // dinitial like initial
    float *dweight, *dbias;  // (B, 4, E), (B, E): to be summed over B
};

// y, or y silu(z), divided by its root mean square over each of `groups` parts of a row, times weight (E).
struct Norm {
    int64_t batch, length, inner, groups;
    float epsilon;
    Rows y, z, out;  // z, dz: null for no gate
    const float *weight;
    // backward only
    Rows dout, dy, dz;
    float *dweight;  // (items, E), to be summed
};

// Mamba-2's scan, arXiv 2405.21060, section 6, in chunks of Q tokens.
struct SsdForward {
    int64_t batch, length, heads, width, groups, n, chunk;  // B, L, H, P, G, N, Q
    int64_t parts;                                          // how many parts the heads of a group are divided into, for threads
    Rows x, B, C, y;                                        // (B, L, H P), (B, L, G N) twice, (B, L, H P)
    const float *delta;                                     // (B, L, H)
    const float *A2, *D;                                    // (H): A log2(e); (H) or null
    const float *initial;                                   // (B, H, P, N) or null
    float *final;                                           // (B, H, P, N) or null
    // the state before each chunk that reads one, (chunks, B, H, N, P) in the format of x; or null
    void *before;
    // What makes x, B and C of each chunk, and what norms its y; or null. Only where an item has all heads of a sequence.
    const Conv *conv;
    const Norm *norm;
};
struct SsdBackward {
    int64_t batch, length, heads, width, groups, n, chunk, parts;
    Rows x, B, C, dy, dx;
    const float *delta, *A, *A2, *D;  // A (H); the others as in the forward
    const float *initial;             // null or not; not read
    const void *before;               // as in the forward
    const float *dfinal;              // (B, H, P, N) or null
    float *dinitial;                  // (B, H, P, N) or null
    float *ddelta;                    // (B, L, H)
    float *dA, *dD;                   // (B, H), to be summed over B
    float *dB, *dC;                   // (parts, B, L, G, N), to be summed over the parts
    const Norm *norm;                 // what makes dy of each chunk, as in the forward
};

// Rotary embedding: numbers i and i + pairs of a head's row at t turn by an angle of cos and sin (., L, pairs), null for none.
struct Rotation {
    const float *cos, *sin;
    int64_t pairs, batch_stride;
};

// Attention. q, out (B, L, .), k, v (B, K, .): their heads of P numbers lie *_head apart; in out and gradients P.
struct Attention {
    int64_t batch, heads, width, queries, keys;  // B, H, P, L, K
    int64_t shared;                              // number of heads that read the same keys and values
    int64_t causal;                              // 1: the last query sees all keys, each before it one less
    float scale;
    Rows q, k, v, out;
    int64_t q_head, k_head, v_head;
    const float *hidden;  // (B, K): 0, or minus infinity where nobody looks; or null
    const float *bias;    // (H, L, K): added to the scaled products; or null
    Rotation q_rotation, k_rotation;
    // backward only
    Rows dout, dq, dk, dv;
    int64_t dout_head;
};

// y = gelu(x + bias), `rows` rows as a batch of one. y may be x. bias (E) or null.
struct Gelu {
    int64_t rows, inner;  // inner: E
    Rows x, y;
    const float *bias;
    // backward only
    Rows dy, dx;
    float *dbias;  // (items, E), to be summed
};

// out = (x + bias + residual - mean) / standard deviation * weight + shift, all of these over a row. out may be x. bias (E) or null.
struct AddNorm {
    int64_t rows, inner;
    float epsilon;
    Rows x, residual, out;
    const float *bias, *weight, *shift;
};
}

// One build of a kernel: `items` independent pieces of work; each needs `workspace` floats, 64-byte aligned.
template <class Arguments>
struct Kernel {
    int64_t (*items)(const Arguments &);
    int64_t (*workspace)(const Arguments &);
    void (*run)(const Arguments &, int64_t item, float *workspace);
};

struct Kernels {
    int width, block, tile;  // lanes, channels of a block, tokens of a tile
    int item_rows;           // of the kernels that go row by row: norms and GELU
    int taps;                // of the convolution's filters
    Kernel<Scan> scan_forward, scan_backward;
    Kernel<Conv> conv_forward, conv_backward;
    Kernel<SsdForward> ssd_forward;
    Kernel<SsdBackward> ssd_backward;
    Kernel<Norm> norm_forward, norm_backward;
    Kernel<Attention> attention, attention_backward;
    Kernel<Gelu> gelu_forward, gelu_backward;
    Kernel<AddNorm> add_norm;
};
