// torch ops over ops.h: what happens between the matrix products of the dense chain.
#include "common.h"

namespace {

using namespace ejmp::bindings;

// Sum rows of x, or of x times factor, over the edges into each atom, in float32 or float64.
Tensor sum_into_atoms(const char* op, const char* name, const Tensor& x, const OptionalTensor& factor,
                      const OptionalTensor& order, const Tensor& ptr) {
    check_type(op, name, x, true), check_axes(op, name, x, 2), check_memory(op, name, x);
    if (factor) check_like(op, "factor", *factor, x.scalar_type(), x.sizes());
    check_ptr(op, "ptr", ptr, x.size(0));
    if (order) check_order(op, *order, x.size(0));
    const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor out = at::empty({ptr.size(0) - 1, x.size(1)}, x.options().dtype(type));
    with_stored(op, x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().edge_sum(out.size(0), x.size(1), Array<S>(x).data(), Array<S>(factor).data(),
                                    Array<int64_t>(order).data(), Array<int64_t>(ptr).data(), out.mutable_data_ptr(),
                                    threads());
    });
    return out;
}

Tensor atom_sum(const Tensor& m, const Tensor& factor, const Tensor& ptr) {
    return sum_into_atoms("atom_sum", "m", m, factor, c10::nullopt, ptr);
}

std::tuple<Tensor, Tensor> atom_sum_backward(const Tensor& grad_, const Tensor& m_, const Tensor& factor_,
                                             const Tensor& ptr_) {
    const char* const op = "atom_sum";
    const auto type = check_type(op, "m", m_, true);
    check_axes(op, "m", m_, 2), check_memory(op, "m", m_);
    check_like(op, "factor", factor_, type, m_.sizes());
    check_ptr(op, "ptr", ptr_, m_.size(0));
    check_like(op, "grad", grad_, type == at::kDouble ? at::kDouble : at::kFloat, {ptr_.size(0) - 1, m_.size(1)});
    const Tensor grad = grad_.contiguous(), m = m_.contiguous(), factor = factor_.contiguous(), ptr = ptr_.contiguous();
    const Tensor to_m = at::empty_like(m), to_factor = at::empty_like(m);
    with_stored(op, m, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().atom_sum_backward(grad.size(0), m.size(1), grad.const_data_ptr(), Array<S>(m).data(),
                                             Array<S>(factor).data(), ptr.const_data_ptr<int64_t>(), data<S>(to_m),
                                             data<S>(to_factor), threads());
    });
    return {to_m, to_factor};
}

Tensor edge_sum(const Tensor& x, const OptionalTensor& order, const Tensor& ptr) {
    return sum_into_atoms("edge_sum", "x", x, c10::nullopt, order, ptr);
}

Tensor gather_add(const OptionalTensor& x, const Tensor& from_, const Tensor& to_, const Tensor& source_,
                  const Tensor& swap, const Tensor& ptr_) {
    const char* const op = "gather_add";
    check_axes(op, "source_rows", from_, 2), check_axes(op, "source", source_, 1);
    const int64_t E = source_.size(0), N = from_.size(0);
    const auto type = x ? check_type(op, "x", *x, true) : check_type(op, "source_rows", from_);
    check_like(op, "source_rows", from_, type == at::kBFloat16 ? at::kFloat : type, from_.sizes());
    check_like(op, "target_rows", to_, from_.scalar_type(), from_.sizes());
    check_ids(op, "source", source_, E, N);
    check_swap(op, swap, E);
    check_ptr(op, "ptr", ptr_, E);
    TORCH_CHECK_VALUE(ptr_.size(0) == N + 1, op, ": ptr must have one entry more than source_rows has rows, ", N + 1,
                      ", got ", ptr_.size(0));
    if (x) check_like(op, "x", *x, type, {E, from_.size(1)});
    const Tensor from = from_.contiguous(), to = to_.contiguous(), source = source_.contiguous(),
                 ptr = ptr_.contiguous();
    const Tensor out = at::empty({source.size(0), from.size(1)}, from.options().dtype(type));
    with_stored(op, out, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().gather_add(from.size(0), out.size(1), Array<S>(x).data(), from.const_data_ptr(),
                                      to.const_data_ptr(), source.const_data_ptr<int64_t>(),
                                      ptr.const_data_ptr<int64_t>(), data<S>(out), threads());
    });
    return out;
}

