// Block-sparse attention on the CPU in float32: one pass with a running maximum and sum (arXiv:2205.14135, algorithm 1)
// over the kept key blocks of each query block. Called by block_cpp.py, compiled for the machine it runs on.
//
// Both products are C[rows][width] += A[rows][depth] * B[depth][width] with B packed, so one micro-kernel does them:
// scores = Q K^T with K^T packed by blocks of keys, output += P V with V packed likewise. Packing reads keys through
// `order`, queries are read and outputs written through it: reordering the tokens costs no pass of its own.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4, ROWS = 6;  // 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, WIDE = 2, ROWS = 6;  // 12 sums in 16 registers
#else
constexpr int LANES = 4, WIDE = 4, ROWS = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4)));

static inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
static inline vec splat(float x) { return x - vec{}; }

static inline vec larger(vec a, vec b) { return a > b ? a : b; }

static inline float highest(vec a) {
    float best = a[0];
    for (int i = 1; i < LANES; i++) best = a[i] > best ? a[i] : best;
    return best;
}

static inline float total(vec a) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += a[i];
    return sum;
}

// 2^x for x <= 0, relative error below 2e-7; 0 below -126. The fraction by its Taylor series in x ln 2.
static inline vec exp2_of(vec x) {
    const vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
    vec clamped = larger(x, splat(-126.f));
    vec shifted = clamped + magic;
    vec f = clamped - (shifted - magic);
    vec y = splat(1.5403530e-4f);
    y = y * f + splat(1.3333558e-3f);
    y = y * f + splat(9.6181291e-3f);
    y = y * f + splat(5.5504109e-2f);
    y = y * f + splat(2.4022651e-1f);
    y = y * f + splat(6.9314718e-1f);
    y = y * f + splat(1.f);
    ivec bits = (reinterpret_cast<ivec>(shifted) - 0x4b400000) << 23;
    vec result = reinterpret_cast<vec>(reinterpret_cast<ivec>(y) + bits);
    return x < splat(-126.f) ? vec{} : result;
}

// C[R][W * LANES] (+)= A[R][depth] * B[depth][W * LANES].
template <int R, int W, bool ADD>
static inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int depth) {
    vec sums[R][W];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) sums[r][w] = ADD ? load(c + r * ldc + w * LANES) : vec{};
    for (int i = 0; i < depth; i++) {
        vec row[W];
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) row[w] = load(b + i * ldb + w * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vec x = splat(a[r * lda + i]);
#pragma GCC unroll 8
            for (int w = 0; w < W; w++) sums[r][w] += x * row[w];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int w = 0; w < W; w++) store(c + r * ldc + w * LANES, sums[r][w]);
}

template <int W, bool ADD>
static void rows_of(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int depth) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS) tile<ROWS, W, ADD>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth);
    switch (rows - r) {
        case 5: tile<5, W, ADD>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth); break;
        case 4: tile<4, W, ADD>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth); break;
        case 3: tile<3, W, ADD>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth); break;
        case 2: tile<2, W, ADD>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth); break;
        case 1: tile<1, W, ADD>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth); break;
    }
}

// `width` is a multiple of LANES.
template <bool ADD>
static void product(int rows, int width, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                    int depth) {
    int w = 0;
    for (; w + WIDE * LANES <= width; w += WIDE * LANES)
        rows_of<WIDE, ADD>(rows, a, lda, b + w, ldb, c + w, ldc, depth);
    for (; w < width; w += LANES) rows_of<1, ADD>(rows, a, lda, b + w, ldb, c + w, ldc, depth);
}

static inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct Call {
    const float *q, *k, *v, *bias;                       // bias on keys or null
    float* out;
    const int32_t *num, *indices, *order;                // order or null
    float *keys, *values;                                // packed [B, P, m, D, pad(bs)], [B, P, m, bs, pad(Dv)]
    int64_t qb, qh, qn, kb, kh, kn, vb, vh, vn, ob, oh, on, bias_b, bias_h;
    int64_t lists_h, order_h;                            // strides by head, 0 where heads share
    int64_t B, H, Hkv, N, M, D, Dv, bs, n, m, P;         // P: packed heads, H where each has an order of its own
    float scale;                                         // to base 2
    std::atomic<int64_t>* next;                          // which piece of work is next, shared by the threads
};

static void pack(const Call& c, int64_t item) {
    const int64_t j = item % c.m, p = item / c.m % c.P, b = item / c.m / c.P;
    const int64_t head = p * c.Hkv / c.P, wide = up(c.bs, LANES), deep = up(c.Dv, LANES);
    const int64_t count = std::min(c.bs, c.M - j * c.bs);
    float* keys = c.keys + item * c.D * wide;
    float* values = c.values + item * c.bs * deep;
    const int32_t* order = c.order ? c.order + p * c.order_h + j * c.bs : nullptr;
    if (count < wide) std::memset(keys, 0, sizeof(float) * c.D * wide);
    for (int64_t t = 0; t < count; t++) {
        const int64_t token = order ? order[t] : j * c.bs + t;
        const float* k = c.k + b * c.kb + head * c.kh + token * c.kn;
        const float* v = c.v + b * c.vb + head * c.vh + token * c.vn;
        for (int64_t d = 0; d < c.D; d++) keys[d * wide + t] = k[d];
        std::memcpy(values + t * deep, v, sizeof(float) * c.Dv);
        for (int64_t d = c.Dv; d < deep; d++) values[t * deep + d] = 0;
    }
    for (int64_t t = count; t < c.bs; t++) std::memset(values + t * deep, 0, sizeof(float) * deep);
}

