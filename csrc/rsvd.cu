// Kernels and launchers: a block per matrix, or per chunk or strip of one, around the algorithms of the headers.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cholesky_qr.cuh"
#include "effective_rank.cuh"
#include "launch.h"
#include "rescale.cuh"
#include "signs.cuh"
#include "small_eigh.cuh"

namespace mingle {

namespace {

// Threads per block.  Jacobi: 32 warps for the 64 pairs of 128 columns.
constexpr int kCholeskyThreads = 256;
constexpr int kJacobiThreads = 1024;
constexpr int kThreads = 256;
static_assert(kThreads == kLanes * kColumns, "the sign kernel gives every thread one row of one column");

template <class Out>
__global__ void __launch_bounds__(kCholeskyThreads)
    cholesky_inverse_kernel(const double* __restrict__ gram, int n, double shift, Out* __restrict__ inverse, int32_t* __restrict__ flags) {
    extern __shared__ double memory[];
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * n * n;
    const int flag = cholesky_inverse(DeviceBlock{}, memory, gram + offset, n, shift, inverse + offset);
    if (threadIdx.x == 0) flags[blockIdx.x] = flag;
}

__global__ void __launch_bounds__(kJacobiThreads) small_eigh_kernel(const double* __restrict__ gram, int n, double* __restrict__ values,
                                                                    double* __restrict__ vectors, int32_t* __restrict__ flags) {
    extern __shared__ double memory[];
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * n * n;
    const int flag = small_eigh(DeviceBlock{}, memory, gram + offset, n, values + static_cast<int64_t>(blockIdx.x) * n, vectors + offset);
    if (threadIdx.x == 0) flags[blockIdx.x] = flag;
}

// Blocks are numbered matrix by matrix: block = matrix · chunks + chunk.
template <class In>
__global__ void __launch_bounds__(kThreads) survey_kernel(const In* __restrict__ data, int64_t m, int64_t n, int64_t batch_stride,
                                                          int64_t row_stride, int chunks, Survey* __restrict__ surveys) {
    const Rows<In> M{data + blockIdx.x / chunks * batch_stride, m, n, row_stride};
    const Survey mine = survey(DeviceBlock{}, M, Chunk::of(m * n, chunks, blockIdx.x % chunks));
    if (threadIdx.x == 0) surveys[blockIdx.x] = mine;
}

template <class In>
__global__ void __launch_bounds__(kThreads)
    rescale_kernel(const In* __restrict__ data, int64_t m, int64_t n, int64_t batch_stride, int64_t row_stride, int chunks,
                   const Survey* __restrict__ surveys, float* __restrict__ scaled, int32_t* __restrict__ exponent,
                   int64_t* __restrict__ nonfinite, int64_t* __restrict__ first) {
    const int64_t b = blockIdx.x / chunks;
    const int chunk = blockIdx.x % chunks;
    const Rows<In> M{data + b * batch_stride, m, n, row_stride};
    int e = 0;
    const Survey all = rescale(DeviceBlock{}, M, Chunk::of(m * n, chunks, chunk), surveys + b * chunks, chunks, scaled + b * m * n, &e);
    if (threadIdx.x == 0 && chunk == 0) {
        exponent[b] = e;
        nonfinite[b] = all.nonfinite;
        first[b] = all.nonfinite ? all.first : -1;
    }
}

// block = matrix · strips + strip of kColumns singular vectors.
template <class T>
__global__ void __launch_bounds__(kThreads) fix_signs_kernel(Batch<T> U, Batch<T> Vh, int64_t m, int64_t r, int64_t n, int strips) {
    __shared__ SignMemory memory;
    const int64_t b = blockIdx.x / strips;
    fix_signs(DeviceBlock{}, memory, Strided<T>{U.data + b * U.strides[0], m, r, U.strides[1], U.strides[2]},
              Strided<T>{Vh.data + b * Vh.strides[0], r, n, Vh.strides[1], Vh.strides[2]},
              static_cast<int64_t>(blockIdx.x % strips) * kColumns);
}

__global__ void __launch_bounds__(kThreads) effective_rank_kernel(const double* __restrict__ sigma, int k, int32_t* __restrict__ ranks) {
    const int rank = effective_rank(DeviceBlock{}, sigma + static_cast<int64_t>(blockIdx.x) * k, k);
    if (threadIdx.x == 0) ranks[blockIdx.x] = rank;
}

void check(cudaError_t status, const char* name) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that it is not reported again for the next launch
    throw std::runtime_error("mingle: " + std::string(name) + ": " + cudaGetErrorString(status));
}

void require(bool valid, const std::string& message) {
    if (!valid) throw std::invalid_argument("mingle: " + message);
}

void require_size(const char* name, int n, int widest = kMaxSize) {
    require(1 <= n && n <= widest, std::string(name) + ": n = " + std::to_string(n) + ", expected 1 … " + std::to_string(widest));
}

// Makes a device current for as long as it lives.
class Current {
public:
    Current(int device, const char* name) {
        check(cudaGetDevice(&previous_), name);
        if (previous_ != device) check(cudaSetDevice(device), name);
        changed_ = previous_ != device;
    }
    ~Current() {
        if (changed_) cudaSetDevice(previous_);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

// Queues kernel<<<blocks, threads, shared>>>(arguments…); no blocks, no launch.  `most`: what any launch of this kernel takes of shared
// memory.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Queue& queue, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, int most,
            Arguments... arguments) {
    if (blocks == 0) return;
    require(blocks <= INT32_MAX, std::string(name) + ": too many matrices for one launch");
    const Current current(queue.device, name);
    // More than 48 KB is granted to those who ask: always for as much, as other threads may be about to launch the same kernel.
    if (most > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
    kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(queue.stream)>>>(arguments...);
    check(cudaGetLastError(), name);
}

}  // namespace

void check_device(int device) {
    const Current current(device, "device");
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, effective_rank_kernel), "device");
}