// x of an op of activations; the others are of its type and shape, each by its name.
void check_same(const char* op, const Tensor& x, std::initializer_list<std::pair<const char*, OptionalTensor>> others) {
    check_type(op, "x", x, true), check_memory(op, "x", x);
    for (const auto& [name, other] : others)
        if (other) check_like(op, name, *other, x.scalar_type(), x.sizes());
}

void activate_into(const Tensor& x, const OptionalTensor& factor, const OptionalTensor& add, double alpha, double beta,
                   const Tensor& out) {
    with_stored("activate", x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().activate(x.numel(), static_cast<const S*>(x.const_data_ptr()), Array<S>(factor).data(),
                                    Array<S>(add).data(), alpha, beta, data<S>(out), threads());
    });
}

Tensor activate(const Tensor& x_, const OptionalTensor& factor, const OptionalTensor& add, double alpha, double beta) {
    check_same("activate", x_, {{"factor", factor}, {"add", add}});
    const Tensor x = x_.contiguous(), out = at::empty_like(x);
    activate_into(x, factor, add, alpha, beta, out);
    return out;
}

Tensor& activate_(Tensor& x, const OptionalTensor& factor, const OptionalTensor& add, double alpha, double beta) {
    const char* const op = "activate_";
    check_same(op, x, {{"factor", factor}, {"add", add}});
    TORCH_CHECK_VALUE(x.is_contiguous(), op, ": x must be contiguous, got strides ", x.strides());
    check_apart(op, "factor", factor, x), check_apart(op, "add", add, x);
    activate_into(x, factor, add, alpha, beta, x);
    return x;
}

std::tuple<Tensor, Tensor> activate_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& factor,
                                             double alpha) {
    check_same("activate_backward", x, {{"grad", grad}, {"factor", factor}});
    const Tensor to_x = at::empty(x.sizes(), x.options());
    const Tensor to_factor = factor ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
    with_stored("activate", x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().activate_backward(x.numel(), Array<S>(grad).data(), Array<S>(x).data(),
                                             Array<S>(factor).data(), alpha, data<S>(to_x),
                                             factor ? data<S>(to_factor) : nullptr, threads());
    });
    return {to_x, to_factor};
}

std::tuple<Tensor, Tensor, Tensor> activate_double(const Tensor& u_x, const OptionalTensor& u_factor,
                                                   const Tensor& grad, const Tensor& x, const OptionalTensor& factor,
                                                   double alpha) {
    const char* const op = "activate_double";
    TORCH_CHECK_VALUE(u_factor.has_value() == factor.has_value(), op, ": u_factor must be given where factor is");
    check_same(op, x, {{"u_x", u_x}, {"u_factor", u_factor}, {"grad", grad}, {"factor", factor}});
    const Tensor to_grad = at::empty(x.sizes(), x.options()), to_x = at::empty(x.sizes(), x.options());
    const Tensor to_factor = factor ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
    with_stored("activate", x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().activate_double(x.numel(), Array<S>(u_x).data(), Array<S>(u_factor).data(),
                                           Array<S>(grad).data(), Array<S>(x).data(), Array<S>(factor).data(), alpha,
                                           data<S>(to_grad), data<S>(to_x), factor ? data<S>(to_factor) : nullptr,
                                           threads());
    });
    return {to_grad, to_x, to_factor};
}

// Messages to edges beside those to counter-edges, x [E, 2 M]; `wide` is like it, `narrow` [E, M]. Returns M.
int64_t check_messages(const char* op, const Tensor& x, const Tensor& swap, std::pair<const char*, OptionalTensor> wide,
                       std::pair<const char*, OptionalTensor> narrow) {
    check_axes(op, "x", x, 2);
    check_same(op, x, {wide});
    TORCH_CHECK_VALUE(x.size(1) % 2 == 0, op, ": x must be [E, 2 M], got ", x.sizes());
    const int64_t E = x.size(0), width = x.size(1) / 2;
    if (narrow.second) check_like(op, narrow.first, *narrow.second, x.scalar_type(), {E, width});
    check_swap(op, swap, E);
    return width;
}

