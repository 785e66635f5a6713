// Quadruplet aggregation in its factorised form, one target atom a at a time. Included once per instruction set.
//
// The dihedral's cosine is p . n with p made from (c, b) and n from (d, b), so for each middle edge q = b->a and each
// edge e = c->a seven sums over d, U[k, c] = sum_d Y_k(p . n) v[d, c], stand for all its quadruplets; they enter the
// edge's 49 sums once per pair (e, q), with Y_l(V_e . V_q).

// What one middle edge q = b->a needs of the edges d->b, whichever edge c->a it meets.
template <class T, bool D>
struct Middle {
    int64_t q, first, count, ld;        // of the edges d->b
    Tile<T, D> value, value_t, filter;  // v [count, C], its transpose [C, ld], v / x [count, C]
    Tile<T, D> y, slopes;               // [S, ld], Y_l(V_q . V_d)
    Tile<T, D> normal, inverse;         // [3, ld], [ld]
    T* regular;                         // [ld]
    Tile<T, D> to_value, to_normal;     // gradients: [count, C], [3, ld]
};

// A middle edge that an output edge e meets: b is not c.
template <class T, bool D>
struct Meeting {
    Middle<T, D>* middle;
    Unit<T, D> p;  // V_e x V_q / |.|
};

// Scratch of one edge e with all middle edges that it meets, a row or a column each.
template <class T, bool D>
struct Dihedrals {
    Tile<T, D> cosine, z, slopes;     // [longest], [S, longest] for each, of p . n; forward, only the last ones
    T* mask;                          // [longest]
    Tile<T, D> between, y, y_slopes;  // [ld], [S, ld] twice, of V_e . V_q
    T* ones;                          // [ld]
    Tile<T, D> sum, to_sum, sloped;   // U, the gradient by it, and sum_l Y_l' of the gradient, [., S C]
};

template <class T, bool D>
class QuadrupletAtom {
  public:
    QuadrupletAtom(const Quadruplet<T>& p, int64_t atom, Arena<T>& arena, bool backward)
        : p_(p), atom_(atom), arena_(arena), S(p.spherical), C(p.channels), A(p.basis), v_(tile<D>(p.v)) {
        arena.reset();
        for (int64_t q = p.middle.ptr[atom]; q < p.middle.ptr[atom + 1]; ++q) {
            middles_.push_back(prepare(q, backward));
            longest_ = std::max(longest_, middles_.back().ld);
        }
        const int64_t most = middles_.size(), kept = backward ? most : 1;
        ld_ = padded<T>(most);
        const Tile<T, D> none{nullptr, nullptr};
        met_ = {take(longest_),
                take(kept * S * longest_),
                none,
                arena.take(longest_),
                take(ld_),
                take(S * ld_),
                none,
                arena.take(ld_),
                take(most * S * C),
                none,
                none};
        met_.between.zero(ld_), std::fill_n(met_.ones, ld_, T(1));
        if (backward) {
            met_.slopes = take(most * S * longest_), met_.y_slopes = take(S * ld_);
            met_.to_sum = take(most * S * C), met_.sloped = take(most * S * C);
        }
        meetings_.reserve(most);
    }

    // This atom's rows of out [E, A C].
    void forward(Tile<T, D> out) {
        const auto sums = take(S * S * C);
        for (int64_t e = p_.main.ptr[atom_]; e < p_.main.ptr[atom_ + 1]; ++e) forward_edge(e, sums, out + e * A * C);
    }

    // This atom's rows of out [E, width], the product with mix [A C, width].
    void forward_mixed(const T* mix, int64_t width, T* out) {
        constexpr int64_t ROWS = 7;                 // what mm does at a time; these stay in a core's cache
        const int64_t ld = A * C + 64 / sizeof(T);  // rows a power of two apart would compete for places in the cache
        const auto sums = take(S * S * C), rows = take(ROWS * ld);
        const int64_t last = p_.main.ptr[atom_ + 1];
        for (int64_t e = p_.main.ptr[atom_]; e < last; e += ROWS) {
            const int64_t count = std::min(ROWS, last - e);
            for (int64_t i = 0; i < count; ++i) forward_edge(e + i, sums, rows + i * ld);
            mm(count, width, A * C, rows.value, ld, 1, mix, width, out + e * width, width, false);
        }
    }

