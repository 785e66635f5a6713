// The gradients of quadruplet aggregation; see quadruplet.cuh for the letters.
//
// In order: the rows (q, d) of v; the sums, for to_weight; the pairs (e, q), which add to the gradients of v and n in
// the rows and to those of V_e and V_q; the rows' gradients carried on to filter, V_q and parts of x and V_d; the parts
// of all q with one source b summed in the order of q.
#include "quadruplet.cuh"

namespace ejmp::cuda {
namespace {

template <class T, bool D>
struct PairTile : QuadrupletTile<T, D, 12> {
    using Base = QuadrupletTile<T, D, 12>;
    using typename Base::N;
    static constexpr int EDGES = Base::EDGES, PER_EDGE = SPHERICAL * SPHERICAL;
    alignas(16) N z_slopes[EDGES][Base::ROWS][SPHERICAL];
    N y_slopes[EDGES][SPHERICAL];
    N to_sums[EDGES][PER_EDGE][Base::CHANNELS + 1];
    N to_u[EDGES][SPHERICAL][Base::CHANNELS + 1];
    N to_dihedral[EDGES][Base::ROWS];  // gradient of p . n
    N to_y[EDGES][PER_EDGE];           // of y[e, l], in parts k
    Vector<T, D> to_p[EDGES], to_v_q[EDGES];
};

// to_sums[e, S l + k, c] = sum_a weight[e, a, S l + k] grad[e, a, c], zero beyond the edges and channels
template <class T, bool D, class Tile>
__device__ void fill_to_sums(const Quadruplet<T>& p, In<T> grad, Rows e, int64_t channel, Tile& tile) {
    using N = Number<T, D>;
    const int num_lk = static_cast<int>(p.spherical * p.spherical);
    const auto weight = [&](int i, int lk, int a) {
        return e.begin + i < e.end ? read<D>(p.weight, ((e.begin + i) * p.basis + a) * num_lk + lk) : N(0);
    };
    const auto g = [&](int i, int a, int c) {
        const bool inside = e.begin + i < e.end && channel + c < p.channels;
        return inside ? read<D>(grad, ((e.begin + i) * p.basis + a) * p.channels + channel + c) : N(0);
    };
    products<4, 4, N>(Tile::EDGES, num_lk, Tile::CHANNELS, static_cast<int>(p.basis), weight, g,
                      [&](int i, int lk, int c, N x) { tile.to_sums[i][lk][c] = x; });
}

// to_u[e, k, c] = sum_l y[e, l] to_sums[e, S l + k, c]
template <class Tile>
__device__ void fill_to_u(int spherical, Tile& tile) {
    for (int item = threadIdx.x; item < Tile::EDGES * SPHERICAL * Tile::CHANNELS; item += blockDim.x) {
        const int i = item / Tile::CHANNELS / SPHERICAL, k = item / Tile::CHANNELS % SPHERICAL;
        const int c = item % Tile::CHANNELS;
        typename Tile::N total(0);
        if (k < spherical)
            for (int l = 0; l < spherical; ++l) total += tile.y[i][l] * tile.to_sums[i][l * spherical + k][c];
        tile.to_u[i][k][c] = total;
    }
}

// to_value[q, d, c] += sum_e sum_k z[e, d, k] to_u[e, k, c]
template <class T, bool D, class Tile>
__device__ void add_to_value(int64_t channels, int64_t count, int64_t row, int64_t channel, const Tile& tile,
                             Number<T, D>* to_value) {
    using N = Number<T, D>;
    const auto z = [&](int, int j, int q) { return tile.z[q / SPHERICAL][j][q % SPHERICAL]; };
    const auto to_u = [&](int, int q, int c) { return tile.to_u[q / SPHERICAL][q % SPHERICAL][c]; };
    products<4, 2, N>(1, static_cast<int>(count), tile_width(channels, channel, Tile::CHANNELS),
                      Tile::EDGES * SPHERICAL, z, to_u,
                      [&](int, int j, int c, N x) { to_value[(row + j) * channels + channel + c] += x; });
}

// to_dihedral[e, d] = sum_k z_slopes[e, d, k] sum_c to_u[e, k, c] v[q, d, c], zero where p or n is not regular
template <class Tile>
__device__ void fill_to_dihedral(int64_t num_edges, int64_t num_rows, Tile& tile) {
    using N = typename Tile::N;
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::ROWS; item += blockDim.x) {
        const int i = item / Tile::ROWS, j = item % Tile::ROWS;
        N to_z[SPHERICAL], total(0);
        no_scores(to_z, static_cast<N*>(nullptr));
        if (i < num_edges && j < num_rows && tile.p[i].regular && tile.regular[j]) {
            for (int c = 0; c < Tile::CHANNELS; ++c) {
                const N value = tile.value[j][c];
#pragma unroll
                for (int k = 0; k < SPHERICAL; ++k) to_z[k] += tile.to_u[i][k][c] * value;
            }
#pragma unroll
            for (int k = 0; k < SPHERICAL; ++k) total += tile.z_slopes[i][j][k] * to_z[k];
        }
        tile.to_dihedral[i][j] = total;
    }
}

// to_p[e] += sum_d to_dihedral[e, d] n[d] and to_normal[q, d] += sum_e to_dihedral[e, d] p[e]
template <class T, bool D, class Tile>
__device__ void add_to_directions(int64_t num_edges, int64_t num_rows, int64_t row, Tile& tile,
                                  Number<T, D>* to_normal) {
    for (int item = threadIdx.x; item < Tile::EDGES + Tile::ROWS; item += blockDim.x) {
        const int i = item, j = item - Tile::EDGES;
        Vector<T, D> total{T(0), T(0), T(0)};
        if (i < num_edges) {
            for (int d = 0; d < num_rows; ++d) total += tile.to_dihedral[i][d] * tile.normal[d];
            tile.to_p[i] += total;
        } else if (j >= 0 && j < num_rows) {
            for (int e = 0; e < num_edges; ++e) total += tile.to_dihedral[e][j] * tile.p[e].direction;
            Number<T, D>* const place = to_normal + 3 * (row + j);
            place[0] += total.x, place[1] += total.y, place[2] += total.z;
        }
    }
}

// to_y[e, S l + k] = sum_c to_sums[e, S l + k, c] u[e, k, c]
template <class Tile>
__device__ void fill_to_y(int spherical, Tile& tile) {
    const int num_lk = spherical * spherical;
    for (int item = threadIdx.x; item < Tile::EDGES * num_lk; item += blockDim.x) {
        const int i = item / num_lk, lk = item % num_lk;
        typename Tile::N total(0);
        for (int c = 0; c < Tile::CHANNELS; ++c) total += tile.to_sums[i][lk][c] * tile.u[i][lk % spherical][c];
        tile.to_y[i][lk] = total;
    }
}

// to_v[e] and to_v_q[e] from the gradients of V_e . V_q and of p
template <class T, bool D, class Tile>
__device__ void finish_pair(const Quadruplet<T>& p, Rows e, int64_t q, Tile& tile, T* to_v) {
    for (int i = threadIdx.x; i < e.count(); i += blockDim.x) {
        Number<T, D> to_cosine(0);
        for (int l = 0; l < p.spherical; ++l) {
            Number<T, D> to_y(0);
            for (int k = 0; k < p.spherical; ++k) to_y += tile.to_y[i][l * p.spherical + k];
            to_cosine += tile.y_slopes[i][l] * to_y;
        }
        const auto v_e = read_vector<D>(p.v, e.begin + i), v_q = read_vector<D>(p.v_middle, q);
        const auto to_cross = tile.p[i].backward(tile.to_p[i]);  // of V_e x V_q
        add_stored(to_v, e.begin + i, to_cosine * v_q + cross(v_q, to_cross));
        tile.to_v_q[i] = to_cosine * v_e + cross(to_cross, v_e);
    }
}

template <class T, bool D>
__global__ void __launch_bounds__(THREADS)
    quadruplet_pairs(Quadruplet<T> p, const int64_t* row_ptr, QuadrupletWorkspace<T, D> work, In<T> grad, T* to_v,
                     T* to_v_middle) {
    using Tile = PairTile<T, D>;
    __shared__ Tile tile;
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.main.ptr, atom), middle = rows_of(p.middle.ptr, atom);
    zero(to_v + 3 * edges.begin, 3 * edges.count());
    zero(to_v_middle + 3 * middle.begin, 3 * middle.count());
    for (int64_t channel = 0; channel < p.channels; channel += Tile::CHANNELS)
        for (int64_t begin = edges.begin; begin < edges.end; begin += Tile::EDGES) {
            const Rows e = edges.part(begin, Tile::EDGES);
            fill_to_sums<T, D>(p, grad, e, channel, tile);
            for (int64_t q = middle.begin; q < middle.end; ++q) {
                const Rows to_b = edges_of_middle(p, q);
                start_pair<T, D>(p, e, q, tile, tile.y_slopes);
                for (int i = threadIdx.x; i < Tile::EDGES; i += blockDim.x) tile.to_p[i] = {T(0), T(0), T(0)};
                __syncthreads();
                fill_to_u(static_cast<int>(p.spherical), tile);
                for (int64_t first = to_b.begin; first < to_b.end; first += Tile::ROWS) {
                    const Rows d = to_b.part(first, Tile::ROWS);
                    const int64_t row = row_ptr[q] + first - to_b.begin;
                    load_rows<T, D>(p, q, d, row, channel, work.value, tile);
                    __syncthreads();
                    fill_z<T, D>(p, e, q, d, tile, tile.z_slopes[0]);
                    __syncthreads();
                    add_to_u(tile);
                    add_to_value(p.channels, d.count(), row, channel, tile, work.to_value);
                    fill_to_dihedral(e.count(), d.count(), tile);
                    __syncthreads();
                    add_to_directions(e.count(), d.count(), row, tile, work.to_normal);
                    __syncthreads();
                }
                fill_to_y(static_cast<int>(p.spherical), tile);
                __syncthreads();
                finish_pair<T, D>(p, e, q, tile, to_v);
                __syncthreads();
                if (threadIdx.x == 0)
                    for (int i = 0; i < e.count(); ++i) add_stored(to_v_middle, q, tile.to_v_q[i]);
            }
        }
}

