// The backward of Mamba-2's scan (arXiv 2405.21060, section 6): what is inside a chunk of Q tokens, and the row by row work around
// the large matrix products, which are left to torch. Within a chunk, for one head,
//
//   y_i = sum_(j <= i) M_ij x_j + exp(a_i) carried_i + D x_i,   M_ij = scores_ij exp(a_i - a_j) delta_j,
//
// with a the running sum of delta A, scores_ij = C_i . B_j and carried_i = C_i . (the state before the chunk).
// What the chunk adds to the state is sum_j B_j xw_j, xw_j = exp(a_Q - a_j) delta_j x_j.
#pragma once
#include "ssd_forward.h"

namespace {

// One chunk of one group of heads. Buffers hold whole vectors: Qp, Pp are Q, P filled up, `line` is a row of (Q, Q) filled up.
struct Chunk {
    const Ssd &s;
    int64_t b, index, group, t0, scores_at;
    int tokens, shared, width, Qp, Pp, line;

    Chunk(const Ssd &s_, int64_t item)
        : s(s_),
          b(item / (s.chunks * s.groups)),
          index(item / s.groups % s.chunks),
          group(item % s.groups),
          t0(index * s.chunk),
          scores_at(((index * s.batch + b) * s.groups + group) * s.chunk * s.chunk),
          tokens(smaller(s.chunk, s.length - t0)),
          shared((int)(s.heads / s.groups)),
          width((int)s.width),
          Qp(padded(s.chunk, ROWS)),
          Pp(padded(s.width, W)),
          line(padded(s.chunk, W)) {}

    int64_t step(int64_t h, int t) const { return ((b * s.chunks + index) * s.chunk + t) * s.heads + h; }
    bool has_carried() const { return s.carried.data && index >= s.carried_from; }
    bool has_dxw() const { return s.dxw.data && index < s.dxw_until; }
    int64_t carried_batch() const { return (index - s.carried_from) * s.batch + b; }
    int64_t dxw_batch() const { return index * s.batch + b; }

