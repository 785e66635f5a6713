// Triplet aggregation, one block per atom: the edges out of the sum and into it all end at that atom.
//
// For a tile of edges e and channels c the sums S[e, l, c] = sum_k Y_l(V_e . V_k) x[k, c] are collected over tiles of
// edges k; out[e, a, c] = sum_l weight[e, a, l] S[e, l, c]. Reads x once per tile of edges e, weight once; writes out.
#include "number.cuh"
#include "ops.h"

namespace ejmp::cuda {
namespace {

template <class T, bool D>
struct TripletTile {
    using N = Number<T, D>;
    static constexpr int EDGES = 32 / sizeof(N), INCOMING = 16, CHANNELS = 32;

    alignas(16) N y[EDGES][INCOMING][SPHERICAL];
    N x[INCOMING][CHANNELS + 1];
    N sum[EDGES][SPHERICAL][CHANNELS + 1];
};

template <class T, bool D>
struct TripletBackwardTile : TripletTile<T, D> {
    using Base = TripletTile<T, D>;
    using typename Base::N;
    alignas(16) N slopes[Base::EDGES][Base::INCOMING][SPHERICAL];
    N to_sum[Base::EDGES][SPHERICAL][Base::CHANNELS + 1];
    N to_cosine[Base::EDGES][Base::INCOMING];
};

// Scores of edges e and k; zero for the same image of the same atom, and beyond the rows.
template <class T, bool D, class Tile>
__device__ void fill_scores(const Triplet<T>& p, Rows e, Rows k, Tile& tile, Number<T, D> (*slopes)[SPHERICAL]) {
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::INCOMING; item += blockDim.x) {
        const int i = item / Tile::INCOMING, j = item % Tile::INCOMING;
        Number<T, D>* const slope = slopes ? slopes[item] : nullptr;
        const int64_t out = e.begin + i, in = k.begin + j;
        if (out >= e.end || in >= k.end ||
            (p.in.source[in] == p.out.source[out] && p.in.image[in] == p.out.image[out])) {
            no_scores(tile.y[i][j], slope);
        } else {
            const auto cosine = dot(read_vector<D>(p.v_out, out), read_vector<D>(p.v_in, in));
            legendre(p.spherical, cosine, tile.y[i][j], slope);
        }
    }
}

template <class T, bool D, class Tile>
__device__ void load_x(const Triplet<T>& p, Rows k, int64_t channel, Tile& tile) {
    for (int item = threadIdx.x; item < Tile::INCOMING * Tile::CHANNELS; item += blockDim.x) {
        const int j = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        const bool inside = k.begin + j < k.end && channel + c < p.channels;
        tile.x[j][c] = inside ? read<D>(p.x, (k.begin + j) * p.channels + channel + c) : Number<T, D>(0);
    }
}

template <class Tile>
__device__ void clear_sum(Tile& tile) {
    for (int item = threadIdx.x; item < Tile::EDGES * SPHERICAL * Tile::CHANNELS; item += blockDim.x)
        tile.sum[item / Tile::CHANNELS / SPHERICAL][item / Tile::CHANNELS % SPHERICAL][item % Tile::CHANNELS] = 0;
}

template <class Tile>
__device__ void add_to_sum(Tile& tile) {
    using N = typename Tile::N;
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::CHANNELS; item += blockDim.x) {
        const int i = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        N sum[SPHERICAL];
#pragma unroll
        for (int l = 0; l < SPHERICAL; ++l) sum[l] = tile.sum[i][l][c];
        for (int j = 0; j < Tile::INCOMING; ++j) {
            const N x = tile.x[j][c];
#pragma unroll
            for (int l = 0; l < SPHERICAL; ++l) sum[l] += tile.y[i][j][l] * x;
        }
#pragma unroll
        for (int l = 0; l < SPHERICAL; ++l) tile.sum[i][l][c] = sum[l];
    }
}

// Write rows of the result for a tile of edges, or with to_atoms add them to the atom's row.
template <class T, bool D, class Tile>
__device__ void write_out(const Triplet<T>& p, int64_t atom, Rows e, bool first, int64_t channel, const Tile& tile,
                          T* out) {
    const int num_edges = static_cast<int>(e.count()), num_rows = p.to_atoms ? 1 : num_edges;
    const int per_row = static_cast<int>(p.basis) * Tile::CHANNELS;
    for (int item = threadIdx.x; item < num_rows * per_row; item += blockDim.x) {
        const int row = item / per_row, a = item % per_row / Tile::CHANNELS, c = item % Tile::CHANNELS;
        if (channel + c >= p.channels) continue;
        Number<T, D> total(0);
        for (int i = row; i < (p.to_atoms ? num_edges : row + 1); ++i)
            for (int l = 0; l < p.spherical; ++l)
                total += read<D>(p.weight, ((e.begin + i) * p.basis + a) * p.spherical + l) * tile.sum[i][l][c];
        T& place = out[((p.to_atoms ? atom : e.begin + row) * p.basis + a) * p.channels + channel + c];
        place = p.to_atoms && !first ? place + stored(total) : stored(total);
    }
}

