// Gaussian radial basis times a weight, without storing the basis. Only Gaussians within a window around a distance are
// more than rounding. Edges are taken in blocks that share a window: it is narrow because the edges into an atom come
// in the order of their distances. Included once per instruction set.

constexpr int64_t RADIAL_ROWS = 14;

// Edges begin .. begin + rows and the basis functions first .. first + count that matter to them.
template <class T>
struct RadialBlock {
    int64_t begin, rows, first, count;

    RadialBlock(const Radial<T>& p, int64_t block) : begin(block * RADIAL_ROWS), first(0), count(0) {
        rows = std::min(RADIAL_ROWS, p.num_edges - begin);
        T low = 1, high = 0;  // the distances within the cutoff
        for (int64_t i = 0; i < rows; ++i) {
            const T x = p.distance[begin + i] / T(p.cutoff);
            if (x < 1) low = std::min(low, x), high = std::max(high, x);
        }
        int64_t last = 0;
        for (int64_t k = 0; k < p.num_radial && low <= high; ++k) {
            const T y = std::max(std::max(low - p.offset[k], p.offset[k] - high), T(0));
            if (p.temps[k] * y * y > (sizeof(T) == 4 ? 30 : 60)) continue;  // exp(-30) is 1e-13, exp(-60) 1e-26
            if (last == 0) first = k;
            last = k + 1;
        }
        count = std::max<int64_t>(0, last - first);
    }

    // values [rows, count rounded up to whole vectors]: the basis functions or their derivative by the distance
    void evaluate(const Radial<T>& p, const T* offset, const T* temps, T* values) const {
        const int64_t ld = padded<T>(count);
        const T n = T(p.exponent), a = -(n + 1) * (n + 2) / 2, b = n * (n + 2), c = -n * (n + 1) / 2;
        const T scale = std::pow(1 / T(p.cutoff), T(p.order));
        for (int64_t i = 0; i < rows; ++i) {
            const T x = p.distance[begin + i] / T(p.cutoff);
            T u = 0, u1 = 0, u2 = 0;
            if (x < 1) {
                const T power = std::pow(x, p.exponent - 2);
                u = scale * (1 + power * x * x * (a + x * (b + x * c)));
                u1 = scale * power * x * (n * a + x * ((n + 1) * b + x * (n + 2) * c));
                u2 = scale * power * (n * (n - 1) * a + x * ((n + 1) * n * b + x * (n + 2) * (n + 1) * c));
            }
            for (int64_t k = 0; k < ld; k += WIDTH<T>) {
                const Vec<T> y = x - load(offset + first + k), t = load(temps + first + k), slope = T(-2) * t * y;
                Vec<T> factor = splat(u);
                if (p.order == 1) factor = u1 + u * slope;
                if (p.order == 2) factor = u2 + T(2) * u1 * slope + u * (slope * slope - T(2) * t);
                store(values + i * ld + k, factor * exponential<T>(T(0.5) * slope * y));
            }
        }
    }
};

// The centres and widths, with room to read whole vectors beyond the last.
template <class T>
struct RadialTables {
    std::vector<T> offset, temps;
    explicit RadialTables(const Radial<T>& p)
        : offset(p.offset, p.offset + p.num_radial), temps(p.temps, p.temps + p.num_radial) {
        offset.resize(p.num_radial + WIDTH<T>), temps.resize(p.num_radial + WIDTH<T>);
    }
};

template <class T>
int64_t radial_blocks(const Radial<T>& p) {
    return (p.num_edges + RADIAL_ROWS - 1) / RADIAL_ROWS;
}

template <class T>
void radial(const Radial<T>& p, const T* weight, T* out, int threads) {
    const RadialTables<T> tables(p);
    const int64_t W = p.width;
    parallel_for<Arena<T>>(radial_blocks(p), 16, threads, [&](int64_t i, Arena<T>& arena) {
        arena.reset();
        const RadialBlock<T> block(p, i);
        const int64_t ld = padded<T>(block.count);
        T* const values = arena.take(RADIAL_ROWS * ld);
        block.evaluate(p, tables.offset.data(), tables.temps.data(), values);
        mm(block.rows, W, block.count, values, ld, 1, weight + block.first * W, W, out + block.begin * W, W, false);
    });
}

template <class T>
void radial_transposed(const Radial<T>& p, const T* x, T* out, int threads) {
    const RadialTables<T> tables(p);
    const int64_t R = p.num_radial, W = p.width, blocks = radial_blocks(p);
    const int64_t parts = std::min<int64_t>(blocks, W < 1024 ? 8 : 4);  // not by the number of threads
    std::vector<T> partial(parts * R * W);
    parallel_for<Arena<T>>(parts, 1, threads, [&](int64_t part, Arena<T>& arena) {
        T* const sum = partial.data() + part * R * W;
        for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
            arena.reset();
            const RadialBlock<T> block(p, i);
            const int64_t ld = padded<T>(block.count);
            T* const values = arena.take(RADIAL_ROWS * ld);
            block.evaluate(p, tables.offset.data(), tables.temps.data(), values);
            mm(block.count, W, block.rows, values, 1, ld, x + block.begin * W, W, sum + block.first * W, W, true);
        }
    });
    std::fill_n(out, R * W, T(0));
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < R * W; ++i) out[i] += partial[part * R * W + i];
}
