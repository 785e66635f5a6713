// torch ops over ops.h: matrix products and dense layers, as autograd sees them.
#include <torch/csrc/autograd/custom_function.h>

#include <cstdlib>

#include "common.h"

namespace {

using namespace ejmp::bindings;

// An op by its name, called through torch's dispatcher: what follows and counts calls sees it.
template <class Signature>
c10::TypedOperatorHandle<Signature> op_of(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Matrix products. Small ones, and all that are not on the CPU, are torch's, without a detour through Python; for the
// others, a provider is chosen there (ejmp_kernels/gemm.py).

// Multiply-adds from which on the choice matters, as in gemm.py.
constexpr double WORTH_MEASURING = 5e6;

void check_factor(const char* name, const Tensor& x) {
    const char* const op = "matmul";
    check_given(op, name, x);
    TORCH_CHECK_VALUE(x.dim() == 2 && x.is_floating_point() && x.layout() == at::kStrided, op, ": ", name,
                      " must be a matrix of floats, got ", x.layout(), " ", x.scalar_type(), " ", x.sizes());
    if (x.is_cpu() && x.numel()) check_memory(op, name, x);
}

Tensor call_product(const Tensor& a, const Tensor& b) {
    static const auto op = op_of<Tensor(const Tensor&, const Tensor&)>("ejmp::product");
    return op.call(a, b);
}

Tensor multiply(const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
    check_factor("a", a), check_factor("b", b);
    TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type() && a.device() == b.device(), "matmul: b must be ",
                      a.scalar_type(), " on ", a.device(), " as a, got ", b.scalar_type(), " on ", b.device());
    const Tensor left = transpose_a ? a.t() : a, right = transpose_b ? b.t() : b;
    TORCH_CHECK_VALUE(left.size(1) == right.size(0), "matmul: a and b must fit together, got ", left.sizes(), " times ",
                      right.sizes());
    const double work = double(left.size(0)) * left.size(1) * right.size(1);
    const bool one_provider = !a.is_cpu() || (work < WORTH_MEASURING && !std::getenv("EJMP_GEMM"));
    return one_provider ? at::mm(left, right) : call_product(left, right);
}

Tensor call_matmul(const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
    static const auto op = op_of<Tensor(const Tensor&, const Tensor&, bool, bool)>("ejmp::matmul");
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
    check_given("matmul", "a", a), check_given("matmul", "b", b);
    return Matmul::apply(a, b, transpose_a, transpose_b);
}

// A dense layer: y = alpha silu(z) factor + beta add with z = x weight^T, as one function to autograd. A first
// derivative that is to be differentiated again keeps the gradient of y alone: that of z, which a product and a pass of
// their own would keep as well, is made anew, which costs a pass and saves an array of the size of y for each layer.

std::tuple<Tensor, Tensor> call_activate_backward(const Tensor& grad, const Tensor& z, const OptionalTensor& factor,
                                                  double alpha) {
    static const auto op =
        op_of<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, double)>(
            "ejmp::activate_backward");
    return op.call(grad, z, factor, alpha);
}

std::tuple<Tensor, Tensor, Tensor> call_activate_double(const Tensor& u_z, const OptionalTensor& u_factor,
                                                        const Tensor& grad, const Tensor& z,
                                                        const OptionalTensor& factor, double alpha) {
    static const auto op =
        op_of<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                                 const OptionalTensor&, double)>("ejmp::activate_double");
    return op.call(u_z, u_factor, grad, z, factor, alpha);
}

Tensor call_activate(const Tensor& z, const OptionalTensor& factor, const OptionalTensor& add, double alpha,
                     double beta) {
    static const auto op =
        op_of<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, double, double)>("ejmp::activate");
    return op.call(z, factor, add, alpha, beta);
}

OptionalTensor given(const Tensor& x) { return x.defined() ? OptionalTensor(x) : OptionalTensor(); }

// The gradient of z: through y and from elsewhere; and that of factor.
std::tuple<Tensor, Tensor> gradients_of(const Tensor& grad, const OptionalTensor& grad_z, const Tensor& z,
                                        const OptionalTensor& factor, double alpha) {
    const auto [to_z, to_factor] = call_activate_backward(grad, z, factor, alpha);
    return {grad_z ? to_z + *grad_z : to_z, to_factor};
}

