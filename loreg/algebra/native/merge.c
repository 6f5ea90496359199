/* W + L·R, rounded once to a storage dtype; what that leaves in doubt is summed more exactly, and the little that is
 * still in doubt is listed.
 *
 * What algebra/edits.py does block by block in some ten passes of torch is here one pass, in which a strip of four
 * rows stays in the first-level cache. Plain C: loops that compilers turn into vectors, and in which the order of a
 * sum may be any, as the bounds hold for all (algebra/rounding.py, Screen).
 *
 * Compiled once for each width of vectors, LOREG_BYTES, which is in the names (levels.c, build.py): a vector that is
 * wider than the registers lives in memory, and a sum of such took 17 ns where it takes 0.8.
 *
 * Where L·R is small beside W, as it is in adapters, single precision decides all but one element in some thousands,
 * in half the time. Those are summed in double, and what that cannot decide in pairs of doubles.
 *
 * R comes packed: panels of PANEL columns, in each r rows of PANEL numbers, the last one filled up with zeros.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "storage is little-endian, and read here as it lies"
#endif

#define PANEL 32
#define STRIP 256
#define ROWS 4
#define CACHED 32768 /* numbers of R that are used on many rows before the next are fetched */
#define INLINE static inline __attribute__((always_inline))

#define NAMED_(NAME, BYTES) NAME##_##BYTES
#define NAMED(NAME, BYTES) NAMED_(NAME, BYTES)
#define DOUBLES (LOREG_BYTES / 8) /* in a vector */
#define SINGLES (LOREG_BYTES / 4)

typedef double doubles __attribute__((vector_size(LOREG_BYTES), aligned(8)));
typedef float singles __attribute__((vector_size(LOREG_BYTES), aligned(4)));
typedef float halves __attribute__((vector_size(LOREG_BYTES / 2), aligned(4)));
typedef uint32_t words __attribute__((vector_size(LOREG_BYTES), aligned(4)));
typedef int32_t places __attribute__((vector_size(LOREG_BYTES), aligned(4)));
typedef uint16_t shorts __attribute__((vector_size(LOREG_BYTES / 2), aligned(2)));
typedef uint8_t bytes __attribute__((vector_size(LOREG_BYTES), aligned(1)));
typedef int8_t smalls __attribute__((vector_size(LOREG_BYTES / 4), aligned(1)));

enum dtype { BF16, F32 };

/* tau, top: magnitudes as words of the carrier, float32 or for F32 float64; doubtful is what is below tau or at least
 * top, or whose last `low` bits are within `slack` of a one and zeros. */
struct screen { uint64_t tau, top, slack; };

struct doubtful { int64_t *index; double *near, *weight; int64_t count; };
struct wide { int64_t *index, *by, count; };

/* As algebra/native/__init__.py has it. R is there once, as doubles or, where it has no more bits, as floats. `Lrest`:
 * what rounding L to double lost, null for nothing. `margin`: the error of L·R in single precision for each row; null
 * where all is to be done in double. `small`: takes the residual, null without. `spread`: at least the sum of the
 * magnitudes of any element of L·R; infinite where L or Lrest do not tell all. `looked` counts the elements that were
 * not decided at once. */
struct task {
    const void *W;
    void *to;
    const double *L, *Lrest, *R;
    const float *Lsingle, *Rsingle, *margin;
    int64_t rows, cols, r;
    double spread;
    struct screen screen;
    struct doubtful found;
    int64_t room, looked;
    int8_t *small;
    struct screen back;
    struct doubtful unsure;
    struct wide wide;
};

/* Of an undo: by how many storage values W lies from what taking back the delta gives, for each element; UNSURE where
 * that is to be decided exactly, or is beyond a byte and so is in the list of the wide ones. */
#define UNSURE (-128)