    // Gradients of this atom's rows go where they belong; what belongs to the edges d->b of the atoms b goes to rows
    // slot[q] + (d - first) of x_part [., C] and v_part [., 3].
    void backward(Tile<T, D> grad, const int64_t* slot, Tile<T, D> x_part, Tile<T, D> v_part, Tile<T, D> to_filter,
                  Tile<T, D> to_weight, Tile<T, D> to_v, Tile<T, D> to_v_middle) {
        const int64_t ldw = padded<T>(S * S);
        const auto sums = take(S * S * C), sums_t = take(C * ldw), to_sums = take(S * S * C), weights = take(A * ldw);
        const auto to_z = take(S * longest_);
        for (const Middle<T, D>& middle : middles_) (to_v_middle + 3 * middle.q).zero(3);
        for (int64_t e = p_.main.ptr[atom_]; e < p_.main.ptr[atom_ + 1]; ++e) {
            const auto g = grad + e * A * C, w = tile<D>(p_.weight) + e * A * S * S;
            mm(S * S, C, A, w, 1, S * S, g, C, to_sums, C, false);
            (to_v + 3 * e).zero(3);
            meet_all(e, true), add_up(sums);
            const int64_t met = meetings_.size();
            mm(met, S * C, S, met_.y, 1, ld_, to_sums, S * C, met_.to_sum, S * C, false);
            mm(met, S * C, S, met_.y_slopes, 1, ld_, to_sums, S * C, met_.sloped, S * C, false);
            for (int64_t i = 0; i < met; ++i) pair_backward(e, i, to_z, to_v, to_v_middle);
            transpose(S * S, C, sums, sums_t, ldw);
            mm(A, ldw, C, g, C, 1, sums_t, ldw, weights, ldw, false);
            for (int64_t a = 0; a < A; ++a)
                for (int64_t l = 0; l < S * S; ++l) to_weight.set((e * A + a) * S * S + l, weights[a * ldw + l]);
        }
        for (const Middle<T, D>& middle : middles_) {
            const int64_t row = slot[middle.q];
            middle_backward(middle, x_part + row * C, v_part + 3 * row, to_filter, to_v_middle);
        }
    }

  private:
    // The row [A, C] of an edge.
    void forward_edge(int64_t e, Tile<T, D> sums, Tile<T, D> out) {
        const auto weight = tile<D>(p_.weight) + e * A * S * S;
        for (int64_t i = 0; i < A * S * S; i += 64 / sizeof(T)) __builtin_prefetch(weight.value + i, 0, 2);
        meet_all(e, false), add_up(sums);
        mm(A, C, S * S, weight, S * S, 1, sums, C, out, C, false);
    }

    Tile<T, D> take(int64_t n) { return arena_.template tile<D>(n); }
    bool comes_from_b(int64_t e, const Middle<T, D>& m) const {
        return p_.main.source[e] == p_.middle.source[m.q] && p_.main.image[e] == p_.middle.image[m.q];
    }

