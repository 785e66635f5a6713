// The launch functions as a C library of emulated kernels for tests (see emulate.h): every function takes its sizes and
// its arrays in the order of the structs in ops.h, null where there is none, and returns null or what went wrong.
#include <exception>
#include <string>

#include "emulate.h"
#include "ops.h"

namespace {

std::string error;

template <class F>
const char* guarded(int wide, F&& f) {
    try {
        wide ? f(double()) : f(float());
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
    return nullptr;
}

// Arrays taken one after another.
struct Arrays {
    void* const* next;
    template <class T>
    T* take() {
        return static_cast<T*>(*next++);
    }
    template <class T>
    ejmp::In<T> input() {
        const T* const value = take<T>();
        return {value, take<T>()};
    }
    ejmp::Incoming incoming() {
        const int64_t *const ptr = take<int64_t>(), *const source = take<int64_t>();
        return {ptr, source, take<int64_t>()};
    }
    ejmp::cuda::BySource by_source() {
        const int64_t* const ptr = take<int64_t>();
        return {ptr, take<int64_t>()};
    }
};

template <class T>
ejmp::Triplet<T> triplet(const int64_t* n, Arrays& a) {
    ejmp::Triplet<T> p{n[0], n[1], n[2], n[3], n[4] != 0, {}, {}, {}, {}, {}, {}};
    p.out = a.incoming(), p.in = a.incoming();
    p.x = a.input<T>(), p.weight = a.input<T>(), p.v_out = a.input<T>(), p.v_in = a.input<T>();
    return p;
}

template <class T>
ejmp::Quadruplet<T> quadruplet(const int64_t* n, double eps, Arrays& a) {
    ejmp::Quadruplet<T> p{n[0], n[1], n[2], n[3], 0, n[0], T(eps), {}, {}, {}, {}, {}, {}, {}};
    p.main = a.incoming(), p.middle = a.incoming();
    p.x = a.input<T>(), p.filter = a.input<T>(), p.weight = a.input<T>();
    p.v = a.input<T>(), p.v_middle = a.input<T>();
    return p;
}

ejmp::cuda::MiddleRows middle_rows(int64_t count, Arrays& a) {
    const int64_t* const ptr = a.take<int64_t>();
    return {count, ptr, a.by_source()};
}

template <class T>
ejmp::Pair<T> pair(const int64_t* n, Arrays& a) {
    const int64_t *const ptr = a.take<int64_t>(), *const source = a.take<int64_t>();
    const T* const h = a.take<T>();
    return {n[0], n[1], n[2], ptr, source, h, a.take<T>()};
}

ejmp::cuda::NeighborQuery neighbor_query(const int64_t* n, Arrays& a) {
    ejmp::cuda::NeighborQuery query{};
    query.num_structures = n[0], query.num_atoms = n[1];
    query.positions = a.take<double>(), query.cell = a.take<double>(), query.pbc = a.take<bool>();
    query.ptr = a.take<int64_t>(), query.cutoff = a.take<double>(), query.limits = a.take<int64_t>();
    query.quad_atom = a.take<bool>();
    return query;
}

}  // namespace

extern "C" {

// Threads per block; below zero they run in reverse order.
void ejmp_threads(int threads) { ejmp::cuda::emulated_threads = threads; }

const char* ejmp_triplet(int wide, const int64_t* sizes, double, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const auto p = triplet<T>(sizes, a);
        ejmp::cuda::triplet(p, a.take<T>(), nullptr);
    });
}

const char* ejmp_triplet_backward(int wide, const int64_t* sizes, double, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const auto p = triplet<T>(sizes, a);
        const auto grad = a.input<T>();
        T* const x = a.take<T>();
        T* const weight = a.take<T>();
        T* const v_out = a.take<T>();
        ejmp::cuda::triplet_backward(p, grad, x, weight, v_out, a.take<T>(), nullptr);
    });
}

int64_t ejmp_quadruplet_workspace(int wide, int64_t rows, int64_t channels, int backward, int second) {
    return wide ? ejmp::cuda::quadruplet_workspace<double>(rows, channels, backward, second)
                : ejmp::cuda::quadruplet_workspace<float>(rows, channels, backward, second);
}

