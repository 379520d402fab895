// The CPU kernels for x86-64 processors with AVX2 and FMA, chosen at run time: unlike -march=native, a library built on
// one machine of a cluster runs on the others.
#if defined(__x86_64__)
#include "cpu_kernels_api.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define KERNELS avx2
#include "cpu_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
