// Rows of numbers in 8 bits, each with a scale of its own, for products of integers. Included once per instruction set.
//
// A row x is kept as bytes 128 + round(x / scale) with scale = max |x| / 127. Bytes are unsigned and 128 is zero, as
// the VNNI instructions want the left factor of a product. A row with a NaN or an infinite number has the scale NaN,
// and so has what is computed with it.

typedef uint8_t Bytes __attribute__((vector_size(EJMP_BYTES / 4)));
typedef std::vector<float> RowBuffer;

// What one step of a loop takes of an array: one vector, or the lower and the upper halves of one of pairs.
template <class S>
constexpr int VECTORS = std::is_same_v<S, bfloat16> ? 2 : 1;
template <class S>
constexpr int64_t STEP = VECTORS<S> * WIDTH<Compute<S>>;

template <class S>
inline void read_step(const S* p, Vec<Compute<S>> (&v)[VECTORS<S>]) {
    if constexpr (VECTORS<S> == 1) {
        v[0] = load(p);
    } else {
        Word pairs;
        std::memcpy(&pairs, p, sizeof(pairs));
        v[0] = lower_halves(pairs), v[1] = upper_halves(pairs);
    }
}
template <class S>
inline void write_step(S* p, const Vec<Compute<S>> (&v)[VECTORS<S>]) {
    if constexpr (VECTORS<S> == 1) {
        store(p, v[0]);
    } else {
        const Word pairs = as_pairs(v[0], v[1]);
        std::memcpy(p, &pairs, sizeof(pairs));
    }
}

// The largest of many numbers without their signs. As bits they are ordered like numbers, and NaN comes last.
struct Largest {
    Word bits{};

    void add(Vec<float> v) {
        const Word size = (Word)v & 0x7fffffff;
        bits = size > bits ? size : bits;
    }
    float value() const {
        uint32_t most = 0;
        for (int j = 0; j < WIDTH<float>; ++j) most = std::max<uint32_t>(most, bits[j]);
        float found;
        std::memcpy(&found, &most, sizeof(found));
        return found;
    }
};

// What a row is multiplied by to be kept as bytes.
struct Steps {
    float scale, inverse;

    explicit Steps(float largest) {
        const bool empty = largest < 1e-30f;
        inverse = empty ? 0.0f : 127 / largest;
        scale = std::isfinite(largest) ? (empty ? 0.0f : largest / 127) : std::numeric_limits<float>::quiet_NaN();
    }
};

// Added to 1.5 * 2^23, a number is rounded to an integer, to the nearest and ties to even, in the lowest bits.
inline Word byte_of(Vec<float> v, float inverse) {
    return (Word)(v * splat(inverse) + splat(12582912.0f + 128.0f)) & 255;
}
template <class S>
inline void write_bytes(uint8_t* p, const Vec<float> (&v)[VECTORS<S>], float inverse, int64_t count) {
    if constexpr (VECTORS<S> == 1) {
        const Bytes bytes = __builtin_convertvector(byte_of(v[0], inverse), Bytes);
        std::memcpy(p, &bytes, count);
    } else {
        const Half bytes = narrowed(byte_of(v[0], inverse) | byte_of(v[1], inverse) << 8);
        std::memcpy(p, &bytes, count);
    }
}

// Calls f(i, count) for every step of a row of n numbers: its beginning and how many numbers of it there are.
template <class S, class F>
inline void each_step(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + STEP<S> <= n; i += STEP<S>) f(i, STEP<S>);
    if (i < n) f(i, n - i);
}
// The numbers of a step that there are, and zeros.
template <class S>
inline void read_some(const S* p, int64_t count, Vec<float> (&v)[VECTORS<S>]) {
    if (count == STEP<S>) return read_step(p, v);
    S buffer[STEP<S>] = {};
    std::copy_n(p, count, buffer);
    read_step(buffer, v);
}

template <class S>
void quantize_rows(int64_t rows, int64_t width, const S* x, uint8_t* values, float* scales, int threads) {
    parallel_for<Stateless>(rows, 16, threads, [&](int64_t r, Stateless&) {
        const S* const row = x + r * width;
        Vec<float> v[VECTORS<S>];
        Largest largest;
        each_step<S>(width, [&](int64_t i, int64_t count) {
            read_some(row + i, count, v);
            for (const auto& part : v) largest.add(part);
        });
        const Steps steps(largest.value());
        scales[r] = steps.scale;
        each_step<S>(width, [&](int64_t i, int64_t count) {
            read_some(row + i, count, v);
            write_bytes<S>(values + r * width + i, v, steps.inverse, count);
        });
    });
}

template <class S>
void activate_rows(const ActivateRows<S>& op, int threads) {
    constexpr int W = WIDTH<float>, V = VECTORS<S>;
    const float a = float(op.alpha), b = float(op.beta);
    parallel_for<RowBuffer>(op.rows, 16, threads, [&](int64_t r, RowBuffer& buffer) {
        buffer.resize((op.width + STEP<S> - 1) / STEP<S> * STEP<S>);
        const float scale = op.scale[r];
        Vec<float> value[V]{}, factor[V]{}, add[V]{};
        Largest largest;
        each_step<S>(op.width, [&](int64_t i, int64_t count) {
            const int64_t place = r * op.width + i;
            read_some(op.x + place, count, value);
            if (op.factor) read_some(op.factor + place, count, factor);
            if (op.add) read_some(op.add + place, count, add);
            for (int half = 0; half < V; ++half) {
                value[half] = a * silu_of<S>(scale * value[half]);
                if (op.factor) value[half] = value[half] * factor[half];
                if (op.add) value[half] = value[half] + b * add[half];
                largest.add(value[half]);
                store(buffer.data() + i + half * W, value[half]);
            }
            if (!op.out) return;
            if (count == STEP<S>) return write_step(op.out + place, value);
            S rest[STEP<S>];
            write_step(rest, value);
            std::copy_n(rest, count, op.out + place);
        });
        if (!op.values) return;
        const Steps steps(largest.value());
        op.scales[r] = steps.scale;
        each_step<S>(op.width, [&](int64_t i, int64_t count) {
            for (int half = 0; half < V; ++half) value[half] = load(buffer.data() + i + half * W);
            write_bytes<S>(op.values + r * op.width + i, value, steps.inverse, count);
        });
    });
}

template <class S>
void scale_rows(int64_t rows, int64_t width, S* x, const float* scale, int threads) {
    parallel_for<Stateless>(rows, 16, threads, [&](int64_t r, Stateless&) {
        S* const row[1] = {x + r * width};
        map_row<S, 1, 1>(width, {row[0]}, row, [by = scale[r]](const auto* v, auto* o) { o[0] = by * v[0]; });
    });
}