INLINE uint32_t bits32(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
INLINE float float32(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint64_t bits64(double x) { uint64_t u; memcpy(&u, &x, 8); return u; }
INLINE double float64(uint64_t u) { double x; memcpy(&x, &u, 8); return x; }
INLINE uint32_t word32(double x) { return bits32((float)x); }
INLINE uint16_t nearest16(uint32_t u) { return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16); }

INLINE double number(enum dtype dtype, uint32_t u) { return dtype == BF16 ? float32(u << 16) : float32(u); }

INLINE double value(enum dtype dtype, const void *W, int64_t at)
{
    return dtype == BF16 ? float32((uint32_t)((const uint16_t *)W)[at] << 16) : ((const float *)W)[at];
}

INLINE uint32_t raw(enum dtype dtype, const void *W, int64_t at)
{
    return dtype == BF16 ? ((const uint16_t *)W)[at] : ((const uint32_t *)W)[at];
}

/* The place of a storage value among all, the two zeros being neighbours: algebra/rounding.py, ordered(). */
INLINE int64_t place(enum dtype dtype, uint32_t x)
{
    int32_t s = dtype == BF16 ? (int16_t)x : (int32_t)x, mask = dtype == BF16 ? 0x7fff : 0x7fffffff;
    return s ^ ((s >> 31) & mask);
}

INLINE uint64_t is_doubtful(enum dtype dtype, double x, struct screen s)
{
    if (dtype == F32) {
        uint64_t u = bits64(x), magnitude = u & ~(1ull << 63), past = (u << 35) + ((s.slack - (1ull << 28)) << 35);
        return (past <= s.slack << 36) | (magnitude - s.tau >= s.top - s.tau);
    }
    uint32_t u = word32(x), magnitude = u & 0x7fffffffu, tau = (uint32_t)s.tau;
    return (uint32_t)(u << 16 == 0x80000000u) | (uint32_t)(magnitude - tau >= (uint32_t)s.top - tau);
}

/* ---- single elements ---- */

INLINE double right(const struct task *t, int64_t k, int64_t j)
{
    int64_t at = j / PANEL * PANEL * t->r + PANEL * k + j % PANEL;
    return t->Rsingle ? t->Rsingle[at] : t->R[at];
}

INLINE double delta(const struct task *t, int64_t i, int64_t j)
{
    const double *l = t->L + i * t->r;
    double sum = 0;
    for (int64_t k = 0; k < t->r; k++) sum += l[k] * right(t, k, j);
    return sum;
}

/* The exact sum of two numbers: what is returned, and *lost (Knuth). `volatile` keeps a product from being contracted
 * into the sum, which would then be another number. */
INLINE double two_sum(double a, double b, double *lost)
{
    volatile double sum = a + b;
    double s = sum, part = s - a;
    *lost = (a - (s - part)) + (b - part);
    return s;
}

/* The correctly rounded value of weight + sign·(L·R) as raw bits, by a sum in pairs of doubles. The low parts add up to
 * within (r + 8)²·4u² of all magnitudes, or nothing at all is lost, and then a tie is known to be one. 0 where that
 * does not decide either, or the value is none that one midpoint separates from its neighbours. */
static __attribute__((noinline)) int decide(enum dtype out, const struct task *t, int64_t i, int64_t j, double weight,
                                            double sign, uint32_t *found)
{
    const double *l = t->L + i * t->r, *rest = t->Lrest ? t->Lrest + i * t->r : 0;
    double high = weight, low = 0, n = (double)(t->r + 8), middle, lost, part;
    uint32_t lower;
    int exact = 1;
    if (!(t->spread < INFINITY)) return 0;
    for (int64_t k = 0; k < t->r; k++) {
        double x = sign * right(t, k, j);
        volatile double product = l[k] * x;
        double p = product;
        high = two_sum(high, p, &part);
        low = two_sum(low, part, &lost);
        exact &= lost == 0;
        low = two_sum(low, fma(l[k], x, -p), &lost);
        exact &= lost == 0;
        if (rest && rest[k] != 0) low += rest[k] * x, exact = 0;
    }
    double all = high + low;
    low -= all - high;
    high = all;
    if (out == BF16) {
        uint32_t u = word32(high), magnitude = u & 0x7fffffffu;
        if (magnitude < 0x00800000u || magnitude >= 0x7f7f0000u) return 0;
        lower = u >> 16;
        middle = float32((u & 0xffff0000u) | 0x8000u);
    } else {
        if (!(fabs(high) >= 0x1p-126 && fabs(high) < 0x1.fffffep127)) return 0;
        uint64_t u = bits64(high) & ~0x1fffffffull;
        lower = word32(float64(u));
        middle = float64(u | 0x10000000ull);
    }
    double by = (high - middle) + low;
    if (by == 0 && exact && high - middle == -low)
        *found = lower + (lower & 1);
    else if (fabs(by) * (1 - 0x1p-50) > n * n * 0x1p-104 * (fabs(weight) + t->spread))
        *found = lower + ((by > 0) == (middle > 0));
    else return 0;
    return 1;
}

/* One element of W' that was in doubt, of which `by` is the delta; what is still in doubt goes on the list. */
INLINE uint32_t settled(enum dtype in, enum dtype out, struct task *t, int64_t i, int64_t j, double by)
{
    double weight = value(in, t->W, i * t->cols + j), near = weight + by;
    uint32_t u = out == BF16 ? nearest16(word32(near)) : word32(near);
    struct doubtful *d = &t->found;
    if (is_doubtful(out, near, t->screen) && !decide(out, t, i, j, weight, 1, &u)) {
        d->index[d->count] = i * t->cols + j, d->near[d->count] = near, d->weight[d->count++] = weight;
    }
    return u;
}

/* Of one element the residual, of which nothing is known yet; what is beyond a byte or in doubt goes on a list. */
INLINE int8_t looked_back(enum dtype in, enum dtype out, struct task *t, int64_t i, int64_t j, double by,
                          uint32_t after, int open)
{
    int64_t at = i * t->cols + j;
    double weight = value(in, t->W, at), now = number(out, after), near = now - by;
    uint32_t u = in == BF16 ? nearest16(word32(near)) : word32(near);
    struct doubtful *d = &t->unsure;
    if (!open && (!is_doubtful(in, near, t->back) || decide(in, t, i, j, now, -1, &u))) {
        int64_t distance = place(in, raw(in, t->W, at)) - place(in, u);
        if (distance > -128 && distance < 128) return (int8_t)distance;
        t->wide.index[t->wide.count] = at, t->wide.by[t->wide.count++] = distance;
        return UNSURE;
    }
    d->index[d->count] = at, d->near[d->count] = by, d->weight[d->count++] = weight;
    return UNSURE;
}

/* memcpy of a size that is not known is a string instruction to some compilers, whose start costs more than all of it. */
INLINE void copy(char *to, const char *from, int64_t size)
{
    int64_t k = 0;
    for (; k + LOREG_BYTES <= size; k += LOREG_BYTES) *(bytes *)(to + k) = *(const bytes *)(from + k);
    for (; k + 4 <= size; k += 4) memcpy(to + k, from + k, 4);
    for (; k < size; k++) to[k] = from[k];
}

/* ---- strips of one row: n elements from (i, j) on, of which the sums or deltas are there ---- */

#define DOUBTFUL 1
#define UNKNOWN 2 /* of the residual */

/* Settles the elements of `rounded` that are DOUBTFUL by their `flags`, and the residuals of those and of the UNKNOWN.
 * The flags of the last elements of a word are 0. */
INLINE void settle(enum dtype in, enum dtype out, struct task *t, int64_t i, int64_t j, int64_t n, uint32_t *rounded,
                   const uint8_t *flags)
{
    for (int64_t word = 0; word < n; word += 8) {
        uint64_t any;
        memcpy(&any, flags + word, 8);
        for (int64_t k = word; any != 0; k++, any >>= 8) {
            if (!(any & (DOUBTFUL | UNKNOWN))) continue;
            int64_t before = t->found.count;
            double by = delta(t, i, j + k);
            if (any & DOUBTFUL) {
                uint32_t u = settled(in, out, t, i, j + k, by);
                if (out == BF16) ((uint16_t *)rounded)[k] = (uint16_t)u;
                else rounded[k] = u;
                t->looked++;
            }
            if (t->small)
                t->small[i * t->cols + j + k] =
                    looked_back(in, out, t, i, j + k, by, raw(out, rounded, k), t->found.count > before);
        }
    }
}

/* W against what is predicted for it; whether any is beyond a byte, which is UNSURE then. */
INLINE uint64_t compare(enum dtype dtype, const void *W, int64_t at, const uint32_t *restrict predicted, int64_t n,
                        int8_t *restrict small)
{
    if (dtype == BF16) {
        const uint16_t *were = (const uint16_t *)W + at, *are = (const uint16_t *)predicted;
        int32_t any = 0;
        for (int64_t k = 0; k < n; k++) {
            int32_t by = (int32_t)place(BF16, were[k]) - (int32_t)place(BF16, are[k]);
            int32_t beyond = by > 127 || by < -127;
            small[k] = (int8_t)(beyond ? UNSURE : by);
            any |= beyond;
        }
        return any != 0;
    }
    const uint32_t *were = (const uint32_t *)W + at;
    int64_t any = 0;
    for (int64_t k = 0; k < n; k++) {
        int64_t by = place(F32, were[k]) - place(F32, predicted[k]), beyond = by > 127 || by < -127;
        small[k] = (int8_t)(beyond ? UNSURE : by);
        any |= beyond;
    }
    return any != 0;
}

INLINE uint64_t round_doubles(enum dtype dtype, const double *restrict x, int64_t n, uint32_t *restrict to,
                              struct screen s)
{
    uint64_t any = 0;
    if (dtype == BF16) {
        uint32_t some = 0; /* of the width of what is looked at: a wider one halves the speed */
        for (int64_t k = 0; k < n; k++) {
            ((uint16_t *)to)[k] = nearest16(word32(x[k]));
            some |= (uint32_t)is_doubtful(BF16, x[k], s);
        }
        return some;
    }
    for (int64_t k = 0; k < n; k++) {
        to[k] = word32(x[k]);
        any |= is_doubtful(F32, x[k], s);
    }
    return any;
}

INLINE void end_in_double(enum dtype in, enum dtype out, struct task *t, int64_t i, int64_t j, int64_t n,
                          const double *restrict sum)
{
    int64_t at = i * t->cols + j, size = out == BF16 ? 2 : 4;
    uint32_t rounded[STRIP], predicted[STRIP];
    double near[STRIP];
    uint64_t any = round_doubles(out, sum, n, rounded, t->screen);
    if (t->small) {
        for (int64_t k = 0; k < n; k++) near[k] = value(out, rounded, k) - (sum[k] - value(in, t->W, at + k));
        any |= round_doubles(in, near, n, predicted, t->back) | compare(in, t->W, at, predicted, n, t->small + at);
    }
    if (__builtin_expect(any != 0, 0)) {
        uint8_t flags[STRIP + 8] = {0};
        for (int64_t k = 0; k < n; k++) flags[k] = DOUBTFUL * (uint8_t)is_doubtful(out, sum[k], t->screen);
        for (int64_t k = 0; t->small && k < n; k++)
            flags[k] |= UNKNOWN * (uint8_t)(is_doubtful(in, near[k], t->back) | (t->small[at + k] == UNSURE));
        settle(in, out, t, i, j, n, rounded, flags);
    }
    copy((char *)t->to + at * size, (const char *)rounded, n * size);
}

INLINE int any_of(words x)
{
#if LOREG_BYTES == 64
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif LOREG_BYTES == 32
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    return (x[0] | x[1] | x[2] | x[3]) != 0;
#endif
}

INLINE words smaller(words x, words y)
{
#if LOREG_BYTES == 64
    return (words)_mm512_min_epu32((__m512i)x, (__m512i)y);
#elif LOREG_BYTES == 32
    return (words)_mm256_min_epu32((__m256i)x, (__m256i)y);
#else
    words less = (words)(x < y);
    return (x & less) | (y & ~less);
#endif
}

/* Which numbers, off by `margin` and their own rounding at most, may lie on the other side of the midpoint above them of
 * their neighbours in bfloat16, or beyond the largest one. What is no number does. */
INLINE words are_below(singles x, singles margin)
{
    words u = (words)x;
    singles from = x - (singles)((u & 0xffff0000u) | 0x8000u), size = (singles)(u & 0x7fffffffu);
    from = (singles)((words)from & 0x7fffffffu);
    return ~(words)(from > size * 0x1.01p-24f + margin) | (words)(size >= 0x1.fep127f);
}

/* Which may be off by as much as the midpoint below is away: above a power of two a quarter of a step, which is 2^-10 of
 * the number at least. */
INLINE words are_small(words size, singles margin) { return ~(words)((singles)size > margin * 1025); }

INLINE words are_near(singles x, singles margin)
{
    return are_below(x, margin) | are_small((words)x & 0x7fffffffu, margin);
}

/* GCC before 15 takes several instructions for each of the conversions where AVX2 has one. */
#if LOREG_BYTES == 32
INLINE words widened(const uint16_t *x) { return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)x)) << 16; }

