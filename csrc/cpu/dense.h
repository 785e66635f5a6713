// What happens between the matrix products: one pass over memory each. Included once per instruction set.

// Numbers are stored as S and computed with as Compute<S>.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;
typedef uint16_t Half __attribute__((vector_size(EJMP_BYTES / 2)));  // WIDTH<float> bfloat16 numbers

typedef uint32_t Word __attribute__((vector_size(EJMP_BYTES)));

// Half a vector of 16-bit numbers to a whole one of 32 bits, and back. GCC makes several instructions of what is one.
#if EJMP_BYTES == 64
inline Word widened(Half x) { return (Word)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }
inline Half narrowed(Word x) { return (Half)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x); }
#else
inline Word widened(Half x) { return __builtin_convertvector(x, Word); }
inline Half narrowed(Word x) { return __builtin_convertvector(x, Half); }
#endif

template <class S>
inline Vec<Compute<S>> read(const S* p) {
    if constexpr (!std::is_same_v<S, bfloat16>) {
        return load(p);
    } else {
        Half bits;
        std::memcpy(&bits, p, sizeof(bits));
        const auto wide = widened(bits) << 16;
        Vec<float> v;
        std::memcpy(&v, &wide, sizeof(v));
        return v;
    }
}

// to the nearest, ties to even; a NaN stays one
inline Half round_to_half(Vec<float> v) {
    Word bits;
    std::memcpy(&bits, &v, sizeof(v));
    const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Word kept = v == v ? rounded : (bits >> 16) | 0x40;
    return narrowed(kept);
}

template <class S>
inline void write(S* p, Vec<Compute<S>> v) {
    if constexpr (!std::is_same_v<S, bfloat16>) {
        store(p, v);
    } else {
        const Half bits = round_to_half(v);
        std::memcpy(p, &bits, sizeof(bits));
    }
}

constexpr int64_t PIECE = 1 << 13;

// 16-bit numbers two by two, as they lie in 32 bits: the lower ones and the upper ones, and both rounded together
// again. A NaN stays one where its lower 16 bits are zero: where it came from a 16-bit number or from arithmetic with
// one.
inline Vec<float> lower_halves(Word pairs) { return (Vec<float>)(pairs << 16); }
inline Vec<float> upper_halves(Word pairs) { return (Vec<float>)(pairs & 0xffff0000u); }
inline Word rounded_to_half(Vec<float> v) {
    const Word bits = (Word)v;
    return bits + 0x7fff + ((bits >> 16) & 1);
}
inline Word as_pairs(Vec<float> lower, Vec<float> upper) {
    return rounded_to_half(lower) >> 16 | (rounded_to_half(upper) & 0xffff0000u);
}

// N input and M output arrays of n numbers, any may be null; f takes N vectors and fills M. What does not fill a vector
// goes through a buffer, so that f sees whole ones only.
template <class S, int N, int M, class F>
inline void map_row(int64_t n, const S* const (&in)[N], S* const (&out)[M], F&& f) {
    constexpr int W = WIDTH<Compute<S>>;
    Vec<Compute<S>> x[N], y[M]{};
    int64_t i = 0;
    if constexpr (std::is_same_v<S, bfloat16>) {
        Vec<float> upper[N], upper_y[M]{};
        for (; i + 2 * W <= n; i += 2 * W) {
            for (int j = 0; j < N; ++j) {
                Word pairs{};
                if (in[j]) std::memcpy(&pairs, in[j] + i, sizeof(pairs));
                x[j] = lower_halves(pairs), upper[j] = upper_halves(pairs);
            }
            f(x, y), f(upper, upper_y);
            for (int j = 0; j < M; ++j) {
                const Word pairs = as_pairs(y[j], upper_y[j]);
                if (out[j]) std::memcpy(out[j] + i, &pairs, sizeof(pairs));
            }
        }
    }
    for (; i + W <= n; i += W) {
        for (int j = 0; j < N; ++j) x[j] = in[j] ? read(in[j] + i) : Vec<Compute<S>>{};
        f(x, y);
        for (int j = 0; j < M; ++j)
            if (out[j]) write(out[j] + i, y[j]);
    }
    if (i == n) return;
    S buffer[W] = {};
    for (int j = 0; j < N; ++j) {
        if (in[j]) std::copy_n(in[j] + i, n - i, buffer);
        x[j] = in[j] ? read(buffer) : Vec<Compute<S>>{};
    }
    f(x, y);
    for (int j = 0; j < M; ++j)
        if (out[j]) write(buffer, y[j]), std::copy_n(buffer, n - i, out[j] + i);
}

