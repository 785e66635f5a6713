// Rows of numbers in 8 bits, each with a scale of its own, for products of integers. Included once per instruction set.
//
// A row x is kept as bytes 128 + round(x / scale) with scale = max |x| / 127. Bytes are unsigned and 128 is zero, as
// the VNNI instructions want the left factor of a product. A row with a NaN or an infinite number has the scale NaN,
// and so has what is computed with it.

typedef uint8_t Bytes __attribute__((vector_size(EJMP_BYTES / 4)));
typedef std::vector<float> RowBuffer;

// A whole vector, or the `left` numbers there are and zeros.
template <class S>
inline Vec<float> read_some(const S* p, int64_t left) {
    if (left >= WIDTH<float>) return read(p);
    S buffer[WIDTH<float>] = {};
    std::copy_n(p, left, buffer);
    return read(buffer);
}

template <class S>
inline void write_some(S* p, Vec<float> v, int64_t left) {
    if (left >= WIDTH<float>) return write(p, v);
    S buffer[WIDTH<float>];
    write(buffer, v);
    std::copy_n(buffer, left, p);
}

// The row is filled up with zeros to whole vectors.
inline void quantize_row(int64_t n, const float* row, uint8_t* values, float* scale) {
    constexpr int W = WIDTH<float>;
    Vec<float> largest{}, poison{};
    for (int64_t i = 0; i < n; i += W) {
        const Vec<float> v = load(row + i), size = v < -v ? -v : v;
        largest = size > largest ? size : largest;
        poison += v * 0.0f;  // NaN where v is not finite
    }
    float most = 0, bad = 0;
    for (int j = 0; j < W; ++j) most = std::max(most, largest[j]), bad += poison[j];
    const bool empty = most < 1e-30f;
    *scale = (empty ? 0.0f : most / 127) + bad;
    const Vec<float> inverse = splat(empty ? 0.0f : 127 / most);
    // Added to 1.5 * 2^23, a number is rounded to an integer, to the nearest and ties to even, in the lowest bits.
    const Vec<float> shift = splat(12582912.0f + 128.0f);
    for (int64_t i = 0; i < n; i += W) {
        const Vec<float> shifted = load(row + i) * inverse + shift;
        Int<float> bits;
        std::memcpy(&bits, &shifted, sizeof(bits));
        const Bytes bytes = __builtin_convertvector(bits & 255, Bytes);
        std::memcpy(values + i, &bytes, std::min<int64_t>(W, n - i));
    }
}

template <class S>
void quantize_rows(int64_t rows, int64_t width, const S* x, uint8_t* values, float* scales, int threads) {
    parallel_for<RowBuffer>(rows, 16, threads, [&](int64_t r, RowBuffer& buffer) {
        buffer.resize(padded<float>(width));
        for (int64_t c = 0; c < width; c += WIDTH<float>)
            store(buffer.data() + c, read_some(x + r * width + c, width - c));
        quantize_row(width, buffer.data(), values + r * width, scales + r);
    });
}

template <class S>
void activate_rows(const ActivateRows<S>& op, int threads) {
    constexpr int W = WIDTH<float>;
    const float a = float(op.alpha), b = float(op.beta);
    parallel_for<RowBuffer>(op.rows, 16, threads, [&](int64_t r, RowBuffer& buffer) {
        buffer.resize(padded<float>(op.width));
        const float scale = op.scale[r];
        for (int64_t c = 0; c < op.width; c += W) {
            const int64_t i = r * op.width + c, left = op.width - c;
            Vec<float> value = a * silu_of<S>(scale * read_some(op.x + i, left));
            if (op.factor) value = value * read_some(op.factor + i, left);
            if (op.add) value = value + b * read_some(op.add + i, left);
            store(buffer.data() + c, value);
            if (op.out) write_some(op.out + i, value, left);
        }
        if (op.values) quantize_row(op.width, buffer.data(), op.values + r * op.width, op.scales + r);
    });
}

template <class S>
void scale_rows(int64_t rows, int64_t width, S* x, const float* scale, int threads) {
    parallel_for<Stateless>(rows, 16, threads, [&](int64_t r, Stateless&) {
        for (int64_t c = 0; c < width; c += WIDTH<float>) {
            S* const p = x + r * width + c;
            write_some(p, scale[r] * read_some(p, width - c), width - c);
        }
    });
}
