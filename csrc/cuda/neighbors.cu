// Graph building, the search: atoms sorted into bins, one block per structure, then everything within the cutoff of an
// atom, one block per atom. Lengths are made by the same operations in the same order as on the CPU and in torch.
#include "neighbors.cuh"

namespace ejmp::cuda {
namespace {

// One structure's bins in fractional coordinates. A bin outside the cell is one inside it plus a lattice shift.
struct Grid {
    double inverse[3][3];                // cartesian -> fractional: f_j = sum_i r_i inverse[i][j]
    double low[3], width[3], height[3];  // fractional origin and extent of the bins, distance between cell faces
    int64_t bins[3];
    int64_t first_bin;  // of all structures
};

// The cells of all structures in one piece of memory.
struct Cells {
    Grid* grid;          // [B]
    double* fractional;  // [N, 3], wrapped into the cell in periodic directions
    int64_t* start;      // [8 N + 65 B] first member of each bin; no structure of n atoms has more than 8 n + 64 bins
    int64_t* next;       // the same, while members are placed
    int64_t* members;    // [N] atoms by bin
    Shift* wrap;         // [N] cells by which each atom was moved

    static int64_t num_starts(int64_t B, int64_t N) { return 8 * N + 65 * B; }
    Cells(void* memory, int64_t B, int64_t N) {
        grid = static_cast<Grid*>(memory);
        fractional = reinterpret_cast<double*>(grid + B);
        start = reinterpret_cast<int64_t*>(fractional + 3 * N);
        next = start + num_starts(B, N);
        members = next + num_starts(B, N);
        wrap = reinterpret_cast<Shift*>(members + N);
    }
};

__device__ void invert(const double* m, Grid& grid) {
    double normal[3][3];
    for (int i = 0; i < 3; ++i) {
        const double *const a = m + 3 * ((i + 1) % 3), *const b = m + 3 * ((i + 2) % 3);
        for (int x = 0; x < 3; ++x) {
            const int y = (x + 1) % 3, z = (x + 2) % 3;
            normal[i][x] = a[y] * b[z] - a[z] * b[y];
        }
    }
    const double volume = m[0] * normal[0][0] + m[1] * normal[0][1] + m[2] * normal[0][2];
    for (int j = 0; j < 3; ++j) {
        double area = 0;
        for (int i = 0; i < 3; ++i) {
            grid.inverse[i][j] = normal[j][i] / volume;
            area += normal[j][i] * normal[j][i];
        }
        grid.height[j] = std::abs(volume) / std::sqrt(area);
    }
}

// Bins of about a third of the cutoff; never many more bins than atoms, however far apart the atoms are.
__device__ void choose_bins(int64_t num_atoms, double cutoff, const double* low, const double* high, Grid& grid) {
    int64_t total = 1;
    for (int j = 0; j < 3; ++j) {
        grid.low[j] = low[j];
        grid.width[j] = fmax(high[j] - low[j], 1e-9);
        const double count = grid.width[j] * grid.height[j] / fmax(cutoff / 3, 1.0);
        grid.bins[j] = static_cast<int64_t>(fmin(fmax(count, 1.0), 1e5));
        const int64_t room = (8 * num_atoms + 64) / total;
        if (grid.bins[j] > room) grid.bins[j] = room > 1 ? room : 1;
        total *= grid.bins[j];
    }
}

__device__ int64_t bin_of(const Grid& grid, const double* fractional) {
    int64_t bin = 0;
    for (int j = 0; j < 3; ++j) {
        const double x = (fractional[j] - grid.low[j]) / grid.width[j] * grid.bins[j];
        bin = bin * grid.bins[j] + static_cast<int64_t>(fmin(fmax(x, 0.0), grid.bins[j] - 1.0));
    }
    return bin;
}

// Fractional coordinates, wrapped into periodic cells, and each thread's bounds of them; `good` becomes false where one
// is not a number or too far outside.
__device__ void wrap_atoms(const NeighborQuery& query, const Cells& cells, Rows atoms, const Grid& grid,
                           const bool* pbc, double (*low)[3], double (*high)[3], bool& good) {
    for (int j = 0; j < 3; ++j) {
        low[threadIdx.x][j] = pbc[j] ? 0.0 : INFINITY;
        high[threadIdx.x][j] = pbc[j] ? 1.0 : -INFINITY;
    }
    for (int64_t a = atoms.begin + threadIdx.x; a < atoms.end; a += blockDim.x)
        for (int j = 0; j < 3; ++j) {
            double f = 0;
            for (int i = 0; i < 3; ++i) f += query.positions[3 * a + i] * grid.inverse[i][j];
            if (!(std::abs(f) <= MOST_CELLS)) good = false, f = 0;
            const double whole = pbc[j] ? std::floor(f) : 0.0;
            f -= whole;
            cells.wrap[a].x[j] = static_cast<int32_t>(whole);
            cells.fractional[3 * a + j] = f;
            if (pbc[j]) continue;
            low[threadIdx.x][j] = fmin(low[threadIdx.x][j], f), high[threadIdx.x][j] = fmax(high[threadIdx.x][j], f);
        }
}

// What the bins around an atom are: see estimate_pairs.
__device__ double estimate(const Grid& grid, const bool* pbc, double cutoff, double squares) {
    double bins = 1, box = 1;
    for (int j = 0; j < 3; ++j) {
        const double bin_width = grid.height[j] * grid.width[j] / grid.bins[j], span = 2 * cutoff / bin_width + 1;
        const double searched = pbc[j] ? span : fmin(span, static_cast<double>(grid.bins[j]));
        bins *= searched, box *= searched * bin_width;
    }
    return estimate_pairs(squares, bins, box, cutoff);
}

__global__ void __launch_bounds__(THREADS) make_cells(NeighborQuery query, Cells cells, double* pairs) {
    __shared__ Grid grid;
    __shared__ bool good;
    __shared__ double low[THREADS][3], high[THREADS][3];
    const int64_t b = blockIdx.x;
    const Rows atoms = rows_of(query.ptr, b);
    if (threadIdx.x == 0) {
        invert(query.cell + 9 * b, grid);
        good = true;
        for (const double height : grid.height) good = good && height > 0 && std::isfinite(height);
    }
    __syncthreads();
    wrap_atoms(query, cells, atoms, grid, query.pbc + 3 * b, low, high, good);
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned t = 1; t < blockDim.x; ++t)
            for (int j = 0; j < 3; ++j)
                low[0][j] = fmin(low[0][j], low[t][j]), high[0][j] = fmax(high[0][j], high[t][j]);
        choose_bins(atoms.count(), query.cutoff[b], low[0], high[0], grid);
        grid.first_bin = 8 * atoms.begin + 65 * b;
        cells.grid[b] = grid;
    }
    __syncthreads();
    const int64_t num_bins = grid.bins[0] * grid.bins[1] * grid.bins[2];
    int64_t *const start = cells.start + grid.first_bin, *const next = cells.next + grid.first_bin;
    zero(start, num_bins + 1);
    __syncthreads();
    const auto take = [&](int64_t* count, int64_t a) {  // integers: the order in which threads come does not matter
        auto* const place = reinterpret_cast<unsigned long long*>(count + bin_of(grid, cells.fractional + 3 * a));
        return static_cast<int64_t>(atomicAdd(place, 1ull));
    };
    for (int64_t a = atoms.begin + threadIdx.x; a < atoms.end; a += blockDim.x) take(start + 1, a);
    __syncthreads();
    double squares = 0;
    for (int64_t i = threadIdx.x; i < num_bins; i += blockDim.x)
        squares += static_cast<double>(start[i + 1]) * static_cast<double>(start[i + 1]);
    low[threadIdx.x][0] = squares;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned t = 1; t < blockDim.x; ++t) squares += low[t][0];
        pairs[b] = good ? estimate(grid, query.pbc + 3 * b, query.cutoff[b], squares) : NAN;
    }
    __syncthreads();
    running_sums(start + 1, num_bins);
    for (int64_t i = threadIdx.x; i < num_bins; i += blockDim.x) next[i] = start[i];
    __syncthreads();
    for (int64_t a = atoms.begin + threadIdx.x; a < atoms.end; a += blockDim.x)
        cells.members[atoms.begin + take(next, a)] = a;
}

