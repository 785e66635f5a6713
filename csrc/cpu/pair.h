// Sums over the many neighbours of an atom, in pieces that stay in the cache. Included once per instruction set.

constexpr int64_t PAIR_ROWS = 64;

// rows [end - begin, C] of h for edges begin .. end
template <class T>
void gather_rows(const Pair<T>& p, int64_t begin, int64_t end, T* rows) {
    for (int64_t e = begin; e < end; ++e)
        std::copy_n(p.h + p.source[e] * p.channels, p.channels, rows + (e - begin) * p.channels);
}

template <class T>
void pair(const Pair<T>& p, T* out, int threads) {
    const int64_t R = p.num_radial, C = p.channels;
    parallel_for<Arena<T>>(p.num_atoms, 1, threads, [&](int64_t n, Arena<T>& arena) {
        arena.reset();
        T* const rows = arena.take(PAIR_ROWS * C);
        std::fill_n(out + n * R * C, R * C, T(0));
        for (int64_t e = p.ptr[n]; e < p.ptr[n + 1]; e += PAIR_ROWS) {
            const int64_t end = std::min(e + PAIR_ROWS, p.ptr[n + 1]);
            gather_rows(p, e, end, rows);
            mm(R, C, end - e, p.radial + e * R, 1, R, rows, C, out + n * R * C, C, true);
        }
    });
}

// The gradient of h is summed over edges by source: in a fixed number of parts, each over some of the targets, so that
// threads do not meet and the sum does not depend on how many there are.
template <class T>
void pair_backward(const Pair<T>& p, const T* grad, T* to_h, T* to_radial, int threads) {
    const int64_t R = p.num_radial, C = p.channels, N = p.num_atoms, parts = std::min<int64_t>(N, 16);
    std::vector<T> partial(parts * N * C);
    parallel_for<Arena<T>>(parts, 1, threads, [&](int64_t part, Arena<T>& arena) {
        T* const sum = partial.data() + part * N * C;
        for (int64_t n = part * N / parts; n < (part + 1) * N / parts; ++n) {
            arena.reset();
            T *const rows = arena.take(PAIR_ROWS * C), *const grad_t = arena.take(C * R);
            const T* const g = grad + n * R * C;
            for (int64_t c = 0; c < C; ++c)
                for (int64_t r = 0; r < R; ++r) grad_t[c * R + r] = g[r * C + c];
            for (int64_t e = p.ptr[n]; e < p.ptr[n + 1]; e += PAIR_ROWS) {
                const int64_t end = std::min(e + PAIR_ROWS, p.ptr[n + 1]);
                gather_rows(p, e, end, rows);
                mm(end - e, R, C, rows, C, 1, grad_t, R, to_radial + e * R, R, false);
                mm(end - e, C, R, p.radial + e * R, R, 1, g, C, rows, C, false);
                for (int64_t i = e; i < end; ++i) {
                    T* const row = sum + p.source[i] * C;
                    for (int64_t c = 0; c < C; ++c) row[c] += rows[(i - e) * C + c];
                }
            }
        }
    });
    parallel_for<Stateless>(N, 64, threads, [&](int64_t n, Stateless&) {
        for (int64_t c = 0; c < C; ++c) {
            T total = 0;
            for (int64_t part = 0; part < parts; ++part) total += partial[(part * N + n) * C + c];
            to_h[n * C + c] = total;
        }
    });
}
