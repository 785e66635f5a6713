// Loops over OpenMP threads that let exceptions out.
#pragma once

#include <cstdint>
#include <exception>

namespace ejmp {

// Carries the first exception out of a parallel region, where one that escapes would end the process.
class Guard {
  public:
    template <typename F>
    void run(F&& work) {
        try {
            work();
        } catch (...) {
#pragma omp critical(ejmp_guard)
            if (!error_) error_ = std::current_exception();
        }
    }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    std::exception_ptr error_;
};

// Call work(i, state) for i in 0 .. n, `chunk` at a time; every thread has its own State. Which thread does what must
// not change the result.
template <class State, class F>
void parallel_for(int64_t n, int64_t chunk, int threads, F&& work) {
    Guard guard;
#pragma omp parallel num_threads(threads) if (n > chunk)
    {
        State state;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < n; first += chunk)
            guard.run([&] {
                for (int64_t i = first; i < n && i < first + chunk; ++i) work(i, state);
            });
    }
    guard.rethrow();
}

struct Stateless {};

}  // namespace ejmp
