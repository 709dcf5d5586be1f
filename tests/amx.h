// AMX tiles (bfloat16) and AVX512_BF16 in plain C++, for processors that have AVX-512 alone: `sanitize.py` builds the
// kernels with it, so that their code for both runs everywhere; WITHOUT_TILES leaves the processor with AVX512_BF16 alone. It aborts
// on a tile that was not configured or has another shape.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef WITHOUT_TILES
#define __AMX_BF16__ 1
#define __AMX_TILE__ 1
#endif
#define __AVX512BF16__ 1

namespace amx {
struct State {
    bool configured = false;
    int rows[8] = {}, bytes[8] = {};
    uint8_t data[8][16][64];
};
inline State &state() {
    static thread_local State s;
    return s;
}
[[noreturn]] inline void die(const char *what) {
    fprintf(stderr, "AMX emulation: %s\n", what);
    abort();
}
inline void config(const void *p) {
    State &s = state();
    if (s.configured) die("loadconfig while configured (nested session)");
    uint8_t c[64];
    memcpy(c, p, 64);
    if (c[0] != 1) die("palette");
    for (int i = 1; i < 16; i++)
        if (c[i]) die("reserved/start_row");
    for (int i = 0; i < 8; i++) {
        uint16_t b;
        memcpy(&b, c + 16 + 2 * i, 2);
        s.bytes[i] = b, s.rows[i] = c[48 + i];
        if (b > 64 || c[48 + i] > 16) die("shape");
    }
    for (int i = 8; i < 16; i++)
        if (c[16 + 2 * i] || c[17 + 2 * i] || c[48 + i]) die("tiles beyond 8");
    memset(s.data, 0, sizeof s.data);
    s.configured = true;
}
inline void release() { state().configured = false; }
inline void check(int t) {
    State &s = state();
    if (!s.configured) die("not configured");
    if (!s.rows[t] || !s.bytes[t]) die("tile without a shape");
}
inline void zero(int t) { check(t), memset(state().data[t], 0, 1024); }
inline void loadd(int t, const void *base, long stride) {
    check(t);
    State &s = state();
    memset(s.data[t], 0, 1024);
    for (int r = 0; r < s.rows[t]; r++) memcpy(s.data[t][r], (const char *)base + r * stride, s.bytes[t]);
}
inline void stored(int t, void *base, long stride) {
    check(t);
    State &s = state();
    for (int r = 0; r < s.rows[t]; r++) memcpy((char *)base + r * stride, s.data[t][r], s.bytes[t]);
}
inline float wide(uint16_t h) {
    uint32_t b = (uint32_t)h << 16;
    if (!(b & 0x7f800000)) b &= 0x80000000;  // DAZ
    float f;
    memcpy(&f, &b, 4);
    return f;
}
inline float flushed(float f) { return f == 0 || fabsf(f) >= 1.17549435e-38f || f != f ? f : copysignf(0, f); }
inline void dp(int d, int a, int b) {
    check(d), check(a), check(b);
    State &s = state();
    if (s.rows[d] != s.rows[a] || s.bytes[d] != s.bytes[b] || s.bytes[a] / 4 != s.rows[b]) die("dpbf16ps shapes");
    if (d == a || d == b || a == b) die("same tile twice");
    for (int m = 0; m < s.rows[d]; m++) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < s.bytes[a] / 4; k++) {
            uint16_t l[2];
            memcpy(l, s.data[a][m] + 4 * k, 4);
            for (int n = 0; n < s.bytes[d] / 4; n++) {
                uint16_t r[2];
                memcpy(r, s.data[b][k] + 4 * n, 4);
                even[n] = flushed(__builtin_fmaf(wide(l[0]), wide(r[0]), even[n]));
                odd[n] = flushed(__builtin_fmaf(wide(l[1]), wide(r[1]), odd[n]));
            }
        }
        for (int n = 0; n < s.bytes[d] / 4; n++) {
            float c;
            memcpy(&c, s.data[d][m] + 4 * n, 4);
            c = flushed(flushed(c) + flushed(even[n] + odd[n]));
            memcpy(s.data[d][m] + 4 * n, &c, 4);
        }
    }
}
inline uint16_t bf16(float f) {
    uint32_t b;
    memcpy(&b, &f, 4);
    if ((b & 0x7f800000) == 0x7f800000 && (b & 0x7fffff)) return (b >> 16) | 0x40;  // quiet
    if (!(b & 0x7f800000)) return (b >> 16) & 0x8000;                               // denormal: zero
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
inline __m256bh cvtne(__m512 x) {
    float f[16];
    uint16_t h[16];
    memcpy(f, &x, 64);
    for (int i = 0; i < 16; i++) h[i] = bf16(f[i]);
    __m256bh v;
    memcpy(&v, h, 32);
    return v;
}
inline __m512bh cvtne2(__m512 high, __m512 low) {  // _mm512_cvtne2ps_pbh(a, b): b in the lower half
    float f[32];
    uint16_t h[32];
    memcpy(f, &low, 64), memcpy(f + 16, &high, 64);
    for (int i = 0; i < 32; i++) h[i] = bf16(f[i]);
    __m512bh v;
    memcpy(&v, h, 64);
    return v;
}
inline __m512 dpbf16(__m512 sums, __m512bh a, __m512bh b) {
    float c[16];
    uint16_t l[32], r[32];
    memcpy(c, &sums, 64), memcpy(l, &a, 64), memcpy(r, &b, 64);
    for (int i = 0; i < 16; i++)
        for (int odd = 1; odd >= 0; odd--) c[i] = flushed(__builtin_fmaf(wide(l[2 * i + odd]), wide(r[2 * i + odd]), flushed(c[i])));
    memcpy(&sums, c, 64);
    return sums;
}
}  // namespace amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) amx::config(p)
#define _tile_release() amx::release()
#define _tile_loadd(t, p, s) amx::loadd(t, p, s)
#define _tile_stored(t, p, s) amx::stored(t, p, s)
#define _tile_zero(t) amx::zero(t)
#define _tile_dpbf16ps(d, a, b) amx::dp(d, a, b)
#define _mm512_cvtneps_pbh(x) amx::cvtne(x)
#define _mm512_cvtne2ps_pbh(a, b) amx::cvtne2(a, b)
#define _mm512_dpbf16_ps(c, a, b) amx::dpbf16(c, a, b)
