// Triplet aggregation, one atom at a time: the edges out of the sum and into it all end at that atom, so nothing is
// listed and no two threads write to one place. Included once per instruction set.

// The edges into one atom: their vectors by component, and scratch for their angles with one edge out of the sum.
template <class T, bool D>
struct TripletAngles {
    const Triplet<T>& p;
    int64_t first, count, ld;
    Tile<T, D> axes, cosine;  // [3, ld], [ld]
    T* mask;                  // [ld]

    TripletAngles(const Triplet<T>& p, int64_t atom, Arena<T>& arena)
        : p(p),
          first(p.in.ptr[atom]),
          count(p.in.ptr[atom + 1] - first),
          ld(padded<T>(count)),
          axes(arena.template tile<D>(3 * ld)),
          cosine(arena.template tile<D>(ld)),
          mask(arena.take(ld)) {
        axes.zero(3 * ld), std::fill_n(mask, ld, T(0));
        for (int64_t k = 0; k < count; ++k)
            for (int i = 0; i < 3; ++i) axes.set(i * ld + k, tile<D>(p.v_in)[3 * (first + k) + i]);
    }

    // Values and slopes [S, ld] of Y_l(V_e . V_k); zero for the same image of the same atom.
    void evaluate(int64_t e, Tile<T, D> y, Tile<T, D> slopes) const {
        const auto v = vector(tile<D>(p.v_out), e);
        const Number<T, D> components[3] = {v.x, v.y, v.z};
        project(components, axes, ld, cosine);
        const int64_t source = p.out.source[e], image = p.out.image[e];
        const int64_t *const sources = p.in.source + first, *const images = p.in.image + first;
        for (int64_t k = 0; k < count; ++k) mask[k] = T((sources[k] != source) | (images[k] != image));
        legendre(p.spherical, ld, cosine, mask, y, slopes, ld);
    }
};

template <class T, bool D>
void triplet_atom(const Triplet<T>& p, int64_t atom, Arena<T>& arena, Tile<T, D> out) {
    arena.reset();
    const TripletAngles<T, D> angles(p, atom, arena);
    const int64_t first = angles.first, count = angles.count, ld = angles.ld;
    const int64_t S = p.spherical, C = p.channels, A = p.basis;
    const auto y = arena.template tile<D>(S * ld), sum = arena.template tile<D>(S * C);
    if (p.to_atoms && p.out.ptr[atom] == p.out.ptr[atom + 1]) (out + atom * A * C).zero(A * C);
    for (int64_t e = p.out.ptr[atom]; e < p.out.ptr[atom + 1]; ++e) {
        angles.evaluate(e, y, Tile<T, D>{nullptr, nullptr});
        mm(S, C, count, y, ld, 1, tile<D>(p.x) + first * C, C, sum, C, false);
        const bool add = p.to_atoms && e > p.out.ptr[atom];
        mm(A, C, S, tile<D>(p.weight) + e * A * S, S, 1, sum, C, out + (p.to_atoms ? atom : e) * A * C, C, add);
    }
}

template <class T, bool D>
void triplet_backward_atom(const Triplet<T>& p, Tile<T, D> grad, int64_t atom, Arena<T>& arena, Tile<T, D> to_x,
                           Tile<T, D> to_weight, Tile<T, D> to_v_out, Tile<T, D> to_v_in) {
    arena.reset();
    const TripletAngles<T, D> angles(p, atom, arena);
    const int64_t first = angles.first, count = angles.count, ld = angles.ld;
    const int64_t S = p.spherical, C = p.channels, A = p.basis, lds = padded<T>(S);
    const auto y = arena.template tile<D>(S * ld), slopes = arena.template tile<D>(S * ld);
    const auto sum = arena.template tile<D>(S * C);
    const auto sum_t = arena.template tile<D>(C * lds), to_sum = arena.template tile<D>(S * C);
    const auto x_t = arena.template tile<D>(C * ld), to_y = arena.template tile<D>(S * ld);
    const auto weight_t = arena.template tile<D>(A * lds), x = tile<D>(p.x) + first * C;
    transpose(count, C, x, x_t, ld);
    (to_x + first * C).zero(count * C);
    (to_v_in + 3 * first).zero(3 * count);
    for (int64_t e = p.out.ptr[atom]; e < p.out.ptr[atom + 1]; ++e) {
        angles.evaluate(e, y, slopes);
        const auto g = grad + (p.to_atoms ? atom : e) * A * C, w = tile<D>(p.weight) + e * A * S;
        mm(S, C, A, w, 1, S, g, C, to_sum, C, false);
        mm(S, C, count, y, ld, 1, x, C, sum, C, false);
        transpose(S, C, sum, sum_t, lds);
        mm(A, lds, C, g, C, 1, sum_t, lds, weight_t, lds, false);
        for (int64_t a = 0; a < A; ++a)
            for (int64_t l = 0; l < S; ++l) to_weight.set((e * A + a) * S + l, weight_t[a * lds + l]);
        mm(count, C, S, y, 1, ld, to_sum, C, to_x + first * C, C, true);
        mm(S, ld, C, to_sum, C, 1, x_t, ld, to_y, ld, false);
        const auto v_e = vector(tile<D>(p.v_out), e);
        Vector<T, D> to_v_e{T(0), T(0), T(0)};
        for (int64_t k = 0; k < count; ++k) {
            Number<T, D> to_cosine(0);
            for (int64_t l = 0; l < S; ++l) to_cosine = to_cosine + slopes[l * ld + k] * to_y[l * ld + k];
            to_v_e = to_v_e + to_cosine * vector(tile<D>(p.v_in), first + k);
            add_vector(to_v_in, first + k, to_cosine * v_e);
        }
        to_v_out.set(3 * e, to_v_e.x), to_v_out.set(3 * e + 1, to_v_e.y), to_v_out.set(3 * e + 2, to_v_e.z);
    }
}

template <class T, bool D>
void triplet_run(const Triplet<T>& p, T* out, int threads) {
    parallel_for<Arena<T>>(p.num_atoms, 1, threads,
                           [&](int64_t i, Arena<T>& arena) { triplet_atom<T, D>(p, i, arena, result<D>(out)); });
}

template <class T>
void triplet(const Triplet<T>& p, T* out, int threads) {
    p.x.along ? triplet_run<T, true>(p, out, threads) : triplet_run<T, false>(p, out, threads);
}

template <class T, bool D>
void triplet_backward_run(const Triplet<T>& p, In<T> grad, T* x, T* weight, T* v_out, T* v_in, int threads) {
    parallel_for<Arena<T>>(p.num_atoms, 1, threads, [&](int64_t i, Arena<T>& arena) {
        triplet_backward_atom<T, D>(p, tile<D>(grad), i, arena, result<D>(x), result<D>(weight), result<D>(v_out),
                                    result<D>(v_in));
    });
}

template <class T>
void triplet_backward(const Triplet<T>& p, In<T> grad, T* x, T* weight, T* v_out, T* v_in, int threads) {
    const auto run = p.x.along ? triplet_backward_run<T, true> : triplet_backward_run<T, false>;
    run(p, grad, x, weight, v_out, v_in, threads);
}