static constexpr int64_t CHUNK = 512;  // keys whose scores are held at a time

struct Buffers {
    std::vector<float> q, scores, out, peak, sum;
};

static void attend(const Call& c, int64_t item, Buffers& buffers) {
    const int64_t i = item % c.n, h = item / c.n % c.H, b = item / c.n / c.H;
    const int64_t wide = up(c.bs, LANES), deep = up(c.Dv, LANES), rows = std::min(c.bs, c.N - i * c.bs);
    const int64_t p = c.P == c.H ? h : h * c.Hkv / c.H;
    const int32_t* order = c.order ? c.order + h * c.order_h + i * c.bs : nullptr;
    const int64_t per_chunk = std::max<int64_t>(CHUNK / wide, 1), stride = per_chunk * wide;
    buffers.q.resize(c.bs * c.D), buffers.scores.resize(c.bs * stride), buffers.out.resize(c.bs * deep);
    buffers.peak.assign(c.bs, -INFINITY), buffers.sum.assign(c.bs, 0.f);
    float *q = buffers.q.data(), *scores = buffers.scores.data(), *out = buffers.out.data();
    std::memset(out, 0, sizeof(float) * c.bs * deep);
    for (int64_t r = 0; r < rows; r++) {
        const float* from = c.q + b * c.qb + h * c.qh + (order ? order[r] : i * c.bs + r) * c.qn;
        for (int64_t d = 0; d < c.D; d++) q[r * c.D + d] = from[d] * c.scale;
    }
    const int32_t* list = c.indices + h * c.lists_h * c.m + i * c.m;
    const int64_t count = c.num[h * c.lists_h + i];
    for (int64_t first = 0; first < count; first += per_chunk) {
        const int64_t blocks = std::min(per_chunk, count - first), width = blocks * wide;
        for (int64_t x = 0; x < blocks; x++) {
            const int64_t j = list[first + x], keys = std::min(c.bs, c.M - j * c.bs);
            const float* packed = c.keys + ((b * c.P + p) * c.m + j) * c.D * wide;
            product<false>(rows, wide, q, c.D, packed, wide, scores + x * wide, stride, c.D);
            if (c.bias) {
                const float* bias = c.bias + b * c.bias_b + h * c.bias_h;
                const int32_t* where = c.order ? c.order + h * c.order_h + j * c.bs : nullptr;
                for (int64_t t = 0; t < keys; t++) {
                    const float add = bias[where ? where[t] : j * c.bs + t];
                    for (int64_t r = 0; r < rows; r++) scores[r * stride + x * wide + t] += add;
                }
            }
            for (int64_t r = 0; keys < wide && r < rows; r++)
                for (int64_t t = keys; t < wide; t++) scores[r * stride + x * wide + t] = -INFINITY;
        }
        for (int64_t r = 0; r < rows; r++) {
            float* line = scores + r * stride;
            vec best = load(line);
            for (int64_t t = LANES; t < width; t += LANES) best = larger(best, load(line + t));
            const float peak = std::max(buffers.peak[r], highest(best));
            // While a query has met only masked keys its maximum is -inf, and -inf - -inf is not a number.
            const vec shift = splat(peak == -INFINITY ? 0.f : peak);
            vec sum{};
            for (int64_t t = 0; t < width; t += LANES) {
                const vec e = exp2_of(load(line + t) - shift);
                store(line + t, e);
                sum += e;
            }
            const float alpha = buffers.peak[r] == -INFINITY ? 0.f : std::exp2(buffers.peak[r] - peak);
            if (alpha != 1.f)
                for (int64_t d = 0; d < deep; d += LANES) store(out + r * deep + d, load(out + r * deep + d) * alpha);
            buffers.sum[r] = buffers.sum[r] * alpha + total(sum);
            buffers.peak[r] = peak;
        }
        for (int64_t x = 0; x < blocks; x++) {
            const float* packed = c.values + ((b * c.P + p) * c.m + list[first + x]) * c.bs * deep;
            product<true>(rows, deep, scores + x * wide, stride, packed, deep, out, deep, c.bs);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float* to = c.out + b * c.ob + h * c.oh + (order ? order[r] : i * c.bs + r) * c.on;
        const float factor = buffers.sum[r] > 0 ? 1.f / buffers.sum[r] : 0.f;
        for (int64_t d = 0; d < c.Dv; d++) to[d] = out[r * deep + d] * factor;
    }
}

extern "C" void pack_all(const Call* call) {
    for (int64_t item; (item = call->next->fetch_add(1)) < call->B * call->P * call->m;) pack(*call, item);
}

extern "C" void attend_all(const Call* call) {
    Buffers buffers;
    for (int64_t item; (item = call->next->fetch_add(1)) < call->B * call->H * call->n;) attend(*call, item, buffers);
}
