// Execution policies.  An algorithm is a template over the block of threads that runs it, written as phases with barriers between them:
//
//     block.each(n, [&](int i) { ... });   // f(0) … f(n − 1), in any order, by any thread
//     block.sync();
//
// No phase may read what another index of the same phase writes.  That is all a GPU needs to run it with any number of threads, and all
// that is needed for one host thread to compute the same, where barriers are nothing: g++ tests what nvcc ships.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MINGLE_DEVICE __device__
#else
#define MINGLE_DEVICE
#endif

namespace mingle {

// Whether x is neither infinite nor NaN.
template <class T>
MINGLE_DEVICE inline bool finite(T x) {
    return x - x == T(0);
}

// An entry and where it is; of equal ones the first is preferred.
struct Peak {
    double value;
    int64_t index;

    MINGLE_DEVICE static Peak larger(Peak a, Peak b) { return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a; }
};

#ifdef __CUDACC__

// The value of `lane ^ mask`, for any trivially copyable T of whole 32-bit words.
template <class T>
__device__ inline T exchanged(T value, int mask) {
    constexpr int kWords = sizeof(T) / sizeof(unsigned);
    static_assert(sizeof(T) % sizeof(unsigned) == 0, "only whole words can be exchanged");
    unsigned words[kWords];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = __shfl_xor_sync(0xffffffffu, words[w], mask);
    memcpy(&value, words, sizeof(T));
    return value;
}

// 32 threads that need no barrier between them where each reads only what it has written itself.
struct DeviceWarp {
    int lane;

    template <class F>
    __device__ void each(int n, F f) const {
        for (int i = lane; i < n; i += 32) f(i);
    }

    // f(0) + … + f(n − 1), the same bits for every lane.
    template <class T, class F>
    __device__ T sum(int n, T zero, F f) const {
        T total = zero;
        for (int i = lane; i < n; i += 32) total = total + f(i);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) total = total + exchanged(total, mask);
        return total;
    }
};

struct DeviceBlock {
    __device__ static int threads() { return blockDim.x; }
    __device__ static int thread() { return threadIdx.x; }

    template <class F>
    __device__ void each(int n, F f) const {
        for (int i = thread(); i < n; i += threads()) f(i);
    }

    // f(i, warp) for i < n, one warp for each; blocks have whole warps.
    template <class F>
    __device__ void each_warp(int n, F f) const {
        const DeviceWarp warp{thread() % 32};
        for (int i = thread() / 32; i < n; i += threads() / 32) f(i, warp);
    }

    __device__ void sync() const { __syncthreads(); }

    // Whether any thread passes true; a barrier.
    __device__ bool any(bool mine) const { return __syncthreads_or(mine); }

    // f(0) ∘ … ∘ f(n − 1), the same for every thread and in an order that depends on the number of threads only; with barriers.
    template <class T, class F, class Combine>
    __device__ T reduce(int n, T neutral, F f, Combine combine) const {
        __shared__ T partial[32];
        T total = neutral;
        for (int i = thread(); i < n; i += threads()) total = combine(total, f(i));
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) total = combine(total, exchanged(total, mask));
        __syncthreads();  // the partials of the last call have been read
        if (thread() % 32 == 0) partial[thread() / 32] = total;
        __syncthreads();
        total = neutral;
        for (int w = 0; w < threads() / 32; ++w) total = combine(total, partial[w]);
        return total;
    }
};

#else

struct HostWarp {
    template <class F>
    void each(int n, F f) const {
        for (int i = 0; i < n; ++i) f(i);
    }

    template <class T, class F>
    T sum(int n, T zero, F f) const {
        T total = zero;
        for (int i = 0; i < n; ++i) total = total + f(i);
        return total;
    }
};

struct HostBlock {
    template <class F>
    void each(int n, F f) const {
        for (int i = 0; i < n; ++i) f(i);
    }

    template <class F>
    void each_warp(int n, F f) const {
        for (int i = 0; i < n; ++i) f(i, HostWarp{});
    }

    void sync() const {}

    bool any(bool mine) const { return mine; }

    template <class T, class F, class Combine>
    T reduce(int n, T neutral, F f, Combine combine) const {
        T total = neutral;
        for (int i = 0; i < n; ++i) total = combine(total, f(i));
        return total;
    }
};

#endif

}  // namespace mingle