const char* ejmp_quadruplet(int wide, const int64_t* sizes, double eps, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const auto p = quadruplet<T>(sizes, eps, a);
        const auto rows = middle_rows(sizes[4], a);
        void* const workspace = a.take<void>();
        ejmp::cuda::quadruplet(p, rows, a.take<T>(), workspace, nullptr);
    });
}

const char* ejmp_quadruplet_backward(int wide, const int64_t* sizes, double eps, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const auto p = quadruplet<T>(sizes, eps, a);
        const auto rows = middle_rows(sizes[4], a);
        const auto grad = a.input<T>();
        void* const workspace = a.take<void>();
        ejmp::cuda::QuadrupletGradients<T> to;
        to.x = a.take<T>(), to.filter = a.take<T>(), to.weight = a.take<T>();
        to.v = a.take<T>(), to.v_middle = a.take<T>();
        ejmp::cuda::quadruplet_backward(p, rows, grad, to, workspace, nullptr);
    });
}

const char* ejmp_pair(int wide, const int64_t* sizes, double, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const auto p = pair<T>(sizes, a);
        ejmp::cuda::pair(p, a.take<T>(), nullptr);
    });
}

const char* ejmp_pair_backward(int wide, const int64_t* sizes, double, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const auto p = pair<T>(sizes, a);
        const int64_t* const target = a.take<int64_t>();
        const auto by_source = a.by_source();
        const T* const grad = a.take<T>();
        T* const h = a.take<T>();
        ejmp::cuda::pair_backward(p, target, by_source, grad, h, a.take<T>(), nullptr);
    });
}

const char* ejmp_edge_sum(int wide, const int64_t* sizes, double, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const T* const x = a.take<T>();
        const T* const factor = a.take<T>();
        const int64_t* const order = a.take<int64_t>();
        const int64_t* const ptr = a.take<int64_t>();
        ejmp::cuda::edge_sum(sizes[0], sizes[1], x, factor, order, ptr, a.take<T>(), nullptr);
    });
}

const char* ejmp_atom_sum_backward(int wide, const int64_t* sizes, double, void* const* arrays) {
    return guarded(wide, [&](auto t) {
        using T = decltype(t);
        Arrays a{arrays};
        const T* const grad = a.take<T>();
        const T* const x = a.take<T>();
        const T* const factor = a.take<T>();
        const int64_t* const ptr = a.take<int64_t>();
        T* const grad_x = a.take<T>();
        ejmp::cuda::atom_sum_backward(sizes[0], sizes[1], grad, x, factor, ptr, grad_x, a.take<T>(), nullptr);
    });
}

// Sizes of memory: of the cells, and of the lists of everything found.
int64_t ejmp_cells_bytes(int64_t structures, int64_t atoms) { return ejmp::cuda::cells_bytes(structures, atoms); }
int64_t ejmp_lists_bytes(int64_t found) { return ejmp::cuda::lists_bytes(found); }

const char* ejmp_count_neighbors(int, const int64_t* sizes, double, void* const* arrays) {
    return guarded(1, [&](auto) {
        Arrays a{arrays};
        const auto query = neighbor_query(sizes, a);
        void* const cells = a.take<void>();
        ejmp::cuda::count_neighbors(query, cells, a.take<int64_t>(), nullptr);
    });
}

const char* ejmp_list_neighbors(int, const int64_t* sizes, double, void* const* arrays) {
    return guarded(1, [&](auto) {
        Arrays a{arrays};
        const auto query = neighbor_query(sizes, a);
        void* const cells = a.take<void>();
        const int64_t* const list_ptr = a.take<int64_t>();
        void* const lists = a.take<void>();
        ejmp::cuda::list_neighbors(query, cells, list_ptr, sizes[2], lists, a.take<int64_t>(), nullptr);
    });
}

const char* ejmp_pack_neighbors(int, const int64_t* sizes, double, void* const* arrays) {
    return guarded(1, [&](auto) {
        Arrays a{arrays};
        const auto query = neighbor_query(sizes, a);
        const int64_t* const list_ptr = a.take<int64_t>();
        void* const lists = a.take<void>();
        const int64_t* const ptr = a.take<int64_t>();
        ejmp::cuda::EdgePlaces to[4];
        for (auto& set : to) set.source = a.take<int64_t>(), set.offset = a.take<int32_t>();
        ejmp::cuda::pack_neighbors(query, list_ptr, sizes[2], lists, ptr, to, a.take<int64_t>(), nullptr);
    });
}
}
