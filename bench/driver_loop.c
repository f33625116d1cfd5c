// What the CUDA driver itself takes for a launch: a loop around cuLaunchKernel, for bench/driver_loop.py.
#include <time.h>

typedef int (*launch_fn)(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                         unsigned shared, void *stream, void **arguments, void **extra);

// Nanoseconds for one of `count` launches, as the host sees them; an error of the driver's as a negative number.
double launches(launch_fn launch, void *function, unsigned threads, unsigned shared, void *stream, void **arguments, int count) {
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < count; ++i) {
        const int error = launch(function, 1, 1, 1, threads, 1, 1, shared, stream, arguments, 0);
        if (error != 0) return -error;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    return ((end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec)) / count;
}
