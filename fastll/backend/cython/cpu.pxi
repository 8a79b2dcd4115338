cdef extern from *:
    """
    /* The level of the x86-64 instruction set that CPU and system support: 1, 3 or 4. */
    static int supported_level(void) {
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
            !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("f16c"))
            return 1;
        if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
            !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
            !__builtin_cpu_supports("avx512cd"))
            return 3;
        return 4;
    #else
        return 1;
    #endif
    }
    """
    int supported_level()

level = supported_level()
