// Quadruplet aggregation; see quadruplet.cuh. Writes and reads the rows (q, d) of the workspace, reads weight once.
#include "quadruplet.cuh"

namespace ejmp::cuda {
namespace {

template <class T, bool D>
void run(const Quadruplet<T>& p, const MiddleRows& rows, T* out, void* workspace, void* stream) {
    const QuadrupletWorkspace<T, D> work(workspace, rows.count, p.channels, false);
    launch(quadruplet_values<T, D>, p.num_atoms, stream, p, rows.ptr, work);
    launch(quadruplet_sums<T, D, false>, p.num_atoms, stream, p, rows.ptr, work.value, In<T>{}, out);
}

}  // namespace

template <class T>
int64_t quadruplet_workspace(int64_t num_rows, int64_t channels, bool backward, bool second) {
    return second ? QuadrupletWorkspace<T, true>::bytes(num_rows, channels, backward)
                  : QuadrupletWorkspace<T, false>::bytes(num_rows, channels, backward);
}

template <class T>
void quadruplet(const Quadruplet<T>& p, const MiddleRows& rows, T* out, void* workspace, void* stream) {
    check_spherical(p.spherical);
    p.x.along ? run<T, true>(p, rows, out, workspace, stream) : run<T, false>(p, rows, out, workspace, stream);
}

template int64_t quadruplet_workspace<float>(int64_t, int64_t, bool, bool);
template int64_t quadruplet_workspace<double>(int64_t, int64_t, bool, bool);
template void quadruplet(const Quadruplet<float>&, const MiddleRows&, float*, void*, void*);
template void quadruplet(const Quadruplet<double>&, const MiddleRows&, double*, void*, void*);

}  // namespace ejmp::cuda
