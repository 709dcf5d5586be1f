// Small matrix products in the cache: float32 by vectors, bfloat16 by pairs of numbers (AVX512_BF16) or matrix tiles (AMX) where the
// processor has them, sums in float32.
//
// A left operand lies row by row. A right operand is written two rows at a time: in bfloat16 the two numbers of a column lie
// together. Columns are multiples of UNIT, rows of ROW_UNIT, depth of DEPTH_UNIT (UNIT is a multiple of both); who writes the operands
// fills them up with zeros.
#pragma once
#include "vec.h"

namespace {

// Rows of a product computed together: each loaded vector serves all of them. Wide vectors come with registers for more, and where there are
// COLUMNS vectors, half of the rows take the fewest loads.
constexpr int ROWS = W == 16 ? 8 : 4, COLUMNS = W == 16 ? 4 : 2;

// out (R, V W) = [out +] left (R, depth) right (depth, V W)
template <bool ADD, int R, int V>
inline void product_tile(int depth, const float *__restrict left, int64_t left_stride, const float *__restrict right,
                         int64_t right_stride, float *__restrict out, int64_t out_stride) {
    vf sums[R][V];  // `= {}` would clear them in memory first
    EACH(i, R)
        EACH(c, V) sums[i][c] = vf{};
    for (int64_t k = 0; k < depth; k++, right += right_stride)
        EACH(i, R) {
            const vf l = broadcast(left[i * left_stride + k]);
            EACH(c, V) sums[i][c] = fma(l, load(right + c * W), sums[i][c]);
        }
    EACH(i, R)
        EACH(c, V) {
            float *to = out + i * out_stride + c * W;
            store(to, ADD ? load(to) + sums[i][c] : sums[i][c]);
        }
}

// out (ROWS, vectors W) = [out +] left (ROWS, depth) right (depth, vectors W)
template <bool ADD>
inline void product(int depth, int vectors, const float *left, int64_t left_stride, const float *right, int64_t right_stride, float *out,
                    int64_t out_stride) {
    int v = 0;
    if constexpr (COLUMNS > 2)
        for (; v + COLUMNS <= vectors; v += COLUMNS)
            for (int i = 0; i < ROWS; i += ROWS / 2)
                product_tile<ADD, ROWS / 2, COLUMNS>(depth, left + i * left_stride, left_stride, right + v * W, right_stride,
                                                  out + i * out_stride + v * W, out_stride);
    for (; v + 2 <= vectors; v += 2)
        product_tile<ADD, ROWS, 2>(depth, left, left_stride, right + v * W, right_stride, out + v * W, out_stride);
    if (v < vectors) product_tile<ADD, ROWS, 1>(depth, left, left_stride, right + v * W, right_stride, out + v * W, out_stride);
}

// What there is of a square matrix: beyond its diagonal are zeros, or numbers that nobody reads.
enum Shape { WHOLE, LOWER, UPPER };

struct Vectors {
    typedef float Number;
    static constexpr int UNIT = W, ROW_UNIT = ROWS, DEPTH_UNIT = 1;
    struct [[maybe_unused]] Session {};

