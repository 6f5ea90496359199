/* Sums over rows of bfloat16 weights, before and after a merge, in one pass: what merge/probe.py looks at first.
 *
 * Nothing of merge.c is used here, as this judges what that computed. In single precision and in any order: the bound
 * that the sums are held to (Probe) allows for both.
 */

#include <math.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "storage is little-endian, and read here as it lies"
#endif

#define NAMED_(NAME, BYTES) NAME##_##BYTES
#define NAMED(NAME, BYTES) NAMED_(NAME, BYTES)
#define LANES (LOREG_BYTES / 4)
#define PROBES 4
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(LOREG_BYTES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(LOREG_BYTES), aligned(4)));
typedef uint16_t stored __attribute__((vector_size(LOREG_BYTES / 2), aligned(2)));

INLINE floats values(const uint16_t *at) { return (floats)(__builtin_convertvector(*(const stored *)at, words) << 16); }
INLINE floats magnitudes(floats x) { return (floats)((words)x & 0x7fffffffu); }
INLINE float value(uint16_t x) { union { uint32_t u; float f; } v = {(uint32_t)x << 16}; return v.f; }

INLINE float total(floats x)
{
    float sum = 0;
    for (int k = 0; k < LANES; k++) sum += x[k];
    return sum;
}

/* Rows of `cols` elements. Of D = after - before: `residue` takes its products with each of the PROBES rows of x, and
 * `square` that with itself; `size` takes the products of the magnitudes in the first `few` columns of after and x. */
void NAMED(loreg_glance, LOREG_BYTES)(const uint16_t *before, const uint16_t *after, const float *x, int64_t rows,
                                      int64_t cols, int64_t few, float *restrict residue, float *restrict square,
                                      float *restrict size)
{
    for (int64_t i = 0; i < rows; i++, before += cols, after += cols, residue += PROBES, size += PROBES) {
        floats zero = {0}, r[PROBES] = {zero, zero, zero, zero}, q = zero, s[PROBES] = {zero, zero, zero, zero};
        int64_t j = 0;
        for (; j + LANES <= cols; j += LANES) {
            floats d = values(after + j) - values(before + j);
            q += d * d;
            for (int k = 0; k < PROBES; k++) r[k] += d * *(const floats *)(x + k * cols + j);
        }
        int64_t l = 0;
        for (; l + LANES <= few; l += LANES) {
            floats a = magnitudes(values(after + l));
            for (int k = 0; k < PROBES; k++) s[k] += a * magnitudes(*(const floats *)(x + k * cols + l));
        }
        *square = total(q);
        for (int k = 0; k < PROBES; k++) residue[k] = total(r[k]), size[k] = total(s[k]);
        for (; j < cols; j++) {
            float d = value(after[j]) - value(before[j]);
            *square += d * d;
            for (int k = 0; k < PROBES; k++) residue[k] += d * x[k * cols + j];
        }
        for (; l < few; l++)
            for (int k = 0; k < PROBES; k++) size[k] += fabsf(value(after[l])) * fabsf(x[k * cols + l]);
        square++;
    }
}