INLINE void store_high(uint16_t *to, words x, words y)
{
    __m256i both = _mm256_packus_epi32((__m256i)(x >> 16), (__m256i)(y >> 16));
    _mm256_storeu_si256((void *)to, _mm256_permute4x64_epi64(both, 0xd8));
}

INLINE void store_small(int8_t *to, places x)
{
    __m128i both = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64((void *)to, _mm_packs_epi16(both, both));
}
#else
INLINE words widened(const uint16_t *x) { return __builtin_convertvector(*(const shorts *)x, words) << 16; }

INLINE void store_high(uint16_t *to, words x, words y)
{
    *(shorts *)to = __builtin_convertvector(x >> 16, shorts);
    *(shorts *)(to + SINGLES) = __builtin_convertvector(y >> 16, shorts);
}

INLINE void store_small(int8_t *to, places x) { *(smalls *)to = __builtin_convertvector(x, smalls); }
#endif

/* Rounded halves upward, as halves are near: bfloat16 with its sign's bits before it, to the place among all. */
INLINE places rounded_place(singles x)
{
    places s = (places)((words)x + 0x8000u) >> 16;
    return s ^ ((s >> 31) & 0x7fff);
}

/* Where taking back may give another number than W, which is in bfloat16; `up` is W' before its last bits are cut.
 *
 * Taking back gives W' - delta = W + (W' - x), x the exact sum: less than half a step of W' from W. So it rounds to W
 * unless W' has larger steps than the numbers just below W have. */