    static const Number *column(const Number *right, int j) { return right + j; }
    static void store_left(Number *to, vf x) { store(to, x); }
    // Rows k and k + 1 from `column` on; k is even.
    static void store_right(Number *to, int stride, int k, int column, vf even, vf odd) {
        store(to + k * stride + column, even);
        store(to + (k + 1) * stride + column, odd);
    }
    // W rows from row t on, turned into columns from t on.
    static void store_right_turned(Number *to, int stride, int t, const float *from, int columns, int64_t from_stride) {
        for (int k = 0; k < columns; k += W) {
            vf turned[W];
            for (int i = 0; i < W; i++) turned[i] = load(from + i * from_stride + k);
            transpose(turned);
            for (int i = 0; i < W; i++) store(to + (k + i) * stride + t, turned[i]);
        }
    }
    // out = [out +] left right
    template <bool ADD>
    static void multiply(int rows, int depth, int columns, const Number *left, int left_stride, const Number *right,
                         int right_stride, float *out, int out_stride, Shape of_left = WHOLE, Shape of_out = WHOLE) {
        for (int i = 0; i < rows; i += ROWS) {
            const int k = of_left == UPPER ? i : 0, k_end = of_left == LOWER ? smaller(i + ROWS, depth) : depth;
            const int j = of_out == UPPER ? i / W * W : 0, j_end = of_out == LOWER ? padded(i + ROWS, W) : columns;
            product<ADD>(k_end - k, (j_end - j) / W, left + i * left_stride + k, left_stride, column(right + k * right_stride, j),
                         right_stride, out + i * out_stride + j, out_stride);
        }
    }
};

#ifdef __AVX512BF16__
// bfloat16 for instructions that multiply two numbers of a row by two of a column at a time.
struct Pairs {
    typedef uint16_t Number;
    typedef uint16_t Line __attribute__((vector_size(W * 4), aligned(2)));  // of a right operand, stored as in vec.h
    static constexpr int UNIT = 2 * W, ROW_UNIT = ROWS, DEPTH_UNIT = 2;
    struct [[maybe_unused]] Session {};

    static const Number *column(const Number *right, int j) { return right + 2 * j; }
    static void store_left(Number *to, vf x) { store(to, x); }
    static __m512i halves(vf front, vf back) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)back, (__m512)front); }
    static void store_right(Number *to, int stride, int k, int column, vf even, vf odd) {
        const __m512i pairs = _mm512_permutexvar_epi16(
            _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                             17, 1, 16, 0),
            halves(even, odd));
        *(Line *)(to + k * stride + 2 * column) = (Line)pairs;
    }
    // A row's pairs of numbers are moved together.
    static void store_right_turned(Number *to, int stride, int t, const float *from, int columns, int64_t from_stride) {
        for (int k = 0; k < columns; k += UNIT) {
            vf turned[W];
            for (int i = 0; i < W; i++) {
                const float *row = from + i * from_stride + k;
                turned[i] = (vf)halves(load(row), load(row + W));
            }
            transpose(turned);
            for (int i = 0; i < W; i++) *(Line *)(to + (k + 2 * i) * stride + 2 * t) = (Line)turned[i];
        }
    }
    // out (ROWS, UNIT) = [out +] left (ROWS, depth) right (depth, UNIT)
    template <bool ADD>
    static void multiply_block(int depth, const Number *left, int64_t left_stride, const Number *right, int64_t right_stride, float *out,
                               int64_t out_stride) {
        constexpr int V = UNIT / W;
        vf sums[ROWS][V];
        EACH(i, ROWS)
            EACH(c, V) sums[i][c] = vf{};
        for (int k = 0; k < depth; k += 2, left += 2, right += 2 * right_stride)
            EACH(i, ROWS) {
                int pair;
                memcpy(&pair, left + i * left_stride, sizeof pair);
                EACH(c, V) {
                    __m512i pairs;
                    memcpy(&pairs, right + c * 2 * W, sizeof pairs);
                    sums[i][c] = (vf)_mm512_dpbf16_ps((__m512)sums[i][c], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
                }
            }
        EACH(i, ROWS)
            EACH(c, V) {
                float *to = out + i * out_stride + c * W;
                store(to, ADD ? load(to) + sums[i][c] : sums[i][c]);
            }
    }
    template <bool ADD>
    static void multiply(int rows, int depth, int columns, const Number *left, int left_stride, const Number *right,
                         int right_stride, float *out, int out_stride, Shape of_left = WHOLE, Shape of_out = WHOLE) {
        for (int i = 0; i < rows; i += ROWS) {
            const int k = of_left == UPPER ? i : 0, k_end = of_left == LOWER ? smaller(i + ROWS, depth) : depth;
            const int j_end = of_out == LOWER ? padded(i + ROWS, UNIT) : columns;
            for (int j = of_out == UPPER ? i / UNIT * UNIT : 0; j < j_end; j += UNIT)
                multiply_block<ADD>(k_end - k, left + i * left_stride + k, left_stride, column(right + k * right_stride, j), right_stride,
                                    out + i * out_stride + j, out_stride);
        }
    }
};
#endif