    Middle<T, D> prepare(int64_t q, bool backward) {
        const int64_t b = p_.middle.source[q], first = p_.main.ptr[b], count = p_.main.ptr[b + 1] - first;
        const int64_t ld = padded<T>(count);
        const Tile<T, D> none{nullptr, nullptr};
        Middle<T, D> m{q,        first,           count,        ld,   take(count * C),
                       none,     take(count * C), take(S * ld), none, take(3 * ld),
                       take(ld), arena_.take(ld), none,         none};
        if (backward) {
            m.value_t = take(C * ld), m.slopes = take(S * ld), m.to_value = take(count * C), m.to_normal = take(3 * ld);
            m.to_value.zero(count * C), m.to_normal.zero(3 * ld);
        }
        const auto cosine = take(ld);
        T* const mask = arena_.take(ld);
        cosine.zero(ld), m.normal.zero(3 * ld), std::fill_n(mask, ld, T(0)), std::fill_n(m.regular, ld, T(0));
        const auto v_q = vector(tile<D>(p_.v_middle), q);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t d = first + k;
            const auto v_d = vector(v_, d);
            cosine.set(k, dot(v_d, v_q));
            mask[k] = p_.main.source[d] != atom_ || p_.main.image[d] != -p_.middle.image[q];  // d is not a
            const Unit<T, D> n(cross(v_d, v_q), p_.eps);
            m.normal.set(k, n.direction.x), m.normal.set(ld + k, n.direction.y),
                m.normal.set(2 * ld + k, n.direction.z);
            m.inverse.set(k, n.inverse), m.regular[k] = n.regular;
        }
        legendre(S, ld, cosine, mask, m.y, m.slopes, ld);
        mm(count, C, S, m.y, 1, ld, tile<D>(p_.filter) + q * S * C, C, m.filter, C, false);
        const auto x = tile<D>(p_.x) + first * C;
        for (int64_t i = 0; i < count * C; ++i) m.value.set(i, x[i] * m.filter[i]);
        if (backward) transpose(count, C, m.value, m.value_t, ld);
        return m;
    }

    // Cosines p . n of the dihedral angles with all edges d->b; without a derivative where one is undefined.
    void dihedrals(const Unit<T, D>& p, const Middle<T, D>& m) {
        const Number<T, D> components[3] = {p.direction.x, p.direction.y, p.direction.z};
        project(components, m.normal, m.ld, met_.cosine);
        if constexpr (D)
            for (int64_t k = 0; k < m.ld; ++k) met_.cosine.along[k] *= m.regular[k] * T(p.regular);
    }

    // U of edge e = c->a and a middle edge, [S, C]; z and slopes are kept for the backward.
    void meet(int64_t e, const Middle<T, D>& m, const Unit<T, D>& p, Tile<T, D> z, Tile<T, D> slopes, Tile<T, D> sum) {
        dihedrals(p, m);
        // d is not c (and not a, where v is zero)
        const int64_t source = p_.main.source[e], image = p_.main.image[e] - p_.middle.image[m.q];
        const int64_t *const sources = p_.main.source + m.first, *const images = p_.main.image + m.first;
        for (int64_t k = 0; k < m.count; ++k) met_.mask[k] = T((sources[k] != source) | (images[k] != image));
        std::fill(met_.mask + m.count, met_.mask + m.ld, T(0));
        legendre(S, m.ld, met_.cosine, met_.mask, z, slopes, m.ld);
        mm(S, C, m.count, z, m.ld, 1, m.value, C, sum, C, false);
    }

    // Let edge e meet all middle edges.
    void meet_all(int64_t e, bool backward) {
        const Tile<T, D> none{nullptr, nullptr};
        const auto v_e = vector(v_, e);
        meetings_.clear();
        for (Middle<T, D>& m : middles_) {
            if (comes_from_b(e, m)) continue;
            const int64_t i = meetings_.size(), place = backward ? i * S * longest_ : 0;
            const auto v_q = vector(tile<D>(p_.v_middle), m.q);
            meetings_.push_back({&m, Unit<T, D>(cross(v_e, v_q), p_.eps)});
            met_.between.set(i, dot(v_e, v_q));
            meet(e, m, meetings_[i].p, met_.z + place, backward ? met_.slopes + place : none, met_.sum + i * S * C);
        }
        legendre(S, ld_, met_.between, met_.ones, met_.y, met_.y_slopes, ld_);
    }

    // sums[l, k, c] = sum_q Y_l U[k, c]
    void add_up(Tile<T, D> sums) {
        mm(S, S * C, meetings_.size(), met_.y, ld_, 1, met_.sum, S * C, sums, S * C, false);
    }

    void pair_backward(int64_t e, int64_t i, Tile<T, D> to_z, Tile<T, D> to_v, Tile<T, D> to_v_middle) {
        Middle<T, D>& m = *meetings_[i].middle;
        const Unit<T, D>& p = meetings_[i].p;
        const auto z = met_.z + i * S * longest_, slopes = met_.slopes + i * S * longest_;
        const auto to_sum = met_.to_sum + i * S * C;
        const auto v_e = vector(v_, e), v_q = vector(tile<D>(p_.v_middle), m.q);
        const Number<T, D> to_cosine = inner(S * C, met_.sloped + i * S * C, met_.sum + i * S * C);
        Vector<T, D> to_v_e = to_cosine * v_q, to_v_q = to_cosine * v_e;
        mm(m.count, C, S, z, 1, m.ld, to_sum, C, m.to_value, C, true);
        if (p.regular) {
            mm(S, m.ld, C, to_sum, C, 1, m.value_t, m.ld, to_z, m.ld, false);
            Vector<T, D> to_p{T(0), T(0), T(0)};
            for (int64_t k = 0; k < m.count; ++k) {
                if (m.regular[k] == 0) continue;
                Number<T, D> to_c(0);
                for (int64_t l = 0; l < S; ++l) to_c = to_c + slopes[l * m.ld + k] * to_z[l * m.ld + k];
                to_p = to_p + to_c * Vector<T, D>{m.normal[k], m.normal[m.ld + k], m.normal[2 * m.ld + k]};
                const auto to_n = to_c * p.direction;
                m.to_normal.add(k, to_n.x), m.to_normal.add(m.ld + k, to_n.y), m.to_normal.add(2 * m.ld + k, to_n.z);
            }
            const auto to_cross = p.backward(to_p);  // of V_e x V_q
            to_v_e = to_v_e + cross(v_q, to_cross);
            to_v_q = to_v_q + cross(to_cross, v_e);
        }
        add_vector(to_v, e, to_v_e);
        add_vector(to_v_middle, m.q, to_v_q);
    }

    static Number<T, D> inner(int64_t n, Tile<T, D> a, Tile<T, D> b) {
        Vec<T> value{}, along{};
        int64_t i = 0;
        for (; i + WIDTH<T> <= n; i += WIDTH<T>) {
            const Vec<T> x = load(a.value + i), y = load(b.value + i);
            value = fma(x, y, value);
            if constexpr (D) along = fma(x, load(b.along + i), fma(load(a.along + i), y, along));
        }
        Number<T, D> total(0);
        for (; i < n; ++i) total = total + a[i] * b[i];
        for (int j = 0; j < WIDTH<T>; ++j) total = total + Number<T, D>(value[j], along[j]);
        return total;
    }

    void middle_backward(const Middle<T, D>& m, Tile<T, D> x_part, Tile<T, D> v_part, Tile<T, D> to_filter,
                         Tile<T, D> to_v_middle) {
        const auto x = tile<D>(p_.x) + m.first * C;
        const auto to_filter_rows = take(m.count * C), rows_t = take(C * m.ld), to_y = take(S * m.ld);
        for (int64_t i = 0; i < m.count * C; ++i) {
            x_part.set(i, m.to_value[i] * m.filter[i]);
            to_filter_rows.set(i, m.to_value[i] * x[i]);
        }
        mm(S, C, m.count, m.y, m.ld, 1, to_filter_rows, C, to_filter + m.q * S * C, C, false);
        transpose(m.count, C, to_filter_rows, rows_t, m.ld);
        mm(S, m.ld, C, tile<D>(p_.filter) + m.q * S * C, C, 1, rows_t, m.ld, to_y, m.ld, false);
        const auto v_q = vector(tile<D>(p_.v_middle), m.q);
        for (int64_t k = 0; k < m.count; ++k) {
            const auto v_d = vector(v_, m.first + k);
            Number<T, D> to_cosine(0);
            for (int64_t l = 0; l < S; ++l) to_cosine = to_cosine + m.slopes[l * m.ld + k] * to_y[l * m.ld + k];
            Vector<T, D> to_v_d = to_cosine * v_q, to_v_q = to_cosine * v_d;
            if (m.regular[k] != 0) {
                const Vector<T, D> n{m.normal[k], m.normal[m.ld + k], m.normal[2 * m.ld + k]};
                const Vector<T, D> to_n{m.to_normal[k], m.to_normal[m.ld + k], m.to_normal[2 * m.ld + k]};
                const auto to_cross = m.inverse[k] * (to_n - dot(n, to_n) * n);  // of V_d x V_q
                to_v_d = to_v_d + cross(v_q, to_cross);
                to_v_q = to_v_q + cross(to_cross, v_d);
            }
            v_part.set(3 * k, to_v_d.x), v_part.set(3 * k + 1, to_v_d.y), v_part.set(3 * k + 2, to_v_d.z);
            add_vector(to_v_middle, m.q, to_v_q);
        }
    }

    const Quadruplet<T>& p_;
    const int64_t atom_;
    Arena<T>& arena_;
    const int64_t S, C, A;
    const Tile<T, D> v_;
    std::vector<Middle<T, D>> middles_;
    std::vector<Meeting<T, D>> meetings_;
    int64_t longest_ = WIDTH<T>, ld_;
    Dihedrals<T, D> met_;
};