INLINE places is_open(words were, words up)
{
    return (places)(up & 0x7f800000u) > (places)(((were & 0x7fffffffu) - 1) & 0xff800000u);
}

/* From the deltas of bfloat16 to bfloat16 in single precision; `delta` has numbers up to a whole panel. `looks_back`:
 * whether a residual is wanted. The few vectors in which it may not be 0 come later, by a list: at a branch for each
 * the processor would guess wrong. */
INLINE void end_in_single(struct task *t, int looks_back, int64_t i, int64_t j, int64_t n, const float *restrict delta)
{
    int64_t at = i * t->cols + j, count = 0;
    uint16_t rounded[STRIP], last[STRIP], open[STRIP / SINGLES];
    int8_t by[STRIP];
    const uint16_t *W = (const uint16_t *)t->W + at;
    words any = {0}, least = any + 0x7fffffffu;
    singles margin = (singles)any + t->margin[i];
    if (n % PANEL) { /* what is read beyond the row is an even number */
        for (int64_t k = 0; k < STRIP; k++) last[k] = 0x4000;
        copy((char *)last, (const char *)W, n * 2);
        W = last;
    }
    for (int64_t k = 0; k < n; k += 2 * SINGLES) {
        words up[2];
        for (int v = 0; v < 2; v++) {
            int64_t here = k + v * SINGLES;
            words were = widened(W + here);
            singles x = (singles)were + *(const singles *)(delta + here);
            up[v] = (words)x + 0x8000u;
            any |= are_below(x, margin);
            least = smaller(least, (words)x & 0x7fffffffu);
            if (looks_back) open[count] = (uint16_t)here, count += any_of((words)is_open(were, up[v]));
        }
        store_high(rounded + k, up[0], up[1]);
    }
    for (int64_t k = 0; looks_back && k < n; k += LOREG_BYTES) *(bytes *)(by + k) = (bytes){0};
    for (int64_t each = 0; each < count; each++) {
        int64_t k = open[each];
        words were = widened(W + k);
        singles d = *(const singles *)(delta + k), back = (singles)widened(rounded + k) - d;
        places off = rounded_place((singles)were) - rounded_place(back);
        places unknown = (places)are_near(back, margin) | (off > 127) | (off < -127);
        places at_all = is_open(were, (words)((singles)were + d) + 0x8000u);
        any |= (words)(unknown & at_all);
        store_small(by + k, ((off & ~unknown) | (unknown & UNSURE)) & at_all);
    }
    if (looks_back) copy((char *)t->small + at, (const char *)by, n);
    any |= are_small(least, margin);
    if (__builtin_expect(any_of(any), 0)) {
        uint8_t flags[STRIP + 8] = {0};
        uint32_t doubts[STRIP];
        for (int64_t k = 0; k < n; k += SINGLES)
            *(words *)(doubts + k) = are_near((singles)widened(W + k) + *(const singles *)(delta + k), margin);
        for (int64_t k = 0; k < n; k++) flags[k] = DOUBTFUL & (uint8_t)doubts[k];
        for (int64_t k = 0; looks_back && k < n; k++) flags[k] |= UNKNOWN & -(by[k] == UNSURE);
        settle(BF16, BF16, t, i, j, n, (uint32_t *)rounded, flags);
    }
    copy((char *)((uint16_t *)t->to + at), (const char *)rounded, n * 2);
}

