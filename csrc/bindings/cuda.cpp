// torch ops over cuda/ops.h: the neighbour search, message passing and atom sums on a GPU. With -DEJMP_EMULATE they are
// ejmp_emulated's on the CPU (cuda/emulate.h), for tests.
#include "../cuda/ops.h"
#include "graph.h"

#ifdef EJMP_EMULATE
#include "../cuda/emulate.h"
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using namespace ejmp::bindings;
namespace cuda = ejmp::cuda;

struct Gpu {
#ifdef EJMP_EMULATE
    struct Guard {
        Guard(const Tensor&) {}
    };
    static void* stream() { return nullptr; }
#else
    struct Guard {
        c10::cuda::CUDAGuard guard;
        Guard(const Tensor& x) : guard(x.device()) {}
    };
    static void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
#endif
    template <class T>
    static void run(const TripletOp& op, T* out) {
        cuda::triplet(op.problem<T>(), out, stream());
    }
    template <class T>
    static void run_backward(const TripletOp& op, ejmp::In<T> grad, const std::vector<Tensor>& to) {
        cuda::triplet_backward(op.problem<T>(), grad, data<T>(to[0]), data<T>(to[1]), data<T>(to[2]), data<T>(to[3]),
                               stream());
    }
    template <class T>
    static void run(const QuadrupletOp& op, T* out);
    template <class T>
    static void run_backward(const QuadrupletOp& op, ejmp::In<T> grad, const std::vector<Tensor>& to);
    template <class T>
    static void pair(const ejmp::Pair<T>& p, T* out) {
        cuda::pair(p, out, stream());
    }
    template <class T>
    static void pair_backward(const PairOp& op, const ejmp::Pair<T>& p, const T* grad, T* h, T* radial);
};

// The edges by source, in memory that lives as long as this.
struct Sorted {
    Tensor ptr, order;
    Sorted(const Tensor& source, int64_t num_atoms) {
        const auto [sources, by_source] = source.sort(c10::optional<bool>(true), 0, false);
        order = by_source;
        ptr = at::searchsorted(sources, at::arange(num_atoms + 1, source.options()));
    }
    cuda::BySource view() const { return {ptr.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>()}; }
};

// Where the values of quadruplets are kept. `count` is a bound, because the number of rows is known on the GPU only.
struct Workspace {
    Sorted middle;
    Tensor ptr, memory;
    int64_t count;
    Workspace(const QuadrupletOp& op, bool backward)
        : middle(op.middle.source.tensor, op.main.num_atoms()), count(op.max_degree * op.inputs.values[4].size(0)) {
        const Tensor rows = op.main.ptr.tensor.diff().index_select(0, op.middle.source.tensor);
        ptr = at::constant_pad_nd(rows.cumsum(0), {1, 0});
        with_real(op.name, op.inputs.values[0], [&](auto t) {
            const int64_t bytes = cuda::quadruplet_workspace<decltype(t)>(count, op.inputs.values[0].size(1), backward,
                                                                          !op.inputs.along.empty());
            memory = at::empty({bytes}, rows.options().dtype(at::kByte));
        });
    }
    cuda::MiddleRows rows() const { return {count, ptr.const_data_ptr<int64_t>(), middle.view()}; }
};

template <class T>
void Gpu::run(const QuadrupletOp& op, T* out) {
    const Workspace work(op, false);
    cuda::quadruplet(op.problem<T>(), work.rows(), out, work.memory.mutable_data_ptr(), stream());
}

template <class T>
void Gpu::run_backward(const QuadrupletOp& op, ejmp::In<T> grad, const std::vector<Tensor>& to) {
    const Workspace work(op, true);
    const cuda::QuadrupletGradients<T> gradients{data<T>(to[0]), data<T>(to[1]), data<T>(to[2]), data<T>(to[3]),
                                                 data<T>(to[4])};
    cuda::quadruplet_backward(op.problem<T>(), work.rows(), grad, gradients, work.memory.mutable_data_ptr(), stream());
}

