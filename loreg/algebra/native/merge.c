/* W + L·R in float64, rounded once to a storage dtype, with the elements that this may round wrongly.
 *
 * What algebra/edits.py does block by block in some ten passes of torch is here one pass, in which a strip of four
 * rows stays in the first-level cache. Plain C: loops that compilers turn into vectors of whatever width there is,
 * and in which the order of a sum may be any, as the bound that Screen states holds for all (algebra/rounding.py).
 *
 * R comes packed: panels of PANEL columns, in each r rows of PANEL doubles, the last one filled up with zeros.
 */

#include <stdint.h>
#include <string.h>

/* Of this file, by which the loader knows a library that was made from another version of it. */
const char loreg_source[] = LOREG_SOURCE;

#define PANEL 16
#define STRIP 256
#define ROWS 4
#define CACHED 32768 /* doubles of R that are used on many rows before the next are fetched */
#define INLINE static inline __attribute__((always_inline))

#if defined(LOREG_CLONES) && defined(__x86_64__)
#define FOR_EACH_MACHINE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_MACHINE
#endif

typedef double lanes __attribute__((vector_size(64), aligned(8)));

enum dtype { BF16, F32 };

/* tau, top: magnitudes as words of the carrier, float32 or for F32 float64; doubtful is what is below tau or at least
 * top, or whose last `low` bits are within `slack` of a one and zeros. */
struct screen { uint64_t tau, top, slack; };

struct doubtful { int64_t *index; double *near, *weight; int64_t count; };

INLINE uint32_t word32(double x) { float f = (float)x; uint32_t u; memcpy(&u, &f, 4); return u; }

INLINE void widen(enum dtype dtype, const void *W, int64_t at, int64_t n, double *restrict to)
{
    if (dtype == BF16) {
        const uint16_t *from = (const uint16_t *)W + at;
        for (int64_t j = 0; j < n; j++) {
            uint32_t u = (uint32_t)from[j] << 16;
            float f;
            memcpy(&f, &u, 4);
            to[j] = f;
        }
    } else {
        const float *from = (const float *)W + at;
        for (int64_t j = 0; j < n; j++) to[j] = from[j];
    }
}

INLINE uint64_t is_doubtful(enum dtype dtype, double x, struct screen s)
{
    if (dtype == F32) {
        uint64_t u, magnitude, past;
        memcpy(&u, &x, 8);
        magnitude = u & ~(1ull << 63);
        past = (u << 35) + ((s.slack - (1ull << 28)) << 35);
        return (past <= s.slack << 36) | (magnitude - s.tau >= s.top - s.tau);
    }
    uint32_t u = word32(x), magnitude = u & 0x7fffffffu, tau = (uint32_t)s.tau;
    return (uint32_t)(u << 16 == 0x80000000u) | (uint32_t)(magnitude - tau >= (uint32_t)s.top - tau);
}