/* ---- strips of up to ROWS rows, from (i, j0) on ---- */

/* Asks for the same columns of the rows that come next: pieces of rows are too short for a processor to foresee. */
INLINE void fetch(const struct task *t, int64_t size, int64_t i, int64_t j0, int64_t n)
{
    for (int64_t k = i + ROWS; k < i + 2 * ROWS && k < t->rows; k++)
        for (int64_t at = 0; at < n * size; at += 64)
            __builtin_prefetch((const char *)t->W + (k * t->cols + j0) * size + at);
}

INLINE doubles some(const struct task *t, int single, int64_t at)
{
    return single ? __builtin_convertvector(*(const halves *)(t->Rsingle + at), doubles) : *(const doubles *)(t->R + at);
}

/* Two vectors of each of ROWS rows, which stay in registers: with what is read, all that AVX2 has. */
#define LEFTS(TYPE, L)                                                                                                \
    const TYPE *l[ROWS];                                                                                              \
    for (int64_t q = 0; q < ROWS; q++) l[q] = (L) + (i + (q < h ? q : 0)) * r

INLINE void in_double(enum dtype in, enum dtype out, int single, struct task *t, int64_t i, int64_t h, int64_t j0, int64_t n)
{
    double sum[ROWS][STRIP] __attribute__((aligned(64)));
    int64_t r = t->r;
    for (int64_t k = 0; k < ROWS; k++) {
        if (n < STRIP || k >= h) memset(sum[k], 0, sizeof sum[k]);
        for (int64_t j = 0; k < h && j < n; j++) sum[k][j] = value(in, t->W, (i + k) * t->cols + j0 + j);
    }
    LEFTS(double, t->L);
    fetch(t, in == BF16 ? 2 : 4, i, j0, n);
    for (int64_t j = 0; j < n; j += 2 * DOUBLES) {
        int64_t panel = (j0 + j) / PANEL * PANEL * r + (j0 + j) % PANEL;
        doubles a[ROWS], b[ROWS];
        for (int q = 0; q < ROWS; q++) a[q] = *(doubles *)(sum[q] + j), b[q] = *(doubles *)(sum[q] + j + DOUBLES);
        for (int64_t k = 0; k < r; k++) {
            doubles x = some(t, single, panel + PANEL * k), y = some(t, single, panel + PANEL * k + DOUBLES);
            for (int q = 0; q < ROWS; q++) a[q] += x * l[q][k], b[q] += y * l[q][k];
        }
        for (int q = 0; q < ROWS; q++) *(doubles *)(sum[q] + j) = a[q], *(doubles *)(sum[q] + j + DOUBLES) = b[q];
    }
    for (int64_t k = 0; k < h; k++) end_in_double(in, out, t, i + k, j0, n, sum[k]);
}

