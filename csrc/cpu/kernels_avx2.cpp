// The kernels for x86 processors with AVX2; nothing on others.
#include "headers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define EJMP_ISA avx2
#define EJMP_BYTES 32
#include "kernels.h"
#endif