Tensor swap_add(const Tensor& x_, const Tensor& swap_, const OptionalTensor& add, double alpha) {
    const int64_t width = check_messages("swap_add", x_, swap_, {}, {"add", add});
    const Tensor x = x_.contiguous(), swap = swap_.contiguous();
    const Tensor out = at::empty({x.size(0), width}, x.options());
    with_stored("swap_add", x, [&](auto s) {
        using S = decltype(s);
        const S* const messages = Array<S>(x).data();
        dense_kernels<S>().swap_add(x.size(0), width, messages, messages + width, 2 * width,
                                    swap.const_data_ptr<int64_t>(), Array<S>(add).data(), alpha, data<S>(out),
                                    threads());
    });
    return out;
}

Tensor swap_add_backward(const Tensor& grad, const Tensor& x_, const Tensor& swap_, double alpha) {
    const int64_t width = check_messages("swap_add_backward", x_, swap_, {}, {"grad", grad});
    const Tensor x = x_.contiguous(), swap = swap_.contiguous(), out = at::empty_like(x);
    with_stored("swap_add", x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().swap_add_backward(x.size(0), width, Array<S>(grad).data(), Array<S>(x).data(),
                                             swap.const_data_ptr<int64_t>(), alpha, data<S>(out), threads());
    });
    return out;
}

std::tuple<Tensor, Tensor> swap_add_double(const Tensor& u, const Tensor& grad, const Tensor& x_, const Tensor& swap_,
                                           double alpha) {
    const int64_t width = check_messages("swap_add_double", x_, swap_, {"u", u}, {"grad", grad});
    const Tensor x = x_.contiguous(), swap = swap_.contiguous(), to_x = at::empty_like(x);
    const Tensor to_grad = at::empty({x.size(0), width}, x.options());
    with_stored("swap_add", x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().swap_add_double(x.size(0), width, Array<S>(u).data(), Array<S>(grad).data(),
                                           Array<S>(x).data(), swap.const_data_ptr<int64_t>(), alpha, data<S>(to_grad),
                                           data<S>(to_x), threads());
    });
    return {to_grad, to_x};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ejmp, library) {
    define_sums(library);
    library.def(
        "gather_add(Tensor? x, Tensor source_rows, Tensor target_rows, Tensor source, Tensor swap, "
        "Tensor ptr) -> Tensor");
    library.def("activate(Tensor x, Tensor? factor, Tensor? add, float alpha, float beta) -> Tensor");
    library.def("activate_(Tensor(a!) x, Tensor? factor, Tensor? add, float alpha, float beta) -> Tensor(a!)");
    library.def("activate_backward(Tensor grad, Tensor x, Tensor? factor, float alpha) -> (Tensor, Tensor)");
    library.def(
        "activate_double(Tensor u_x, Tensor? u_factor, Tensor grad, Tensor x, Tensor? factor, float alpha) -> "
        "(Tensor, Tensor, Tensor)");
    library.def("swap_add(Tensor x, Tensor swap, Tensor? add, float alpha) -> Tensor");
    library.def("swap_add_backward(Tensor grad, Tensor x, Tensor swap, float alpha) -> Tensor");
    library.def("swap_add_double(Tensor u, Tensor grad, Tensor x, Tensor swap, float alpha) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ejmp, CPU, library) {
    library.impl("atom_sum", &atom_sum);
    library.impl("atom_sum_backward", &atom_sum_backward);
    library.impl("edge_sum", &edge_sum);
    library.impl("gather_add", &gather_add);
    library.impl("activate", &activate);
    library.impl("activate_", &activate_);
    library.impl("activate_backward", &activate_backward);
    library.impl("activate_double", &activate_double);
    library.impl("swap_add", &swap_add);
    library.impl("swap_add_backward", &swap_add_backward);
    library.impl("swap_add_double", &swap_add_double);
}