INLINE void in_single(struct task *t, int looks_back, int64_t i, int64_t h, int64_t j0, int64_t n)
{
    float delta[ROWS][STRIP] __attribute__((aligned(64)));
    int64_t r = t->r;
    LEFTS(float, t->Lsingle);
    fetch(t, 2, i, j0, n);
    for (int64_t j = 0; j < n; j += 2 * SINGLES) {
        const float *panel = t->Rsingle + (j0 + j) / PANEL * PANEL * r + (j0 + j) % PANEL;
        singles a[ROWS] = {{0}}, b[ROWS] = {{0}};
        for (int64_t k = 0; k < r; k++) {
            singles x = *(const singles *)(panel + PANEL * k), y = *(const singles *)(panel + PANEL * k + SINGLES);
            for (int q = 0; q < ROWS; q++) a[q] += x * l[q][k], b[q] += y * l[q][k];
        }
        for (int q = 0; q < ROWS; q++) *(singles *)(delta[q] + j) = a[q], *(singles *)(delta[q] + j + SINGLES) = b[q];
    }
    for (int64_t k = 0; k < h; k++) end_in_single(t, looks_back, i + k, j0, n, delta[k]);
}

/* `single`: whether R is there as floats; `fast`: whether to begin in single precision. */
INLINE int64_t merge(enum dtype in, enum dtype out, int single, int fast, struct task *t)
{
    int64_t cols = t->cols, room = t->room, i = 0, high = room / (2 * (cols ? cols : 1));
    int64_t block = CACHED / (t->r ? t->r : 1) / STRIP * STRIP;
    if (block < STRIP) block = STRIP;
    high = high > 16 * ROWS ? 16 * ROWS : high > ROWS ? high / ROWS * ROWS : high; /* whose elements have room, all doubtful */
    for (; i < t->rows; i += high) {
        if (t->found.count + high * cols > room || t->unsure.count + t->wide.count + high * cols > room) return i;
        int64_t end = i + high < t->rows ? i + high : t->rows;
        int few = t->looked <= 4096 + i * cols / 128; /* more would cost more than it saves */
        for (int64_t j = 0; j < cols; j += block)
            for (int64_t k = i; k < end; k += ROWS)
                for (int64_t j0 = j; j0 < cols && j0 < j + block; j0 += STRIP) {
                    int64_t h = end - k < ROWS ? end - k : ROWS, n = cols - j0 < STRIP ? cols - j0 : STRIP;
                    if (fast && few && t->small) in_single(t, 1, k, h, j0, n);
                    else if (fast && few) in_single(t, 0, k, h, j0, n);
                    else in_double(in, out, single, t, k, h, j0, n);
                }
    }
    return t->rows;
}

/* Rows of W (rows, cols) from the first on, into `to`, which may be W. Returns how many were done: all, unless room
 * for elements in doubt may not last. `room` is at least 2·cols. */
#define MERGE(NAME, IN, OUT)                                                                                          \
    int64_t NAMED(NAME, LOREG_BYTES)(struct task *t)                                                                  \
    {                                                                                                                 \
        if (!t->Rsingle) return merge(IN, OUT, 0, 0, t);                                                              \
        return merge(IN, OUT, 1, IN == BF16 && OUT == BF16 && t->margin != 0, t);                                     \
    }

MERGE(loreg_merge_bf16_bf16, BF16, BF16)
MERGE(loreg_merge_f32_f32, F32, F32)
MERGE(loreg_merge_f32_bf16, F32, BF16)
MERGE(loreg_merge_bf16_f32, BF16, F32)

/* Which of the SPAN bytes from x on are not 0, a bit for each. */
#if LOREG_BYTES == 64
#define SPAN 64
INLINE uint64_t filled(const int8_t *x) { __m512i all = _mm512_loadu_si512(x); return _mm512_test_epi8_mask(all, all); }
#elif LOREG_BYTES == 32
#define SPAN 32
INLINE uint64_t filled(const int8_t *x)
{
    __m256i all = _mm256_loadu_si256((const void *)x);
    return (uint32_t)~_mm256_movemask_epi8(_mm256_cmpeq_epi8(all, _mm256_setzero_si256()));
}
#else
#define SPAN 8
INLINE uint64_t filled(const int8_t *x)
{
    uint64_t word, low = 0x7f7f7f7f7f7f7f7full;
    memcpy(&word, x, 8);
    word = (((word & low) + low) | word) & ~low; /* the first bit of each byte that is not 0 */
    return (word >> 7) * 0x0102040810204080ull >> 56;
}
#endif

/* Those of n bytes, at most 65536, that are not 0: how many, and their places and values, which have room for n and one. */
INLINE int64_t gather(const int8_t *restrict x, int64_t n, uint16_t *restrict offsets, int8_t *restrict values)
{
    int64_t i = 0, count = 0;
    for (; i + SPAN <= n; i += SPAN)
        for (uint64_t mask = filled(x + i); mask != 0; mask &= mask - 1) {
            int64_t at = i + __builtin_ctzll(mask);
            offsets[count] = (uint16_t)at, values[count++] = x[at];
        }
    for (; i < n; i++) {
        offsets[count] = (uint16_t)i, values[count] = x[i];
        count += x[i] != 0;
    }
    return count;
}

