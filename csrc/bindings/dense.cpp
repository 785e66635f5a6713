// torch ops over ops.h: what happens between the matrix products of the dense chain.
#include <torch/csrc/autograd/custom_function.h>

#include "common.h"

namespace {

using namespace ejmp::bindings;

// Sum rows of x, or of x times factor, over the edges into each atom, in float32 or float64.
Tensor sum_into_atoms(const char* op, const Tensor& x, const OptionalTensor& factor, const OptionalTensor& order,
                      const Tensor& ptr) {
    check_size(op, "x", x, 2);
    if (factor) check_like(op, "factor", *factor, x.scalar_type(), x.sizes());
    check_ptr(op, "ptr", ptr, x.size(0));
    if (order) check_ids(op, "order", order->contiguous(), x.size(0), x.size(0));
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
    return sum_into_atoms("atom_sum", m, factor, c10::nullopt, ptr);
}

std::tuple<Tensor, Tensor> atom_sum_backward(const Tensor& grad_, const Tensor& m_, const Tensor& factor_,
                                             const Tensor& ptr_) {
    const char* const op = "atom_sum";
    const Tensor grad = grad_.contiguous(), m = m_.contiguous(), factor = factor_.contiguous(), ptr = ptr_.contiguous();
    check_size(op, "m", m, 2);
    check_like(op, "factor", factor, m.scalar_type(), m.sizes());
    check_ptr(op, "ptr", ptr, m.size(0));
    check_like(op, "grad", grad, m.scalar_type() == at::kDouble ? at::kDouble : at::kFloat,
               {ptr.size(0) - 1, m.size(1)});
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
    return sum_into_atoms("edge_sum", x, c10::nullopt, order, ptr);
}

Tensor gather_add(const OptionalTensor& x, const Tensor& from_, const Tensor& to_, const Tensor& source_,
                  const Tensor& swap, const Tensor& ptr_) {
    const char* const op = "gather_add";
    const Tensor from = from_.contiguous(), to = to_.contiguous(), source = source_.contiguous(),
                 ptr = ptr_.contiguous();
    check_size(op, "source_rows", from, 2), check_size(op, "source", source, 1);
    const auto type = x ? x->scalar_type() : from.scalar_type();
    check_like(op, "source_rows", from, type == at::kBFloat16 ? at::kFloat : type, from.sizes());
    check_like(op, "target_rows", to, from.scalar_type(), from.sizes());
    check_ids(op, "source", source, source.size(0), from.size(0));
    check_ids(op, "swap", swap.contiguous(), source.size(0), source.size(0));
    check_ptr(op, "ptr", ptr, source.size(0));
    TORCH_CHECK_VALUE(ptr.size(0) == from.size(0) + 1, op, ": ptr must have one entry more than there are atoms");
    if (x) check_like(op, "x", *x, type, {source.size(0), from.size(1)});
    const Tensor out = at::empty({source.size(0), from.size(1)}, from.options().dtype(type));
    with_stored(op, out, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().gather_add(from.size(0), out.size(1), Array<S>(x).data(), from.const_data_ptr(),
                                      to.const_data_ptr(), source.const_data_ptr<int64_t>(),
                                      ptr.const_data_ptr<int64_t>(), data<S>(out), threads());
    });
    return out;
}

void activate_into(const Tensor& x, const OptionalTensor& factor, const OptionalTensor& add, double alpha, double beta,
                   const Tensor& out) {
    if (factor) check_like("activate", "factor", *factor, x.scalar_type(), x.sizes());
    if (add) check_like("activate", "add", *add, x.scalar_type(), x.sizes());
    with_stored("activate", x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().activate(x.numel(), static_cast<const S*>(x.const_data_ptr()), Array<S>(factor).data(),
                                    Array<S>(add).data(), alpha, beta, data<S>(out), threads());
    });
}

Tensor activate(const Tensor& x_, const OptionalTensor& factor, const OptionalTensor& add, double alpha, double beta) {
    const Tensor x = x_.contiguous(), out = at::empty_like(x);
    activate_into(x, factor, add, alpha, beta, out);
    return out;
}

Tensor& activate_(Tensor& x, const OptionalTensor& factor, const OptionalTensor& add, double alpha, double beta) {
    TORCH_CHECK_VALUE(x.is_contiguous(), "activate_: x must be contiguous");
    activate_into(x, factor, add, alpha, beta, x);
    return x;
}

// Arrays of one shape and type; undefined ones stay null.
template <class S>
struct Same {
    std::vector<Array<S>> arrays;
    Same(const char* op, const Tensor& like, const std::vector<OptionalTensor>& tensors) {
        for (const auto& x : tensors) {
            if (x) check_like(op, "input", *x, like.scalar_type(), like.sizes());
            arrays.emplace_back(x);
        }
    }
    const S* operator[](size_t i) const { return arrays[i].data(); }
};

std::tuple<Tensor, Tensor> activate_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& factor,
                                             double alpha) {
    const Tensor to_x = at::empty(x.sizes(), x.options());
    const Tensor to_factor = factor ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
    with_stored("activate", x, [&](auto s) {
        using S = decltype(s);
        const Same<S> in("activate", x, {grad, x, factor});
        dense_kernels<S>().activate_backward(x.numel(), in[0], in[1], in[2], alpha, data<S>(to_x),
                                             factor ? data<S>(to_factor) : nullptr, threads());
    });
    return {to_x, to_factor};
}

