// Sums over the many neighbours of an atom: out[n, r, c] = sum_e radial[e, r] h[source[e], c] for edges e into atom n,
// one block per atom. Reads radial and the rows of h once per tile of the result; writes out once.
#include "ops.h"
#include "product.cuh"

namespace ejmp::cuda {
namespace {

constexpr int TILE = 32, GROUP = 8;

// Columns column .. column + TILE of rows of x [., width], of rows[i] if `rows` is given; zeros beyond its last row and
// column.
template <class T>
__device__ void load(T (*tile)[TILE + 1], int num_rows, int64_t width, int64_t column, const T* x,
                     const int64_t* rows) {
    for (int item = threadIdx.x; item < TILE * TILE; item += blockDim.x) {
        const int i = item / TILE, c = item % TILE;
        const bool inside = i < num_rows && column + c < width;
        tile[i][c] = inside ? x[(rows ? rows[i] : i) * width + column + c] : T(0);
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) pair_kernel(Pair<T> p, T* out) {
    __shared__ T radial[TILE][TILE + 1], h[TILE][TILE + 1], sum[TILE][TILE + 1];
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.ptr, atom);
    for (int64_t column = 0; column < p.num_radial; column += TILE)
        for (int64_t channel = 0; channel < p.channels; channel += TILE) {
            zero(sum[0], TILE * (TILE + 1));
            for (int64_t first = edges.begin; first < edges.end; first += TILE) {
                const int num_edges = tile_width(edges.end, first, TILE);
                load(radial, num_edges, p.num_radial, column, p.radial + first * p.num_radial, nullptr);
                load(h, num_edges, p.channels, channel, p.h, p.source + first);
                __syncthreads();
                products<4, 2, T>(
                    1, TILE, TILE, TILE, [&](int, int r, int e) { return radial[e][r]; },
                    [&](int, int e, int c) { return h[e][c]; }, [&](int, int r, int c, T x) { sum[r][c] += x; });
                __syncthreads();
            }
            __syncthreads();
            for (int item = threadIdx.x; item < TILE * TILE; item += blockDim.x) {
                const int r = item / TILE, c = item % TILE;
                if (column + r < p.num_radial && channel + c < p.channels)
                    out[(atom * p.num_radial + column + r) * p.channels + channel + c] = sum[r][c];
            }
            __syncthreads();
        }
}

// to_radial[e, r] = sum_c grad[n, r, c] h[source[e], c]
template <class T>
__global__ void __launch_bounds__(THREADS) pair_to_radial(Pair<T> p, const T* grad, T* to_radial) {
    __shared__ T g[TILE][TILE + 1], h[TILE][TILE + 1], sum[TILE][TILE + 1];
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.ptr, atom);
    for (int64_t first = edges.begin; first < edges.end; first += TILE)
        for (int64_t column = 0; column < p.num_radial; column += TILE) {
            const int num_edges = tile_width(edges.end, first, TILE);
            const int num_radial = tile_width(p.num_radial, column, TILE);
            zero(sum[0], TILE * (TILE + 1));
            for (int64_t channel = 0; channel < p.channels; channel += TILE) {
                load(h, num_edges, p.channels, channel, p.h, p.source + first);
                load(g, num_radial, p.channels, channel, grad + (atom * p.num_radial + column) * p.channels, nullptr);
                __syncthreads();
                products<4, 2, T>(
                    1, TILE, TILE, TILE, [&](int, int e, int c) { return h[e][c]; },
                    [&](int, int c, int r) { return g[r][c]; }, [&](int, int e, int r, T x) { sum[e][r] += x; });
                __syncthreads();
            }
            for (int item = threadIdx.x; item < num_edges * num_radial; item += blockDim.x) {
                const int e = item / num_radial, r = item % num_radial;
                to_radial[(first + e) * p.num_radial + column + r] = sum[e][r];
            }
            __syncthreads();
        }
}

// to_h[s, c] = sum_e sum_r radial[e, r] grad[target[e], r, c] over the edges e out of atom s: every GROUP-th edge is
// summed by itself, then these sums are.
template <class T>
__global__ void __launch_bounds__(THREADS)
    pair_to_h(Pair<T> p, const int64_t* target, BySource by_source, const T* grad, T* to_h) {
    __shared__ T part[GROUP][TILE];
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(by_source.ptr, atom);
    for (int64_t channel = 0; channel < p.channels; channel += TILE) {
        for (int item = threadIdx.x; item < GROUP * TILE; item += blockDim.x) {
            const int group = item / TILE, c = item % TILE;
            T total = 0;
            if (channel + c < p.channels)
                for (int64_t i = edges.begin + group; i < edges.end; i += GROUP) {
                    const int64_t e = by_source.order[i];
                    const T* const g = grad + target[e] * p.num_radial * p.channels + channel + c;
                    for (int64_t r = 0; r < p.num_radial; ++r)
                        total += p.radial[e * p.num_radial + r] * g[r * p.channels];
                }
            part[group][c] = total;
        }
        __syncthreads();
        for (int c = threadIdx.x; c < TILE; c += blockDim.x) {
            T total = 0;
            for (int group = 0; group < GROUP; ++group) total += part[group][c];
            if (channel + c < p.channels) to_h[atom * p.channels + channel + c] = total;
        }
        __syncthreads();
    }
}

}  // namespace

template <class T>
void pair(const Pair<T>& p, T* out, void* stream) {
    launch(pair_kernel<T>, p.num_atoms, stream, p, out);
}

template <class T>
void pair_backward(const Pair<T>& p, const int64_t* target, const BySource& by_source, const T* grad, T* h, T* radial,
                   void* stream) {
    launch(pair_to_radial<T>, p.num_atoms, stream, p, grad, radial);
    launch(pair_to_h<T>, p.num_atoms, stream, p, target, by_source, grad, h);
}

template void pair(const Pair<float>&, float*, void*);
template void pair(const Pair<double>&, double*, void*);
template void pair_backward(const Pair<float>&, const int64_t*, const BySource&, const float*, float*, float*, void*);
template void pair_backward(const Pair<double>&, const int64_t*, const BySource&, const double*, double*, double*,
                            void*);

}  // namespace ejmp::cuda
