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
    const float *A2;  // (N, E): A log2(e), transposed
    const float *D, *delta_bias;  // (E) or null
    const float *initial;  // (B, E, N) or null
    Rows y;
    float *final;  // (B, E, N) or null
    float *checkpoints;  // the state before each tile of tokens, or null; (B, blocks, tiles, N, block)
    // backward only
    int64_t groups;  // channel blocks are dealt to this many groups; each sums dB and dC over its own channels
    Rows dy, du, ddelta, dz;
    const float *dfinal;  // (B, E, N) or null
    float *dinitial;  // (B, E, N)
    float *dA;  // (B, N, E), to be summed over B
    float *dD, *ddelta_bias;  // (B, E), to be summed over B
    float *dB, *dC;  // (groups, B, L, N), to be summed over the groups
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
};
