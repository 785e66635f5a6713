// What all bindings need beside checks: contiguous arrays, dispatch on the type of numbers.
#pragma once

#include <ATen/Parallel.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "checks.h"

namespace ejmp::bindings {

inline int threads() { return at::get_num_threads(); }

// A contiguous tensor and its pointer.
template <class T>
struct Array {
    Tensor tensor;
    Array() = default;
    Array(const Tensor& x) : tensor(x.contiguous()) {}
    Array(const OptionalTensor& x) : tensor(x.has_value() ? x->contiguous() : Tensor()) {}
    const T* data() const { return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr; }
};

template <class T>
T* data(const Tensor& x) {
    return static_cast<T*>(x.mutable_data_ptr());
}

// Call f(T()) with the type numbers of a tensor are computed in, or f(S()) with the one they are stored in.
template <class F>
void with_real(const char* op, const Tensor& x, F&& f) {
    if (x.scalar_type() == at::kFloat) return f(float());
    if (x.scalar_type() == at::kDouble) return f(double());
    TORCH_CHECK_VALUE(false, op, ": must be float32 or float64, got ", x.scalar_type());
}
template <class F>
void with_stored(const char* op, const Tensor& x, F&& f) {
    if (x.scalar_type() == at::kBFloat16) return f(ejmp::bfloat16());
    with_real(op, x, f);
}
template <class T>
const ejmp::GraphKernels<T>& graph_kernels() {
    if constexpr (std::is_same_v<T, float>)
        return ejmp::kernels().graph_float;
    else
        return ejmp::kernels().graph_double;
}
template <class S>
const ejmp::DenseKernels<S>& dense_kernels() {
    if constexpr (std::is_same_v<S, float>)
        return ejmp::kernels().dense_float;
    else if constexpr (std::is_same_v<S, double>)
        return ejmp::kernels().dense_double;
    else
        return ejmp::kernels().dense_bfloat16;
}

inline void define_sums(torch::Library& library) {
    library.def("atom_sum(Tensor m, Tensor factor, Tensor ptr) -> Tensor");
    library.def("atom_sum_backward(Tensor grad, Tensor m, Tensor factor, Tensor ptr) -> (Tensor, Tensor)");
    library.def("edge_sum(Tensor x, Tensor? order, Tensor ptr) -> Tensor");
}

}  // namespace ejmp::bindings
