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
    // backward only
    int64_t groups;  // channel blocks are dealt to this many groups; each sums dB and dC over its own channels
    Rows dy, du, ddelta, dz;
    const float *dfinal;      // (B, E, N) or null
    float *dinitial;          // (B, E, N)
    float *dA;                // (B, N, E), to be summed over B
    float *dD, *ddelta_bias;  // (B, E), to be summed over B
    float *dB, *dC;           // (groups, B, L, N), to be summed over the groups
};

// The convolution before the scan. weight: (K, E). state: (B, K-1, E).
struct Conv {
    int64_t batch, length, inner, taps;  // B, L, E, K
    int64_t silu;
    Rows x, y, initial;
    const float *weight, *bias;  // bias (E) or null
    // backward only
    Rows dy, dx, dinitial;
    float *dweight, *dbias;  // (B, K, E), (B, E): to be summed over B
};

// Mamba-2's scan, arXiv 2405.21060, section 6, in chunks of Q tokens.
struct SsdForward {
    int64_t batch, length, heads, width, groups, n, chunk;  // B, L, H, P, G, N, Q
    Rows x, B, C, y;       // (B, L, H P), (B, L, G N) twice, (B, L, H P)
    const float *delta;    // (B, L, H)
    const float *A2, *D;   // (H): A log2(e); (H) or null
    const float *initial;  // (B, H, P, N) or null
    float *final;          // (B, H, P, N) or null
    void *before;          // the state before each chunk that reads one, (chunks, B, G, N, H/G P) in the format of x, or null
};

// Its backward inside the chunks. Rows of H P channels.
struct Ssd {
    int64_t batch, length, heads, width, groups, chunk, chunks;  // B, L, H, P, G, Q
    int64_t carried_from, dxw_until;                             // the chunks that have `carried`; and `dxw`: those before
    Rows x;                                                      // (B, L, H P)
    Rows carried;         // (chunks with it, B, Q, H P): the batch is chunk-major, "row" counts within the chunk
    const float *scores;  // (chunks, B, G, Q, Q)
    // (B, chunks, Q, H): the running sum of delta A log2(e) in each chunk, as the sum of two floats
    const float *log_high, *log_low;
    const float *delta;  // (B, chunks, Q, H)
    const float *D;      // (H) or null
    Rows dy, dxw, dx;              // dxw like carried
    float *dscores, *da, *ddelta;  // like scores, log_high (for the natural logarithm), delta
    float *dD;                     // (chunks, B, H), to be summed
};
// Rows times one factor per token and head, cut into chunks: (B, L, H P) to (chunks, B, Q, H P), zeros where the last chunk has
// no token.
struct Weigh {
    int64_t batch, length, heads, width, chunk, chunks;
    int64_t start;  // the first chunk wanted
    Rows x, out;
    const float *factor;  // (B, all chunks, Q, H)
    int64_t factor_batch_stride;
};

// Back from chunk to chunk, in place: `dstates` comes with the gradient of the state before each chunk as far as it read it, and
// leaves with all of that gradient.
struct Pass {
    int64_t batch, groups, n, heads, width, chunks;  // B, G, N, H, P
    void *dstates;                                   // (chunks, B, G, N, H/G P)
    const void *before;                              // the state before each chunk, likewise
    int64_t bfloat16;
    const float *kept;  // what a chunk leaves of the state before it: [b kept_batch_stride + chunk kept_chunk_stride + h]
    int64_t kept_batch_stride, kept_chunk_stride;
    const float *dfinal;  // (B, G, N, H/G P) or null
    float *dinitial;      // likewise or null
    float *dlog;          // (parts, B, chunks, H): the gradient of the logarithm of kept, to be summed over the parts of N
};

// y silu(z), then divided by its root mean square over each of `groups` parts of a row, times weight (E).
struct Norm {
    int64_t batch, length, inner, groups;
    float epsilon;
    Rows y, z, out;
    const float *weight;
    // backward only
    Rows dout, dy, dz;
    float *dweight;  // (items, E), to be summed
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
    int width, block, tile;  // lanes, channels per block, tokens per tile
    Kernel<Scan> scan_forward, scan_backward;
    Kernel<Conv> conv_forward, conv_backward;
    Kernel<SsdForward> ssd_forward;
    Kernel<Ssd> ssd_backward;
    Kernel<Weigh> weigh;
    Kernel<Pass> pass_backward;
    Kernel<Norm> norm_forward, norm_backward;
};
