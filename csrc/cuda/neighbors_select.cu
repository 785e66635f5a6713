// Graph building, the choice: which of the sorted neighbours of an atom are in which edge set; one block per atom.
//
// Being near is mutual and lengths are the same from both ends, so that each entry (source, offset) of an atom's list
// has its counter-edge in the list of the source. That makes symmetrisation a choice too: a main edge is one of the
// nearest of its target if it is the kept half of the pair, else its counter-edge is one of the nearest of the source.
#include "neighbors.cuh"

namespace ejmp::cuda {

namespace {

constexpr int PAIRS = 0, MAIN = 1, ATOM_EDGES = 2, QUAD_EDGES = 3;

__device__ int64_t find(const Neighbor* found, Rows list, const Neighbor& wanted) {
    int64_t low = list.begin, high = list.end;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        (found[middle] < wanted ? low : high) = found[middle] < wanted ? middle + 1 : middle;
    }
    return low;
}

__device__ bool is_kept_half(int64_t source, int64_t target, const Shift& offset) {
    return source != target ? source < target : offset < Shift{{0, 0, 0}};
}

__global__ void __launch_bounds__(THREADS)
    choose_sets(NeighborQuery query, const int64_t* list_ptr, Lists lists, int64_t* ptr) {
    __shared__ int64_t counts[THREADS][4];
    const int64_t atom = blockIdx.x;
    const int64_t* const most = query.limits + 4 * structure_of(query, atom);
    const Rows list = rows_of(list_ptr, atom);
    for (int j = 0; j < 4; ++j) counts[threadIdx.x][j] = 0;
    for (int64_t k = list.begin + threadIdx.x; k < list.end; k += blockDim.x) {
        const Neighbor x = lists.found[k];
        const Rows other = rows_of(list_ptr, x.source);
        lists.counter[k] = find(lists.found, other, {x.rank, atom, -x.offset});
        const int64_t order = k - list.begin, counter_order = lists.counter[k] - other.begin;
        const int64_t kept_order = is_kept_half(x.source, atom, x.offset) ? order : counter_order;
        const bool quad = query.quad_atom[atom] || query.quad_atom[x.source];
        const bool chosen[4] = {order < most[PAIRS], kept_order < most[MAIN], order < most[ATOM_EDGES],
                                order < most[QUAD_EDGES] && quad};
        uint8_t sets = 0;
        for (int j = 0; j < 4; ++j) counts[threadIdx.x][j] += chosen[j], sets |= chosen[j] << j;
        lists.sets[k] = sets;
        lists.slot[k] = chosen[MAIN];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < 4; j += blockDim.x) {
        int64_t total = 0;
        for (unsigned t = 0; t < blockDim.x; ++t) total += counts[t][j];
        ptr[j * (query.num_atoms + 1) + atom + 1] = total;
    }
    running_sums(lists.slot + list.begin, list.count());
}

struct Places {
    EdgePlaces set[4];
};

// Entries of one set, in order: each thread takes consecutive ones.
__device__ void pack_set(Rows list, const Lists& lists, int set, int64_t first, const EdgePlaces& to, int64_t* counts) {
    const int64_t begin = list.begin + list.count() * threadIdx.x / blockDim.x;
    const int64_t end = list.begin + list.count() * (threadIdx.x + 1) / blockDim.x;
    int64_t count = 0;
    for (int64_t k = begin; k < end; ++k) count += lists.sets[k] >> set & 1;
    counts[threadIdx.x] = count;
    __syncthreads();
    for (unsigned t = 0; t < threadIdx.x; ++t) first += counts[t];
    for (int64_t k = begin; k < end; ++k) {
        if (!(lists.sets[k] >> set & 1)) continue;
        to.source[first] = lists.found[k].source;
        for (int x = 0; x < 3; ++x) to.offset[3 * first + x] = lists.found[k].offset.x[x];
        ++first;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(THREADS)
    pack_sets(NeighborQuery query, const int64_t* list_ptr, Lists lists, const int64_t* ptr, Places to, int64_t* swap) {
    __shared__ int64_t counts[THREADS];
    const int64_t atom = blockIdx.x, stride = query.num_atoms + 1;
    const Rows list = rows_of(list_ptr, atom);
    for (int j = 0; j < 4; ++j) pack_set(list, lists, j, ptr[j * stride + atom], to.set[j], counts);
    for (int64_t k = list.begin + threadIdx.x; k < list.end; k += blockDim.x) {
        if (!(lists.sets[k] >> MAIN & 1)) continue;
        const auto edge = [&](int64_t target, int64_t entry) {
            return ptr[MAIN * stride + target] + lists.slot[entry] - 1;
        };
        swap[edge(atom, k)] = edge(lists.found[k].source, lists.counter[k]);
    }
}

}  // namespace

int64_t lists_bytes(int64_t num_found) {
    return num_found * (sizeof(Neighbor) + 2 * sizeof(int64_t) + sizeof(uint8_t));
}

void list_neighbors(const NeighborQuery& query, const void* cells, const int64_t* list_ptr, int64_t num_found,
                    void* memory, int64_t* ptr, void* stream) {
    const Lists lists(memory, num_found);
    find_lists(query, cells, list_ptr, lists.found, stream);
    launch(choose_sets, query.num_atoms, stream, query, list_ptr, lists, ptr);
    launch(counts_to_pointers, 4, stream, ptr, query.num_atoms);
}

void pack_neighbors(const NeighborQuery& query, const int64_t* list_ptr, int64_t num_found, void* memory,
                    const int64_t* ptr, const EdgePlaces (&to)[4], int64_t* swap, void* stream) {
    const Lists lists(memory, num_found);
    const Places places{{to[0], to[1], to[2], to[3]}};
    launch(pack_sets, query.num_atoms, stream, query, list_ptr, lists, ptr, places, swap);
}

}  // namespace ejmp::cuda
