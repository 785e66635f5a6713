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

template <class T>
void pair_backward(const Pair<T>& p, const T* grad, T* to_h, T* to_radial, int threads) {
    const int64_t R = p.num_radial, C = p.channels, num_edges = p.ptr[p.num_atoms];
    std::vector<int64_t> target(num_edges);
    parallel_for<Arena<T>>(p.num_atoms, 1, threads, [&](int64_t n, Arena<T>& arena) {
        arena.reset();
        T *const rows = arena.take(PAIR_ROWS * C), *const grad_t = arena.take(C * R);
        for (int64_t c = 0; c < C; ++c)
            for (int64_t r = 0; r < R; ++r) grad_t[c * R + r] = grad[(n * R + r) * C + c];
        std::fill(target.begin() + p.ptr[n], target.begin() + p.ptr[n + 1], n);
        for (int64_t e = p.ptr[n]; e < p.ptr[n + 1]; e += PAIR_ROWS) {
            const int64_t end = std::min(e + PAIR_ROWS, p.ptr[n + 1]);
            gather_rows(p, e, end, rows);
            mm(end - e, R, C, rows, C, 1, grad_t, R, to_radial + e * R, R, false);
        }
    });
    const std::vector<int64_t> from = pointers_by_source(p.source, num_edges, p.num_atoms);
    const std::vector<int64_t> order = order_by_source(p.source, num_edges, from);
    parallel_for<Stateless>(p.num_atoms, 1, threads, [&](int64_t s, Stateless&) {
        std::fill_n(to_h + s * C, C, T(0));
        for (int64_t i = from[s]; i < from[s + 1]; ++i)
            mm(1, C, R, p.radial + order[i] * R, R, 1, grad + target[order[i]] * R * C, C, to_h + s * C, C, true);
    });
}
