// What all bindings need: argument checks with clear errors, contiguous arrays, dispatch on the type of numbers.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../ops.h"

namespace ejmp::bindings {

using at::Tensor;
using OptionalTensor = c10::optional<Tensor>;

inline int threads() { return at::get_num_threads(); }

inline void check_like(const char* op, const char* name, const Tensor& x, at::ScalarType type, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(x.scalar_type() == type, op, ": ", name, " must be ", type, ", got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ", x.sizes());
}

inline void check_device(const char* op, const Tensor& first, const std::vector<Tensor>& others) {
    for (const Tensor& x : others)
        TORCH_CHECK_VALUE(x.device() == first.device(), op, ": all must be on one device, got ", first.device(),
                          " and ", x.device());
}

// Values of index tensors are looked at on the CPU only: on a GPU that would wait for it.
inline void check_ids(const char* op, const char* name, const Tensor& ids, int64_t size, int64_t limit) {
    check_like(op, name, ids, at::kLong, {size});
    if (!ids.is_cpu()) return;
    const int64_t* const p = ids.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < size; ++i)
        TORCH_CHECK_VALUE(p[i] >= 0 && p[i] < limit, op, ": ", name, " must be in 0..", limit - 1, ", got ", p[i]);
}

inline void check_ptr(const char* op, const char* name, const Tensor& ptr, int64_t num_edges) {
    TORCH_CHECK_VALUE(ptr.dim() == 1 && ptr.size(0) > 0, op, ": ", name, " must be [N + 1], got ", ptr.sizes());
    check_like(op, name, ptr, at::kLong, {ptr.size(0)});
    if (!ptr.is_cpu()) return;
    const int64_t* const p = ptr.const_data_ptr<int64_t>();
    bool rises = p[0] == 0 && p[ptr.size(0) - 1] == num_edges;
    for (int64_t i = 1; i < ptr.size(0); ++i) rises = rises && p[i] >= p[i - 1];
    TORCH_CHECK_VALUE(rises, op, ": ", name, " must rise from 0 to ", num_edges);
}

inline void check_size(const char* op, const char* name, const Tensor& x, int64_t dim) {
    TORCH_CHECK_VALUE(x.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", x.dim());
}

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
