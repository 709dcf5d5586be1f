// Vectors of WIDTH floats with the compiler's own vector types, and the few functions the kernels need on them.
//
// Everything is in an unnamed namespace: this file is compiled once per instruction set, and a function that the linker took
// from the wrong build would be an illegal instruction on an older processor. For the same reason no standard library templates
// here.
//
// The functions work on M vectors at a time, step by step: a processor waits some four cycles for each step, and fills the wait
// with the same step on the other vectors.
#pragma once
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

// The compiler's own limit is one for the whole file: what else stands there would decide whether a loop calls functions.
#define ALWAYS_INLINE inline __attribute__((always_inline))
// A short loop, unrolled before the compiler decides what stays in registers: GCC leaves the array that it walks in memory otherwise.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)

namespace {

constexpr int W = WIDTH;
constexpr int VECTORS = 4;          // M almost everywhere: enough to fill the wait, few enough for 16 registers
constexpr int BLOCK = VECTORS * W;  // channels worked on together
constexpr int ITEM_ROWS = 32;       // rows of an item, where each is worked on by itself

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

inline vf broadcast(float x) { return x - vf{}; }
// Anywhere in memory. Not by memcpy, which could write to anything: pointers would be read again behind every store.
typedef float vf_at __attribute__((vector_size(W * 4), aligned(4)));
typedef uint16_t vh_at __attribute__((vector_size(W * 2), aligned(2)));
inline vf load(const float *p) { return *(const vf_at *)p; }
inline void store(float *p, vf v) { *(vf_at *)p = v; }
inline vi lane_numbers() {
    vi lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    return lanes;
}
inline vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
inline vf magnitude(vf a) { return (vf)((vi)a & 0x7fffffff); }

// max(x, low) and min(x, high); where x is not a number it stays so (hence the order of the operands).
#if defined(__AVX512F__) && WIDTH == 16
inline vf at_least(vf x, vf low) { return (vf)_mm512_max_ps((__m512)low, (__m512)x); }
inline vf at_most(vf x, vf high) { return (vf)_mm512_min_ps((__m512)high, (__m512)x); }
#elif defined(__AVX__) && WIDTH == 8
inline vf at_least(vf x, vf low) { return (vf)_mm256_max_ps((__m256)low, (__m256)x); }
inline vf at_most(vf x, vf high) { return (vf)_mm256_min_ps((__m256)high, (__m256)x); }
#else
inline vf at_least(vf x, vf low) { return select(x < low, low, x); }
inline vf at_most(vf x, vf high) { return select(x > high, high, x); }
#endif

inline float sum(vf v) {
    typedef float quarter __attribute__((vector_size(16)));
    quarter q[W / 4];
    memcpy(q, &v, sizeof v);
    for (int i = 1; i < W / 4; i++) q[0] += q[i];
    return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

#if defined(__AVX512F__) && WIDTH == 16
// Rows that differ in one bit of their numbers: lanes with that bit of the first and lanes without it of the second change places. Each with the
// cheapest instruction there is for it.
template <int BIT>
ALWAYS_INLINE void exchange(vf &first, vf &second) {
    const __m512 a = (__m512)first, b = (__m512)second;
    if constexpr (BIT == 1) {
        first = (vf)_mm512_mask_moveldup_ps(a, 0xaaaa, b), second = (vf)_mm512_mask_movehdup_ps(b, 0x5555, a);
    } else if constexpr (BIT == 2) {
        first = (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b), second = (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
    } else if constexpr (BIT == 4) {
        first = (vf)_mm512_mask_shuffle_f32x4(a, 0xf0f0, b, b, 0xa0), second = (vf)_mm512_mask_shuffle_f32x4(b, 0x0f0f, a, a, 0xf5);
    } else {
        first = (vf)_mm512_shuffle_f32x4(a, b, 0x44), second = (vf)_mm512_shuffle_f32x4(a, b, 0xee);
    }
}
template <int BIT>
ALWAYS_INLINE void exchange_all(vf *rows) {
    EACH(i, W) if (!(i & BIT)) exchange<BIT>(rows[i], rows[i + BIT]);
}
#endif

// Row i, lane j becomes row j, lane i.
inline void transpose(vf *rows) {
#if defined(__AVX512F__) && WIDTH == 16
    exchange_all<1>(rows), exchange_all<2>(rows), exchange_all<4>(rows), exchange_all<8>(rows);
#else
    for (int i = 0; i < W; i++)
        for (int j = 0; j < i; j++) {
            const float x = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = x;
        }
#endif
}

// bfloat16. The intrinsics since GCC widens half of a vector at a time.
inline vf load(const uint16_t *p) {
#if defined(__AVX512F__) && WIDTH == 16
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__) && WIDTH == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    vh v;
    memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vu) << 16);
#endif
}
#ifndef __AVX512BF16__
// In the lower half of each lane.
inline vu rounded_bf16(vf x) {
    vu bits = (vu)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const vu nan = vu{} + 0x7fc0;
    return (vu)select(x == x, (vf)bits, (vf)nan);
}
#endif
inline void store(uint16_t *p, vf x) {
#ifdef __AVX512BF16__
    const __m256bh v = _mm512_cvtneps_pbh((__m512)x);
#else
    const vh v = __builtin_convertvector(rounded_bf16(x), vh);
#endif
    *(vh_at *)p = (vh)v;
}

