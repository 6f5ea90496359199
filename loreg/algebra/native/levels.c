/* Which copy of merge.c is for this processor, by the bytes of its vectors. */

/* Of all the sources, by which the loader knows a library that was made from another version of them. */
const char loreg_source[] = LOREG_SOURCE;

int loreg_bytes(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    int narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int wide = narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && LOREG_WIDEST >= 64) return 64;
    if (narrow && LOREG_WIDEST >= 32) return 32;
#endif
    return 16;
}