template <class S, int N, int M, class F>
inline void map(int64_t n, const S* const (&in)[N], S* const (&out)[M], int threads, F&& f) {
    parallel_for<Stateless>((n + PIECE - 1) / PIECE, 1, threads, [&](int64_t piece, Stateless&) {
        const int64_t begin = piece * PIECE;
        const S* from[N];
        S* to[M];
        for (int j = 0; j < N; ++j) from[j] = in[j] ? in[j] + begin : nullptr;
        for (int j = 0; j < M; ++j) to[j] = out[j] ? out[j] + begin : nullptr;
        map_row<S, N, M>(std::min(PIECE, n - begin), from, to, f);
    });
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
    return T(1) / (T(1) + exponential<T>(-x));
}
template <class T>
inline Vec<T> silu(Vec<T> x) {
    return x * sigmoid<T>(x);
}
// silu of what is stored as S: in 16 bits, of which 8 are of the value, to 1.5e-4.
template <class S>
inline Vec<Compute<S>> silu_of(Vec<Compute<S>> x) {
    if constexpr (std::is_same_v<S, bfloat16>)
        return x * rough_sigmoid(x);
    else
        return silu<S>(x);
}
// The derivatives of silu from x and s = sigmoid(x).
template <class T>
inline Vec<T> silu_slope(Vec<T> x, Vec<T> s) {
    return s * (T(1) + x * (T(1) - s));
}
template <class T>
inline Vec<T> silu_curvature(Vec<T> x, Vec<T> s) {
    return s * (T(1) - s) * (T(2) + x * (T(1) - T(2) * s));
}

template <class S>
void activate(int64_t n, const S* x, const S* factor, const S* add, double alpha, double beta, S* out, int threads) {
    using T = Compute<S>;
    using V = Vec<T>;
    const T a = T(alpha), b = T(beta);
    const bool product = factor;
    map<S, 3, 1>(n, {x, factor, add}, {out}, threads, [=](const V* v, V* o) {
        const V value = a * silu_of<S>(v[0]);
        o[0] = (product ? value * v[1] : value) + b * v[2];
    });
}

template <class S>
void activate_backward(int64_t n, const S* grad, const S* x, const S* factor, double alpha, S* grad_x, S* grad_factor,
                       int threads) {
    using T = Compute<S>;
    using V = Vec<T>;
    const T a = T(alpha);
    const bool product = factor;
    map<S, 3, 2>(n, {grad, x, factor}, {grad_x, grad_factor}, threads, [=](const V* v, V* o) {
        const V s = sigmoid<T>(v[1]), g = a * v[0];
        o[0] = g * silu_slope<T>(v[1], s);
        if (product) o[0] = o[0] * v[2], o[1] = g * v[1] * s;
    });
}

template <class S>
void activate_double(int64_t n, const S* u_x, const S* u_factor, const S* grad, const S* x, const S* factor,
                     double alpha, S* to_grad, S* to_x, S* to_factor, int threads) {
    using T = Compute<S>;
    using V = Vec<T>;
    const T a = T(alpha);
    const bool product = factor;
    map<S, 5, 3>(n, {u_x, u_factor, grad, x, factor}, {to_grad, to_x, to_factor}, threads, [=](const V* v, V* o) {
        const V s = sigmoid<T>(v[3]), slope = a * silu_slope<T>(v[3], s), curvature = a * silu_curvature<T>(v[3], s);
        o[0] = v[0] * slope;
        o[1] = v[0] * v[2] * curvature;
        if (product) {
            o[0] = o[0] * v[4] + a * v[1] * v[3] * s;
            o[1] = o[1] * v[4] + v[1] * v[2] * slope;
            o[2] = v[0] * v[2] * slope;
        }
    });
}

