// torch ops over ops.h on the CPU: the neighbour search and message passing. Only the bindings include torch.
#include "graph.h"

namespace {

using namespace ejmp::bindings;

template <typename T>
Tensor to_tensor(std::vector<T>&& values, at::IntArrayRef shape, at::ScalarType type) {
    auto* owner = new std::vector<T>(std::move(values));
    return at::from_blob(owner->data(), shape, [owner](void*) { delete owner; }, at::TensorOptions().dtype(type));
}

void append(std::vector<Tensor>& out, ejmp::Edges&& edges) {
    const int64_t num_edges = static_cast<int64_t>(edges.source.size());
    const int64_t num_ptr = static_cast<int64_t>(edges.ptr.size());
    out.push_back(to_tensor(std::move(edges.source), {num_edges}, at::kLong));
    out.push_back(to_tensor(std::move(edges.offset), {num_edges, 3}, at::kInt));
    out.push_back(to_tensor(std::move(edges.ptr), {num_ptr}, at::kLong));
}

std::vector<Tensor> find_neighbors(const Tensor& positions, const Tensor& cell, const Tensor& pbc, const Tensor& ptr,
                                   const Tensor& cutoff, const Tensor& limits, const Tensor& quad_atom,
                                   int64_t max_pairs) {
    check_query({positions, cell, pbc, ptr, cutoff, limits, quad_atom});
    const Tensor r = positions.contiguous(), c = cell.contiguous(), p = pbc.contiguous(), s = ptr.contiguous(),
                 rc = cutoff.contiguous(), k = limits.contiguous(), q = quad_atom.contiguous();
    const int64_t num_structures = c.size(0);
    ejmp::Neighbors found = ejmp::find_neighbors(
        {num_structures, r.size(0), r.const_data_ptr<double>(), c.const_data_ptr<double>(), p.const_data_ptr<bool>(),
         s.const_data_ptr<int64_t>(), rc.const_data_ptr<double>(), k.const_data_ptr<int64_t>(),
         q.const_data_ptr<bool>()},
        [&](const double* pairs) { check_pairs(pairs, num_structures, max_pairs); }, at::get_num_threads());
    std::vector<Tensor> out;
    append(out, std::move(found.pairs));
    append(out, std::move(found.main));
    append(out, std::move(found.atom_edges));
    append(out, std::move(found.quad_edges));
    const int64_t num_main = static_cast<int64_t>(found.swap.size());
    out.push_back(to_tensor(std::move(found.swap), {num_main}, at::kLong));
    return out;
}

// What graph.h asks of a device.
struct Cpu {
    struct Guard {
        Guard(const Tensor&) {}
    };
    template <class T>
    static void run(const TripletOp& op, T* out) {
        graph_kernels<T>().triplet(op.problem<T>(), out, threads());
    }
    template <class T>
    static void run_backward(const TripletOp& op, ejmp::In<T> grad, const std::vector<Tensor>& to) {
        graph_kernels<T>().triplet_backward(op.problem<T>(), grad, data<T>(to[0]), data<T>(to[1]), data<T>(to[2]),
                                            data<T>(to[3]), threads());
    }
    template <class T>
    static void run(const QuadrupletOp& op, T* out) {
        graph_kernels<T>().quadruplet(op.problem<T>(), out, threads());
    }
    template <class T>
    static void run_backward(const QuadrupletOp& op, ejmp::In<T> grad, const std::vector<Tensor>& to) {
        graph_kernels<T>().quadruplet_backward(op.problem<T>(), grad, data<T>(to[0]), data<T>(to[1]), data<T>(to[2]),
                                               data<T>(to[3]), data<T>(to[4]), threads());
    }
    template <class T>
    static void pair(const ejmp::Pair<T>& p, T* out) {
        graph_kernels<T>().pair(p, out, threads());
    }
    template <class T>
    static void pair_backward(const PairOp&, const ejmp::Pair<T>& p, const T* grad, T* h, T* radial) {
        graph_kernels<T>().pair_backward(p, grad, h, radial, threads());
    }
};

// The product of quadruplet with a matrix, mix [out, A C], atom by atom; not differentiable.
Tensor quadruplet_mixed(const Tensor& x, const Tensor& filter, const Tensor& weight, const Tensor& v,
                        const Tensor& v_middle, const Tensor& ptr, const Tensor& source, const Tensor& image,
                        const Tensor& middle_ptr, const Tensor& middle_source, const Tensor& middle_image, double eps,
                        int64_t max_degree, const Tensor& mix) {
    const c10::IValue options[] = {eps, max_degree};
    const QuadrupletOp op({x, filter, weight, v, v_middle}, {},
                          {ptr, source, image, middle_ptr, middle_source, middle_image}, options);
    check_given(op.name, "mix", mix), check_axes(op.name, "mix", mix, 2);
    check_like(op.name, "mix", mix, x.scalar_type(), {mix.size(0), op.shape()[1]});
    const Tensor columns = mix.t().contiguous(), out = at::empty({op.shape()[0], mix.size(0)}, mix.options());
    with_real(op.name, out, [&](auto t) {
        using T = decltype(t);
        graph_kernels<T>().quadruplet_mixed(op.problem<T>(), columns.const_data_ptr<T>(), out.size(1), data<T>(out),
                                            threads());
    });
    return out;
}

constexpr int64_t MOST_EXPONENT = 64;

template <bool TRANSPOSED>
Tensor radial(const Tensor& distance_, const Tensor& offset_, const Tensor& temps_, const Tensor& x_, double cutoff,
              int64_t exponent, int64_t order) {
    const char *const op = "radial", *const name = TRANSPOSED ? "x" : "weight";
    const auto type = check_type(op, "distance", distance_);
    check_axes(op, "distance", distance_, 1), check_axes(op, "offset", offset_, 1), check_axes(op, name, x_, 2);
    const int64_t E = distance_.size(0), R = offset_.size(0);
    check_memory(op, "distance", distance_);
    check_like(op, "offset", offset_, type, {R});
    check_like(op, "temps", temps_, type, {R});
    check_like(op, name, x_, type, {TRANSPOSED ? E : R, x_.size(1)});
    TORCH_CHECK_VALUE(R <= MOST_COLUMNS, op, ": offset must have at most ", MOST_COLUMNS, " entries, got ", R);
    TORCH_CHECK_VALUE(order >= 0 && order <= 2, op, ": order must be 0, 1 or 2, got ", order);
    TORCH_CHECK_VALUE(exponent >= 2 && exponent <= MOST_EXPONENT, op, ": exponent must be in 2..", MOST_EXPONENT,
                      ", got ", exponent);
    TORCH_CHECK_VALUE(cutoff > 0 && std::isfinite(cutoff), op, ": cutoff must be positive, got ", cutoff);
    const Tensor distance = distance_.contiguous(), offset = offset_.contiguous(), temps = temps_.contiguous(),
                 x = x_.contiguous();
    const Tensor out = at::empty({TRANSPOSED ? R : E, x.size(1)}, x.options());
    with_real(op, x, [&](auto t) {
        using T = decltype(t);
        const ejmp::Radial<T> problem{E,
                                      R,
                                      x.size(1),
                                      static_cast<int>(exponent),
                                      static_cast<int>(order),
                                      cutoff,
                                      distance.const_data_ptr<T>(),
                                      offset.const_data_ptr<T>(),
                                      temps.const_data_ptr<T>()};
        const auto& kernels = graph_kernels<T>();
        (TRANSPOSED ? kernels.radial_transposed : kernels.radial)(problem, x.const_data_ptr<T>(), data<T>(out),
                                                                  threads());
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ejmp, library) {
    define_message_passing(library);
    library.def(("quadruplet_mixed(" + QUADRUPLET_ARGUMENTS + ", Tensor mix) -> Tensor").c_str());
    library.def("isa() -> str", [] { return std::string(ejmp::kernels().name); });
    const std::string radial = ", float cutoff, int exponent, int order) -> Tensor";
    library.def(("radial(Tensor distance, Tensor offset, Tensor temps, Tensor weight" + radial).c_str());
    library.def(("radial_transposed(Tensor distance, Tensor offset, Tensor temps, Tensor x" + radial).c_str());
}

TORCH_LIBRARY_IMPL(ejmp, CPU, library) {
    implement_message_passing<Cpu>(library);
    library.impl("find_neighbors", &find_neighbors);
    library.impl("quadruplet_mixed", &quadruplet_mixed);
    library.impl("radial", &radial<false>);
    library.impl("radial_transposed", &radial<true>);
}