// Shared memory for a tile of rows (q, d).
template <class T, bool D>
struct RowTile {
    using N = Number<T, D>;
    static constexpr int ROWS = 16, CHANNELS = 32;
    alignas(16) N y[ROWS][SPHERICAL], slopes[ROWS][SPHERICAL];  // Y_k(V_q . V_d)
    N to_filtered[ROWS][CHANNELS + 1];                          // gradient of v / x
    N to_y[ROWS][SPHERICAL];
    Vector<T, D> to_v_q[ROWS];
};

// x_part = to_value v / x and to_filtered = to_value x
template <class T, bool D, class Tile>
__device__ void fill_to_filtered(const Quadruplet<T>& p, int64_t q, Rows d, int64_t row, int64_t channel, Tile& tile,
                                 const Number<T, D>* to_value, T* x_part) {
    for (int item = threadIdx.x; item < Tile::ROWS * Tile::CHANNELS; item += blockDim.x) {
        const int j = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        tile.to_filtered[j][c] = 0;
        if (j >= d.count() || channel + c >= p.channels) continue;
        const auto to = to_value[(row + j) * p.channels + channel + c];
        x_part[(row + j) * p.channels + channel + c] = stored(to * filtered<T, D>(p, q, channel + c, tile.y[j]));
        tile.to_filtered[j][c] = to * read<D>(p.x, (d.begin + j) * p.channels + channel + c);
    }
}

