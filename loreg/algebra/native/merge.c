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

INLINE void append(struct doubtful *d, int64_t index, double near, double weight)
{
    d->index[d->count] = index, d->near[d->count] = near, d->weight[d->count++] = weight;
}

/* Of an undo: by how many storage values W lies from what taking back the delta gives, for each element; UNSURE where
 * that is to be decided exactly, or is beyond a byte. None is computed where `small` is null. */
struct residual { int8_t *small; struct screen screen; struct doubtful *unsure; };

#define UNSURE (-128)

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

/* The place of a storage value among all, the two zeros being neighbours: algebra/rounding.py, ordered(). */
INLINE int32_t ordered16(uint16_t x) { int16_t s = (int16_t)x; return (int16_t)(s ^ ((s >> 15) & 0x7fff)); }
INLINE int64_t ordered32(uint32_t x) { int32_t s = (int32_t)x; return s ^ ((s >> 31) & 0x7fffffff); }

/* W against what is predicted for it, n elements of raw bits; whether any is beyond a byte. */
INLINE int compare(enum dtype dtype, const void *W, int64_t at, const uint32_t *restrict predicted, int64_t n,
                   int8_t *restrict small)
{
    if (dtype == BF16) {
        const uint16_t *were = (const uint16_t *)W + at, *are = (const uint16_t *)predicted;
        int32_t any = 0;
        for (int64_t j = 0; j < n; j++) {
            int32_t by = ordered16(were[j]) - ordered16(are[j]), beyond = by > 127 || by < -127;
            small[j] = (int8_t)(beyond ? UNSURE : by);
            any |= beyond;
        }
        return any;
    }
    const uint32_t *were = (const uint32_t *)W + at;
    int64_t any = 0;
    for (int64_t j = 0; j < n; j++) {
        int64_t by = ordered32(were[j]) - ordered32(predicted[j]), beyond = by > 127 || by < -127;
        small[j] = (int8_t)(beyond ? UNSURE : by);
        any |= beyond;
    }
    return any != 0;
}

/* Of one row of a strip whose n sums were rounded: what W' - (sum - W) rounds to, against W. */
INLINE void look_back(enum dtype in, enum dtype out, const void *W, int64_t at, int64_t n, const double *restrict sum,
                      const uint32_t *rounded, uint64_t doubts, struct screen s, struct residual *back)
{
    double weight[STRIP], after[STRIP], near[STRIP];
    uint32_t predicted[STRIP];
    int8_t *small = back->small + at;
    widen(in, W, at, n, weight);
    widen(out, rounded, 0, n, after);
    for (int64_t j = 0; j < n; j++) near[j] = after[j] - (sum[j] - weight[j]);
    doubts |= narrow(in, near, n, predicted, back->screen);
    doubts |= (uint64_t)compare(in, W, at, predicted, n, small);
    if (__builtin_expect(doubts != 0, 0))
        for (int64_t j = 0; j < n; j++)
            if (small[j] == UNSURE || is_doubtful(in, near[j], back->screen) || is_doubtful(out, sum[j], s)) {
                small[j] = UNSURE;
                append(back->unsure, at + j, sum[j] - weight[j], weight[j]);
            }
}

/* A strip of up to ROWS rows, from (i, j0) on. */
INLINE void strip(enum dtype in, enum dtype out, const void *W, void *to, const double *L, const double *R,
                  int64_t i, int64_t h, int64_t j0, int64_t n, int64_t cols, int64_t r, struct screen s,
                  struct doubtful *d, struct residual *back)
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
        uint64_t doubts = narrow(out, sum[t], n, rounded, s);
        if (back->small) look_back(in, out, W, at, n, sum[t], rounded, doubts, s, back);
        if (__builtin_expect(doubts != 0, 0)) {
            widen(in, W, at, n, weight); /* before it is overwritten: `to` may be W */
            for (int64_t j = 0; j < n; j++)
                if (is_doubtful(out, sum[t][j], s)) append(d, at + j, sum[t][j], weight[j]);
        }
        memcpy((char *)to + at * size, rounded, n * size);
    }
}

INLINE int64_t merge(enum dtype in, enum dtype out, const void *W, void *to, const double *L, const double *R,
                     int64_t rows, int64_t cols, int64_t r, struct screen s, struct doubtful *d,
                     struct residual *back, int64_t room)
{
    int64_t block = CACHED / (r ? r : 1) / STRIP * STRIP, high = room / (2 * (cols ? cols : 1)), i = 0;
    if (block < STRIP) block = STRIP;
    high = high > 64 ? 64 : high > ROWS ? high / ROWS * ROWS : high; /* whose elements have room, all doubtful */
    for (; i < rows && d->count + high * cols <= room && back->unsure->count + high * cols <= room; i += high) {
        int64_t end = i + high < rows ? i + high : rows;
        for (int64_t j = 0; j < cols; j += block)
            for (int64_t k = i; k < end; k += ROWS)
                for (int64_t j0 = j; j0 < cols && j0 < j + block; j0 += STRIP)
                    strip(in, out, W, to, L, R, k, end - k < ROWS ? end - k : ROWS, j0,
                          cols - j0 < STRIP ? cols - j0 : STRIP, cols, r, s, d, back);
    }
    return i < rows ? i : rows;
}

/* As algebra/native/__init__.py has it. `found` is of what was rounded, `unsure` of the residual. */
struct task {
    const void *W;
    void *to;
    const double *L, *R;
    int64_t rows, cols, r;
    struct screen screen;
    struct doubtful found;
    int64_t room;
    int8_t *small;
    struct screen back;
    struct doubtful unsure;
};

/* Rows of W (rows, cols) from the first on, into `to`, which may be W. Returns how many were done: all, unless room
 * for elements in doubt may not last. `room` is at least 2·cols. */
#define MERGE(NAME, IN, OUT)                                                                                          \
    FOR_EACH_MACHINE int64_t NAME(struct task *t)                                                                     \
    {                                                                                                                 \
        struct residual back = {t->small, t->back, &t->unsure};                                                       \
        return merge(IN, OUT, t->W, t->to, t->L, t->R, t->rows, t->cols, t->r, t->screen, &t->found, &back, t->room); \
    }

MERGE(loreg_merge_bf16_bf16, BF16, BF16)
MERGE(loreg_merge_f32_f32, F32, F32)
MERGE(loreg_merge_f32_bf16, F32, BF16)
MERGE(loreg_merge_bf16_f32, BF16, F32)