// The gradients of x, weight and factor from those of y and z; of what is not asked for, an empty tensor.
struct LinearActivateBackward : torch::autograd::Function<LinearActivateBackward> {
    static std::vector<Tensor> forward(torch::autograd::AutogradContext* ctx, const Tensor& grad,
                                       const OptionalTensor& grad_z, const Tensor& x, const Tensor& weight,
                                       const Tensor& z, const OptionalTensor& factor, double alpha, bool want_x,
                                       bool want_weight) {
        at::AutoDispatchBelowADInplaceOrView below;
        ctx->set_materialize_grads(false);
        ctx->save_for_backward({grad, grad_z.value_or(Tensor()), x, weight, z, factor.value_or(Tensor())});
        ctx->saved_data["alpha"] = alpha;
        const auto [to_z, to_factor] = gradients_of(grad, grad_z, z, factor, alpha);
        const Tensor nothing = at::empty({0}, z.options());
        return {want_x ? call_matmul(to_z, weight, false, false) : nothing,
                want_weight ? call_matmul(to_z, x, true, false) : nothing, to_factor};
    }
    static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& u) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &grad = saved[0], &x = saved[2], &weight = saved[3], &z = saved[4];
        const auto grad_z = given(saved[1]), factor = given(saved[5]);
        const double alpha = ctx->saved_data["alpha"].toDouble();
        const Tensor &u_x = u[0], &u_weight = u[1];
        const int64_t first = grad_z ? 2 : 1;  // inputs that are not given are not counted
        const bool x_wanted = u_weight.defined() && ctx->needs_input_grad(first);
        const bool weight_wanted = u_x.defined() && ctx->needs_input_grad(first + 1);
        Tensor to_x, to_weight, u_z;
        if (x_wanted || weight_wanted) {
            const Tensor to_z = std::get<0>(gradients_of(grad, grad_z, z, factor, alpha));
            if (x_wanted) to_x = call_matmul(to_z, u_weight, false, false);
            if (weight_wanted) to_weight = call_matmul(to_z, u_x, true, false);
        }
        if (u_x.defined()) u_z = call_matmul(u_x, weight, false, true);
        if (u_weight.defined()) {
            const Tensor more = call_matmul(x, u_weight, false, true);
            u_z = u_z.defined() ? u_z + more : more;
        }
        if (!u_z.defined()) u_z = at::zeros_like(z);
        OptionalTensor u_factor;
        if (factor) u_factor = u[2].defined() ? u[2].contiguous() : at::zeros_like(*factor);
        const auto [to_grad, to_z, to_factor] = call_activate_double(u_z, u_factor, grad, z, factor, alpha);
        return {to_grad, grad_z ? u_z : Tensor(),       to_x,     to_weight,
                to_z,    factor ? to_factor : Tensor(), Tensor(), Tensor(),
                Tensor()};
    }
};

struct LinearActivate : torch::autograd::Function<LinearActivate> {
    static std::vector<Tensor> forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                                       const OptionalTensor& factor, const OptionalTensor& add, double alpha,
                                       double beta) {
        at::AutoDispatchBelowADInplaceOrView below;
        ctx->set_materialize_grads(false);
        const Tensor z = call_matmul(x, weight, false, true);
        ctx->save_for_backward({x, weight, z, factor.value_or(Tensor())});
        ctx->saved_data["alpha"] = alpha, ctx->saved_data["beta"] = beta, ctx->saved_data["has_add"] = add.has_value();
        return {call_activate(z, factor, add, alpha, beta), z};
    }
    // z has a gradient of its own in a second backward pass only.
    static std::vector<Tensor> backward(torch::autograd::AutogradContext* ctx, const std::vector<Tensor>& grads) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &weight = saved[1], &z = saved[2];
        const auto factor = given(saved[3]);
        const double alpha = ctx->saved_data["alpha"].toDouble(), beta = ctx->saved_data["beta"].toDouble();
        const Tensor grad = grads[0].defined() ? grads[0].contiguous() : at::zeros_like(z);
        const auto to = LinearActivateBackward::apply(grad, given(grads[1]), x, weight, z, factor, alpha,
                                                      ctx->needs_input_grad(0), ctx->needs_input_grad(1));
        Tensor to_add;
        if (ctx->saved_data["has_add"].toBool() && ctx->needs_input_grad(factor ? 3 : 2))
            to_add = beta == 1.0 ? grad : grad * beta;
        return {ctx->needs_input_grad(0) ? to[0] : Tensor(),
                ctx->needs_input_grad(1) ? to[1] : Tensor(),
                factor ? to[2] : Tensor(),
                to_add,
                Tensor(),
                Tensor()};
    }
};