template <class S>
void swap_add(int64_t num_edges, int64_t width, const S* here, const S* there, int64_t stride, const int64_t* swap,
              const S* add, double alpha, S* out, int threads) {
    using T = Compute<S>;
    using V = Vec<T>;
    const T a = T(alpha);
    parallel_for<Stateless>(num_edges, 8, threads, [&](int64_t e, Stateless&) {
        const S* const in[3] = {here + e * stride, there + (swap ? swap[e] : e) * stride,
                                add ? add + e * width : nullptr};
        S* const to[1] = {out + e * width};
        map_row<S, 3, 1>(width, in, to,
                         [=](const V* v, V* o) { o[0] = a * (silu_of<S>(v[0]) + silu_of<S>(v[1])) + v[2]; });
    });
}

template <class S>
void swap_add_backward(int64_t num_edges, int64_t width, const S* grad, const S* x, const int64_t* swap, double alpha,
                       S* grad_x, int threads) {
    using T = Compute<S>;
    using V = Vec<T>;
    const T a = T(alpha);
    parallel_for<Stateless>(2 * num_edges, 16, threads, [&](int64_t row, Stateless&) {
        const int64_t e = row % 2 ? swap[row / 2] : row / 2;  // a swap undoes itself
        const S* const in[2] = {grad + e * width, x + row * width};
        S* const to[1] = {grad_x + row * width};
        map_row<S, 2, 1>(width, in, to,
                         [=](const V* v, V* o) { o[0] = a * v[0] * silu_slope<T>(v[1], sigmoid<T>(v[1])); });
    });
}

template <class S>
void swap_add_double(int64_t num_edges, int64_t width, const S* u, const S* grad, const S* x, const int64_t* swap,
                     double alpha, S* to_grad, S* to_x, int threads) {
    using T = Compute<S>;
    using V = Vec<T>;
    const T a = T(alpha);
    parallel_for<Stateless>(num_edges, 8, threads, [&](int64_t e, Stateless&) {
        const int64_t here = 2 * e * width, there = (2 * swap[e] + 1) * width;
        const S* const in[5] = {u + here, x + here, u + there, x + there, grad + e * width};
        S* const to[3] = {to_grad + e * width, to_x + here, to_x + there};
        map_row<S, 5, 3>(width, in, to, [=](const V* v, V* o) {
            const V here = sigmoid<T>(v[1]), there = sigmoid<T>(v[3]);
            o[0] = a * (v[0] * silu_slope<T>(v[1], here) + v[2] * silu_slope<T>(v[3], there));
            o[1] = a * v[4] * v[0] * silu_curvature<T>(v[1], here);
            o[2] = a * v[4] * v[2] * silu_curvature<T>(v[3], there);
        });
    });
}

template <class S>
void gather_add(int64_t num_atoms, int64_t width, const S* x, const void* from, const void* to, const int64_t* source,
                const int64_t* ptr, S* out, int threads) {
    using T = Compute<S>;
    constexpr int W = WIDTH<T>;
    parallel_for<Stateless>(num_atoms, 1, threads, [&](int64_t n, Stateless&) {
        const T* const b = static_cast<const T*>(to) + n * width;
        for (int64_t e = ptr[n]; e < ptr[n + 1]; ++e) {
            const T* const a = static_cast<const T*>(from) + source[e] * width;
            const S* const row = x ? x + e * width : nullptr;
            int64_t c = 0;
            for (; c + W <= width; c += W) {
                const Vec<T> sum = load(a + c) + load(b + c);
                write(out + e * width + c, row ? sum + read(row + c) : sum);
            }
            if (c == width) continue;
            S buffer[W] = {};
            if (row) std::copy_n(row + c, width - c, buffer);
            const Vec<T> sum = load(a + c, width - c) + load(b + c, width - c);
            write(buffer, row ? sum + read(buffer) : sum);
            std::copy_n(buffer, width - c, out + e * width + c);
        }
    });
}

