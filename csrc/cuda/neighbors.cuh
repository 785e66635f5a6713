// What the steps of graph building share; see ops.h for the steps and ../cpu/neighbors.cpp for the rules.
#pragma once

#include "device.cuh"
#include "ops.h"

namespace ejmp::cuda {

struct Shift {
    int32_t x[3];
    __device__ Shift operator-() const { return {{-x[0], -x[1], -x[2]}}; }
    __device__ bool operator==(const Shift& b) const { return x[0] == b.x[0] && x[1] == b.x[1] && x[2] == b.x[2]; }
    __device__ bool operator<(const Shift& b) const {
        if (x[0] != b.x[0]) return x[0] < b.x[0];
        return x[1] != b.x[1] ? x[1] < b.x[1] : x[2] < b.x[2];
    }
};

struct Neighbor {
    int64_t rank;  // length in units of 1e-6 A, rounded half to even
    int64_t source;
    Shift offset;
    __device__ bool operator<(const Neighbor& b) const {
        if (rank != b.rank) return rank < b.rank;
        return source != b.source ? source < b.source : offset < b.offset;
    }
};

// Everything within the cutoff of each atom, sorted.
struct Lists {
    Neighbor* found;   // [F]
    int64_t* counter;  // [F] where in `found` the same edge seen from the other end is
    int64_t* slot;     // [F] which main edge into its atom it is
    uint8_t* sets;     // [F] bits: in pairs, main, atom_edges, quad_edges

    Lists(void* memory, int64_t num_found) {
        found = static_cast<Neighbor*>(memory);
        counter = reinterpret_cast<int64_t*>(found + num_found);
        slot = counter + num_found;
        sets = reinterpret_cast<uint8_t*>(slot + num_found);
    }
};

// Fill and sort `found`; list_ptr comes from count_neighbors.
void find_lists(const NeighborQuery& query, const void* cells, const int64_t* list_ptr, Neighbor* found, void* stream);

namespace {

// The structure an atom belongs to.
__device__ int64_t structure_of(const NeighborQuery& query, int64_t atom) {
    int64_t low = 0, high = query.num_structures;  // query.ptr[low] <= atom < query.ptr[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (query.ptr[middle] <= atom ? low : high) = middle;
    }
    return low;
}

// Counts in ptr[1] .. ptr[n] of each row [n + 1] become pointers.
__global__ void __launch_bounds__(THREADS) counts_to_pointers(int64_t* ptr, int64_t n) {
    int64_t* const row = ptr + blockIdx.x * (n + 1);
    if (threadIdx.x == 0) row[0] = 0;
    running_sums(row + 1, n);
}

}  // namespace
}  // namespace ejmp::cuda