/* How many of n bytes are not 0. */
int64_t NAMED(loreg_count, LOREG_BYTES)(const int8_t *x, int64_t n)
{
    int64_t i = 0, count = 0;
    for (; i + SPAN <= n; i += SPAN) count += __builtin_popcountll(filled(x + i));
    for (; i < n; i++) count += x[i] != 0;
    return count;
}

/* Those of n bytes that are not 0: how many, and their places, counted from `start`, and values, ascending, for which
 * there is room, and for FEW more. */
#define FEW 4
INLINE int64_t listed(const int8_t *restrict x, int64_t n, int64_t start, int32_t *restrict index, int8_t *restrict values)
{
    int64_t i = 0, count = 0;
    for (; i + SPAN <= n; i += SPAN) {
        uint64_t mask = filled(x + i);
        int64_t here = __builtin_popcountll(mask);
        if (here == 0) continue;
        /* always as many, which a processor foresees: where there are fewer, the last ones are written over */
        for (int64_t k = 0; k < FEW || k < here; k++, mask &= mask - 1) {
            int64_t at = i + __builtin_ctzll(mask | 1ull << 63) % SPAN;
            index[count + k] = (int32_t)(start + at), values[count + k] = x[at];
        }
        count += here;
    }
    for (; i < n; i++)
        if (x[i] != 0) index[count] = (int32_t)(start + i), values[count++] = x[i];
    return count;
}

void NAMED(loreg_places, LOREG_BYTES)(const int8_t *x, int64_t n, int32_t *index, int8_t *values)
{
    listed(x, n, 0, index, values);
}

/* A storage value, by so many places. Those of float16 lie as those of bfloat16. */
INLINE void moved(enum dtype dtype, void *words, int64_t at, int64_t by)
{
    int64_t to = place(dtype, raw(dtype, words, at)) + by, mask = dtype == BF16 ? 0x7fff : 0x7fffffff;
    uint32_t word = (uint32_t)(to ^ ((to >> 63) & mask));
    if (dtype == BF16) ((uint16_t *)words)[at] = (uint16_t)word;
    else ((uint32_t *)words)[at] = word;
}

/* Moves n of them, each elsewhere, at places that are counted from `start`. */
#define MOVE(NAME, DTYPE, INDEX, BY)                                                                                  \
    void NAMED(NAME, LOREG_BYTES)(void *words, const INDEX *index, const BY *by, int64_t n, int64_t start)            \
    {                                                                                                                 \
        for (int64_t k = 0; k < n; k++) moved(DTYPE, words, index[k] - start, by[k]);                                 \
    }

MOVE(loreg_move_16_8, BF16, int32_t, int8_t)
MOVE(loreg_move_16_64, BF16, int64_t, int64_t)
MOVE(loreg_move_32_8, F32, int32_t, int8_t)
MOVE(loreg_move_32_64, F32, int64_t, int64_t)

/* ---- rows that are changed where they lie ---- */

/* What undoes an edit in memory: corrections by ascending place, those beyond a byte apart. */
struct kept { int32_t *index; int8_t *by; int64_t count, *far_index, *far, far_count; };

/* Takes `back` out of rows of W, with what is kept of it in `old`, and applies `forth`, which is taken back by what is
 * added to `fresh`, which has room for as many bytes as these rows have, and for what `high` more rows may need. Either
 * may be null. The places of `old` are counted from `start`. `base`, `out`, `small`: room for `high` rows. */
struct change {
    const struct task *back, *forth;
    void *W;
    int64_t rows, cols, high, start;
    struct kept old, fresh;
    void *base, *out;
    int8_t *small;
};

typedef int64_t pass(struct task *);

/* `given`, from its row i on, of these rows; 0 where it leaves something in doubt. `looked` is carried on. */
INLINE int passed(pass *run, const struct task *given, int64_t *looked, int64_t i, int64_t rows, const void *W, void *to,
                  int8_t *small, struct wide *wide)
{
    struct task t = *given;
    int64_t spent = i * t.cols / 128; /* as `few` in merge() has it, of all rows so far */
    t.W = W, t.to = to, t.rows = rows, t.small = small, t.looked = *looked > spent ? *looked - spent : 0;
    t.found.count = t.unsure.count = t.wide.count = 0;
    t.L += i * t.r;
    if (t.Lrest) t.Lrest += i * t.r;
    if (t.Lsingle) t.Lsingle += i * t.r, t.margin += i;
    if (run(&t) < rows || t.found.count || t.unsure.count) return 0;
    *looked = t.looked + (*looked < spent ? *looked : spent);
    *wide = t.wide;
    return 1;
}