// An edge's length in units of 1e-6 A, or -1 beyond the cutoff.
__device__ int64_t length_of(const NeighborQuery& query, int64_t b, int64_t source, int64_t target, Shift offset) {
    const double *const c = query.cell + 9 * b, cutoff = query.cutoff[b] + 1e-5;
    double squared = 0;
    for (int x = 0; x < 3; ++x) {  // no operation may be fused with another
        const double first = __dmul_rn(offset.x[0], c[x]), second = __dmul_rn(offset.x[1], c[3 + x]);
        const double shift = __dadd_rn(__dadd_rn(first, second), __dmul_rn(offset.x[2], c[6 + x]));
        const double between = __dsub_rn(query.positions[3 * target + x], query.positions[3 * source + x]);
        const double d = __dsub_rn(between, shift);
        squared = x == 0 ? __dmul_rn(d, d) : __dadd_rn(squared, __dmul_rn(d, d));
    }
    if (squared > __dmul_rn(cutoff, cutoff)) return -1;
    const double rank = std::nearbyint(__dmul_rn(__dsqrt_rn(squared), 1e6));
    return rank <= std::nearbyint(__dmul_rn(query.cutoff[b], 1e6)) ? static_cast<int64_t>(rank) : -1;
}

// Call work(neighbor) for everything within the cutoff of an atom; a block's threads share the bins.
template <class F>
__device__ void search(const NeighborQuery& query, const Cells& cells, int64_t atom, F&& work) {
    const int64_t b = structure_of(query, atom), first_atom = query.ptr[b];
    const Grid& grid = cells.grid[b];
    int64_t first[3], count[3];
    for (int j = 0; j < 3; ++j) {
        const double bin_width = grid.width[j] / grid.bins[j];
        const double at = (cells.fractional[3 * atom + j] - grid.low[j]) / bin_width;
        const double reach = (query.cutoff[b] + 1e-5) / (grid.height[j] * bin_width) + 1e-6;
        double from = std::floor(fmax(at - reach, -1e9)), to = std::floor(fmin(at + reach, 1e9));
        if (!query.pbc[3 * b + j]) {
            const double last = grid.bins[j] - 1.0;
            from = fmin(fmax(from, 0.0), last), to = fmin(fmax(to, 0.0), last);
        }
        first[j] = static_cast<int64_t>(from), count[j] = static_cast<int64_t>(to) - first[j] + 1;
    }
    for (int64_t item = threadIdx.x; item < count[0] * count[1] * count[2]; item += blockDim.x) {
        const int64_t index[3] = {first[0] + item / (count[1] * count[2]), first[1] + item / count[2] % count[1],
                                  first[2] + item % count[2]};
        int64_t bin = 0;
        Shift shift;  // the cell the bin is in
        for (int j = 0; j < 3; ++j) {
            const int64_t n = grid.bins[j], cell = index[j] >= 0 ? index[j] / n : -((n - 1 - index[j]) / n);
            shift.x[j] = static_cast<int32_t>(cell);
            bin = bin * n + index[j] - cell * n;
        }
        const int64_t* const start = cells.start + grid.first_bin + bin;
        for (int64_t k = start[0]; k < start[1]; ++k) {
            const int64_t source = cells.members[first_atom + k];
            Shift offset;
            for (int j = 0; j < 3; ++j) offset.x[j] = shift.x[j] + cells.wrap[atom].x[j] - cells.wrap[source].x[j];
            if (source == atom && offset == Shift{{0, 0, 0}}) continue;
            const int64_t rank = length_of(query, b, source, atom, offset);
            if (rank >= 0) work(Neighbor{rank, source, offset});
        }
    }
}

