// torch ops over ops.h: the neighbour search and message passing. Only the bindings include torch.
#include "bindings.h"

#include <string>
#include <vector>

namespace {

using namespace ejmp::bindings;

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

void check_spherical(const char* op, int64_t spherical) {
    TORCH_CHECK_VALUE(spherical <= 16, op, ": at most 16 spherical functions, got ", spherical);
}

struct IncomingTensors {
    Array<int64_t> ptr, source, image;
    IncomingTensors(const char* op, const Tensor& p, const Tensor& s, const Tensor& i, int64_t num_edges)
        : ptr(p), source(s), image(i) {
        check_ptr(op, "ptr", ptr.tensor, num_edges);
        check_ids(op, "source", source.tensor, num_edges, ptr.tensor.size(0) - 1);
        check_like(op, "image", image.tensor, at::kLong, {num_edges});
    }
    ejmp::Incoming view() const { return {ptr.data(), source.data(), image.data()}; }
    int64_t num_atoms() const { return ptr.tensor.size(0) - 1; }
};

// The differentiable inputs of an op, and in its second backward the directions.
struct Inputs {
    std::vector<Tensor> values, along;
    Inputs(const char* op, std::vector<Tensor> v, std::vector<Tensor> u = {})
        : values(std::move(v)), along(std::move(u)) {
        for (Tensor& x : values) x = x.contiguous();
        for (size_t i = 0; i < along.size(); ++i) {
            along[i] = along[i].contiguous();
            check_like(op, "direction", along[i], values[0].scalar_type(), values[i].sizes());
        }
    }
    template <class T>
    ejmp::In<T> in(size_t i) const {
        return {values[i].const_data_ptr<T>(), along.empty() ? nullptr : along[i].const_data_ptr<T>()};
    }
    std::vector<Tensor> like() const {
        std::vector<Tensor> made;
        for (const Tensor& x : values) made.push_back(at::empty_like(x));
        return made;
    }
};

struct TripletOp {
    using Option = bool;
    static constexpr const char* name = "triplet";
    Inputs inputs;  // x, weight, v_out, v_in
    IncomingTensors out, in;
    bool to_atoms;

    TripletOp(const std::vector<Tensor>& values, const std::vector<Tensor>& along, const std::vector<Tensor>& ids,
              bool to_atoms)
        : inputs(name, values, along),
          out(name, ids[0], ids[1], ids[2], values[2].size(0)),
          in(name, ids[3], ids[4], ids[5], values[3].size(0)),
          to_atoms(to_atoms) {
        const auto type = values[0].scalar_type();
        check_size(name, "x", values[0], 2), check_size(name, "weight", values[1], 3);
        check_spherical(name, values[1].size(2));
        const int64_t num_out = values[2].size(0), num_in = values[3].size(0);
        check_like(name, "x", values[0], type, {num_in, values[0].size(1)});
        check_like(name, "weight", values[1], type, {num_out, values[1].size(1), values[1].size(2)});
        check_like(name, "v_out", values[2], type, {num_out, 3});
        check_like(name, "v_in", values[3], type, {num_in, 3});
        TORCH_CHECK_VALUE(out.num_atoms() == in.num_atoms(), name, ": both ptr must have the same length");
    }
    std::vector<int64_t> shape() const {
        const Tensor &x = inputs.values[0], &w = inputs.values[1];
        return {to_atoms ? out.num_atoms() : w.size(0), w.size(1) * x.size(1)};
    }
    template <class T>
    ejmp::Triplet<T> problem() const {
        const Tensor &x = inputs.values[0], &w = inputs.values[1];
        return {out.num_atoms(), x.size(1),       w.size(1),       w.size(2),       to_atoms,       out.view(),
                in.view(),       inputs.in<T>(0), inputs.in<T>(1), inputs.in<T>(2), inputs.in<T>(3)};
    }
    template <class T>
    void run(T* result) const {
        graph_kernels<T>().triplet(problem<T>(), result, threads());
    }
    template <class T>
    void run_backward(ejmp::In<T> grad, const std::vector<Tensor>& to) const {
        graph_kernels<T>().triplet_backward(problem<T>(), grad, data<T>(to[0]), data<T>(to[1]), data<T>(to[2]),
                                            data<T>(to[3]), threads());
    }
};

struct QuadrupletOp {
    using Option = double;
    static constexpr const char* name = "quadruplet";
    Inputs inputs;  // x, filter, weight, v, v_middle
    IncomingTensors main, middle;
    double eps;
    int64_t first_atom = 0, last_atom;

