// torch ops over ops.h for products of 8-bit integers: rows with a scale each, and activations that read and write
// them.
#include "common.h"

namespace {

using namespace ejmp::bindings;

template <class F>
void with_row_kernels(const char* op, const Tensor& x, F&& f) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
                      ": x must be float32 or bfloat16, got ", x.scalar_type());
    if (x.scalar_type() == at::kFloat)
        f(float(), ejmp::kernels().row_float);
    else
        f(ejmp::bfloat16(), ejmp::kernels().row_bfloat16);
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_) {
    check_axes("quantize_rows", "x", x_, 2), check_memory("quantize_rows", "x", x_);
    TORCH_CHECK_VALUE(x_.is_cpu(), "quantize_rows: x must be on cpu, got ", x_.device());
    const Tensor x = x_.contiguous();
    const Tensor values = at::empty(x.sizes(), x.options().dtype(at::kByte));
    const Tensor scales = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
    with_row_kernels("quantize_rows", x, [&](auto s, const auto& kernels) {
        using S = decltype(s);
        kernels.quantize_rows(x.size(0), x.size(1), static_cast<const S*>(x.const_data_ptr()), data<uint8_t>(values),
                              data<float>(scales), threads());
    });
    return {values, scales};
}

std::tuple<Tensor, Tensor, Tensor> activate_rows(const Tensor& x_, const Tensor& scale_, const OptionalTensor& factor,
                                                 const OptionalTensor& add, double alpha, double beta, bool keep,
                                                 bool quantize) {
    const char* const op = "activate_rows";
    check_axes(op, "x", x_, 2), check_memory(op, "x", x_);
    check_like(op, "scale", scale_, at::kFloat, {x_.size(0)});
    if (factor) check_like(op, "factor", *factor, x_.scalar_type(), x_.sizes());
    if (add) check_like(op, "add", *add, x_.scalar_type(), x_.sizes());
    const Tensor x = x_.contiguous(), scale = scale_.contiguous();
    const std::vector<int64_t> nothing{0};
    const at::IntArrayRef sizes = x.sizes(), none = nothing;
    const Tensor out = at::empty(keep ? sizes : none, x.options());
    const Tensor values = at::empty(quantize ? sizes : none, x.options().dtype(at::kByte));
    const Tensor scales = at::empty({quantize ? x.size(0) : 0}, x.options().dtype(at::kFloat));
    with_row_kernels(op, x, [&](auto s, const auto& kernels) {
        using S = decltype(s);
        const Array<S> by(factor), plus(add);
        kernels.activate_rows(
            {x.size(0), x.size(1), static_cast<const S*>(x.const_data_ptr()), scale.const_data_ptr<float>(), by.data(),
             plus.data(), alpha, beta, keep ? data<S>(out) : nullptr, quantize ? data<uint8_t>(values) : nullptr,
             data<float>(scales)},
            threads());
    });
    return {out, values, scales};
}

Tensor& scale_rows_(Tensor& x, const Tensor& scale_) {
    const char* const op = "scale_rows_";
    check_axes(op, "x", x, 2), check_memory(op, "x", x);
    TORCH_CHECK_VALUE(x.is_contiguous(), op, ": x must be contiguous, got strides ", x.strides());
    check_like(op, "scale", scale_, at::kFloat, {x.size(0)});
    check_apart(op, "scale", scale_, x);
    const Tensor scale = scale_.contiguous();
    with_row_kernels(op, x, [&](auto s, const auto& kernels) {
        using S = decltype(s);
        kernels.scale_rows(x.size(0), x.size(1), data<S>(x), scale.const_data_ptr<float>(), threads());
    });
    return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ejmp, library) {
    library.def("quantize_rows(Tensor x) -> (Tensor, Tensor)");
    library.def("scale_rows_(Tensor(a!) x, Tensor scale) -> Tensor(a!)");
    library.def(
        "activate_rows(Tensor x, Tensor scale, Tensor? factor, Tensor? add, float alpha, float beta, bool keep, "
        "bool quantize) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ejmp, CPU, library) {
    library.impl("activate_rows", &activate_rows);
    library.impl("scale_rows_", &scale_rows_);
}

// With no tensor at all there is no device to choose a kernel by: this one is called for None too, and refuses it.
TORCH_LIBRARY_IMPL(ejmp, CompositeExplicitAutograd, library) { library.impl("quantize_rows", &quantize_rows); }