template <class T, bool D>
__global__ void __launch_bounds__(THREADS) triplet_kernel(Triplet<T> p, T* out) {
    using Tile = TripletTile<T, D>;
    __shared__ Tile tile;
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.out.ptr, atom), incoming = rows_of(p.in.ptr, atom);
    if (p.to_atoms && edges.count() == 0) zero(out + atom * p.basis * p.channels, p.basis * p.channels);
    for (int64_t channel = 0; channel < p.channels; channel += Tile::CHANNELS)
        for (int64_t first = edges.begin; first < edges.end; first += Tile::EDGES) {
            const Rows e = edges.part(first, Tile::EDGES);
            clear_sum(tile);
            __syncthreads();
            for (int64_t start = incoming.begin; start < incoming.end; start += Tile::INCOMING) {
                const Rows k = incoming.part(start, Tile::INCOMING);
                fill_scores<T, D>(p, e, k, tile, nullptr);
                load_x<T, D>(p, k, channel, tile);
                __syncthreads();
                add_to_sum(tile);
                __syncthreads();
            }
            write_out<T, D>(p, atom, e, first == edges.begin, channel, tile, out);
            __syncthreads();
        }
}

// to_sum[e, l, c] = sum_a weight[e, a, l] grad[e, a, c]
template <class T, bool D, class Tile>
__device__ void fill_to_sum(const Triplet<T>& p, In<T> grad, int64_t atom, Rows e, int64_t channel, Tile& tile) {
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::CHANNELS; item += blockDim.x) {
        const int i = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        Number<T, D> sum[SPHERICAL];
        no_scores<T, D>(sum, nullptr);
        if (e.begin + i < e.end && channel + c < p.channels)
            for (int64_t a = 0; a < p.basis; ++a) {
                const int64_t row = (p.to_atoms ? atom : e.begin + i) * p.basis + a;
                const auto g = read<D>(grad, row * p.channels + channel + c);
#pragma unroll
                for (int l = 0; l < SPHERICAL; ++l)
                    if (l < p.spherical)
                        sum[l] += read<D>(p.weight, ((e.begin + i) * p.basis + a) * p.spherical + l) * g;
            }
#pragma unroll
        for (int l = 0; l < SPHERICAL; ++l) tile.to_sum[i][l][c] = sum[l];
    }
}

// to_x[k, c] += sum_e sum_l y[e, k, l] to_sum[e, l, c]
template <class T, class Tile>
__device__ void add_to_x(const Triplet<T>& p, Rows k, int64_t channel, const Tile& tile, T* to_x) {
    for (int item = threadIdx.x; item < Tile::INCOMING * Tile::CHANNELS; item += blockDim.x) {
        const int j = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        if (k.begin + j >= k.end || channel + c >= p.channels) continue;
        typename Tile::N total(0);
        for (int i = 0; i < Tile::EDGES; ++i)
#pragma unroll
            for (int l = 0; l < SPHERICAL; ++l) total += tile.y[i][j][l] * tile.to_sum[i][l][c];
        to_x[(k.begin + j) * p.channels + channel + c] += stored(total);
    }
}

// to_cosine[e, k] = sum_l slopes[e, k, l] sum_c to_sum[e, l, c] x[k, c]
template <class Tile>
__device__ void fill_to_cosine(Tile& tile) {
    using N = typename Tile::N;
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::INCOMING; item += blockDim.x) {
        const int i = item / Tile::INCOMING, j = item % Tile::INCOMING;
        N total(0);
        for (int l = 0; l < SPHERICAL; ++l) {
            N inner(0);
            for (int c = 0; c < Tile::CHANNELS; ++c) inner += tile.to_sum[i][l][c] * tile.x[j][c];
            total += tile.slopes[i][j][l] * inner;
        }
        tile.to_cosine[i][j] = total;
    }
}