// a b + c, rounded once where the processor can.
#if defined(__AVX512F__) && WIDTH == 16
inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__) && WIDTH == 8
inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif

// 1 / x where neither is zero or infinite, next to exact: a division of wide vectors takes as long as many other instructions.
inline vf reciprocal(vf x) {
#if defined(__AVX512F__) && WIDTH == 16
    const vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return r * (2.f - x * r);
#else
    return 1.f / x;
#endif
}
// The same as exact as bfloat16 deserves: to 6e-5 of it.
inline vf reciprocal_bf16(vf x) {
#if defined(__AVX512F__) && WIDTH == 16
    return (vf)_mm512_rcp14_ps((__m512)x);
#else
    return reciprocal(x);
#endif
}

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float EXP_LIMIT = 86.6f;  // exp(-EXP_LIMIT) is 2^-125

// (2^f - 1) / f for |f| <= 1/2 as a polynomial of degree DEGREE - 1, highest power first. Exact at 0: then 2^f has the right
// slope there, and a decay close to 1 keeps its distance from 1. Errors of 2^f: 5e-6, 1e-7, 7e-9; in units of 1 - 2^f: 2e-5,
// 4e-7, 1e-8.
template <int DEGREE>
struct Exp2;
template <>
struct Exp2<4> {
    static constexpr float q[] = {0.00952835f, 0.05579333f, 0.24025109f, LN2};
};
template <>
struct Exp2<5> {
    static constexpr float q[] = {0.00133003f, 0.00966971f, 0.0555056f, 0.24022282f, LN2};
};
template <>
struct Exp2<6> {
    static constexpr float q[] = {1.5467357e-4f, 1.33867494e-3f, 9.61804035e-3f, 5.5503697e-2f, 0.24022651f, LN2};
};

// q = 2^f for |f| <= 1/2
template <int DEGREE, int M>
ALWAYS_INLINE void exp2_fraction(const vf *f, vf *q) {
    for (int i = 0; i < M; i++) q[i] = Exp2<DEGREE>::q[0] * f[i] + Exp2<DEGREE>::q[1];
    for (int k = 2; k < DEGREE; k++)
        for (int i = 0; i < M; i++) q[i] = q[i] * f[i] + Exp2<DEGREE>::q[k];
    for (int i = 0; i < M; i++) q[i] = q[i] * f[i] + 1.f;
}