__global__ void __launch_bounds__(THREADS) count_found(NeighborQuery query, Cells cells, int64_t* list_ptr) {
    __shared__ int64_t counts[THREADS];
    const int64_t atom = blockIdx.x;
    int64_t count = 0;
    search(query, cells, atom, [&](const Neighbor&) { ++count; });
    counts[threadIdx.x] = count;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (unsigned t = 1; t < blockDim.x; ++t) count += counts[t];
    list_ptr[atom + 1] = count;
}

__device__ void order_two(Neighbor* x, int64_t i, int64_t j) {
    if (!(x[j] < x[i])) return;
    const Neighbor larger = x[i];
    x[i] = x[j], x[j] = larger;
}

// Bitonic sort by one block, of any number: each comparison puts the smaller one first, so that what would be beyond
// the end is as good as infinite.
__device__ void sort(Neighbor* x, int64_t n) {
    for (int64_t size = 2; size < 2 * n; size *= 2) {
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
            const int64_t mirror = i / size * size + size - 1 - i % size;
            if (i < mirror && mirror < n) order_two(x, i, mirror);
        }
        __syncthreads();
        for (int64_t stride = size / 4; stride > 0; stride /= 2) {
            for (int64_t i = threadIdx.x; i + stride < n; i += blockDim.x)
                if (i / stride % 2 == 0) order_two(x, i, i + stride);
            __syncthreads();
        }
    }
}

__global__ void __launch_bounds__(THREADS)
    list_found(NeighborQuery query, Cells cells, const int64_t* list_ptr, Neighbor* found) {
    __shared__ unsigned long long next;
    const int64_t atom = blockIdx.x;
    const Rows list = rows_of(list_ptr, atom);
    if (threadIdx.x == 0) next = list.begin;
    __syncthreads();
    search(query, cells, atom, [&](const Neighbor& x) { found[atomicAdd(&next, 1ull)] = x; });  // sorted afterwards
    __syncthreads();
    sort(found + list.begin, list.count());
}

}  // namespace

int64_t cells_bytes(int64_t B, int64_t N) {
    return B * sizeof(Grid) + N * (3 * sizeof(double) + sizeof(int64_t) + sizeof(Shift)) +
           2 * Cells::num_starts(B, N) * sizeof(int64_t);
}

void fill_cells(const NeighborQuery& query, void* memory, double* pairs, void* stream) {
    const Cells cells(memory, query.num_structures, query.num_atoms);
    launch(make_cells, query.num_structures, stream, query, cells, pairs);
}

void count_neighbors(const NeighborQuery& query, const void* memory, int64_t* list_ptr, void* stream) {
    const Cells cells(const_cast<void*>(memory), query.num_structures, query.num_atoms);
    launch(count_found, query.num_atoms, stream, query, cells, list_ptr);
    launch(counts_to_pointers, 1, stream, list_ptr, query.num_atoms);
}

void find_lists(const NeighborQuery& query, const void* memory, const int64_t* list_ptr, Neighbor* found,
                void* stream) {
    const Cells cells(const_cast<void*>(memory), query.num_structures, query.num_atoms);
    launch(list_found, query.num_atoms, stream, query, cells, list_ptr, found);
}

}  // namespace ejmp::cuda
