// Gaussian radial basis times a weight, without storing the basis. Only Gaussians within a window around a distance are
// more than rounding: edges are taken in the order of their distances, so that a block of them shares one window.
// Included once per instruction set.

constexpr int64_t RADIAL_ROWS = 14;

template <class T>
class RadialBlocks {
  public:
    explicit RadialBlocks(const Radial<T>& p) : p_(p), order_(p.num_edges) {
        std::iota(order_.begin(), order_.end(), int64_t(0));
        std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
            return std::make_pair(p.distance[a], a) < std::make_pair(p.distance[b], b);
        });
    }
    int64_t count() const { return (p_.num_edges + RADIAL_ROWS - 1) / RADIAL_ROWS; }

    struct Block {
        const int64_t* edges;
        int64_t rows, first, count;  // basis functions first .. first + count
    };
    // Fill values [rows, R], of which columns first .. first + count matter.
    Block evaluate(int64_t block, T* values) const {
        const int64_t R = p_.num_radial, begin = block * RADIAL_ROWS;
        Block found{order_.data() + begin, std::min(RADIAL_ROWS, p_.num_edges - begin), R, 0};
        int64_t last = 0;
        for (int64_t i = 0; i < found.rows; ++i)
            for (int64_t k = 0; k < R; ++k) {
                const T value = function(p_.distance[found.edges[i]], k);
                values[i * R + k] = value;
                if (value != 0) found.first = std::min(found.first, k), last = std::max(last, k + 1);
            }
        found.count = std::max<int64_t>(0, last - found.first);
        if (found.count == 0) found.first = 0;
        return found;
    }

  private:
    // The basis function k or its derivative by the distance.
    T function(T distance, int64_t k) const {
        const T x = distance / T(p_.cutoff), t = p_.temps[k], y = x - p_.offset[k];
        if (!(x < 1) || t * y * y > (sizeof(T) == 4 ? 30 : 60)) return 0;  // exp(-60) is 1e-26
        const T n = p_.exponent, a = -(n + 1) * (n + 2) / 2, b = n * (n + 2), c = -n * (n + 1) / 2;
        const T power = std::pow(x, p_.exponent - 2);  // x^(n - 2)
        const T u = 1 + power * x * x * (a + x * (b + x * c)), g = std::exp(-t * y * y);
        if (p_.order == 0) return u * g;
        const T u1 = power * x * (n * a + x * ((n + 1) * b + x * (n + 2) * c)), g1 = -2 * t * y * g;
        if (p_.order == 1) return (u1 * g + u * g1) / T(p_.cutoff);
        const T u2 = power * (n * (n - 1) * a + x * ((n + 1) * n * b + x * (n + 2) * (n + 1) * c));
        return (u2 * g + 2 * u1 * g1 + u * (4 * t * t * y * y - 2 * t) * g) / T(p_.cutoff * p_.cutoff);
    }

    const Radial<T>& p_;
    std::vector<int64_t> order_;
};

template <class T>
void radial(const Radial<T>& p, const T* weight, T* out, int threads) {
    const RadialBlocks<T> blocks(p);
    const int64_t R = p.num_radial, W = p.width;
    parallel_for<Arena<T>>(blocks.count(), 4, threads, [&](int64_t i, Arena<T>& arena) {
        arena.reset();
        T *const values = arena.take(RADIAL_ROWS * R), *const rows = arena.take(RADIAL_ROWS * W);
        const auto block = blocks.evaluate(i, values);
        mm(block.rows, W, block.count, values + block.first, R, 1, weight + block.first * W, W, rows, W, false);
        for (int64_t j = 0; j < block.rows; ++j) std::copy_n(rows + j * W, W, out + block.edges[j] * W);
    });
}

template <class T>
void radial_transposed(const Radial<T>& p, const T* x, T* out, int threads) {
    const RadialBlocks<T> blocks(p);
    const int64_t R = p.num_radial, W = p.width;
    const int64_t parts = std::min<int64_t>(blocks.count(), W < 1024 ? 8 : 4);  // not by the number of threads
    std::vector<T> partial(parts * R * W);
    parallel_for<Arena<T>>(parts, 1, threads, [&](int64_t part, Arena<T>& arena) {
        T* const sum = partial.data() + part * R * W;
        for (int64_t i = part * blocks.count() / parts; i < (part + 1) * blocks.count() / parts; ++i) {
            arena.reset();
            T *const values = arena.take(RADIAL_ROWS * R), *const rows = arena.take(RADIAL_ROWS * W);
            const auto block = blocks.evaluate(i, values);
            for (int64_t j = 0; j < block.rows; ++j) std::copy_n(x + block.edges[j] * W, W, rows + j * W);
            mm(block.count, W, block.rows, values + block.first, 1, R, rows, W, sum + block.first * W, W, true);
        }
    });
    std::fill_n(out, R * W, T(0));
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < R * W; ++i) out[i] += partial[part * R * W + i];
}