// x = 2^(x y), as 2^n (1 + f q(f)) with n = round(x y). Right for -126 < x y < 127. Where the processor does not split numbers
// itself, product and range reduction round once.
template <int DEGREE, int M>
ALWAYS_INLINE void exp2_product(vf *x, const vf *y) {
    vf q[M];
#if defined(__AVX512DQ__) && WIDTH == 16
    vf n[M];
    for (int i = 0; i < M; i++) n[i] = x[i] * y[i];
    for (int i = 0; i < M; i++) x[i] = (vf)_mm512_reduce_ps((__m512)n[i], 0);
    for (int i = 0; i < M; i++) n[i] = n[i] - x[i];
#else
    const vf magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
    vf shifted[M];
    for (int i = 0; i < M; i++) shifted[i] = fma(x[i], y[i], magic);
    for (int i = 0; i < M; i++) q[i] = shifted[i] - magic;
    for (int i = 0; i < M; i++) x[i] = fma(x[i], y[i], -q[i]);
#endif
    exp2_fraction<DEGREE, M>(x, q);
#if defined(__AVX512DQ__) && WIDTH == 16
    for (int i = 0; i < M; i++) x[i] = (vf)_mm512_scalef_ps((__m512)q[i], (__m512)n[i]);
#else
    for (int i = 0; i < M; i++) x[i] = (vf)((vi)q[i] + ((vi)shifted[i] << 23));
#endif
}
// x = 2^(x y) as exact as bfloat16 inputs deserve: exp2_product<4>, with two instructions less where the processor splits numbers
// itself. x y + 1/2 is split into the integer below and a rest g, and 2^(g - 1/2) is Exp2<4> multiplied out: next to 1 its error is that of
// a float32, not of the distance from 1.
template <int M>
ALWAYS_INLINE void exp2_product_bf16(vf *x, const vf *y) {
#if defined(__AVX512DQ__) && WIDTH == 16
    vf g[M], p[M];
    for (int i = 0; i < M; i++) x[i] = fma(x[i], y[i], broadcast(0.5f));
    for (int i = 0; i < M; i++) g[i] = (vf)_mm512_reduce_ps((__m512)x[i], 1);  // x - floor(x)
    for (int i = 0; i < M; i++) p[i] = fma(broadcast(0.00952835f), g[i], broadcast(0.03673663f));
    for (int i = 0; i < M; i++) p[i] = fma(p[i], g[i], broadcast(0.17085362f));
    for (int i = 0; i < M; i++) p[i] = fma(p[i], g[i], broadcast(0.48997691f));
    for (int i = 0; i < M; i++) p[i] = fma(p[i], g[i], broadcast(0.70711054f));
    for (int i = 0; i < M; i++) x[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
#else
    exp2_product<4, M>(x, y);
#endif
}

// x = 2^x for every x: what underflows becomes 2^-125, what overflows 2^126.
template <int M>
ALWAYS_INLINE void exp2_clamped(vf *x) {
    vf one[M];
    for (int i = 0; i < M; i++) one[i] = broadcast(1.f), x[i] = at_most(at_least(x[i], broadcast(-125.f)), broadcast(126.f));
    exp2_product<5, M>(x, one);
}

// x = 2^x for x <= 0, minus infinity among them: what underflows becomes 0 or 2^-125.
template <int M>
ALWAYS_INLINE void exp2_up_to_1(vf *x) {
#if defined(__AVX512DQ__) && WIDTH == 16
    vf q[M], f[M];
    for (int i = 0; i < M; i++) f[i] = (vf)_mm512_reduce_ps((__m512)x[i], 0);
    exp2_fraction<5, M>(f, q);
    for (int i = 0; i < M; i++) x[i] = (vf)_mm512_scalef_ps((__m512)q[i], (__m512)(x[i] - f[i]));
#else
    exp2_clamped<M>(x);
#endif
}

// x = exp(-x) for |x| <= EXP_LIMIT
template <int M>
ALWAYS_INLINE void exp_minus(vf *x) {
    vf scale[M];
    for (int i = 0; i < M; i++) scale[i] = broadcast(-LOG2E);
    exp2_product<5, M>(x, scale);
}

// 1 / (1 + exp(-x))
template <int M>
ALWAYS_INLINE void sigmoid(const vf *x, vf *y) {
    for (int i = 0; i < M; i++) y[i] = at_most(at_least(x[i], broadcast(-EXP_LIMIT)), broadcast(EXP_LIMIT));
    exp_minus<M>(y);
    for (int i = 0; i < M; i++) y[i] = reciprocal(1.f + y[i]);
}

// The same as exact as bfloat16 deserves: to 7e-5 of it.
template <int M>
ALWAYS_INLINE void sigmoid_bf16(const vf *x, vf *y) {
#if defined(__AVX512DQ__) && WIDTH == 16
    for (int i = 0; i < M; i++) y[i] = broadcast(-LOG2E);
    exp2_product_bf16<M>(y, x);
    for (int i = 0; i < M; i++) y[i] = reciprocal_bf16(1.f + y[i]);
#else
    sigmoid<M>(x, y);
#endif
}

// x = softplus(x) = max(x, 0) + log1p(w), w = exp(-|x|); log1p(w) = 2 atanh(s), s = w / (2 + w) <= 1/3. Relative error 2e-7.
// slope: its derivative, the sigmoid of x, or null.
template <int M>
ALWAYS_INLINE void softplus(vf *x, vf *slope) {
    vf w[M], s[M], s2[M], p[M];
    for (int i = 0; i < M; i++) w[i] = at_most(magnitude(x[i]), broadcast(EXP_LIMIT));
    exp_minus<M>(w);
    for (int i = 0; i < M; i++) s[i] = w[i] * reciprocal(2.f + w[i]);
    if (slope) {
        for (int i = 0; i < M; i++) slope[i] = select(x[i] > 0.f, broadcast(1.f), w[i]) * reciprocal(1.f + w[i]);
    }
    for (int i = 0; i < M; i++) s2[i] = s[i] * s[i];
    for (int i = 0; i < M; i++) p[i] = 0.14005995f * s2[i] + 0.14000902f;
    for (int i = 0; i < M; i++) p[i] = p[i] * s2[i] + 0.20010764f;
    for (int i = 0; i < M; i++) p[i] = p[i] * s2[i] + 0.33333208f;
    for (int i = 0; i < M; i++) p[i] = p[i] * s2[i] + 1.f;
    for (int i = 0; i < M; i++) x[i] = p[i] * (s[i] + s[i]) + at_least(x[i], vf{});
}

// Row t of batch b, channels [first, first + count), as `size` floats; what lies beyond `count` reads as zero.
inline void load_row(const Rows &r, int64_t b, int64_t t, int64_t first, int count, int size, float *to) {
    const int64_t at = b * r.batch_stride + t * r.row_stride + first;
    int i = 0;
    if (r.bfloat16) {
        const uint16_t *from = (const uint16_t *)r.data + at;
        for (; i + W <= count; i += W) store(to + i, load(from + i));
        for (; i < count; i++) {
            const uint32_t bits = (uint32_t)from[i] << 16;
            memcpy(to + i, &bits, 4);
        }
    } else {
        const float *from = (const float *)r.data + at;
        for (; i + W <= count; i += W) store(to + i, load(from + i));
        for (; i < count; i++) to[i] = from[i];
    }
    for (; i < size; i++) to[i] = 0;
}

inline void store_row(const Rows &r, int64_t b, int64_t t, int64_t first, int count, const float *from) {
    const int64_t at = b * r.batch_stride + t * r.row_stride + first;
    int i = 0;
    if (r.bfloat16) {
        uint16_t *to = (uint16_t *)r.data + at;
        for (; i + W <= count; i += W) store(to + i, load(from + i));
        if (i < count) {
            float last[W] = {};
            uint16_t rounded[W];
            memcpy(last, from + i, (count - i) * sizeof(float));
            store(rounded, load(last));
            memcpy(to + i, rounded, (count - i) * sizeof(uint16_t));
        }
    } else {
        float *to = (float *)r.data + at;
        for (; i + W <= count; i += W) store(to + i, load(from + i));
        for (; i < count; i++) to[i] = from[i];
    }
}

// The same for BLOCK channels in registers; `count` of them exist.
ALWAYS_INLINE void load_block(const Rows &r, int64_t b, int64_t t, int64_t first, int count, vf *to) {
    if (count == BLOCK) {
        const int64_t at = b * r.batch_stride + t * r.row_stride + first;
        if (r.bfloat16)
            for (int c = 0; c < VECTORS; c++) to[c] = load((const uint16_t *)r.data + at + c * W);
        else
            for (int c = 0; c < VECTORS; c++) to[c] = load((const float *)r.data + at + c * W);
    } else {
        float row[BLOCK];
        load_row(r, b, t, first, count, BLOCK, row);
        for (int c = 0; c < VECTORS; c++) to[c] = load(row + c * W);
    }
}
ALWAYS_INLINE void store_block(const Rows &r, int64_t b, int64_t t, int64_t first, int count, const vf *from) {
    if (count == BLOCK) {
        const int64_t at = b * r.batch_stride + t * r.row_stride + first;
        if (r.bfloat16)
            for (int c = 0; c < VECTORS; c++) store((uint16_t *)r.data + at + c * W, from[c]);
        else
            for (int c = 0; c < VECTORS; c++) store((float *)r.data + at + c * W, from[c]);
    } else {
        float row[BLOCK];
        for (int c = 0; c < VECTORS; c++) store(row + c * W, from[c]);
        store_row(r, b, t, first, count, row);
    }
}

// Ask for a piece of row t ahead of its use: rows lie far apart, and the processor's own guess is the next line. It comes into the
// second-level cache: the first one is full of what is worked on. Never faults. Asks for the last byte of each 64: where rows begin anywhere
// in a cache line, as Mamba-2's do, the first line is the one that came with the piece before. Always inlined, since GCC drops calls of a
// function that does nothing else.
ALWAYS_INLINE void prefetch_row(const Rows &r, int64_t b, int64_t t, int64_t first, int64_t size = BLOCK) {
    if (!r.data) return;
    const int64_t bytes = r.bfloat16 ? 2 : 4;
    const char *at = (const char *)r.data + (b * r.batch_stride + t * r.row_stride + first) * bytes;
    for (int64_t i = 63; i < size * bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// `count` floats, then zeros up to `size`; all zeros where there is nothing to read.
inline void load_span(const float *from, int count, int size, float *to) {
    if (!from) count = 0;
    if (count) memcpy(to, from, count * sizeof(float));
    if (count < size) memset(to + count, 0, (size - count) * sizeof(float));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int padded(int64_t n, int unit) { return (int)(ceil_div(n, unit) * unit); }
inline int smaller(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

// A matrix, turned: to[c * to_stride + r] = from[r * from_stride + c].
inline void turn(const float *from, int64_t from_stride, int64_t rows, int64_t columns, float *to, int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            const int height = smaller(W, rows - r), width = smaller(W, columns - c);
            const float *corner = from + r * from_stride + c;
            float *place = to + c * to_stride + r;
            if (height == W && width == W) {
                vf block[W];
                for (int i = 0; i < W; i++) block[i] = load(corner + i * from_stride);
                transpose(block);
                for (int i = 0; i < W; i++) store(place + i * to_stride, block[i]);
            } else {
                for (int i = 0; i < height; i++)
                    for (int j = 0; j < width; j++) place[j * to_stride + i] = corner[i * from_stride + j];
            }
        }
}

// Denormal numbers cost a hundred cycles each on many processors, and a decaying state makes them: zero instead, meanwhile.
struct [[maybe_unused]] FlushDenormals {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

}  // namespace
