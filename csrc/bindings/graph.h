// What the bindings of message passing share between the CPU and a GPU: checked arguments, results, schemas. A Device
// has run and run_backward of each op.
#pragma once

#include <string>
#include <vector>

#include "common.h"

namespace ejmp::bindings {

using Options = c10::ArrayRef<c10::IValue>;

constexpr double MOST_CUTOFF = 1e6;  // A; lengths are compared in units of 1e-6 A

inline void check_spherical(const char* op, const char* name, int64_t spherical) {
    TORCH_CHECK_VALUE(spherical <= 16, op, ": ", name, " must have at most 16 spherical functions, got ", spherical);
}

struct IncomingTensors {
    Array<int64_t> ptr, source, image;
    IncomingTensors() = default;
    // names and tensors of ptr, source, image
    IncomingTensors(const char* op, const char* const (&names)[3], const Tensor* ids, int64_t num_edges) {
        check_ptr(op, names[0], ids[0], num_edges);
        check_ids(op, names[1], ids[1], num_edges, ids[0].size(0) - 1);
        check_range(op, names[2], ids[2], num_edges, -MOST_IMAGE, MOST_IMAGE);
        ptr = ids[0], source = ids[1], image = ids[2];
    }
    ejmp::Incoming view() const { return {ptr.data(), source.data(), image.data()}; }
    int64_t num_atoms() const { return ptr.tensor.size(0) - 1; }
    // The most edges into one atom, on the CPU.
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t n = 0; n < num_atoms(); ++n) most = std::max(most, ptr.data()[n + 1] - ptr.data()[n]);
        return most;
    }
};

