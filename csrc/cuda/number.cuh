// Numbers that carry, in the second backward (D), their derivative along a direction, and the geometry made of them.
//
// The second backward of an op is the derivative of its backward and of itself along the incoming gradients (see
// cpu/tile.h), so the kernels are written once, for numbers of both kinds.
#pragma once

#include "device.cuh"

namespace ejmp::cuda {

template <class T, bool D>
struct Number {  // a value and its derivative
    T value, along;
    Number() = default;
    __device__ Number(T v) : value(v), along(0) {}
    __device__ Number(T v, T a) : value(v), along(a) {}
};
template <class T>
struct Number<T, false> {
    T value;
    Number() = default;
    __device__ Number(T v, T = 0) : value(v) {}
};

template <class T, bool D>
__device__ T slope(Number<T, D> x) {
    if constexpr (D) return x.along;
    return 0;
}
template <class T, bool D>
__device__ Number<T, D> operator+(Number<T, D> x, Number<T, D> y) {
    return {x.value + y.value, slope(x) + slope(y)};
}
template <class T, bool D>
__device__ Number<T, D> operator-(Number<T, D> x, Number<T, D> y) {
    return {x.value - y.value, slope(x) - slope(y)};
}
template <class T, bool D>
__device__ Number<T, D> operator*(Number<T, D> x, Number<T, D> y) {
    return {x.value * y.value, slope(x) * y.value + x.value * slope(y)};
}
template <class T, bool D>
__device__ void operator+=(Number<T, D>& x, Number<T, D> y) {
    x = x + y;
}

// Entry i of an input; one without a direction (the incoming gradient) is constant.
template <bool D, class T>
__device__ Number<T, D> read(In<T> x, int64_t i) {
    if constexpr (D) return {x.value[i], x.along ? x.along[i] : T(0)};
    return {x.value[i]};
}

// What a result stores: the value, or in the second backward the derivative.
template <class T, bool D>
__device__ T stored(Number<T, D> x) {
    if constexpr (D) return x.along;
    return x.value;
}

template <class T, bool D>
struct Vector {
    Number<T, D> x, y, z;
};
template <bool D, class T>
__device__ Vector<T, D> read_vector(In<T> v, int64_t i) {
    return {read<D>(v, 3 * i), read<D>(v, 3 * i + 1), read<D>(v, 3 * i + 2)};
}
// v[i] += the stored part of x
template <class T, bool D>
__device__ void add_stored(T* v, int64_t i, Vector<T, D> x) {
    v[3 * i] += stored(x.x), v[3 * i + 1] += stored(x.y), v[3 * i + 2] += stored(x.z);
}
template <class T, bool D>
__device__ Number<T, D> dot(Vector<T, D> a, Vector<T, D> b) {
    return a.x * b.x + a.y * b.y + a.z * b.z;
}
template <class T, bool D>
__device__ Vector<T, D> cross(Vector<T, D> a, Vector<T, D> b) {
    return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
template <class T, bool D>
__device__ Vector<T, D> operator*(Number<T, D> s, Vector<T, D> v) {
    return {s * v.x, s * v.y, s * v.z};
}
template <class T, bool D>
__device__ Vector<T, D> operator+(Vector<T, D> a, Vector<T, D> b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z};
}
template <class T, bool D>
__device__ Vector<T, D> operator-(Vector<T, D> a, Vector<T, D> b) {
    return {a.x - b.x, a.y - b.y, a.z - b.z};
}
template <class T, bool D>
__device__ void operator+=(Vector<T, D>& a, Vector<T, D> b) {
    a = a + b;
}

// v / max(|v|, eps); where |v| <= eps it has no derivative and is not `regular`.
template <class T, bool D>
struct Unit {
    Vector<T, D> direction;
    Number<T, D> inverse;  // 1 / max(|v|, eps)
    bool regular;

    Unit() = default;
    __device__ Unit(Vector<T, D> v, T eps) {
        const Number<T, D> squared = dot(v, v);
        regular = squared.value > eps * eps;
        if (regular) {
            const T root = 1 / std::sqrt(squared.value);
            inverse = {root, T(-0.5) * root / squared.value * slope(squared)};
        } else {
            inverse = {1 / eps, T(0)};
            v = {{v.x.value, T(0)}, {v.y.value, T(0)}, {v.z.value, T(0)}};
        }
        direction = inverse * v;
    }
    // gradient with respect to v from the gradient with respect to the direction
    __device__ Vector<T, D> backward(Vector<T, D> grad) const {
        if (!regular) return {T(0), T(0), T(0)};
        return inverse * (grad - dot(direction, grad) * direction);
    }
};

// Most spherical functions. Scores have so many entries, zeros after the functions that there are.
constexpr int SPHERICAL = 8;

// y[l] = Y_l0(c) = sqrt((2l+1)/4pi) P_l(c) by Bonnet's recursion; slopes[l] its derivative by c, or null.
template <class T, bool D>
__device__ void legendre(int64_t spherical, Number<T, D> c, Number<T, D>* y, Number<T, D>* slopes) {
    constexpr double scales[SPHERICAL] = {0.28209479177387814, 0.48860251190291992, 0.63078313050504009,
                                          0.74635266518023078, 0.84628437532163447, 0.93560257962738880,
                                          1.01710723628205478, 1.09254843059207920};
    T p0 = 0, p1 = 0, d0 = 0, d1 = 0, s0 = 0, s1 = 0;  // P, P', P'' of the two degrees before
#pragma unroll
    for (int l = 0; l < SPHERICAL; ++l) {
        const T a = T(2 * l - 1), scale = l < spherical ? T(scales[l]) : T(0);
        const T p = l == 0 ? T(1) : (a * c.value * p1 - T(l - 1) * p0) * (T(1) / T(l ? l : 1));
        const T d = l == 0 ? T(0) : d0 + a * p1, s = l == 0 ? T(0) : s0 + a * d1;
        y[l] = {scale * p, scale * d * slope(c)};
        if (slopes) slopes[l] = {scale * d, scale * s * slope(c)};
        p0 = p1, p1 = p, d0 = d1, d1 = d, s0 = s1, s1 = s;
    }
}

template <class T, bool D>
__device__ void no_scores(Number<T, D>* y, Number<T, D>* slopes) {
#pragma unroll
    for (int l = 0; l < SPHERICAL; ++l) {
        y[l] = T(0);
        if (slopes) slopes[l] = T(0);
    }
}

inline void check_spherical(int64_t spherical) {
    if (spherical < 1 || spherical > SPHERICAL)
        throw std::runtime_error("ejmp: spherical must be in 1.." + std::to_string(SPHERICAL) + " on a GPU, got " +
                                 std::to_string(spherical));
}

}  // namespace ejmp::cuda
