// Small arrays of dual numbers (dual.h), and the angular functions on them. Included once per instruction set, after
// simd.h.

// Where numbers are: `value` or `along` may be null in a result that does not need it.
template <class T, bool D>
struct Tile {
    T *value, *along;
    Tile operator+(int64_t i) const { return {value ? value + i : nullptr, along ? along + i : nullptr}; }
    Number<T, D> operator[](int64_t i) const {
        if constexpr (D) return {value[i], along[i]};
        return {value[i]};
    }
    void set(int64_t i, Number<T, D> x) const {
        if (value) value[i] = x.value;
        if constexpr (D) along[i] = x.along;
    }
    void add(int64_t i, Number<T, D> x) const {
        if (value) value[i] += x.value;
        if constexpr (D) along[i] += x.along;
    }
    void zero(int64_t n) const {
        if (value) std::fill_n(value, n, T(0));
        if (D) std::fill_n(along, n, T(0));
    }
};

// An input as a tile that nobody writes to.
template <bool D, class T>
inline Tile<T, D> tile(In<T> x) {
    return {const_cast<T*>(x.value), const_cast<T*>(x.along)};
}

// A result: the value, or in the second backward only the derivative.
template <bool D, class T>
inline Tile<T, D> result(T* x) {
    return D ? Tile<T, D>{nullptr, x} : Tile<T, D>{x, nullptr};
}

// Memory of one thread, given out piece by piece, from whole vectors on, and taken back all at once. A vector that lies
// across two lines of the cache takes twice as long to load.
template <class T>
class Arena {
  public:
    void reset() { block_ = used_ = 0; }
    T* take(int64_t n) {
        n = padded<T>(n);
        while (block_ < blocks_.size() && used_ + n + WIDTH<T> > blocks_[block_].size()) ++block_, used_ = 0;
        if (block_ == blocks_.size()) blocks_.emplace_back(std::max<size_t>(n + WIDTH<T>, 1 << 16));
        T* const begin = blocks_[block_].data();
        T* const p = begin + (-reinterpret_cast<uintptr_t>(begin) % EJMP_BYTES) / sizeof(T) + used_;
        used_ += n;
        return p;
    }
    template <bool D>
    Tile<T, D> tile(int64_t n) {
        T* const value = take(n);
        return {value, D ? take(n) : nullptr};
    }

  private:
    std::vector<std::vector<T>> blocks_;
    size_t block_ = 0, used_ = 0;
};

// c = a b, or c += a b; see mm in simd.h. An input without `along` (the incoming gradient) is constant.
template <class T, bool D>
inline void mm(int64_t m, int64_t n, int64_t k, Tile<T, D> a, int64_t row, int64_t col, Tile<T, D> b, int64_t ldb,
               Tile<T, D> c, int64_t ldc, bool add) {
    if (c.value) mm(m, n, k, a.value, row, col, b.value, ldb, c.value, ldc, add);
    if constexpr (D) {
        if (a.along) mm(m, n, k, a.along, row, col, b.value, ldb, c.along, ldc, add);
        if (b.along) mm(m, n, k, a.value, row, col, b.along, ldb, c.along, ldc, add || a.along);
    }
}

// out [n, ld] = the transpose of x [m, n], zero from column m on
template <class T, bool D>
inline void transpose(int64_t m, int64_t n, Tile<T, D> x, Tile<T, D> out, int64_t ld) {
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < ld; ++i) out.set(j * ld + i, i < m ? x[i * n + j] : Number<T, D>(0));
}

template <class T, bool D>
inline Vector<T, D> vector(Tile<T, D> v, int64_t i) {
    return {v[3 * i], v[3 * i + 1], v[3 * i + 2]};
}
template <class T, bool D>
inline void add_vector(Tile<T, D> out, int64_t i, Vector<T, D> v) {
    out.add(3 * i, v.x), out.add(3 * i + 1, v.y), out.add(3 * i + 2, v.z);
}
// out[k] = v . (axes[0, k], axes[1, k], axes[2, k]) for k < count, a multiple of the vector width; axes [3, count]
template <class T, bool D>
void project(const Number<T, D> (&v)[3], Tile<T, D> axes, int64_t count, Tile<T, D> out) {
    for (int64_t k = 0; k < count; k += WIDTH<T>) {
        Vec<T> value{}, along{};
        for (int i = 0; i < 3; ++i) {
            const Vec<T> n = load(axes.value + i * count + k);
            value = fma(n, splat(v[i].value), value);
            if constexpr (D)
                along = fma(load(axes.along + i * count + k), splat(v[i].value), fma(n, splat(v[i].along), along));
        }
        store(out.value + k, value);
        if constexpr (D) store(out.along + k, along);
    }
}

// Spherical functions Y_l0(c) = sqrt((2l+1)/4pi) P_l(c) of `count` cosines (a multiple of the vector width), each times
// mask, by Bonnet's recursion: y [S, ld]; slopes [S, ld] is the derivative by c, or null.
constexpr int64_t MOST_SPHERICAL = 16;
template <class T>
struct Bonnet {  // constants of degree l: 2l - 1, l - 1, 1 / l and the norm
    T twice[MOST_SPHERICAL], once[MOST_SPHERICAL], inverse[MOST_SPHERICAL], norm[MOST_SPHERICAL];
    Bonnet() {
        for (int l = 0; l < MOST_SPHERICAL; ++l) {
            twice[l] = T(2 * l - 1), once[l] = T(l - 1), inverse[l] = T(1) / T(l ? l : 1);
            norm[l] = T(std::sqrt((2 * l + 1) / (4 * 3.14159265358979323846)));
        }
    }
};

template <class T, bool D>
void legendre(int64_t spherical, int64_t count, Tile<T, D> c, const T* mask, Tile<T, D> y, Tile<T, D> slopes,
              int64_t ld) {
    static const Bonnet<T> n;  // made at the first call: a constructor that runs as the library loads would have
                               // instructions that this processor may lack
    for (int64_t k = 0; k < count; k += WIDTH<T>) {
        const Vec<T> x = load(c.value + k), on = load(mask + k);
        Vec<T> p0{}, p1{}, d0{}, d1{}, s0{}, s1{};  // P, P', P'' of the two degrees before
        for (int64_t l = 0; l < spherical; ++l) {
            const Vec<T> p = l == 0 ? splat(T(1)) : (n.twice[l] * x * p1 - n.once[l] * p0) * n.inverse[l];
            const Vec<T> d = l == 0 ? Vec<T>{} : d0 + n.twice[l] * p1, s = l == 0 ? Vec<T>{} : s0 + n.twice[l] * d1;
            const Vec<T> scale = n.norm[l] * on;
            store(y.value + l * ld + k, scale * p);
            if constexpr (D) store(y.along + l * ld + k, scale * d * load(c.along + k));
            if (slopes.value) {
                store(slopes.value + l * ld + k, scale * d);
                if constexpr (D) store(slopes.along + l * ld + k, scale * s * load(c.along + k));
            }
            p0 = p1, p1 = p, d0 = d1, d1 = d, s0 = s1, s1 = s;
        }
    }
}