// to_v_out[e] += sum_k to_cosine[e, k] v_in[k] and to_v_in[k] += sum_e to_cosine[e, k] v_out[e]
template <class T, bool D, class Tile>
__device__ void add_to_vectors(const Triplet<T>& p, Rows e, Rows k, const Tile& tile, T* to_v_out, T* to_v_in) {
    const int num_out = static_cast<int>(e.count()), num_in = static_cast<int>(k.count());
    for (int item = threadIdx.x; item < 3 * (Tile::EDGES + Tile::INCOMING); item += blockDim.x) {
        const int row = item / 3, x = item % 3;
        Number<T, D> total(0);
        if (row < Tile::EDGES) {
            if (row >= num_out) continue;
            for (int j = 0; j < num_in; ++j) total += tile.to_cosine[row][j] * read<D>(p.v_in, 3 * (k.begin + j) + x);
            to_v_out[3 * (e.begin + row) + x] += stored(total);
        } else {
            const int j = row - Tile::EDGES;
            if (j >= num_in) continue;
            for (int i = 0; i < num_out; ++i) total += tile.to_cosine[i][j] * read<D>(p.v_out, 3 * (e.begin + i) + x);
            to_v_in[3 * (k.begin + j) + x] += stored(total);
        }
    }
}

// to_weight[e, a, l] += sum_c grad[e, a, c] sum[e, l, c]
template <class T, bool D, class Tile>
__device__ void add_to_weight(const Triplet<T>& p, In<T> grad, int64_t atom, Rows e, int64_t channel, const Tile& tile,
                              T* to_weight) {
    const int per_edge = static_cast<int>(p.basis * p.spherical);
    const int num_channels = static_cast<int>(Rows{0, p.channels}.part(channel, Tile::CHANNELS).count());
    for (int item = threadIdx.x; item < e.count() * per_edge; item += blockDim.x) {
        const int i = item / per_edge, a = item % per_edge / static_cast<int>(p.spherical);
        const int l = item % static_cast<int>(p.spherical);
        const int64_t row = (p.to_atoms ? atom : e.begin + i) * p.basis + a;
        Number<T, D> total(0);
        for (int c = 0; c < num_channels; ++c)
            total += read<D>(grad, row * p.channels + channel + c) * tile.sum[i][l][c];
        to_weight[e.begin * per_edge + item] += stored(total);
    }
}

template <class T, bool D>
__global__ void __launch_bounds__(THREADS)
    triplet_backward_kernel(Triplet<T> p, In<T> grad, T* to_x, T* to_weight, T* to_v_out, T* to_v_in) {
    using Tile = TripletBackwardTile<T, D>;
    __shared__ Tile tile;
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.out.ptr, atom), incoming = rows_of(p.in.ptr, atom);
    zero(to_x + incoming.begin * p.channels, incoming.count() * p.channels);
    zero(to_v_in + 3 * incoming.begin, 3 * incoming.count());
    zero(to_v_out + 3 * edges.begin, 3 * edges.count());
    zero(to_weight + edges.begin * p.basis * p.spherical, edges.count() * p.basis * p.spherical);
    for (int64_t first = edges.begin; first < edges.end; first += Tile::EDGES) {
        const Rows e = edges.part(first, Tile::EDGES);
        for (int64_t channel = 0; channel < p.channels; channel += Tile::CHANNELS) {
            clear_sum(tile);
            fill_to_sum<T, D>(p, grad, atom, e, channel, tile);
            __syncthreads();
            for (int64_t start = incoming.begin; start < incoming.end; start += Tile::INCOMING) {
                const Rows k = incoming.part(start, Tile::INCOMING);
                fill_scores<T, D>(p, e, k, tile, tile.slopes[0]);
                load_x<T, D>(p, k, channel, tile);
                __syncthreads();
                add_to_sum(tile);
                add_to_x(p, k, channel, tile, to_x);
                fill_to_cosine(tile);
                __syncthreads();
                add_to_vectors<T, D>(p, e, k, tile, to_v_out, to_v_in);
            }
            add_to_weight<T, D>(p, grad, atom, e, channel, tile, to_weight);
            __syncthreads();
        }
    }
}

}  // namespace

template <class T>
void triplet(const Triplet<T>& p, T* out, void* stream) {
    check_spherical(p.spherical);
    launch(p.x.along ? triplet_kernel<T, true> : triplet_kernel<T, false>, p.num_atoms, stream, p, out);
}

template <class T>
void triplet_backward(const Triplet<T>& p, In<T> grad, T* x, T* weight, T* v_out, T* v_in, void* stream) {
    check_spherical(p.spherical);
    const auto kernel = p.x.along ? triplet_backward_kernel<T, true> : triplet_backward_kernel<T, false>;
    launch(kernel, p.num_atoms, stream, p, grad, x, weight, v_out, v_in);
}

template void triplet(const Triplet<float>&, float*, void*);
template void triplet(const Triplet<double>&, double*, void*);
template void triplet_backward(const Triplet<float>&, In<float>, float*, float*, float*, float*, void*);
template void triplet_backward(const Triplet<double>&, In<double>, double*, double*, double*, double*, void*);

}  // namespace ejmp::cuda
