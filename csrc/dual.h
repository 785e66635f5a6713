// Numbers that carry, in the second backward (D), their derivative along a direction beside their value, and vectors
// of them. Included inside a namespace, once per instruction set on the CPU and once for CUDA, so it has no include
// guard; <cmath> must come first.
//
// The backward of an op is the gradient of <grad, op(inputs)>. Its own backward is the directional derivative of that
// gradient and of the op along the incoming gradients (a Hessian is symmetric), so the same code, run on dual numbers,
// is the second backward.

#ifdef __CUDACC__
#define EJMP_HOST_DEVICE __host__ __device__
#else
#define EJMP_HOST_DEVICE
#endif

template <class T, bool D>
struct Number {  // a value and its derivative
    T value, along;
    Number() = default;
    EJMP_HOST_DEVICE Number(T v) : value(v), along(0) {}
    EJMP_HOST_DEVICE Number(T v, T a) : value(v), along(a) {}
};
template <class T>
struct Number<T, false> {
    T value;
    Number() = default;
    EJMP_HOST_DEVICE Number(T v, T = 0) : value(v) {}
};

template <class T, bool D>
EJMP_HOST_DEVICE inline T slope(const Number<T, D>& x) {
    if constexpr (D) return x.along;
    return 0;
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Number<T, D> operator+(Number<T, D> x, Number<T, D> y) {
    return {x.value + y.value, slope(x) + slope(y)};
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Number<T, D> operator-(Number<T, D> x, Number<T, D> y) {
    return {x.value - y.value, slope(x) - slope(y)};
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Number<T, D> operator*(Number<T, D> x, Number<T, D> y) {
    return {x.value * y.value, slope(x) * y.value + x.value * slope(y)};
}
template <class T, bool D>
EJMP_HOST_DEVICE inline void operator+=(Number<T, D>& x, Number<T, D> y) {
    x = x + y;
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Number<T, D> inverse_sqrt(Number<T, D> x) {
    const T root = 1 / std::sqrt(x.value);
    return {root, T(-0.5) * root / x.value * slope(x)};
}
// the same number with no derivative
template <class T, bool D>
EJMP_HOST_DEVICE inline Number<T, D> constant(Number<T, D> x) {
    return {x.value, T(0)};
}

template <class T, bool D>
struct Vector {
    Number<T, D> x, y, z;
};
template <class T, bool D>
EJMP_HOST_DEVICE inline Number<T, D> dot(Vector<T, D> a, Vector<T, D> b) {
    return a.x * b.x + a.y * b.y + a.z * b.z;
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Vector<T, D> cross(Vector<T, D> a, Vector<T, D> b) {
    return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Vector<T, D> operator*(Number<T, D> s, Vector<T, D> v) {
    return {s * v.x, s * v.y, s * v.z};
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Vector<T, D> operator+(Vector<T, D> a, Vector<T, D> b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z};
}
template <class T, bool D>
EJMP_HOST_DEVICE inline Vector<T, D> operator-(Vector<T, D> a, Vector<T, D> b) {
    return {a.x - b.x, a.y - b.y, a.z - b.z};
}
template <class T, bool D>
EJMP_HOST_DEVICE inline void operator+=(Vector<T, D>& a, Vector<T, D> b) {
    a = a + b;
}

// v / max(|v|, eps); where |v| <= eps it has no derivative and is not `regular`.
template <class T, bool D>
struct Unit {
    Vector<T, D> direction;
    Number<T, D> inverse;  // 1 / max(|v|, eps)
    bool regular;

    Unit() = default;
    EJMP_HOST_DEVICE Unit(Vector<T, D> v, T eps) {
        const Number<T, D> squared = dot(v, v);
        regular = squared.value > eps * eps;
        inverse = regular ? inverse_sqrt(squared) : Number<T, D>(1 / eps);
        if (!regular) v = {constant(v.x), constant(v.y), constant(v.z)};
        direction = inverse * v;
    }
    // gradient with respect to v from the gradient with respect to the direction
    EJMP_HOST_DEVICE Vector<T, D> backward(Vector<T, D> grad) const {
        if (!regular) return {T(0), T(0), T(0)};
        return inverse * (grad - dot(direction, grad) * direction);
    }
};

#undef EJMP_HOST_DEVICE
