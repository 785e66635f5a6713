// Vectors of the widest size an instruction set has, and the small matrix product everything else is made of.
// Included once per instruction set, inside namespace ejmp::EJMP_ISA (no include guard; see kernels_avx512.cpp).

// Vec<T>: EJMP_BYTES bytes of T. GCC and Clang translate the operators for any processor.
template <class T>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(EJMP_BYTES)));
    typedef int32_t integer __attribute__((vector_size(EJMP_BYTES)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(EJMP_BYTES)));
    typedef int64_t integer __attribute__((vector_size(EJMP_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Int = typename VecOf<T>::integer;
template <class T>
constexpr int WIDTH = EJMP_BYTES / sizeof(T);
constexpr int COLUMNS = EJMP_BYTES == 16 ? 1 : 2;  // vectors beside each other in `mm`

template <class T>
inline int64_t padded(int64_t n) {
    return (n + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
}

template <class T>
inline Vec<T> splat(T x) {
    return x - Vec<T>{};
}

template <class T>
inline Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <class T>
inline Vec<T> load(const T* p, int64_t n) {
    Vec<T> v{};
    std::memcpy(&v, p, n * sizeof(T));
    return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
    std::memcpy(p, &v, sizeof(v));
}

template <class T>
inline void store(T* p, Vec<T> v, int64_t n) {
    std::memcpy(p, &v, n * sizeof(T));
}

// x * y + z, rounded once where there is such an instruction
#if EJMP_BYTES == 64
inline Vec<float> fma(Vec<float> x, Vec<float> y, Vec<float> z) {
    return (Vec<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
inline Vec<double> fma(Vec<double> x, Vec<double> y, Vec<double> z) {
    return (Vec<double>)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
}
#elif EJMP_BYTES == 32
inline Vec<float> fma(Vec<float> x, Vec<float> y, Vec<float> z) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
inline Vec<double> fma(Vec<double> x, Vec<double> y, Vec<double> z) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
}
#else
template <class V>
inline V fma(V x, V y, V z) {
    return x * y + z;
}
#endif

// exp(x) to about one unit in the last place; infinite from 88 (708 in double) on, and never below exp(-88)
// (exp(-708)).
template <class T>
inline Vec<T> exponential(Vec<T> x) {
    constexpr bool single = sizeof(T) == 4;
    constexpr T high = single ? 88 : 708, magic = single ? 12582912.0 : 6755399441055744.0;  // 1.5 * 2^23, 1.5 * 2^52
    constexpr T ln2_high = single ? 0.693359375 : 0.693147180369123816490,
                ln2_low = single ? -2.12194440e-4 : 1.90821492927058770002e-10;
    constexpr int degree = single ? 7 : 13, bias = single ? 127 : 1023, mantissa = single ? 23 : 52;
    const Vec<T> given = x;
    x = x > high ? splat(high) : x < -high ? splat(-high) : x;
    const Vec<T> n = fma(x, splat(T(1.44269504088896340736)), splat(magic)) - magic;  // the nearest integer
    const Vec<T> r = fma(n, splat(-ln2_low), fma(n, splat(-ln2_high), x));
    T inverse_factorial[degree + 1] = {1};
    for (int k = 1; k <= degree; ++k) inverse_factorial[k] = inverse_factorial[k - 1] / k;
    Vec<T> sum = splat(inverse_factorial[degree]);
    for (int k = degree - 1; k >= 0; --k) sum = fma(sum, r, splat(inverse_factorial[k]));
    const Int<T> power = (__builtin_convertvector(n, Int<T>) + bias) << mantissa;
    Vec<T> scale;
    std::memcpy(&scale, &power, sizeof(scale));
    return given > high ? splat(std::numeric_limits<T>::infinity()) : sum * scale;
}

// 1 / (1 + exp(-x)) to 1.5e-4 of it, in few instructions; zero from -89 down. exp(-x) is 2^whole times 2^r, and 2^r the
// cubic polynomial that is nearest to it for |r| <= 1/2, to 7.5e-5 of it.
inline Vec<float> rough_sigmoid(Vec<float> x) {
#if EJMP_BYTES == 64
    const __m512 power = _mm512_mul_ps((__m512)x, _mm512_set1_ps(-1.44269504f));
    const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec<float> r = (Vec<float>)_mm512_sub_ps(power, whole);
#else
    x = x > 87.0f ? splat(87.0f) : x < -89.0f ? splat(-89.0f) : x;
    const Vec<float> shifted = fma(x, splat(-1.44269504f), splat(12582912.0f));  // the nearest integer, in the low bits
    const Vec<float> whole = shifted - 12582912.0f, r = fma(x, splat(-1.44269504f), -whole);
#endif
    Vec<float> sum = fma(r, splat(0.0551716703f), splat(0.242611125f));
    sum = fma(fma(sum, r, splat(0.693260985f)), r, splat(0.999928073f));
#if EJMP_BYTES == 64
    // where the power overflows, r is no number, and scaled by infinity or minus infinity it is infinity or zero
    const Vec<float> scaled = (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)sum, whole);
    return (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)(1.0f + scaled));
#else
    const Int<float> power = (__builtin_convertvector(whole, Int<float>) + 127) << 23;
    return 1.0f / (1.0f + sum * (Vec<float>)power);
#endif
}

// rows x (N vectors) of c = a b or c += a b; a[i, p] = a[i * row + p * col], b [k, ldb], c [rows, ldc].
template <class T, int ROWS, int N, bool TAIL>
inline void mm_block(int64_t k, const T* a, int64_t row, int64_t col, const T* b, int64_t ldb, T* c, int64_t ldc,
                     int64_t tail, bool add) {
    Vec<T> sum[ROWS][N], y[N];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            T* const place = c + i * ldc + n * WIDTH<T>;
            sum[i][n] = !add ? Vec<T>{} : TAIL ? load(place, tail) : load(place);
        }
    for (int64_t p = 0; p < k; ++p, a += col, b += ldb) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) y[n] = TAIL ? load(b + n * WIDTH<T>, tail) : load(b + n * WIDTH<T>);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Vec<T> x = splat(a[i * row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[i][n] = fma(x, y[n], sum[i][n]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            T* const place = c + i * ldc + n * WIDTH<T>;
            TAIL ? store(place, sum[i][n], tail) : store(place, sum[i][n]);
        }
}

template <class T, int N, bool TAIL>
inline void mm_columns(int64_t m, int64_t k, const T* a, int64_t row, int64_t col, const T* b, int64_t ldb, T* c,
                       int64_t ldc, int64_t tail, bool add) {
    int64_t i = 0;
    if constexpr (EJMP_BYTES == 64)  // only these have the registers
        for (; m % 8 == 0 && i < m; i += 8)
            mm_block<T, 8, N, TAIL>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, tail, add);
    for (; i + 7 <= m; i += 7) mm_block<T, 7, N, TAIL>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, tail, add);
    if (m - i >= 4) {
        mm_block<T, 4, N, TAIL>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, tail, add);
        i += 4;
    }
    if (m - i >= 2) {
        mm_block<T, 2, N, TAIL>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, tail, add);
        i += 2;
    }
    if (i < m) mm_block<T, 1, N, TAIL>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, tail, add);
}

// c [m, n] = a b, or += with add; a [m, k] with any strides, rows of b and c contiguous. Sums run over k in order.
template <class T>
void mm(int64_t m, int64_t n, int64_t k, const T* a, int64_t row, int64_t col, const T* b, int64_t ldb, T* c,
        int64_t ldc, bool add) {
    int64_t j = 0;
    for (; j + COLUMNS * WIDTH<T> <= n; j += COLUMNS * WIDTH<T>)
        mm_columns<T, COLUMNS, false>(m, k, a, row, col, b + j, ldb, c + j, ldc, 0, add);
    for (; j + WIDTH<T> <= n; j += WIDTH<T>) mm_columns<T, 1, false>(m, k, a, row, col, b + j, ldb, c + j, ldc, 0, add);
    if (j < n) mm_columns<T, 1, true>(m, k, a, row, col, b + j, ldb, c + j, ldc, n - j, add);
}