// to_filter[q, k, c] = sum_d y[d, k] to_filtered[d, c], added up over the tiles of rows, and
// to_y[d, k] += sum_c filter[q, k, c] to_filtered[d, c]
template <class T, bool D, class Tile>
__device__ void add_to_filter(const Quadruplet<T>& p, int64_t q, int64_t num_rows, int64_t channel, Tile& tile,
                              T* to_filter) {
    const int num_channels = tile_width(p.channels, channel, Tile::CHANNELS);
    for (int item = threadIdx.x; item < p.spherical * Tile::CHANNELS; item += blockDim.x) {
        const int k = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        if (c >= num_channels) continue;
        Number<T, D> total(0);
        for (int j = 0; j < num_rows; ++j) total += tile.y[j][k] * tile.to_filtered[j][c];
        to_filter[(q * p.spherical + k) * p.channels + channel + c] += stored(total);
    }
    for (int item = threadIdx.x; item < Tile::ROWS * p.spherical; item += blockDim.x) {
        const int j = item % Tile::ROWS, k = item / Tile::ROWS;
        Number<T, D> total(0);
        for (int c = 0; c < num_channels; ++c)
            total += read<D>(p.filter, (q * p.spherical + k) * p.channels + channel + c) * tile.to_filtered[j][c];
        tile.to_y[j][k] += total;
    }
}

// The parts of V_d, and to_v_q[d], from the gradients of V_q . V_d and of n
template <class T, bool D, class Tile>
__device__ void finish_rows(const Quadruplet<T>& p, int64_t q, Rows d, int64_t row, Tile& tile,
                            const Number<T, D>* to_normal, T* v_part) {
    for (int j = threadIdx.x; j < d.count(); j += blockDim.x) {
        Number<T, D> to_cosine(0);
        for (int k = 0; k < p.spherical; ++k) to_cosine += tile.slopes[j][k] * tile.to_y[j][k];
        const auto v_d = read_vector<D>(p.v, d.begin + j), v_q = read_vector<D>(p.v_middle, q);
        const Number<T, D>* const to_n = to_normal + 3 * (row + j);
        const auto to_cross = normal_to<T, D>(p, d.begin + j, q).backward({to_n[0], to_n[1], to_n[2]});
        const auto to_v_d = to_cosine * v_q + cross(v_q, to_cross);
        T* const place = v_part + 3 * (row + j);
        place[0] = stored(to_v_d.x), place[1] = stored(to_v_d.y), place[2] = stored(to_v_d.z);
        tile.to_v_q[j] = to_cosine * v_d + cross(to_cross, v_d);
    }
}

