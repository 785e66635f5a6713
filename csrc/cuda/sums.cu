// Sums of edge rows into atoms and their gradient: one pass over memory each, one thread per number of the result.
#include "device.cuh"
#include "ops.h"

namespace ejmp::cuda {
namespace {

// out[n, c] = sum of x[order[e], c] factor[order[e], c] over e in ptr[n] .. ptr[n + 1]
template <class T>
__global__ void __launch_bounds__(THREADS)
    edge_sum_kernel(int64_t width, const T* x, const T* factor, const int64_t* order, const int64_t* ptr, T* out) {
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(ptr, atom);
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
        T total = 0;
        for (int64_t e = edges.begin; e < edges.end; ++e) {
            const int64_t i = (order ? order[e] : e) * width + c;
            total += factor ? x[i] * factor[i] : x[i];
        }
        out[atom * width + c] = total;
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    atom_sum_backward_kernel(int64_t width, const T* grad, const T* x, const T* factor, const int64_t* ptr, T* grad_x,
                             T* grad_factor) {
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(ptr, atom);
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
        const T g = grad[atom * width + c];
        for (int64_t e = edges.begin; e < edges.end; ++e) {
            const int64_t i = e * width + c;
            const T value = x[i];
            grad_x[i] = g * factor[i], grad_factor[i] = g * value;
        }
    }
}

}  // namespace

template <class T>
void edge_sum(int64_t num_atoms, int64_t width, const T* x, const T* factor, const int64_t* order, const int64_t* ptr,
              T* out, void* stream) {
    launch(edge_sum_kernel<T>, num_atoms, stream, width, x, factor, order, ptr, out);
}

template <class T>
void atom_sum_backward(int64_t num_atoms, int64_t width, const T* grad, const T* x, const T* factor, const int64_t* ptr,
                       T* grad_x, T* grad_factor, void* stream) {
    launch(atom_sum_backward_kernel<T>, num_atoms, stream, width, grad, x, factor, ptr, grad_x, grad_factor);
}

template void edge_sum(int64_t, int64_t, const float*, const float*, const int64_t*, const int64_t*, float*, void*);
template void edge_sum(int64_t, int64_t, const double*, const double*, const int64_t*, const int64_t*, double*, void*);
template void atom_sum_backward(int64_t, int64_t, const float*, const float*, const float*, const int64_t*, float*,
                                float*, void*);
template void atom_sum_backward(int64_t, int64_t, const double*, const double*, const double*, const int64_t*, double*,
                                double*, void*);

}  // namespace ejmp::cuda