#ifdef __AMX_BF16__
struct Tiles : Pairs {
    static constexpr int SIDE = 16, ROW_UNIT = 2 * SIDE, DEPTH_UNIT = 2 * SIDE;  // four tiles of sums at a time
    static_assert(UNIT == 2 * SIDE);

    struct Session {
        Session() {
            struct alignas(64) {
                uint8_t palette, start, reserved[14];
                uint16_t bytes[16];
                uint8_t rows[16];
            } shapes = {};
            shapes.palette = 1;
            for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = SIDE;
            _tile_loadconfig(&shapes);
        }
        ~Session() { _tile_release(); }
    };

    template <bool ADD>
    static void multiply(int rows, int depth, int columns, const Number *left, int left_stride, const Number *right,
                         int right_stride, float *out, int out_stride, Shape of_left = WHOLE, Shape of_out = WHOLE) {
        const int line = out_stride * 4;
        for (int i = 0; i < rows; i += UNIT)
            for (int j = of_out == UPPER ? i : 0; j < (of_out == LOWER ? i + UNIT : columns); j += UNIT) {
                float *to = out + i * out_stride + j, *below = to + SIDE * out_stride;
                if (ADD) {
                    _tile_loadd(0, to, line);
                    _tile_loadd(1, to + SIDE, line);
                    _tile_loadd(2, below, line);
                    _tile_loadd(3, below + SIDE, line);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (int k = of_left == UPPER ? i : 0; k < (of_left == LOWER ? i + UNIT : depth); k += UNIT) {
                    const Number *from = left + i * left_stride + k, *pairs = column(right + k * right_stride, j);
                    _tile_loadd(4, from, left_stride * 2);
                    _tile_loadd(5, from + SIDE * left_stride, left_stride * 2);
                    _tile_loadd(6, pairs, right_stride * 4);
                    _tile_loadd(7, pairs + 2 * SIDE, right_stride * 4);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, to, line);
                _tile_stored(1, to + SIDE, line);
                _tile_stored(2, below, line);
                _tile_stored(3, below + SIDE, line);
            }
    }
};
typedef Tiles Bfloat16;
#elif defined(__AVX512BF16__)
typedef Pairs Bfloat16;
#endif

// The buffers of one item of work with products by M. Without `space` it only counts what they take.
template <class M>
struct Buffers {
    typedef typename M::Number Number;
    float *const space;
    int64_t used = 0;

    explicit Buffers(float *space_) : space(space_) {}
    float *floats(int64_t count) {
        float *taken = space ? space + used : nullptr;
        used += padded(count, 16);
        return taken;
    }
    Number *numbers(int64_t count) { return (Number *)floats(count * sizeof(Number) / sizeof(float)); }
};

// The input whose precision the products have.
template <class Arguments>
const Rows &multiplied(const Arguments &s) {
    return s.x;
}
inline const Rows &multiplied(const Attention &s) { return s.v; }

// Of a kernel whose work on an item is Part<M>, with products by M.
template <template <class> class Part, class Arguments>
int64_t workspace_of(const Arguments &s) {
#ifdef __AVX512BF16__
    if (multiplied(s).bfloat16) return Part<Bfloat16>(s, nullptr).used;
#endif
    return Part<Vectors>(s, nullptr).used;
}
template <template <class> class Part, class Arguments>
void run_item(const Arguments &s, int64_t item, float *space) {
    const FlushDenormals flush;
#ifdef __AVX512BF16__
    if (multiplied(s).bfloat16) return Part<Bfloat16>(s, space).run(item);
#endif
    Part<Vectors>(s, space).run(item);
}

}  // namespace