template <class T, bool D>
__global__ void __launch_bounds__(THREADS)
    quadruplet_rows(Quadruplet<T> p, const int64_t* row_ptr, QuadrupletWorkspace<T, D> work, T* to_filter,
                    T* to_v_middle) {
    using Tile = RowTile<T, D>;
    __shared__ Tile tile;
    const int64_t atom = blockIdx.x;
    const Rows middle = rows_of(p.middle.ptr, atom);
    const int64_t per_middle = p.spherical * p.channels;
    zero(to_filter + middle.begin * per_middle, middle.count() * per_middle);
    for (int64_t q = middle.begin; q < middle.end; ++q) {
        const Rows to_b = edges_of_middle(p, q);
        for (int64_t first = to_b.begin; first < to_b.end; first += Tile::ROWS) {
            const Rows d = to_b.part(first, Tile::ROWS);
            const int64_t row = row_ptr[q] + first - to_b.begin;
            for (int j = threadIdx.x; j < Tile::ROWS; j += blockDim.x) {
                no_scores<T, D>(tile.to_y[j], nullptr);
                if (j < d.count()) middle_scores<T, D>(p, atom, q, d.begin + j, tile.y[j], tile.slopes[j]);
            }
            __syncthreads();
            for (int64_t channel = 0; channel < p.channels; channel += Tile::CHANNELS) {
                T* const x_part = reinterpret_cast<T*>(work.value);
                fill_to_filtered<T, D>(p, q, d, row, channel, tile, work.to_value, x_part);
                __syncthreads();
                add_to_filter<T, D>(p, q, d.count(), channel, tile, to_filter);
                __syncthreads();
            }
            finish_rows<T, D>(p, q, d, row, tile, work.to_normal, work.v_part);
            __syncthreads();
            if (threadIdx.x == 0)
                for (int j = 0; j < d.count(); ++j) add_stored(to_v_middle, q, tile.to_v_q[j]);
        }
    }
}

// x[d] = sum of the parts of the edge d->b over the q with source b; the same is added to v[d].
template <class T>
__global__ void __launch_bounds__(THREADS) quadruplet_gather(int64_t channels, const int64_t* main_ptr, MiddleRows rows,
                                                             const T* x_part, const T* v_part, T* x, T* v) {
    const int64_t b = blockIdx.x;
    const Rows edges = rows_of(main_ptr, b), middle = rows_of(rows.middle.ptr, b);
    const auto gather = [&](int64_t item, int64_t width, const T* part) {
        T total = 0;
        for (int64_t i = middle.begin; i < middle.end; ++i)
            total += part[rows.ptr[rows.middle.order[i]] * width + item];
        return total;
    };
    for (int64_t item = threadIdx.x; item < edges.count() * channels; item += blockDim.x)
        x[edges.begin * channels + item] = gather(item, channels, x_part);
    for (int64_t item = threadIdx.x; item < edges.count() * 3; item += blockDim.x)
        v[edges.begin * 3 + item] += gather(item, 3, v_part);
}

template <class T, bool D>
void run(const Quadruplet<T>& p, const MiddleRows& rows, In<T> grad, const QuadrupletGradients<T>& to, void* workspace,
         void* stream) {
    const QuadrupletWorkspace<T, D> work(workspace, rows.count, p.channels, true);
    const int64_t N = p.num_atoms;
    launch(quadruplet_values<T, D>, N, stream, p, rows.ptr, work);
    launch(quadruplet_sums<T, D, true>, N, stream, p, rows.ptr, work.value, grad, to.weight);
    launch(quadruplet_pairs<T, D>, N, stream, p, rows.ptr, work, grad, to.v, to.v_middle);
    launch(quadruplet_rows<T, D>, N, stream, p, rows.ptr, work, to.filter, to.v_middle);
    const T* const x_part = reinterpret_cast<const T*>(work.value);
    launch(quadruplet_gather<T>, N, stream, p.channels, p.main.ptr, rows, x_part, work.v_part, to.x, to.v);
}

}  // namespace

template <class T>
void quadruplet_backward(const Quadruplet<T>& p, const MiddleRows& rows, In<T> grad, const QuadrupletGradients<T>& to,
                         void* workspace, void* stream) {
    check_spherical(p.spherical);
    (p.x.along ? run<T, true> : run<T, false>)(p, rows, grad, to, workspace, stream);
}

template void quadruplet_backward(const Quadruplet<float>&, const MiddleRows&, In<float>,
                                  const QuadrupletGradients<float>&, void*, void*);
template void quadruplet_backward(const Quadruplet<double>&, const MiddleRows&, In<double>,
                                  const QuadrupletGradients<double>&, void*, void*);

}  // namespace ejmp::cuda