std::tuple<Tensor, Tensor, Tensor> activate_double(const Tensor& u_x, const OptionalTensor& u_factor,
                                                   const Tensor& grad, const Tensor& x, const OptionalTensor& factor,
                                                   double alpha) {
    const Tensor to_grad = at::empty(x.sizes(), x.options()), to_x = at::empty(x.sizes(), x.options());
    const Tensor to_factor = factor ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
    with_stored("activate", x, [&](auto s) {
        using S = decltype(s);
        const Same<S> in("activate", x, {u_x, factor ? u_factor : c10::nullopt, grad, x, factor});
        dense_kernels<S>().activate_double(x.numel(), in[0], in[1], in[2], in[3], in[4], alpha, data<S>(to_grad),
                                           data<S>(to_x), factor ? data<S>(to_factor) : nullptr, threads());
    });
    return {to_grad, to_x, to_factor};
}

int64_t check_swap(const Tensor& x, const Tensor& swap) {
    check_size("swap_add", "x", x, 2);
    TORCH_CHECK_VALUE(x.size(1) % 2 == 0, "swap_add: x must be [E, 2 M], got ", x.sizes());
    check_ids("swap_add", "swap", swap, x.size(0), x.size(0));
    return x.size(1) / 2;
}

Tensor swap_add(const Tensor& x_, const Tensor& swap_, const OptionalTensor& add, double alpha) {
    const Tensor x = x_.contiguous(), swap = swap_.contiguous();
    const int64_t width = check_swap(x, swap);
    const Tensor out = at::empty({x.size(0), width}, x.options());
    with_stored("swap_add", x, [&](auto s) {
        using S = decltype(s);
        const Same<S> in("swap_add", out, {add});
        dense_kernels<S>().swap_add(x.size(0), width, Array<S>(x).data(), swap.const_data_ptr<int64_t>(), in[0], alpha,
                                    data<S>(out), threads());
    });
    return out;
}

Tensor swap_add_backward(const Tensor& grad, const Tensor& x_, const Tensor& swap_, double alpha) {
    const Tensor x = x_.contiguous(), swap = swap_.contiguous(), out = at::empty_like(x);
    const int64_t width = check_swap(x, swap);
    check_like("swap_add", "grad", grad, x.scalar_type(), {x.size(0), width});
    with_stored("swap_add", x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().swap_add_backward(x.size(0), width, Array<S>(grad).data(), Array<S>(x).data(),
                                             swap.const_data_ptr<int64_t>(), alpha, data<S>(out), threads());
    });
    return out;
}

std::tuple<Tensor, Tensor> swap_add_double(const Tensor& u, const Tensor& grad, const Tensor& x_, const Tensor& swap_,
                                           double alpha) {
    const Tensor x = x_.contiguous(), swap = swap_.contiguous(), to_x = at::empty_like(x);
    const int64_t width = check_swap(x, swap);
    const Tensor to_grad = at::empty({x.size(0), width}, x.options());
    check_like("swap_add", "grad", grad, x.scalar_type(), to_grad.sizes());
    with_stored("swap_add", x, [&](auto s) {
        using S = decltype(s);
        const Same<S> in("swap_add", x, {u, x});
        dense_kernels<S>().swap_add_double(x.size(0), width, in[0], Array<S>(grad).data(), in[1],
                                           swap.const_data_ptr<int64_t>(), alpha, data<S>(to_grad), data<S>(to_x),
                                           threads());
    });
    return {to_grad, to_x};
}

// Matrix products: the kernel is chosen in Python (ejmp_kernels/gemm.py), the derivatives are here.

Tensor call_matmul(const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ejmp::matmul", "")
                               .typed<Tensor(const Tensor&, const Tensor&, bool, bool)>();
    return op.call(a, b, transpose_a, transpose_b);
}

// For c = a b: da = g b^T, db = a^T g, and a transposed input gets a transposed gradient. In C++, because only there a
// function knows which gradients a backward pass is after: for forces, those of the weights are not wanted.
struct Matmul : torch::autograd::Function<Matmul> {
    static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& a, const Tensor& b, bool transpose_a,
                          bool transpose_b) {
        at::AutoDispatchBelowADInplaceOrView below;
        ctx->save_for_backward({a, b});
        ctx->saved_data["transposed"] = std::vector<int64_t>{transpose_a, transpose_b};
        return call_matmul(a, b, transpose_a, transpose_b);
    }
    static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grads) {
        const auto saved = ctx->get_saved_variables();
        const auto transposed = ctx->saved_data["transposed"].toIntVector();
        const Tensor &a = saved[0], &b = saved[1], &g = grads[0];
        const bool ta = transposed[0], tb = transposed[1];
        Tensor to_a, to_b;
        if (ctx->needs_input_grad(0)) to_a = ta ? call_matmul(b, g, tb, true) : call_matmul(g, b, false, !tb);
        if (ctx->needs_input_grad(1)) to_b = tb ? call_matmul(g, a, true, ta) : call_matmul(a, g, !ta, false);
        return {to_a, to_b, Tensor(), Tensor()};
    }
};

Tensor matmul(const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
    return Matmul::apply(a, b, transpose_a, transpose_b);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ejmp, library) {
    library.def("matmul(Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> Tensor");
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

TORCH_LIBRARY_IMPL(ejmp, Autograd, library) { library.impl("matmul", &matmul); }