// While shapes are traced as symbols, the ops inside check them.
void check_layer(const Tensor& x, const Tensor& weight, const OptionalTensor& factor, const OptionalTensor& add) {
    const char* const op = "linear_activate";
    const auto type = check_type(op, "x", x, true);
    check_device(op, {"x", x}, {{"weight", weight}, {"factor", factor}, {"add", add}});
    const std::vector<OptionalTensor> all{x, weight, factor, add};
    if (std::any_of(all.begin(), all.end(),
                    [](const auto& t) { return t && t->unsafeGetTensorImpl()->has_symbolic_sizes_strides(); }))
        return;
    check_axes(op, "x", x, 2), check_memory(op, "x", x), check_axes(op, "weight", weight, 2);
    check_like(op, "weight", weight, type, {weight.size(0), x.size(1)});
    if (factor) check_like(op, "factor", *factor, type, {x.size(0), weight.size(0)});
    if (add) check_like(op, "add", *add, type, {x.size(0), weight.size(0)});
}

Tensor linear_activate(const Tensor& x, const Tensor& weight, const OptionalTensor& factor, const OptionalTensor& add,
                       double alpha, double beta) {
    check_layer(x, weight, factor, add);
    return LinearActivate::apply(x, weight, factor, add, alpha, beta)[0];
}

// swap_add of x weight^T, x [E, k], weight [2 M, k]. The product, [E, 2 M], is made some rows at a time, so that it is
// read again while it is still in the caches; the part for counter-edges comes from the rows of these.
Tensor linear_swap_add(const Tensor& x_, const Tensor& weight_, const Tensor& swap_, const OptionalTensor& add_,
                       double alpha) {
    const char* const op = "linear_swap_add";
    const auto type = check_type(op, "x", x_, true);
    check_axes(op, "x", x_, 2), check_memory(op, "x", x_), check_axes(op, "weight", weight_, 2);
    TORCH_CHECK_VALUE(weight_.size(0) % 2 == 0, op, ": weight must be [2 M, k], got ", weight_.sizes());
    check_like(op, "weight", weight_, type, {weight_.size(0), x_.size(1)});
    const int64_t E = x_.size(0), width = weight_.size(0) / 2;
    if (add_) check_like(op, "add", *add_, type, {E, width});
    check_swap(op, swap_, E);
    const Tensor x = x_.contiguous(), weight = weight_.contiguous(), swap = swap_.contiguous();
    const OptionalTensor add = add_ ? OptionalTensor(add_->contiguous()) : OptionalTensor();
    const Tensor out = at::empty({E, width}, x.options());
    const int64_t rows = 512 * threads();
    with_stored(op, x, [&](auto s) {
        using S = decltype(s);
        for (int64_t begin = 0; begin < E; begin += rows) {
            const int64_t count = std::min(rows, E - begin), at = begin * width;
            const Tensor here = multiply(x.narrow(0, begin, count), weight.narrow(0, 0, width), false, true);
            const Tensor there =
                multiply(x.index_select(0, swap.narrow(0, begin, count)), weight.narrow(0, width, width), false, true);
            dense_kernels<S>().swap_add(count, width, Array<S>(here).data(), Array<S>(there).data(), width, nullptr,
                                        add ? Array<S>(add).data() + at : nullptr, alpha, data<S>(out) + at, threads());
        }
    });
    return out;
}

// [rows, columns] -> [columns, rows], copied; torch's own copy runs on one thread.
Tensor transposed(const Tensor& x_) {
    const char* const op = "transposed";
    const auto type = check_type(op, "x", x_, true);
    check_axes(op, "x", x_, 2), check_memory(op, "x", x_);
    TORCH_CHECK_VALUE(x_.is_cpu(), op, ": x must be on cpu, got ", x_.device());
    const Tensor x = x_.contiguous(), out = at::empty({x.size(1), x.size(0)}, x.options().dtype(type));
    with_stored(op, x, [&](auto s) {
        using S = decltype(s);
        dense_kernels<S>().transpose(x.size(0), x.size(1), Array<S>(x).data(), data<S>(out), threads());
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ejmp, library) {
    library.def("matmul(Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> Tensor");
    library.def(
        "linear_activate(Tensor x, Tensor weight, Tensor? factor, Tensor? add, float alpha, float beta) -> Tensor");
    library.def("linear_swap_add(Tensor x, Tensor weight, Tensor swap, Tensor? add, float alpha) -> Tensor");
    library.def("product(Tensor a, Tensor b) -> Tensor");
    library.def("transposed(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(ejmp, Autograd, library) { library.impl("matmul", &matmul); }

TORCH_LIBRARY_IMPL(ejmp, CompositeImplicitAutograd, library) { library.impl("linear_activate", &linear_activate); }

TORCH_LIBRARY_IMPL(ejmp, CompositeExplicitAutograd, library) {
    library.impl("matmul", &multiply);
    library.impl("transposed", &transposed);
    library.impl("linear_swap_add", &linear_swap_add);
}
