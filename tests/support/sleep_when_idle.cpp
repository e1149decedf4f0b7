// Preloaded into the ranks of a launch by launching.py: a rank that waits sleeps instead of offering its core.
//
// MPI and the kernels wait in a loop around sched_yield(). Linux returns from it at once in most cases, even if other
// ranks wait for the core; with more ranks than cores a waiting rank then takes the time of those that compute.
#include <time.h>

extern "C" int sched_yield() noexcept {
    const timespec moment = {0, 10'000};
    nanosleep(&moment, nullptr);
    return 0;
}
