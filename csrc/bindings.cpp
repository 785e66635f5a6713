// torch ops over ops.h: argument checks, tensors in, tensors out. The only file that includes torch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "ops.h"

namespace {

using at::Tensor;

template <typename T>
Tensor to_tensor(std::vector<T>&& values, at::IntArrayRef shape, at::ScalarType type) {
    auto* owner = new std::vector<T>(std::move(values));
    return at::from_blob(owner->data(), shape, [owner](void*) { delete owner; }, at::TensorOptions().dtype(type));
}

void check(const Tensor& tensor, const char* name, at::ScalarType type, at::IntArrayRef shape) {
    TORCH_CHECK(tensor.device().is_cpu(), "find_neighbors: ", name, " must be on the CPU, got ", tensor.device());
    TORCH_CHECK(tensor.scalar_type() == type, "find_neighbors: ", name, " must be ", type, ", got ",
                tensor.scalar_type());
    TORCH_CHECK(tensor.sizes() == shape, "find_neighbors: ", name, " must have shape ", shape, ", got ",
                tensor.sizes());
}

void append(std::vector<Tensor>& out, ejmp::Edges&& edges) {
    const int64_t num_edges = static_cast<int64_t>(edges.source.size());
    const int64_t num_ptr = static_cast<int64_t>(edges.ptr.size());
    out.push_back(to_tensor(std::move(edges.source), {num_edges}, at::kLong));
    out.push_back(to_tensor(std::move(edges.offset), {num_edges, 3}, at::kInt));
    out.push_back(to_tensor(std::move(edges.ptr), {num_ptr}, at::kLong));
}

std::vector<Tensor> find_neighbors(const Tensor& positions, const Tensor& cell, const Tensor& pbc, const Tensor& ptr,
                                   const Tensor& cutoff, const Tensor& limits, const Tensor& quad_atom) {
    const int64_t num_atoms = positions.size(0), num_structures = cell.size(0);
    check(positions, "positions", at::kDouble, {num_atoms, 3});
    check(cell, "cell", at::kDouble, {num_structures, 3, 3});
    check(pbc, "pbc", at::kBool, {num_structures, 3});
    check(ptr, "ptr", at::kLong, {num_structures + 1});
    check(cutoff, "cutoff", at::kDouble, {num_structures});
    check(limits, "limits", at::kLong, {num_structures, 4});
    check(quad_atom, "quad_atom", at::kBool, {num_atoms});
    const Tensor r = positions.contiguous(), c = cell.contiguous(), p = pbc.contiguous(), s = ptr.contiguous(),
                 rc = cutoff.contiguous(), k = limits.contiguous(), q = quad_atom.contiguous();
    const bool covers = s[0].item<int64_t>() == 0 && s[num_structures].item<int64_t>() == num_atoms;
    TORCH_CHECK(covers && s.diff().ge(0).all().item<bool>(), "find_neighbors: ptr must rise from 0 to ", num_atoms);
    const bool ordered = k.ge(0).all().item<bool>() && k.le(k.slice(1, 0, 1)).all().item<bool>();
    TORCH_CHECK(ordered, "find_neighbors: limits must not be negative, and the first the largest");
    ejmp::Neighbors found =
        ejmp::find_neighbors(r.const_data_ptr<double>(), c.const_data_ptr<double>(), p.const_data_ptr<bool>(),
                             s.const_data_ptr<int64_t>(), rc.const_data_ptr<double>(), k.const_data_ptr<int64_t>(),
                             q.const_data_ptr<bool>(), num_structures, at::get_num_threads());
    std::vector<Tensor> out;
    append(out, std::move(found.pairs));
    append(out, std::move(found.main));
    append(out, std::move(found.atom_edges));
    append(out, std::move(found.quad_edges));
    const int64_t num_main = static_cast<int64_t>(found.swap.size());
    out.push_back(to_tensor(std::move(found.swap), {num_main}, at::kLong));
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ejmp, library) {
    library.def(
        "find_neighbors(Tensor positions, Tensor cell, Tensor pbc, Tensor ptr, Tensor cutoff, Tensor limits, "
        "Tensor quad_atom) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(ejmp, CPU, library) { library.impl("find_neighbors", &find_neighbors); }