template <class T>
void Gpu::pair_backward(const PairOp& op, const ejmp::Pair<T>& p, const T* grad, T* h, T* radial) {
    const Tensor &ptr = op.ptr.tensor, &source = op.source.tensor;
    const Tensor target = at::repeat_interleave(ptr.diff(), c10::optional<int64_t>(source.size(0)));
    const Sorted by_source(source, p.num_atoms);
    cuda::pair_backward(p, target.const_data_ptr<int64_t>(), by_source.view(), grad, h, radial, stream());
}

// x as atom sums take it: in float32 where it is stored in less
Tensor as_real(const Tensor& x) { return (x.scalar_type() == at::kDouble ? x : x.to(at::kFloat)).contiguous(); }

Tensor sum_into_atoms(const char* op, const char* name, const Tensor& x, const OptionalTensor& factor,
                      const OptionalTensor& order, const Tensor& ptr) {
    check_device(op, {name, x}, {{"factor", factor}, {"order", order}, {"ptr", ptr}});
    check_type(op, name, x, true), check_axes(op, name, x, 2), check_memory(op, name, x);
    if (factor) check_like(op, "factor", *factor, x.scalar_type(), x.sizes());
    check_ptr(op, "ptr", ptr, x.size(0));
    if (order) check_order(op, *order, x.size(0));
    const Gpu::Guard guard(x);
    const Tensor values = as_real(x), factors = factor ? as_real(*factor) : Tensor();
    const Tensor out = at::empty({ptr.size(0) - 1, x.size(1)}, values.options());
    with_real(op, values, [&](auto t) {
        using T = decltype(t);
        cuda::edge_sum(out.size(0), out.size(1), Array<T>(values).data(), factor ? Array<T>(factors).data() : nullptr,
                       Array<int64_t>(order).data(), Array<int64_t>(ptr).data(), data<T>(out), Gpu::stream());
    });
    return out;
}

Tensor atom_sum(const Tensor& m, const Tensor& factor, const Tensor& ptr) {
    return sum_into_atoms("atom_sum", "m", m, factor, c10::nullopt, ptr);
}

Tensor edge_sum(const Tensor& x, const OptionalTensor& order, const Tensor& ptr) {
    return sum_into_atoms("edge_sum", "x", x, c10::nullopt, order, ptr);
}

std::tuple<Tensor, Tensor> atom_sum_backward(const Tensor& grad_, const Tensor& m_, const Tensor& factor_,
                                             const Tensor& ptr_) {
    const char* const op = "atom_sum";
    check_device(op, {"m", m_}, {{"grad", grad_}, {"factor", factor_}, {"ptr", ptr_}});
    const auto type = check_type(op, "m", m_, true);
    check_axes(op, "m", m_, 2), check_memory(op, "m", m_);
    check_like(op, "factor", factor_, type, m_.sizes());
    check_ptr(op, "ptr", ptr_, m_.size(0));
    check_like(op, "grad", grad_, type == at::kDouble ? at::kDouble : at::kFloat, {ptr_.size(0) - 1, m_.size(1)});
    const Gpu::Guard guard(m_);
    const Tensor m = as_real(m_), factor = as_real(factor_), grad = grad_.contiguous(), ptr = ptr_.contiguous();
    const Tensor to_m = at::empty_like(m), to_factor = at::empty_like(m);
    with_real(op, m, [&](auto t) {
        using T = decltype(t);
        cuda::atom_sum_backward(grad.size(0), m.size(1), grad.const_data_ptr<T>(), m.const_data_ptr<T>(),
                                factor.const_data_ptr<T>(), ptr.const_data_ptr<int64_t>(), data<T>(to_m),
                                data<T>(to_factor), Gpu::stream());
    });
    return {to_m.to(m_.scalar_type()), to_factor.to(m_.scalar_type())};
}

