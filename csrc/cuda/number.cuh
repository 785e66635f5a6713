// Dual numbers (dual.h) on the GPU: how they are read and stored, and the angular functions of them.
#pragma once

#include <cmath>

#include "device.cuh"

namespace ejmp::cuda {

#include "../dual.h"

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

template <bool D, class T>
__device__ Vector<T, D> read_vector(In<T> v, int64_t i) {
    return {read<D>(v, 3 * i), read<D>(v, 3 * i + 1), read<D>(v, 3 * i + 2)};
}
// v[i] += the stored part of x
template <class T, bool D>
__device__ void add_stored(T* v, int64_t i, Vector<T, D> x) {
    v[3 * i] += stored(x.x), v[3 * i + 1] += stored(x.y), v[3 * i + 2] += stored(x.z);
}
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