/* By ascending index (Shell's sort; gaps that are powers of two would compare the same columns of rows). */
static void arrange(int64_t *index, int64_t *by, int64_t n)
{
    for (int64_t gap = n * 5 / 11; n > 1; gap = gap == 2 ? 1 : gap * 5 / 11) {
        if (gap < 1) gap = 1;
        for (int64_t i = gap; i < n; i++) {
            int64_t at = index[i], value = by[i], k = i;
            for (; k >= gap && index[k - gap] > at; k -= gap) index[k] = index[k - gap], by[k] = by[k - gap];
            index[k] = at, by[k] = value;
        }
        if (gap == 1) return;
    }
}

/* Returns how many rows are changed. Those that follow are as they were, and `old.count` and `old.far_count` are of what
 * belongs to those that are changed. */
#define CHANGE(NAME, PASS, DTYPE, WORD)                                                                               \
    int64_t NAMED(NAME, LOREG_BYTES)(struct change *c)                                                                \
    {                                                                                                                 \
        struct kept *old = &c->old, *fresh = &c->fresh;                                                               \
        int64_t all = old->count, all_far = old->far_count, looked[2] = {0, 0}, i = 0;                                \
        old->count = old->far_count = 0;                                                                              \
        for (int64_t h; i < c->rows; i += h) {                                                                        \
            h = c->rows - i < c->high ? c->rows - i : c->high;                                                        \
            int64_t n = h * c->cols, start = i * c->cols, near = old->count, far = old->far_count;                    \
            WORD *W = (WORD *)c->W + start, *last = W;                                                                \
            struct wide wide;                                                                                         \
            if (c->back) {                                                                                            \
                WORD *base = last = c->base;                                                                          \
                if (!passed(PASS, c->back, &looked[0], i, h, W, base, 0, &wide)) break;                               \
                for (; near < all && old->index[near] - c->start < start + n; near++)                                 \
                    moved(DTYPE, base, old->index[near] - c->start - start, old->by[near]);                           \
                for (; far < all_far && old->far_index[far] - c->start < start + n; far++)                            \
                    moved(DTYPE, base, old->far_index[far] - c->start - start, old->far[far]);                        \
            }                                                                                                         \
            if (c->forth) {                                                                                           \
                if (!passed(PASS, c->forth, &looked[1], i, h, last, c->out, c->small, &wide)) break;                  \
                arrange(wide.index, wide.by, wide.count);                                                             \
                for (int64_t k = 0; k < wide.count; k++) {                                                            \
                    c->small[wide.index[k]] = 0;                                                                      \
                    fresh->far_index[fresh->far_count + k] = start + wide.index[k];                                   \
                    fresh->far[fresh->far_count + k] = wide.by[k];                                                    \
                }                                                                                                     \
                int64_t more = listed(c->small, n, start, fresh->index + fresh->count, fresh->by + fresh->count);     \
                int64_t size = 5 * (fresh->count + more) + 16 * (fresh->far_count + wide.count);                      \
                if (size > (int64_t)sizeof *W * (start + n)) break;                                                   \
                fresh->count += more, fresh->far_count += wide.count;                                                 \
                last = c->out;                                                                                        \
            }                                                                                                         \
            if (last != W) memcpy(W, last, n * sizeof *W);                                                            \
            old->count = near, old->far_count = far;                                                                  \
        }                                                                                                             \
        return i < c->rows ? i : c->rows;                                                                             \
    }

CHANGE(loreg_change_bf16, NAMED(loreg_merge_bf16_bf16, LOREG_BYTES), BF16, uint16_t)
CHANGE(loreg_change_f32, NAMED(loreg_merge_f32_f32, LOREG_BYTES), F32, uint32_t)

/* The records of an undo journal [U3] for elements of `width` bytes, which are at `raw`, and their corrections `x`, of
 * which those that are UNSURE are in `wide`. Returns their bytes: at most those of `raw`, and four for each block. */
int64_t NAMED(loreg_records, LOREG_BYTES)(const int8_t *x, int64_t n, int64_t block, const char *raw, int64_t width,
                                          const int64_t *wide, char *to)
{
    uint16_t offsets[65536 + 1];
    int8_t values[65536 + 1];
    char *at = to;
    for (int64_t first = 0; first < n; first += block) {
        int64_t size = first + block < n ? block : n - first, count = gather(x + first, size, offsets, values), beyond = 0;
        for (int64_t k = 0; k < count; k++) beyond += values[k] == UNSURE;
        uint32_t head = 3 * count + 8 * beyond > size * width ? 0xffffffffu : (uint32_t)count;
        memcpy(at, &head, 4), at += 4;
        if (head != (uint32_t)count) memcpy(at, raw + first * width, size * width), at += size * width;
        else {
            memcpy(at, offsets, 2 * count), at += 2 * count;
            memcpy(at, values, count), at += count;
            memcpy(at, wide, 8 * beyond), at += 8 * beyond;
        }
        wide += beyond;
    }
    return at - to;
}