template <class T, bool D>
void quadruplet_run(const Quadruplet<T>& p, T* out, int threads) {
    parallel_for<Arena<T>>(p.num_atoms, 1, threads, [&](int64_t i, Arena<T>& arena) {
        QuadrupletAtom<T, D>(p, i, arena, false).forward(result<D>(out));
    });
}

template <class T>
void quadruplet(const Quadruplet<T>& p, T* out, int threads) {
    p.x.along ? quadruplet_run<T, true>(p, out, threads) : quadruplet_run<T, false>(p, out, threads);
}

template <class T>
void quadruplet_mixed(const Quadruplet<T>& p, const T* mix, int64_t width, T* out, int threads) {
    parallel_for<Arena<T>>(p.num_atoms, 1, threads, [&](int64_t i, Arena<T>& arena) {
        QuadrupletAtom<T, false>(p, i, arena, false).forward_mixed(mix, width, out);
    });
}

template <class T, bool D>
void quadruplet_backward_run(const Quadruplet<T>& p, In<T> grad, T* x, T* filter, T* weight, T* v, T* v_middle,
                             int threads) {
    const int64_t C = p.channels, num_middle = p.middle.ptr[p.num_atoms];
    // Rows of the parts: for each middle edge b->a one for every edge d->b; summed per atom b afterwards.
    std::vector<int64_t> slot(num_middle + 1, 0);
    for (int64_t q = 0; q < num_middle; ++q) {
        const int64_t b = p.middle.source[q];
        slot[q + 1] = slot[q] + p.main.ptr[b + 1] - p.main.ptr[b];
    }
    const std::vector<int64_t> from = pointers_by_source(p.middle.source, num_middle, p.num_atoms);
    const std::vector<int64_t> order = order_by_source(p.middle.source, num_middle, from);
    std::vector<T> x_part(slot[num_middle] * C), v_part(slot[num_middle] * 3);
    parallel_for<Arena<T>>(p.num_atoms, 1, threads, [&](int64_t i, Arena<T>& arena) {
        QuadrupletAtom<T, D>(p, i, arena, true)
            .backward(tile<D>(grad), slot.data(), result<D>(x_part.data()), result<D>(v_part.data()), result<D>(filter),
                      result<D>(weight), result<D>(v), result<D>(v_middle));
    });
    parallel_for<Stateless>(p.num_atoms, 8, threads, [&](int64_t b, Stateless&) {
        const int64_t first = p.main.ptr[b], count = p.main.ptr[b + 1] - first;
        std::fill_n(x + first * C, count * C, T(0));
        for (int64_t i = from[b]; i < from[b + 1]; ++i) {
            const int64_t row = slot[order[i]];
            for (int64_t j = 0; j < count * C; ++j) x[first * C + j] += x_part[row * C + j];
            for (int64_t j = 0; j < count * 3; ++j) v[first * 3 + j] += v_part[row * 3 + j];
        }
    });
}

template <class T>
void quadruplet_backward(const Quadruplet<T>& p, In<T> grad, T* x, T* filter, T* weight, T* v, T* v_middle,
                         int threads) {
    const auto run = p.x.along ? quadruplet_backward_run<T, true> : quadruplet_backward_run<T, false>;
    run(p, grad, x, filter, weight, v, v_middle, threads);
}
