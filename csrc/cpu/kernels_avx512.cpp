// The kernels for x86 processors with AVX512; nothing on others.
#include "headers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define EJMP_ISA avx512
#define EJMP_BYTES 64
#include "kernels.h"
#endif
