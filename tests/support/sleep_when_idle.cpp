// Preloaded into the ranks of a launch by launching.py: a rank that waits sleeps instead of offering its core.
//
// MPI and the kernels wait in a loop around sched_yield(). Linux returns from it at once in most cases, even if other
// ranks wait for the core; with more ranks than cores a waiting rank then takes the time of those that compute.
//
// A sleep is an eighth of the wait so far, so that it makes the wait at most an eighth longer: 10 us at first, 100 us
// at most. A wait ends with a pause: its loop calls sched_yield() again at once, a new wait comes after some work.
#include <time.h>

namespace {
constexpr long SHORTEST = 10'000, LONGEST = 100'000, PAUSE = 5'000;  // nanoseconds
thread_local long began = 0, last = 0;

long now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}
}  // namespace

extern "C" int sched_yield() noexcept {
    const long here = now();
    if (here - last > PAUSE) began = here;
    const long share = (here - began) / 8;
    const timespec moment = {0, share < SHORTEST ? SHORTEST : share > LONGEST ? LONGEST : share};
    nanosleep(&moment, nullptr);
    last = now();
    return 0;
}