    // The chunk's rows of one head; zeros beyond the tokens and beyond P.
    void load_head(const Rows &r, int64_t batch, int64_t first, int64_t h, float *to) const {
        for (int t = 0; t < tokens; t++) load_row(r, batch, first + t, h * width, width, Pp, to + t * Pp);
        memset(to + tokens * Pp, 0, (Qp - tokens) * Pp * sizeof(float));
    }
    // (line) each: a in two floats, and delta.
    void load_steps(int64_t h, float *high, float *low, float *delta) const {
        for (int t = 0; t < line; t++) {
            const bool real = t < tokens;
            high[t] = real ? s.log_high[step(h, t)] : 0;
            low[t] = real ? s.log_low[step(h, t)] : 0;
            delta[t] = real ? s.delta[step(h, t)] : 0;
        }
    }
    // kept (Qp, line): exp(a_i - a_j) for j <= i, else 0. In two floats, the difference of two large sums stays exact.
    void decays(const float *high, const float *low, float *kept) const {
        for (int i = 0; i < Qp; i++) {
            float *row = kept + i * line;
            const int end = i < tokens ? i + 1 : 0;
            for (int j = 0; j < end; j += W) {
                vf x = (high[i] - load(high + j)) + (low[i] - load(low + j));
                exp2_clamped<1>(&x);
                store(row + j, x);
            }
            memset(row + end, 0, (line - end) * sizeof(float));
        }
    }
    // The group's scores with rows of `line`, zeros beyond.
    void load_scores(float *to) const {
        memset(to, 0, Qp * line * sizeof(float));
        for (int i = 0; i < tokens; i++) memcpy(to + i * line, s.scores + scores_at + i * s.chunk, tokens * sizeof(float));
    }
};

int64_t ssd_items(const Ssd &s) { return s.batch * s.chunks * s.groups; }
int64_t ssd_backward_workspace(const Ssd &s) {
    const int64_t Qp = padded(s.chunk, ROWS), Pp = padded(s.width, W), line = padded(s.chunk, W);
    return 5 * line + Qp * (5 * line + 4 * Pp) + s.width * line + Pp;
}

void ssd_backward_run(const Ssd &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const Chunk chunk(s, item);
    const int Qp = chunk.Qp, Pp = chunk.Pp, line = chunk.line, tokens = chunk.tokens, end = tokens - 1;
    float *high = space, *low = high + line, *delta = low + line, *da = delta + line, *ddelta = da + line;
    float *scores = ddelta + line, *kept = scores + Qp * line, *M = kept + Qp * line, *dM = M + Qp * line,
          *dscores = dM + Qp * line;
    float *x = dscores + Qp * line, *dy = x + Qp * Pp, *dx = dy + Qp * Pp, *dxw = dx + Qp * Pp, *turned = dxw + Qp * Pp;
    float *row = turned + chunk.width * line;
    chunk.load_scores(scores);
    memset(dscores, 0, Qp * line * sizeof(float));
    memset(row, 0, Pp * sizeof(float));
    for (int64_t h = chunk.group * chunk.shared; h < (chunk.group + 1) * chunk.shared; h++) {
        const float D = s.D ? s.D[h] : 0;
        chunk.load_head(s.x, chunk.b, chunk.t0, h, x);
        chunk.load_head(s.dy, chunk.b, chunk.t0, h, dy);
        if (chunk.has_dxw())
            chunk.load_head(s.dxw, chunk.dxw_batch(), 0, h, dxw);
        else
            memset(dxw, 0, Qp * Pp * sizeof(float));
        for (int t = 0; t < tokens; t++) {
            const int64_t next = (h + 1) * s.width;
            prefetch_row(s.dx, chunk.b, chunk.t0 + t, h * s.width, s.width);
            if (chunk.has_carried()) prefetch_row(s.carried, chunk.carried_batch(), t, h * s.width, s.width);
            if (h + 1 == s.heads) continue;
            prefetch_row(s.x, chunk.b, chunk.t0 + t, next, s.width);
            prefetch_row(s.dy, chunk.b, chunk.t0 + t, next, s.width);
            if (chunk.has_dxw()) prefetch_row(s.dxw, chunk.dxw_batch(), t, next, s.width);
        }
        chunk.load_steps(h, high, low, delta);
        chunk.decays(high, low, kept);
        memset(da, 0, 2 * line * sizeof(float));
        memset(M, 0, Qp * line * sizeof(float));
        memset(turned, 0, chunk.width * line * sizeof(float));
        for (int j = 0; j < tokens; j++)
            for (int p = 0; p < chunk.width; p++) turned[p * line + j] = x[j * Pp + p];
        // dM_ij = dy_i . x_j, for the j <= i that count, to whole vectors
        for (int i = 0; i < tokens; i += ROWS)
            product(chunk.width, (int)ceil_div(smaller(i + ROWS, tokens), W), dy + i * Pp, Pp, 1, turned, line, dM + i * line,
                    line);
        for (int i = 0; i < tokens; i++) {
            vf row_sum = vf{};
            for (int j = 0; j <= i; j += W) {
                const int at = i * line + j;
                const vf score = load(scores + at), keep = load(kept + at), step = load(delta + j);
                const vf d = load(dM + at) * keep, by_step = d * score, by_log = by_step * step;
                store(M + at, score * keep * step);
                store(dscores + at, load(dscores + at) + d * step);
                store(ddelta + j, load(ddelta + j) + by_step);
                store(da + j, load(da + j) - by_log);
                row_sum += by_log;
            }
            da[i] += sum(row_sum);
        }
        // dx_j = sum_(i >= j) M_ij dy_i + D dy_j + exp(a_Q - a_j) delta_j dxw_j
        for (int j = 0; j < tokens; j += ROWS)
            product(tokens - j, Pp / W, M + j * line + j, 1, line, dy + j * Pp, Pp, dx + j * Pp, Pp);
        float dD = 0;
        for (int t = 0; t < tokens; t++) {
            const float e = exp2_of(high[t] + low[t]), left = exp2_of((high[end] - high[t]) + (low[end] - low[t]));
            vf by_D = vf{}, by_w = vf{}, by_e = vf{};
            if (chunk.has_carried()) load_row(s.carried, chunk.carried_batch(), t, h * s.width, chunk.width, Pp, row);
            for (int p = 0; p < Pp; p += W) {
                const int at = t * Pp + p;
                const vf x_t = load(x + at), dy_t = load(dy + at), dxw_t = load(dxw + at);
                by_D += dy_t * x_t;
                by_w += dxw_t * x_t;
                by_e += dy_t * load(row + p);
                store(dx + at, load(dx + at) + dy_t * D + dxw_t * (left * delta[t]));
            }
            const float dw = sum(by_w) * left, dlog = dw * delta[t];
            dD += sum(by_D);
            ddelta[t] += dw;
            da[t] += sum(by_e) * e - dlog;
            da[end] += dlog;
            store_row(s.dx, chunk.b, chunk.t0 + t, h * s.width, chunk.width, dx + t * Pp);
        }
        for (int t = 0; t < s.chunk; t++) {
            s.da[chunk.step(h, t)] = t < tokens ? da[t] : 0;
            s.ddelta[chunk.step(h, t)] = t < tokens ? ddelta[t] : 0;
        }
        s.dD[(chunk.index * s.batch + chunk.b) * s.heads + h] = dD;
    }
    for (int i = 0; i < s.chunk; i++)
        for (int j = 0; j < s.chunk; j++)
            s.dscores[chunk.scores_at + i * s.chunk + j] = i < tokens && j <= i ? dscores[i * line + j] : 0;
}

int64_t weigh_items(const Weigh &s) { return s.batch * s.chunks; }
int64_t weigh_workspace(const Weigh &s) { return padded(s.width, W); }

void weigh_run(const Weigh &s, int64_t item, float *space) {
    const int64_t b = item % s.batch, index = item / s.batch, first = (s.start + index) * s.chunk;
    const int Pp = padded(s.width, W);
    for (int64_t t = 0; t < s.chunk; t++)
        for (int64_t h = 0; h < s.heads; h++) {
            if (first + t < s.length) {
                const float factor = s.factor[b * s.factor_batch_stride + (first + t) * s.heads + h];
                load_row(s.x, b, first + t, h * s.width, (int)s.width, Pp, space);
                for (int p = 0; p < Pp; p += W) store(space + p, load(space + p) * factor);
            } else {
                memset(space, 0, Pp * sizeof(float));
            }
            store_row(s.out, item, t, h * s.width, (int)s.width, space);
        }
}

constexpr int PART = 8;  // state indices n of one item

inline void load_some(const void *from, bool bfloat16, int64_t at, int count, float *to) {
    const Rows r{(void *)from, 0, 0, bfloat16};
    load_row(r, 0, 0, at, count, padded(count, W), to);
}
inline void store_some(void *to, bool bfloat16, int64_t at, int count, const float *from) {
    const Rows r{to, 0, 0, bfloat16};
    store_row(r, 0, 0, at, count, from);
}

int64_t pass_items(const Pass &s) { return s.batch * s.groups * ceil_div(s.n, PART); }
int64_t pass_workspace(const Pass &s) { return 3 * padded(s.heads / s.groups * s.width, W) + s.chunks * s.heads / s.groups; }

void pass_run(const Pass &s, int64_t item, float *space) {
    const FlushDenormals flush;
    const int64_t parts = ceil_div(s.n, PART), part = item % parts, g = item / parts % s.groups, b = item / parts / s.groups;
    const int64_t shared = s.heads / s.groups, slot = s.batch * s.groups * s.n * shared * s.width;
    const int count = (int)(shared * s.width), size = padded(count, W), width = (int)s.width;
    float *dstate = space, *more = dstate + size, *before = more + size, *sums = before + size;
    memset(sums, 0, s.chunks * shared * sizeof(float));
    for (int64_t n = part * PART; n < s.n && n < (part + 1) * PART; n++) {
        const int64_t at = ((b * s.groups + g) * s.n + n) * count;
        load_span(s.dfinal ? s.dfinal + at : nullptr, count, size, dstate);
        for (int64_t k = s.chunks; k-- > 0;) {
            const float *kept = s.kept + b * s.kept_batch_stride + k * s.kept_chunk_stride + g * shared;
            load_some(s.dstates, s.bfloat16, k * slot + at, count, more);
            load_some(s.before, s.bfloat16, k * slot + at, count, before);
            for (int64_t h = 0; h < shared; h++) {
                float sum_h = 0;
                for (int p = 0; p < width; p++) {
                    float &own = dstate[h * width + p];
                    own *= kept[h];
                    sum_h += own * before[h * width + p];
                    own += more[h * width + p];
                }
                sums[k * shared + h] += sum_h;
            }
            store_some(s.dstates, s.bfloat16, k * slot + at, count, dstate);
        }
        if (s.dinitial) memcpy(s.dinitial + at, dstate, count * sizeof(float));
    }
    for (int64_t k = 0; k < s.chunks; k++)
        memcpy(s.dlog + ((part * s.batch + b) * s.chunks + k) * s.heads + g * shared, sums + k * shared, shared * sizeof(float));
}

}  // namespace