    QuadrupletOp(const std::vector<Tensor>& values, const std::vector<Tensor>& along, const std::vector<Tensor>& ids,
                 double eps)
        : inputs(name, values, along),
          main(name, ids[0], ids[1], ids[2], values[3].size(0)),
          middle(name, ids[3], ids[4], ids[5], values[4].size(0)),
          eps(eps),
          last_atom(main.num_atoms()) {
        const auto type = values[0].scalar_type();
        check_size(name, "x", values[0], 2), check_size(name, "filter", values[1], 3);
        check_spherical(name, values[1].size(1));
        check_size(name, "weight", values[2], 3);
        const int64_t E = values[3].size(0), Q = values[4].size(0), S = values[1].size(1), C = values[0].size(1);
        check_like(name, "x", values[0], type, {E, C});
        check_like(name, "filter", values[1], type, {Q, S, C});
        check_like(name, "weight", values[2], type, {E, values[2].size(1), S * S});
        check_like(name, "v", values[3], type, {E, 3});
        check_like(name, "v_middle", values[4], type, {Q, 3});
        TORCH_CHECK_VALUE(main.num_atoms() == middle.num_atoms(), name, ": both ptr must have the same length");
        TORCH_CHECK_VALUE(eps > 0, name, ": eps must be positive, got ", eps);
    }
    std::vector<int64_t> shape() const {
        const Tensor &x = inputs.values[0], &w = inputs.values[2];
        const int64_t* const ptr = main.ptr.data();
        return {ptr[last_atom] - ptr[first_atom], w.size(1) * x.size(1)};
    }
    template <class T>
    ejmp::Quadruplet<T> problem() const {
        const Tensor &x = inputs.values[0], &filter = inputs.values[1], &w = inputs.values[2];
        return {main.num_atoms(), x.size(1),       w.size(1),       filter.size(1), first_atom,
                last_atom,        T(eps),          main.view(),     middle.view(),  inputs.in<T>(0),
                inputs.in<T>(1),  inputs.in<T>(2), inputs.in<T>(3), inputs.in<T>(4)};
    }
    template <class T>
    void run(T* result) const {
        graph_kernels<T>().quadruplet(problem<T>(), result, threads());
    }
    template <class T>
    void run_backward(ejmp::In<T> grad, const std::vector<Tensor>& to) const {
        graph_kernels<T>().quadruplet_backward(problem<T>(), grad, data<T>(to[0]), data<T>(to[1]), data<T>(to[2]),
                                               data<T>(to[3]), data<T>(to[4]), threads());
    }
};

template <class Op>
Tensor forward(const Op& op) {
    const Tensor out = at::empty(op.shape(), op.inputs.values[0].options());
    with_real(Op::name, out, [&](auto t) { op.template run<decltype(t)>(data<decltype(t)>(out)); });
    return out;
}

template <class Op>
std::vector<Tensor> backward(const Op& op, const Tensor& grad_tensor) {
    const Tensor grad = grad_tensor.contiguous();
    check_like(Op::name, "grad", grad, op.inputs.values[0].scalar_type(), op.shape());
    const std::vector<Tensor> to = op.inputs.like();
    with_real(Op::name, grad, [&](auto t) {
        using T = decltype(t);
        op.template run_backward<T>(ejmp::In<T>{grad.const_data_ptr<T>(), nullptr}, to);
    });
    return to;
}

// Boxed kernels. The stack holds (directions, grad, inputs, index tensors, option) without what an op does not take:
// an op takes no grad and no directions, its backward no directions.
template <class Op, int NUM_INPUTS, int LEVEL>
void boxed(const c10::OperatorHandle&, torch::jit::Stack* stack) {
    constexpr int NUM_IDS = 6;
    const size_t first = stack->size() - (NUM_INPUTS + NUM_IDS + 1) - (LEVEL > 0) - (LEVEL > 1) * NUM_INPUTS;
    size_t next = first;
    const auto take = [&](int count) {
        std::vector<Tensor> taken;
        for (int i = 0; i < count; ++i) taken.push_back((*stack)[next++].toTensor());
        return taken;
    };
    const std::vector<Tensor> along = take(LEVEL > 1 ? NUM_INPUTS : 0), grad = take(LEVEL > 0),
                              inputs = take(NUM_INPUTS), ids = take(NUM_IDS);
    const Op op(inputs, along, ids, (*stack)[next].template to<typename Op::Option>());
    std::vector<Tensor> out;
    if (LEVEL != 1) out.push_back(forward(op));
    if (LEVEL > 0)
        for (Tensor& x : backward(op, grad[0])) out.push_back(x);
    stack->resize(first);
    for (Tensor& x : out) stack->emplace_back(std::move(x));
}

// The rows of quadruplet that belong to some atoms; not differentiable.
Tensor quadruplet_part(const Tensor& x, const Tensor& filter, const Tensor& weight, const Tensor& v,
                       const Tensor& v_middle, const Tensor& ptr, const Tensor& source, const Tensor& image,
                       const Tensor& middle_ptr, const Tensor& middle_source, const Tensor& middle_image, double eps,
                       int64_t first, int64_t last) {
    QuadrupletOp op({x, filter, weight, v, v_middle}, {}, {ptr, source, image, middle_ptr, middle_source, middle_image},
                    eps);
    TORCH_CHECK_VALUE(0 <= first && first <= last && last <= op.last_atom, "quadruplet: atoms must be in 0..",
                      op.last_atom);
    op.first_atom = first, op.last_atom = last;
    return forward(op);
}

// ---- ops that are linear in each input: their second backward is made of themselves ----

struct PairOp {
    Array<int64_t> ptr, source;
    PairOp(const Tensor& h, const Tensor& radial, const Tensor& ptr_, const Tensor& source_)
        : ptr(ptr_), source(source_) {
        check_size("pair", "h", h, 2), check_size("pair", "radial", radial, 2);
        check_like("pair", "radial", radial, h.scalar_type(), {radial.size(0), radial.size(1)});
        check_ptr("pair", "ptr", ptr.tensor, radial.size(0));
        check_ids("pair", "source", source.tensor, radial.size(0), h.size(0));
        TORCH_CHECK_VALUE(ptr.tensor.size(0) == h.size(0) + 1, "pair: ptr must have one entry more than h has rows");
    }
    template <class T>
    ejmp::Pair<T> problem(const Tensor& h, const Tensor& radial) const {
        return {h.size(0),
                h.size(1),
                radial.size(1),
                ptr.data(),
                source.data(),
                h.const_data_ptr<T>(),
                radial.const_data_ptr<T>()};
    }
};

Tensor pair(const Tensor& h_, const Tensor& radial_, const Tensor& ptr, const Tensor& source) {
    const Tensor h = h_.contiguous(), radial = radial_.contiguous();
    const PairOp op(h, radial, ptr, source);
    const Tensor out = at::empty({h.size(0), radial.size(1) * h.size(1)}, h.options());
    with_real("pair", h, [&](auto t) {
        using T = decltype(t);
        graph_kernels<T>().pair(op.problem<T>(h, radial), data<T>(out), threads());
    });
    return out;
}

std::tuple<Tensor, Tensor> pair_backward(const Tensor& grad_, const Tensor& h_, const Tensor& radial_,
                                         const Tensor& ptr, const Tensor& source) {
    const Tensor grad = grad_.contiguous(), h = h_.contiguous(), radial = radial_.contiguous();
    const PairOp op(h, radial, ptr, source);
    check_like("pair", "grad", grad, h.scalar_type(), {h.size(0), radial.size(1) * h.size(1)});
    const Tensor to_h = at::empty_like(h), to_radial = at::empty_like(radial);
    with_real("pair", h, [&](auto t) {
        using T = decltype(t);
        graph_kernels<T>().pair_backward(op.problem<T>(h, radial), grad.const_data_ptr<T>(), data<T>(to_h),
                                         data<T>(to_radial), threads());
    });
    return {to_h, to_radial};
}

template <bool TRANSPOSED>
Tensor radial(const Tensor& distance_, const Tensor& offset_, const Tensor& temps_, const Tensor& x_, double cutoff,
              int64_t exponent, int64_t order) {
    const Tensor distance = distance_.contiguous(), offset = offset_.contiguous(), temps = temps_.contiguous(),
                 x = x_.contiguous();
    const char* const op = "radial";
    const auto type = distance.scalar_type();
    check_size(op, "distance", distance, 1), check_size(op, "offset", offset, 1), check_size(op, "x", x, 2);
    const int64_t E = distance.size(0), R = offset.size(0);
    check_like(op, "offset", offset, type, {R});
    check_like(op, "temps", temps, type, {R});
    check_like(op, TRANSPOSED ? "x" : "weight", x, type, {TRANSPOSED ? E : R, x.size(1)});
    TORCH_CHECK_VALUE(order >= 0 && order <= 2, "radial: only derivatives up to the second are there, got ", order);
    TORCH_CHECK_VALUE(exponent >= 2 && cutoff > 0, "radial: exponent must be 2 or more and cutoff positive");
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
    library.def(
        "find_neighbors(Tensor positions, Tensor cell, Tensor pbc, Tensor ptr, Tensor cutoff, Tensor limits, "
        "Tensor quad_atom) -> Tensor[]");
    library.def("isa() -> str", [] { return std::string(ejmp::kernels().name); });

    const std::string triplet =
        "Tensor x, Tensor weight, Tensor v_out, Tensor v_in, Tensor out_ptr, Tensor out_source, Tensor out_image, "
        "Tensor in_ptr, Tensor in_source, Tensor in_image, bool to_atoms)";
    const auto def = [&](const std::string& schema) { library.def(schema.c_str()); };
    def("triplet(" + triplet + " -> Tensor");
    def("triplet_backward(Tensor grad, " + triplet + " -> (Tensor, Tensor, Tensor, Tensor)");
    def("triplet_double(Tensor u_x, Tensor u_weight, Tensor u_v_out, Tensor u_v_in, Tensor grad, " + triplet +
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    const std::string quadruplet =
        "Tensor x, Tensor filter, Tensor weight, Tensor v, Tensor v_middle, Tensor ptr, Tensor source, Tensor image, "
        "Tensor middle_ptr, Tensor middle_source, Tensor middle_image, float eps";
    def("quadruplet(" + quadruplet + ") -> Tensor");
    def("quadruplet_part(" + quadruplet + ", int first, int last) -> Tensor");
    def("quadruplet_backward(Tensor grad, " + quadruplet + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    def("quadruplet_double(Tensor u_x, Tensor u_filter, Tensor u_weight, Tensor u_v, Tensor u_v_middle, Tensor grad, " +
        quadruplet + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def("pair(Tensor h, Tensor radial, Tensor ptr, Tensor source) -> Tensor");
    library.def("pair_backward(Tensor grad, Tensor h, Tensor radial, Tensor ptr, Tensor source) -> (Tensor, Tensor)");
    const std::string radial = ", float cutoff, int exponent, int order) -> Tensor";
    def("radial(Tensor distance, Tensor offset, Tensor temps, Tensor weight" + radial);
    def("radial_transposed(Tensor distance, Tensor offset, Tensor temps, Tensor x" + radial);
}

TORCH_LIBRARY_IMPL(ejmp, CPU, library) {
    using torch::CppFunction;
    library.impl("find_neighbors", &find_neighbors);
    library.impl("triplet", CppFunction::makeFromBoxedFunction<&boxed<TripletOp, 4, 0>>());
    library.impl("triplet_backward", CppFunction::makeFromBoxedFunction<&boxed<TripletOp, 4, 1>>());
    library.impl("triplet_double", CppFunction::makeFromBoxedFunction<&boxed<TripletOp, 4, 2>>());
    library.impl("quadruplet", CppFunction::makeFromBoxedFunction<&boxed<QuadrupletOp, 5, 0>>());
    library.impl("quadruplet_backward", CppFunction::makeFromBoxedFunction<&boxed<QuadrupletOp, 5, 1>>());
    library.impl("quadruplet_double", CppFunction::makeFromBoxedFunction<&boxed<QuadrupletOp, 5, 2>>());
    library.impl("quadruplet_part", &quadruplet_part);
    library.impl("pair", &pair);
    library.impl("pair_backward", &pair_backward);
    library.impl("radial", &radial<false>);
    library.impl("radial_transposed", &radial<true>);
}