// The differentiable inputs of an op, and in its second backward the directions.
struct Inputs {
    std::vector<Tensor> values, along;
    Inputs() = default;
    // values are checked already, and along is not
    Inputs(const char* op, const char* const* names, const std::vector<Tensor>& v, const std::vector<Tensor>& u) {
        for (size_t i = 0; i < u.size(); ++i)
            check_like(op, (std::string("u_") + names[i]).c_str(), u[i], v[0].scalar_type(), v[i].sizes());
        for (const Tensor& x : v) values.push_back(x.contiguous());
        for (const Tensor& x : u) along.push_back(x.contiguous());
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
    static constexpr const char* input_names[] = {"x", "weight", "v_out", "v_in"};
    Inputs inputs;
    IncomingTensors out, in;
    bool to_atoms;

    TripletOp(const std::vector<Tensor>& values, const std::vector<Tensor>& along, const std::vector<Tensor>& ids,
              Options options)
        : to_atoms(options[0].toBool()) {
        const Tensor &x = values[0], &weight = values[1], &v_out = values[2], &v_in = values[3];
        const auto type = check_type(name, "x", x);
        check_axes(name, "x", x, 2), check_axes(name, "weight", weight, 3);
        check_axes(name, "v_out", v_out, 2), check_axes(name, "v_in", v_in, 2);
        check_spherical(name, "weight", weight.size(2));
        const int64_t num_out = v_out.size(0), num_in = v_in.size(0);
        check_like(name, "x", x, type, {num_in, x.size(1)});
        check_like(name, "weight", weight, type, {num_out, weight.size(1), weight.size(2)});
        check_like(name, "v_out", v_out, type, {num_out, 3});
        check_like(name, "v_in", v_in, type, {num_in, 3});
        out = IncomingTensors(name, {"out_ptr", "out_source", "out_image"}, &ids[0], num_out);
        in = IncomingTensors(name, {"in_ptr", "in_source", "in_image"}, &ids[3], num_in);
        TORCH_CHECK_VALUE(out.num_atoms() == in.num_atoms(), name, ": in_ptr must be as long as out_ptr, ",
                          ids[0].size(0), ", got ", ids[3].size(0));
        inputs = Inputs(name, input_names, values, along);
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
    static constexpr const char* input_names[] = {"x", "filter", "weight", "v", "v_middle"};
    Inputs inputs;
    IncomingTensors main, middle;
    double eps;
    int64_t max_degree;  // the most main edges into one atom: how much memory a GPU takes, which cannot ask

    QuadrupletOp(const std::vector<Tensor>& values, const std::vector<Tensor>& along, const std::vector<Tensor>& ids,
                 Options options)
        : eps(options[0].toDouble()), max_degree(options[1].toInt()) {
        const Tensor &x = values[0], &filter = values[1], &weight = values[2], &v = values[3], &v_middle = values[4];
        const auto type = check_type(name, "x", x);
        check_axes(name, "x", x, 2), check_axes(name, "filter", filter, 3), check_axes(name, "weight", weight, 3);
        check_axes(name, "v", v, 2), check_axes(name, "v_middle", v_middle, 2);
        check_spherical(name, "filter", filter.size(1));
        const int64_t E = v.size(0), Q = v_middle.size(0), S = filter.size(1), C = x.size(1);
        check_like(name, "x", x, type, {E, C});
        check_like(name, "filter", filter, type, {Q, S, C});
        check_like(name, "weight", weight, type, {E, weight.size(1), S * S});
        check_like(name, "v", v, type, {E, 3});
        check_like(name, "v_middle", v_middle, type, {Q, 3});
        main = IncomingTensors(name, {"ptr", "source", "image"}, &ids[0], E);
        middle = IncomingTensors(name, {"middle_ptr", "middle_source", "middle_image"}, &ids[3], Q);
        TORCH_CHECK_VALUE(main.num_atoms() == middle.num_atoms(), name, ": middle_ptr must be as long as ptr, ",
                          ids[0].size(0), ", got ", ids[3].size(0));
        TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), name, ": eps must be positive, got ", eps);
        check_max_degree();
        inputs = Inputs(name, input_names, values, along);
    }
    void check_max_degree() {
        const int64_t least = main.ptr.tensor.is_cpu() ? main.longest() : 0;
        TORCH_CHECK_VALUE(max_degree >= least, name, ": max_degree must be the most main edges into one atom, ", least,
                          " or more, got ", max_degree);
        max_degree = std::min(max_degree, main.source.tensor.size(0));
    }
    std::vector<int64_t> shape() const {
        const Tensor &x = inputs.values[0], &w = inputs.values[2];
        return {w.size(0), w.size(1) * x.size(1)};
    }
    template <class T>
    ejmp::Quadruplet<T> problem() const {
        const Tensor &x = inputs.values[0], &filter = inputs.values[1], &w = inputs.values[2];
        return {main.num_atoms(), x.size(1),       w.size(1),       filter.size(1),  T(eps),          main.view(),
                middle.view(),    inputs.in<T>(0), inputs.in<T>(1), inputs.in<T>(2), inputs.in<T>(3), inputs.in<T>(4)};
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
    check_like(Op::name, "grad", grad_tensor, op.inputs.values[0].scalar_type(), op.shape());
    const Tensor grad = grad_tensor.contiguous();
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
void boxed(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
    constexpr int NUM_IDS = 6, NUM_INPUTS = Op::num_inputs;
    const size_t last = stack->size() - Op::num_options;
    const size_t first = last - (NUM_INPUTS + NUM_IDS) - (LEVEL > 0) - (LEVEL > 1) * NUM_INPUTS;
    size_t next = first;
    const auto take = [&](int count) {
        std::vector<Tensor> taken;
        for (int i = 0; i < count; ++i, ++next) {
            taken.push_back((*stack)[next].toTensor());
            const auto& arguments = handle.schema().arguments();
            check_device(Op::name, {arguments[0].name().c_str(), (*stack)[first].toTensor()},
                         {{arguments[next - first].name().c_str(), taken.back()}});
        }
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
    PairOp(const Tensor& h, const Tensor& radial, const Tensor& ptr_, const Tensor& source_) {
        const char* const op = "pair";
        check_device(op, {"h", h}, {{"radial", radial}, {"ptr", ptr_}, {"source", source_}});
        const auto type = check_type(op, "h", h);
        check_axes(op, "h", h, 2), check_axes(op, "radial", radial, 2);
        check_memory(op, "h", h);
        check_like(op, "radial", radial, type, radial.sizes());
        check_ptr(op, "ptr", ptr_, radial.size(0));
        check_ids(op, "source", source_, radial.size(0), h.size(0));
        TORCH_CHECK_VALUE(ptr_.size(0) == h.size(0) + 1, op, ": ptr must have one entry more than h has rows, ",
                          h.size(0) + 1, ", got ", ptr_.size(0));
        ptr = ptr_, source = source_;
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
    const PairOp op(h_, radial_, ptr, source);
    const Tensor h = h_.contiguous(), radial = radial_.contiguous();
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
    const PairOp op(h_, radial_, ptr, source);
    check_device("pair", {"h", h_}, {{"grad", grad_}});
    check_like("pair", "grad", grad_, h_.scalar_type(), {h_.size(0), radial_.size(1) * h_.size(1)});
    const typename Device::Guard guard(h_);
    const Tensor grad = grad_.contiguous(), h = h_.contiguous(), radial = radial_.contiguous();
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
    static const char* const names[] = {"positions", "cell", "pbc", "ptr", "cutoff", "limits", "quad_atom"};
    for (size_t i = 1; i < query.size(); ++i) check_device(op, {names[0], query[0]}, {{names[i], query[i]}});
    check_axes(op, "positions", query[0], 2), check_axes(op, "cell", query[1], 3);
    const int64_t N = query[0].size(0), B = query[1].size(0);
    check_like(op, "positions", query[0], at::kDouble, {N, 3});
    check_like(op, "cell", query[1], at::kDouble, {B, 3, 3});
    check_like(op, "pbc", query[2], at::kBool, {B, 3});
    check_like(op, "ptr", query[3], at::kLong, {B + 1});
    check_like(op, "cutoff", query[4], at::kDouble, {B});
    check_like(op, "limits", query[5], at::kLong, {B, 4});
    check_like(op, "quad_atom", query[6], at::kBool, {N});
    check_ptr(op, "ptr", query[3], N);
    if (!query[0].is_cpu()) return;
    const Tensor cutoff = query[4].contiguous(), limits = query[5].contiguous();
    for (int64_t b = 0; b < B; ++b) {
        const double most = cutoff.const_data_ptr<double>()[b];
        TORCH_CHECK_VALUE(most >= 0 && most <= MOST_CUTOFF, op, ": cutoff must be in 0..", MOST_CUTOFF, " A, got ",
                          most);
        const int64_t* const k = limits.const_data_ptr<int64_t>() + 4 * b;
        TORCH_CHECK_VALUE(*std::min_element(k, k + 4) >= 0 && *std::max_element(k, k + 4) == k[0], op,
                          ": limits must not be negative, and the first the largest");
    }
}

// Refuse a search before it begins, if there are too many pairs of atoms; pairs [B] is not a number for what is none.
inline void check_pairs(const double* pairs, int64_t num_structures, int64_t max_pairs) {
    TORCH_CHECK_VALUE(max_pairs > 0, "find_neighbors: max_pairs must be positive, got ", max_pairs);
    double total = 0;
    int64_t largest = 0;
    for (int64_t b = 0; b < num_structures; ++b) {
        TORCH_CHECK_VALUE(pairs[b] >= 0, "structure ", b, ": find_neighbors: positions, cell and cutoff must be finite",
                          ", the cell must have a volume, and no atom may be far outside it");
        total += pairs[b];
        if (pairs[b] > pairs[largest]) largest = b;
    }
    TORCH_CHECK_VALUE(total <= static_cast<double>(max_pairs), "structure ", largest, ": cutoff: about ",
                      pairs[largest], " pairs of atoms are within reach (", total, " in the whole graph), and ",
                      static_cast<double>(max_pairs), " are allowed (max_pairs; EJMP_MAX_PAIRS sets another number)");
}

inline const std::string QUADRUPLET_ARGUMENTS =
    "Tensor x, Tensor filter, Tensor weight, Tensor v, Tensor v_middle, Tensor ptr, Tensor source, Tensor image, "
    "Tensor middle_ptr, Tensor middle_source, Tensor middle_image, float eps, int max_degree";

inline void define_message_passing(torch::Library& library) {
    library.def(
        "find_neighbors(Tensor positions, Tensor cell, Tensor pbc, Tensor ptr, Tensor cutoff, Tensor limits, "
        "Tensor quad_atom, int max_pairs) -> Tensor[]");
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