template <class S>
void edge_sum(int64_t num_atoms, int64_t width, const S* x, const S* factor, const int64_t* order, const int64_t* ptr,
              void* out, int threads) {
    using T = Compute<S>;
    constexpr int W = WIDTH<T>;
    constexpr int64_t COLS = 8 * W;  // an atom's columns are summed in registers, some at a time
    const int64_t pieces = (width + COLS - 1) / COLS;
    parallel_for<Stateless>(num_atoms * pieces, 4, threads, [&](int64_t job, Stateless&) {
        const int64_t atom = job / pieces, begin = job % pieces * COLS, count = std::min(COLS, width - begin);
        T* const place = static_cast<T*>(out) + atom * width + begin;
        Vec<T> sum[8] = {};
        for (int64_t i = ptr[atom]; i < ptr[atom + 1]; ++i) {
            const int64_t row = (order ? order[i] : i) * width + begin;
            const S *p = x + row, *f = factor ? factor + row : nullptr;
            if (count == COLS) {
                for (int j = 0; j < 8; ++j)
                    sum[j] = f ? fma(read(p + j * W), read(f + j * W), sum[j]) : sum[j] + read(p + j * W);
                continue;
            }
            for (int64_t c = 0, j = 0; c < count; c += W, ++j) {
                S buffer[2][W] = {};
                std::copy_n(p + c, std::min<int64_t>(W, count - c), buffer[0]);
                if (f) std::copy_n(f + c, std::min<int64_t>(W, count - c), buffer[1]);
                sum[j] = f ? fma(read(buffer[0]), read(buffer[1]), sum[j]) : sum[j] + read(buffer[0]);
            }
        }
        for (int64_t c = 0, j = 0; c < count; c += W, ++j) store(place + c, sum[j], std::min<int64_t>(W, count - c));
    });
}

template <class S>
void atom_sum_backward(int64_t num_atoms, int64_t width, const void* grad, const S* x, const S* factor,
                       const int64_t* ptr, S* grad_x, S* grad_factor, int threads) {
    using T = Compute<S>;
    constexpr int W = WIDTH<T>;
    parallel_for<Stateless>(num_atoms, 1, threads, [&](int64_t n, Stateless&) {
        const T* const g = static_cast<const T*>(grad) + n * width;
        for (int64_t e = ptr[n]; e < ptr[n + 1]; ++e) {
            int64_t c = 0;
            const auto piece = [&](Vec<T> v, const S* px, const S* pf, S* to_x, S* to_factor) {
                write(to_x, v * read(pf)), write(to_factor, v * read(px));
            };
            for (; c + W <= width; c += W) {
                const int64_t i = e * width + c;
                piece(load(g + c), x + i, factor + i, grad_x + i, grad_factor + i);
            }
            if (c == width) continue;
            const int64_t i = e * width + c, rest = width - c;
            S in[2][W] = {}, out[2][W];
            std::copy_n(x + i, rest, in[0]), std::copy_n(factor + i, rest, in[1]);
            piece(load(g + c, rest), in[0], in[1], out[0], out[1]);
            std::copy_n(out[0], rest, grad_x + i), std::copy_n(out[1], rest, grad_factor + i);
        }
    });
}

// Blocks of one cache line by as many rows: each line is read and written once.
template <class S>
void transpose(int64_t rows, int64_t columns, const S* x, S* out, int threads) {
    constexpr int64_t B = 64 / sizeof(S), STRIP = 4 * B;
    parallel_for<Stateless>((columns + STRIP - 1) / STRIP, 1, threads, [&](int64_t strip, Stateless&) {
        const int64_t end = std::min(columns, (strip + 1) * STRIP);
        for (int64_t r = 0; r < rows; r += B) {
            const int64_t height = std::min(B, rows - r);
            for (int64_t c = strip * STRIP; c < end; c += B) {
                const int64_t width = std::min(B, end - c);
                S block[B][B];
                if (height == B && width == B) {  // sizes that the compiler knows
                    for (int64_t i = 0; i < B; ++i)
                        for (int64_t j = 0; j < B; ++j) block[j][i] = x[(r + i) * columns + c + j];
                    for (int64_t j = 0; j < B; ++j) std::copy_n(block[j], B, out + (c + j) * rows + r);
                } else {
                    for (int64_t j = 0; j < width; ++j)
                        for (int64_t i = 0; i < height; ++i) out[(c + j) * rows + r + i] = x[(r + i) * columns + c + j];
                }
            }
        }
    });
}
