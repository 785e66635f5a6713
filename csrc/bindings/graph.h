// What the bindings of message passing share between the CPU and a GPU: checked arguments, results, schemas. A Device
// has run and run_backward of each op.
#pragma once

#include <string>
#include <vector>

#include "common.h"

namespace ejmp::bindings {

using Options = c10::ArrayRef<c10::IValue>;

inline void check_spherical(const char* op, int64_t spherical) {
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
    static constexpr const char* name = "triplet";
    static constexpr int num_inputs = 4, num_options = 1;
    Inputs inputs;  // x, weight, v_out, v_in
    IncomingTensors out, in;
    bool to_atoms;

    TripletOp(const std::vector<Tensor>& values, const std::vector<Tensor>& along, const std::vector<Tensor>& ids,
              Options options)
        : inputs(name, values, along),
          out(name, ids[0], ids[1], ids[2], values[2].size(0)),
          in(name, ids[3], ids[4], ids[5], values[3].size(0)),
          to_atoms(options[0].toBool()) {
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
};

struct QuadrupletOp {
    static constexpr const char* name = "quadruplet";
    static constexpr int num_inputs = 5, num_options = 2;
    Inputs inputs;  // x, filter, weight, v, v_middle
    IncomingTensors main, middle;
    double eps;
    int64_t max_degree;  // the most main edges into one atom: how much memory a GPU takes, which cannot ask
    int64_t first_atom = 0, last_atom;

    QuadrupletOp(const std::vector<Tensor>& values, const std::vector<Tensor>& along, const std::vector<Tensor>& ids,
                 Options options)
        : inputs(name, values, along),
          main(name, ids[0], ids[1], ids[2], values[3].size(0)),
          middle(name, ids[3], ids[4], ids[5], values[4].size(0)),
          eps(options[0].toDouble()),
          max_degree(options[1].toInt()),
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
        const bool all = first_atom == 0 && last_atom == main.num_atoms();
        const int64_t rows = all ? w.size(0) : main.ptr.data()[last_atom] - main.ptr.data()[first_atom];
        return {rows, w.size(1) * x.size(1)};
    }
    template <class T>
    ejmp::Quadruplet<T> problem() const {
        const Tensor &x = inputs.values[0], &filter = inputs.values[1], &w = inputs.values[2];
        return {main.num_atoms(), x.size(1),       w.size(1),       filter.size(1), first_atom,
                last_atom,        T(eps),          main.view(),     middle.view(),  inputs.in<T>(0),
                inputs.in<T>(1),  inputs.in<T>(2), inputs.in<T>(3), inputs.in<T>(4)};
    }
};

template <class Device, class Op>
Tensor forward(const Op& op) {
    const Tensor out = at::empty(op.shape(), op.inputs.values[0].options());
    with_real(Op::name, out, [&](auto t) { Device::run(op, data<decltype(t)>(out)); });
    return out;
}

template <class Device, class Op>
std::vector<Tensor> backward(const Op& op, const Tensor& grad_tensor) {
    const Tensor grad = grad_tensor.contiguous();
    check_like(Op::name, "grad", grad, op.inputs.values[0].scalar_type(), op.shape());
    const std::vector<Tensor> to = op.inputs.like();
    with_real(Op::name, grad, [&](auto t) {
        using T = decltype(t);
        Device::run_backward(op, ejmp::In<T>{grad.const_data_ptr<T>(), nullptr}, to);
    });
    return to;
}

// Boxed kernels. The stack holds (directions, grad, inputs, index tensors, options) without what an op does not take:
// an op takes no grad and no directions, its backward no directions.
template <class Device, class Op, int LEVEL>
void boxed(const c10::OperatorHandle&, torch::jit::Stack* stack) {
    constexpr int NUM_IDS = 6, NUM_INPUTS = Op::num_inputs;
    const size_t last = stack->size() - Op::num_options;
    const size_t first = last - (NUM_INPUTS + NUM_IDS) - (LEVEL > 0) - (LEVEL > 1) * NUM_INPUTS;
    size_t next = first;
    const auto take = [&](int count) {
        std::vector<Tensor> taken;
        for (int i = 0; i < count; ++i) taken.push_back((*stack)[next++].toTensor());
        check_device(Op::name, (*stack)[first].toTensor(), taken);
        return taken;
    };
    const std::vector<Tensor> along = take(LEVEL > 1 ? NUM_INPUTS : 0), grad = take(LEVEL > 0),
                              inputs = take(NUM_INPUTS), ids = take(NUM_IDS);
    const Op op(inputs, along, ids, Options(*stack).slice(last));
    const typename Device::Guard guard(inputs[0]);
    std::vector<Tensor> out;
    if (LEVEL != 1) out.push_back(forward<Device>(op));
    if (LEVEL > 0)
        for (Tensor& x : backward<Device>(op, grad[0])) out.push_back(x);
    stack->resize(first);
    for (Tensor& x : out) stack->emplace_back(std::move(x));
}

// Pair sums are linear in each input: their second backward is made of themselves.

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

template <class Device>
Tensor pair(const Tensor& h_, const Tensor& radial_, const Tensor& ptr, const Tensor& source) {
    const Tensor h = h_.contiguous(), radial = radial_.contiguous();
    check_device("pair", h, {radial, ptr, source});
    const PairOp op(h, radial, ptr, source);
    const typename Device::Guard guard(h);
    const Tensor out = at::empty({h.size(0), radial.size(1) * h.size(1)}, h.options());
    with_real("pair", h, [&](auto t) {
        using T = decltype(t);
        Device::pair(op.problem<T>(h, radial), data<T>(out));
    });
    return out;
}

template <class Device>
std::tuple<Tensor, Tensor> pair_backward(const Tensor& grad_, const Tensor& h_, const Tensor& radial_,
                                         const Tensor& ptr, const Tensor& source) {
    const Tensor grad = grad_.contiguous(), h = h_.contiguous(), radial = radial_.contiguous();
    check_device("pair", h, {grad, radial, ptr, source});
    const PairOp op(h, radial, ptr, source);
    const typename Device::Guard guard(h);
    check_like("pair", "grad", grad, h.scalar_type(), {h.size(0), radial.size(1) * h.size(1)});
    const Tensor to_h = at::empty_like(h), to_radial = at::empty_like(radial);
    with_real("pair", h, [&](auto t) {
        using T = decltype(t);
        Device::pair_backward(op, op.problem<T>(h, radial), grad.const_data_ptr<T>(), data<T>(to_h),
                              data<T>(to_radial));
    });
    return {to_h, to_radial};
}

// The arguments of find_neighbors in order.
inline void check_query(const std::vector<Tensor>& query) {
    const char* const op = "find_neighbors";
    check_size(op, "positions", query[0], 2), check_size(op, "cell", query[1], 3);
    const int64_t N = query[0].size(0), B = query[1].size(0);
    check_like(op, "positions", query[0], at::kDouble, {N, 3});
    check_like(op, "cell", query[1], at::kDouble, {B, 3, 3});
    check_like(op, "pbc", query[2], at::kBool, {B, 3});
    check_like(op, "ptr", query[3], at::kLong, {B + 1});
    check_like(op, "cutoff", query[4], at::kDouble, {B});
    check_like(op, "limits", query[5], at::kLong, {B, 4});
    check_like(op, "quad_atom", query[6], at::kBool, {N});
    check_device(op, query[0], query);
}

inline const std::string QUADRUPLET_ARGUMENTS =
    "Tensor x, Tensor filter, Tensor weight, Tensor v, Tensor v_middle, Tensor ptr, Tensor source, Tensor image, "
    "Tensor middle_ptr, Tensor middle_source, Tensor middle_image, float eps, int max_degree";

inline void define_message_passing(torch::Library& library) {
    library.def(
        "find_neighbors(Tensor positions, Tensor cell, Tensor pbc, Tensor ptr, Tensor cutoff, Tensor limits, "
        "Tensor quad_atom) -> Tensor[]");
    const std::string triplet =
        "Tensor x, Tensor weight, Tensor v_out, Tensor v_in, Tensor out_ptr, Tensor out_source, Tensor out_image, "
        "Tensor in_ptr, Tensor in_source, Tensor in_image, bool to_atoms)";
    const auto def = [&](const std::string& schema) { library.def(schema.c_str()); };
    def("triplet(" + triplet + " -> Tensor");
    def("triplet_backward(Tensor grad, " + triplet + " -> (Tensor, Tensor, Tensor, Tensor)");
    def("triplet_double(Tensor u_x, Tensor u_weight, Tensor u_v_out, Tensor u_v_in, Tensor grad, " + triplet +
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    const std::string& quadruplet = QUADRUPLET_ARGUMENTS;
    def("quadruplet(" + quadruplet + ") -> Tensor");
    def("quadruplet_backward(Tensor grad, " + quadruplet + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    def("quadruplet_double(Tensor u_x, Tensor u_filter, Tensor u_weight, Tensor u_v, Tensor u_v_middle, Tensor grad, " +
        quadruplet + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def("pair(Tensor h, Tensor radial, Tensor ptr, Tensor source) -> Tensor");
    library.def("pair_backward(Tensor grad, Tensor h, Tensor radial, Tensor ptr, Tensor source) -> (Tensor, Tensor)");
}

template <class Device>
void implement_message_passing(torch::Library& library) {
    using torch::CppFunction;
    library.impl("triplet", CppFunction::makeFromBoxedFunction<&boxed<Device, TripletOp, 0>>());
    library.impl("triplet_backward", CppFunction::makeFromBoxedFunction<&boxed<Device, TripletOp, 1>>());
    library.impl("triplet_double", CppFunction::makeFromBoxedFunction<&boxed<Device, TripletOp, 2>>());
    library.impl("quadruplet", CppFunction::makeFromBoxedFunction<&boxed<Device, QuadrupletOp, 0>>());
    library.impl("quadruplet_backward", CppFunction::makeFromBoxedFunction<&boxed<Device, QuadrupletOp, 1>>());
    library.impl("quadruplet_double", CppFunction::makeFromBoxedFunction<&boxed<Device, QuadrupletOp, 2>>());
    library.impl("pair", &pair<Device>);
    library.impl("pair_backward", &pair_backward<Device>);
}

}  // namespace ejmp::bindings
