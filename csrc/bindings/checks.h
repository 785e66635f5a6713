// Checks of what ops are called with. Every op goes through these before it touches memory, in training and inference
// alike; an error is a ValueError that names the op and the argument. Each check costs at most a pass over the indices.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace ejmp::bindings {

using at::Tensor;
using OptionalTensor = c10::optional<Tensor>;

// The largest size of an axis that does not count rows: products of three such sizes stay far from overflow.
constexpr int64_t MOST_COLUMNS = 1 << 20;
// The largest packed cell offset: the difference of two, or the sum of three, is a number of 64 bits.
constexpr int64_t MOST_IMAGE = int64_t{1} << 60;

// None is no tensor where one must be.
inline void check_given(const char* op, const char* name, const Tensor& x) {
    TORCH_CHECK_VALUE(x.defined(), op, ": ", name, " must be a tensor, got none");
}

// Every element lies in the storage, which may have been resized to nothing.
inline void check_memory(const char* op, const char* name, const Tensor& x) {
    TORCH_CHECK_VALUE(x.layout() == at::kStrided, op, ": ", name, " must be strided, got ", x.layout());
    const size_t needed =
        at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.element_size(), x.storage_offset());
    const size_t there = x.storage().nbytes();
    TORCH_CHECK_VALUE(there >= needed, op, ": ", name, " must lie in its storage of ", there, " bytes, needs ", needed);
}

inline void check_like(const char* op, const char* name, const Tensor& x, at::ScalarType type, at::IntArrayRef shape) {
    check_given(op, name, x);
    TORCH_CHECK_VALUE(x.scalar_type() == type, op, ": ", name, " must be ", type, ", got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ", x.sizes());
    check_memory(op, name, x);
}

// A number of axes, of which all but the first are columns, features or functions.
inline void check_axes(const char* op, const char* name, const Tensor& x, int64_t axes) {
    check_given(op, name, x);
    TORCH_CHECK_VALUE(x.dim() == axes, op, ": ", name, " must have ", axes, " axes, got shape ", x.sizes());
    for (int64_t i = 1; i < axes; ++i)
        TORCH_CHECK_VALUE(x.size(i) <= MOST_COLUMNS, op, ": ", name, " must have at most ", MOST_COLUMNS,
                          " columns, got shape ", x.sizes());
}

// The type numbers are computed in, or with `stored` also the one they may be stored in.
inline at::ScalarType check_type(const char* op, const char* name, const Tensor& x, bool stored = false) {
    check_given(op, name, x);
    const auto type = x.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || (stored && type == at::kBFloat16), op, ": ", name,
                      " must be float32", stored ? ", bfloat16" : "", " or float64, got ", type);
    return type;
}

struct Named {
    const char* name;
    OptionalTensor tensor;
};

inline void check_device(const char* op, const Named& first, const std::vector<Named>& others) {
    check_given(op, first.name, *first.tensor);
    for (const Named& x : others) {
        if (!x.tensor) continue;
        check_given(op, x.name, *x.tensor);
        TORCH_CHECK_VALUE(x.tensor->device() == first.tensor->device(), op, ": ", x.name, " must be on ",
                          first.tensor->device(), " as ", first.name, ", got ", x.tensor->device());
    }
}

// Values of index tensors are looked at on the CPU only: on a GPU that would wait for it.
inline void check_range(const char* op, const char* name, const Tensor& ids, int64_t size, int64_t least,
                        int64_t most) {
    check_like(op, name, ids, at::kLong, {size});
    if (!ids.is_cpu() || size == 0) return;
    const Tensor packed = ids.contiguous();
    const int64_t* const p = packed.const_data_ptr<int64_t>();
    int64_t low = p[0], high = p[0];
    for (int64_t i = 1; i < size; ++i) low = std::min(low, p[i]), high = std::max(high, p[i]);
    TORCH_CHECK_VALUE(low >= least && high <= most, op, ": ", name, " must be in ", least, "..", most, ", got ",
                      low < least ? low : high);
}

// Rows of something that has `limit` of them.
inline void check_ids(const char* op, const char* name, const Tensor& ids, int64_t size, int64_t limit) {
    check_range(op, name, ids, size, 0, limit - 1);
}

// Pointers that cut num_edges rows into pieces.
inline void check_ptr(const char* op, const char* name, const Tensor& ptr, int64_t num_edges) {
    check_given(op, name, ptr);
    TORCH_CHECK_VALUE(ptr.dim() == 1 && ptr.size(0) > 0, op, ": ", name, " must be [N + 1], got shape ", ptr.sizes());
    check_like(op, name, ptr, at::kLong, {ptr.size(0)});
    if (!ptr.is_cpu()) return;
    const Tensor packed = ptr.contiguous();
    const int64_t *const p = packed.const_data_ptr<int64_t>(), last = ptr.size(0) - 1;
    bool rises = p[0] == 0 && p[last] == num_edges;
    for (int64_t i = 0; i < last; ++i) rises &= p[i] <= p[i + 1];
    TORCH_CHECK_VALUE(rises, op, ": ", name, " must rise from 0 to ", num_edges);
}

// Counter-edges: what is swapped twice is where it was.
inline void check_swap(const char* op, const Tensor& swap, int64_t num_edges) {
    check_ids(op, "swap", swap, num_edges, num_edges);
    if (!swap.is_cpu()) return;
    const Tensor packed = swap.contiguous();
    const int64_t* const p = packed.const_data_ptr<int64_t>();
    bool undone = true;
    for (int64_t i = 0; i < num_edges; ++i) undone &= p[p[i]] == i;
    TORCH_CHECK_VALUE(undone, op, ": swap must undo itself: swap[swap[e]] = e");
}

// An order of num_edges rows, each of which comes once.
inline void check_order(const char* op, const Tensor& order, int64_t num_edges) {
    check_ids(op, "order", order, num_edges, num_edges);
    if (!order.is_cpu()) return;
    const Tensor packed = order.contiguous();
    const int64_t* const p = packed.const_data_ptr<int64_t>();
    std::vector<uint8_t> seen(num_edges, 0);
    for (int64_t i = 0; i < num_edges; ++i) seen[p[i]] = 1;
    TORCH_CHECK_VALUE(std::find(seen.begin(), seen.end(), 0) == seen.end(), op, ": order must name every row once");
}

// What is read while x is overwritten is x itself, or lies elsewhere.
inline void check_apart(const char* op, const char* name, const OptionalTensor& other, const Tensor& x) {
    if (other)
        TORCH_CHECK_VALUE(at::get_overlap_status(x, *other) != at::MemOverlapStatus::Partial, op, ": ", name,
                          " must not share a part of the memory of x, which is overwritten");
}

}  // namespace ejmp::bindings