// Graph building is the only op that waits for the GPU, for what the search would cost and for the numbers of edges.
std::vector<Tensor> find_neighbors(const Tensor& positions, const Tensor& cell, const Tensor& pbc, const Tensor& ptr,
                                   const Tensor& cutoff, const Tensor& limits, const Tensor& quad_atom,
                                   int64_t max_pairs) {
    std::vector<Tensor> arrays{positions, cell, pbc, ptr, cutoff, limits, quad_atom};
    check_query(arrays);
    for (Tensor& x : arrays) x = x.contiguous();
    const Gpu::Guard guard(positions);
    void* const stream = Gpu::stream();
    const int64_t B = cell.size(0), N = positions.size(0);
    const ejmp::NeighborQuery query{B,
                                    N,
                                    arrays[0].const_data_ptr<double>(),
                                    arrays[1].const_data_ptr<double>(),
                                    arrays[2].const_data_ptr<bool>(),
                                    arrays[3].const_data_ptr<int64_t>(),
                                    arrays[4].const_data_ptr<double>(),
                                    arrays[5].const_data_ptr<int64_t>(),
                                    arrays[6].const_data_ptr<bool>()};
    const auto bytes = [&](int64_t n) { return at::empty({n}, ptr.options().dtype(at::kByte)); };
    const auto ids = [&](at::IntArrayRef shape) { return at::empty(shape, ptr.options()); };

    const Tensor cells = bytes(cuda::cells_bytes(B, N)), list_ptr = ids({N + 1});
    const Tensor pairs = at::empty({B}, positions.options());
    cuda::fill_cells(query, cells.mutable_data_ptr(), data<double>(pairs), stream);
    check_pairs(pairs.cpu().const_data_ptr<double>(), B, max_pairs);
    cuda::count_neighbors(query, cells.const_data_ptr(), data<int64_t>(list_ptr), stream);
    const int64_t num_found = list_ptr[N].item<int64_t>();
    const Tensor lists = bytes(cuda::lists_bytes(num_found)), set_ptr = ids({4, N + 1});
    cuda::list_neighbors(query, cells.const_data_ptr(), list_ptr.const_data_ptr<int64_t>(), num_found,
                         lists.mutable_data_ptr(), data<int64_t>(set_ptr), stream);
    const Tensor sizes = set_ptr.select(1, N).cpu();
    std::vector<Tensor> out;
    cuda::EdgePlaces places[4];
    for (int j = 0; j < 4; ++j) {
        const int64_t num_edges = sizes[j].item<int64_t>();
        out.push_back(ids({num_edges}));
        out.push_back(at::empty({num_edges, 3}, ptr.options().dtype(at::kInt)));
        out.push_back(set_ptr[j]);
        places[j] = {data<int64_t>(out[3 * j]), data<int32_t>(out[3 * j + 1])};
    }
    out.push_back(ids({sizes[1].item<int64_t>()}));
    cuda::pack_neighbors(query, list_ptr.const_data_ptr<int64_t>(), num_found, lists.mutable_data_ptr(),
                         set_ptr.const_data_ptr<int64_t>(), places, data<int64_t>(out[12]), stream);
    return out;
}

void implement(torch::Library& library) {
    implement_message_passing<Gpu>(library);
    library.impl("find_neighbors", &find_neighbors);
    library.impl("atom_sum", &atom_sum);
    library.impl("atom_sum_backward", &atom_sum_backward);
    library.impl("edge_sum", &edge_sum);
}

}  // namespace

#ifdef EJMP_EMULATE
TORCH_LIBRARY_FRAGMENT(ejmp_emulated, library) {
    define_message_passing(library);
    define_sums(library);
    // threads per block; below zero they run in reverse order
    library.def("threads(int count) -> ()", [](int64_t count) { cuda::emulated_threads = static_cast<int>(count); });
}
TORCH_LIBRARY_IMPL(ejmp_emulated, CPU, library) { implement(library); }
#else
TORCH_LIBRARY_IMPL(ejmp, CUDA, library) { implement(library); }
#endif