/* Rounds n sums to `to`; whether any is doubtful. */
INLINE uint64_t narrow(enum dtype dtype, const double *restrict sum, int64_t n, void *restrict to, struct screen s)
{
    if (dtype == BF16) {
        uint32_t any = 0; /* of the width of what is looked at: a wider one halves the speed */
        for (int64_t j = 0; j < n; j++) {
            uint32_t u = word32(sum[j]);
            ((uint16_t *)to)[j] = (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
            any |= (uint32_t)is_doubtful(BF16, sum[j], s);
        }
        return any;
    }
    uint64_t any = 0;
    for (int64_t j = 0; j < n; j++) {
        ((float *)to)[j] = (float)sum[j];
        any |= is_doubtful(F32, sum[j], s);
    }
    return any;
}

/* A strip of up to ROWS rows, from (i, j0) on. */
INLINE void strip(enum dtype in, enum dtype out, const void *W, void *to, const double *L, const double *R,
                  int64_t i, int64_t h, int64_t j0, int64_t n, int64_t cols, int64_t r, struct screen s,
                  struct doubtful *d)
{
    double sum[ROWS][STRIP] __attribute__((aligned(64))), weight[STRIP];
    for (int64_t t = 0; t < ROWS; t++) {
        if (n < STRIP || t >= h) memset(sum[t], 0, sizeof sum[t]);
        if (t < h) widen(in, W, (i + t) * cols + j0, n, sum[t]);
    }
    const double *l0 = L + i * r, *l1 = L + (i + (h > 1)) * r, *l2 = L + (i + (h > 2) * 2) * r,
                 *l3 = L + (i + (h > 3) * 3) * r;
    for (int64_t j = 0; j < n; j += PANEL) {
        const double *panel = R + (j0 + j) * r;
        lanes a0 = *(lanes *)(sum[0] + j), b0 = *(lanes *)(sum[0] + j + 8);
        lanes a1 = *(lanes *)(sum[1] + j), b1 = *(lanes *)(sum[1] + j + 8);
        lanes a2 = *(lanes *)(sum[2] + j), b2 = *(lanes *)(sum[2] + j + 8);
        lanes a3 = *(lanes *)(sum[3] + j), b3 = *(lanes *)(sum[3] + j + 8);
        for (int64_t k = 0; k < r; k++) {
            lanes x = *(const lanes *)(panel + PANEL * k), y = *(const lanes *)(panel + PANEL * k + 8);
            a0 += x * l0[k], b0 += y * l0[k];
            a1 += x * l1[k], b1 += y * l1[k];
            a2 += x * l2[k], b2 += y * l2[k];
            a3 += x * l3[k], b3 += y * l3[k];
        }
        *(lanes *)(sum[0] + j) = a0, *(lanes *)(sum[0] + j + 8) = b0;
        *(lanes *)(sum[1] + j) = a1, *(lanes *)(sum[1] + j + 8) = b1;
        *(lanes *)(sum[2] + j) = a2, *(lanes *)(sum[2] + j + 8) = b2;
        *(lanes *)(sum[3] + j) = a3, *(lanes *)(sum[3] + j + 8) = b3;
    }
    for (int64_t t = 0; t < h; t++) {
        int64_t at = (i + t) * cols + j0, size = out == BF16 ? 2 : 4;
        uint32_t rounded[STRIP];
        if (__builtin_expect(narrow(out, sum[t], n, rounded, s) != 0, 0)) {
            widen(in, W, at, n, weight); /* before it is overwritten: `to` may be W */
            for (int64_t j = 0; j < n; j++)
                if (is_doubtful(out, sum[t][j], s)) {
                    d->index[d->count] = at + j;
                    d->near[d->count] = sum[t][j];
                    d->weight[d->count++] = weight[j];
                }
        }
        memcpy((char *)to + at * size, rounded, n * size);
    }
}

INLINE int64_t merge(enum dtype in, enum dtype out, const void *W, void *to, const double *L, const double *R,
                     int64_t rows, int64_t cols, int64_t r, struct screen s, struct doubtful *d, int64_t room)
{
    int64_t block = CACHED / (r ? r : 1) / STRIP * STRIP, high = room / (2 * (cols ? cols : 1)), i = 0;
    if (block < STRIP) block = STRIP;
    high = high > 64 ? 64 : high > ROWS ? high / ROWS * ROWS : high; /* whose elements have room, all doubtful */
    for (; i < rows && d->count + high * cols <= room; i += high) {
        int64_t end = i + high < rows ? i + high : rows;
        for (int64_t j = 0; j < cols; j += block)
            for (int64_t k = i; k < end; k += ROWS)
                for (int64_t j0 = j; j0 < cols && j0 < j + block; j0 += STRIP)
                    strip(in, out, W, to, L, R, k, end - k < ROWS ? end - k : ROWS, j0,
                          cols - j0 < STRIP ? cols - j0 : STRIP, cols, r, s, d);
    }
    return i < rows ? i : rows;
}

/* Rows of W (rows, cols) from the first on, into `to`, which may be W. Returns how many were done: all, unless room
 * for doubtful elements, of which there are *count, may not last. `room` is at least 2·cols. */
#define MERGE(NAME, IN, OUT)                                                                                          \
    FOR_EACH_MACHINE int64_t NAME(const void *W, void *to, const double *L, const double *R, int64_t rows,            \
                                  int64_t cols, int64_t r, uint64_t tau, uint64_t top, uint64_t slack,                \
                                  int64_t *index, double *near, double *weight, int64_t room, int64_t *count)         \
    {                                                                                                                 \
        struct screen s = {tau, top, slack};                                                                          \
        struct doubtful d = {index, near, weight, 0};                                                                 \
        int64_t done = merge(IN, OUT, W, to, L, R, rows, cols, r, s, &d, room);                                       \
        *count = d.count;                                                                                             \
        return done;                                                                                                  \
    }

MERGE(loreg_merge_bf16_bf16, BF16, BF16)
MERGE(loreg_merge_f32_f32, F32, F32)
MERGE(loreg_merge_f32_bf16, F32, BF16)
MERGE(loreg_merge_bf16_f32, BF16, F32)
