// Launchers of the kernels.  All pointers are device pointers on `device`, all batches contiguous unless strides are given; work is queued
// on `stream` and nothing waits for it.  They throw std::invalid_argument for sizes they do not take and std::runtime_error for CUDA's
// errors.
#pragma once

#include <cstdint>

namespace mingle {

// Where to run: a device's ordinal and a stream on it (a cudaStream_t; this header needs no CUDA).
struct Queue {
    int device;
    void* stream;
};

// Throws what CUDA says where the kernels cannot run on a device: its driver is too old, or no code in the module fits it.
void check_device(int device);

// The widest matrix that `launch_small_eigh` takes on a device: 128, or 111 where a block has 99 KB of shared memory.
int widest_eigh(int device);

// A batch of matrices, `strides` entries apart in batch, row and column.
template <class T>
struct Batch {
    T* data;
    int64_t strides[3];
};

// gram: G [batch, n, n] → R⁻¹ [batch, n, n] and flags [batch]; Out is double or float.
template <class Out>
void launch_cholesky_inverse(const Queue&, const double* gram, int64_t batch, int n, double shift, Out* inverse, int32_t* flags);

// gram: G [batch, n, n] → λ [batch, n], W [batch, n, n] and flags [batch].
void launch_small_eigh(const Queue&, const double* gram, int64_t batch, int n, double* values, double* vectors, int32_t* flags);

// M [batch, m, n] with a column stride of one → scaled [batch, m, n] and per matrix exponent, number and first index of non-finite entries.
// workspace: `rescale_workspace(batch, m, n)` bytes, aligned to 8.  In is float or double.
int64_t rescale_workspace(int64_t batch, int64_t m, int64_t n);
template <class In>
void launch_rescale(const Queue&, const Batch<const In>& M, int64_t batch, int64_t m, int64_t n, void* workspace, float* scaled,
                    int32_t* exponent, int64_t* nonfinite, int64_t* first);

// U [batch, m, r] and Vh [batch, r, n] in place; T is float or double.
template <class T>
void launch_fix_signs(const Queue&, const Batch<T>& U, const Batch<T>& Vh, int64_t batch, int64_t m, int64_t r, int64_t n);

// sigma: σ [batch, k] → ranks [batch].
void launch_effective_rank(const Queue&, const double* sigma, int64_t batch, int k, int32_t* ranks);

}  // namespace mingle