int widest_eigh(int device) {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "small_eigh");
    const Current current(device, "small_eigh");
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, small_eigh_kernel), "small_eigh");
    return JacobiMemory::widest(bytes - static_cast<int64_t>(attributes.sharedSizeBytes));
}

template <class Out>
void launch_cholesky_inverse(const Queue& queue, const double* gram, int64_t batch, int n, double shift, Out* inverse, int32_t* flags) {
    require_size("cholesky_inverse", n);
    const int shared = CholeskyMemory::doubles(n) * sizeof(double), most = CholeskyMemory::doubles(kMaxSize) * sizeof(double);
    launch("cholesky_inverse", queue, cholesky_inverse_kernel<Out>, batch, kCholeskyThreads, shared, most, gram, n, shift, inverse, flags);
}

void launch_small_eigh(const Queue& queue, const double* gram, int64_t batch, int n, double* values, double* vectors, int32_t* flags) {
    require_size("small_eigh", n);
    const int widest = widest_eigh(queue.device);
    require_size("small_eigh", n, widest);
    const int shared = JacobiMemory::doubles(n) * sizeof(double), most = JacobiMemory::doubles(widest) * sizeof(double);
    const int threads = 32 * ((n + 3) / 4);  // a warp for two pairs
    launch("small_eigh", queue, small_eigh_kernel, batch, threads, shared, most, gram, n, values, vectors, flags);
}

int64_t rescale_workspace(int64_t batch, int64_t m, int64_t n) { return batch * chunks_of(m * n) * static_cast<int64_t>(sizeof(Survey)); }

template <class In>
void launch_rescale(const Queue& queue, const Batch<const In>& M, int64_t batch, int64_t m, int64_t n, void* workspace, float* scaled,
                    int32_t* exponent, int64_t* nonfinite, int64_t* first) {
    require(M.strides[2] == 1, "rescale: expected a column stride of 1, got " + std::to_string(M.strides[2]));
    require(0 < m && 0 < n && n <= INT32_MAX && m * n / kMaxChunks < INT32_MAX, "rescale: the matrices are empty or too large");
    const int chunks = chunks_of(m * n);
    const auto surveys = static_cast<Survey*>(workspace);
    launch("rescale", queue, survey_kernel<In>, batch * chunks, kThreads, 0, 0, M.data, m, n, M.strides[0], M.strides[1], chunks, surveys);
    launch("rescale", queue, rescale_kernel<In>, batch * chunks, kThreads, 0, 0, M.data, m, n, M.strides[0], M.strides[1], chunks, surveys,
           scaled, exponent, nonfinite, first);
}

template <class T>
void launch_fix_signs(const Queue& queue, const Batch<T>& U, const Batch<T>& Vh, int64_t batch, int64_t m, int64_t r, int64_t n) {
    require(0 < m && n <= INT32_MAX && r <= INT32_MAX, "fix_signs: the matrices are empty or too large");
    const int strips = static_cast<int>((r + kColumns - 1) / kColumns);
    launch("fix_signs", queue, fix_signs_kernel<T>, batch * strips, kThreads, 0, 0, U, Vh, m, r, n, strips);
}

void launch_effective_rank(const Queue& queue, const double* sigma, int64_t batch, int k, int32_t* ranks) {
    launch("effective_rank", queue, effective_rank_kernel, batch, kThreads, 0, 0, sigma, k, ranks);
}

template void launch_cholesky_inverse(const Queue&, const double*, int64_t, int, double, double*, int32_t*);
template void launch_cholesky_inverse(const Queue&, const double*, int64_t, int, double, float*, int32_t*);
template void launch_rescale(const Queue&, const Batch<const float>&, int64_t, int64_t, int64_t, void*, float*, int32_t*, int64_t*,
                             int64_t*);
template void launch_rescale(const Queue&, const Batch<const double>&, int64_t, int64_t, int64_t, void*, float*, int32_t*, int64_t*,
                             int64_t*);
template void launch_fix_signs(const Queue&, const Batch<float>&, const Batch<float>&, int64_t, int64_t, int64_t, int64_t);
template void launch_fix_signs(const Queue&, const Batch<double>&, const Batch<double>&, int64_t, int64_t, int64_t, int64_t);

}  // namespace mingle
