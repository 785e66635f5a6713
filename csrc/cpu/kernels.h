// All CPU kernels for one instruction set. Before including this, define EJMP_ISA (the namespace's name) and EJMP_BYTES
// (the size of a vector), and choose the instructions; the standard headers must come first, in baseline instructions,
// because the linker keeps one copy of their functions for all.
namespace ejmp::EJMP_ISA {
// clang-format off
#include "simd.h"
#include "../dual.h"
#include "tile.h"
#include "by_source.h"
#include "triplet.h"
#include "quadruplet.h"
#include "pair.h"
#include "radial.h"
#include "dense.h"
#include "quantized.h"
// clang-format on

template <class T>
constexpr GraphKernels<T> graph_kernels() {
    return {triplet<T>, triplet_backward<T>, quadruplet<T>, quadruplet_mixed<T>, quadruplet_backward<T>,
            pair<T>,    pair_backward<T>,    radial<T>,     radial_transposed<T>};
}

template <class S>
constexpr DenseKernels<S> dense_kernels() {
    return {activate<S>,        activate_backward<S>, activate_double<S>, swap_add<S>,          swap_add_backward<S>,
            swap_add_double<S>, gather_add<S>,        edge_sum<S>,        atom_sum_backward<S>, transpose<S>};
}

template <class S>
constexpr RowKernels<S> row_kernels() {
    return {quantize_rows<S>, activate_rows<S>, scale_rows<S>};
}

Kernels table(const char* name) {
    return {name,
            graph_kernels<float>(),
            graph_kernels<double>(),
            dense_kernels<float>(),
            dense_kernels<double>(),
            dense_kernels<bfloat16>(),
            row_kernels<float>(),
            row_kernels<bfloat16>()};
}

}  // namespace ejmp::EJMP_ISA
