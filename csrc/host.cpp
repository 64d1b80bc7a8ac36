// The algorithms of the extension for one thread of the host, with the launchers' batches: what tests compile without a GPU.
#include <memory>
#include <vector>

#include "cholesky_qr.cuh"
#include "effective_rank.cuh"
#include "rescale.cuh"
#include "signs.cuh"
#include "small_eigh.cuh"

namespace {

const mingle::HostBlock block;

// Not initialised, and of exactly the size that a launch asks for: sanitizers see what goes beyond.
std::unique_ptr<double[]> memory(int doubles) { return std::unique_ptr<double[]>(new double[doubles]); }

template <class Out>
void cholesky_inverse(const double* gram, int64_t batch, int n, double shift, Out* inverse, int32_t* flags) {
    for (int64_t b = 0; b < batch; ++b) {
        const auto shared = memory(mingle::CholeskyMemory::doubles(n));
        flags[b] = mingle::cholesky_inverse(block, shared.get(), gram + b * n * n, n, shift, inverse + b * n * n);
    }
}

template <class In>
void rescale(const In* data, int64_t batch, int64_t m, int64_t n, int64_t batch_stride, int64_t row_stride, int chunks, float* scaled,
             int32_t* exponent, int64_t* nonfinite, int64_t* first) {
    std::vector<mingle::Survey> surveys(chunks);
    for (int64_t b = 0; b < batch; ++b) {
        const mingle::Rows<In> M{data + b * batch_stride, m, n, row_stride};
        for (int c = 0; c < chunks; ++c) surveys[c] = mingle::survey(block, M, mingle::Chunk::of(m * n, chunks, c));
        for (int c = 0; c < chunks; ++c) {
            const auto all =
                mingle::rescale(block, M, mingle::Chunk::of(m * n, chunks, c), surveys.data(), chunks, scaled + b * m * n, &exponent[b]);
            nonfinite[b] = all.nonfinite;
            first[b] = all.nonfinite ? all.first : -1;
        }
    }
}

template <class T>
void fix_signs(T* U, const int64_t* u_strides, T* Vh, const int64_t* v_strides, int64_t batch, int64_t m, int64_t r, int64_t n) {
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t first = 0; first < r; first += mingle::kColumns) {
            mingle::SignMemory shared;
            mingle::fix_signs(block, shared, mingle::Strided<T>{U + b * u_strides[0], m, r, u_strides[1], u_strides[2]},
                              mingle::Strided<T>{Vh + b * v_strides[0], r, n, v_strides[1], v_strides[2]}, first);
        }
}

}  // namespace

extern "C" {

void cholesky_inverse_f64(const double* gram, int64_t batch, int n, double shift, double* inverse, int32_t* flags) {
    cholesky_inverse(gram, batch, n, shift, inverse, flags);
}

void cholesky_inverse_f32(const double* gram, int64_t batch, int n, double shift, float* inverse, int32_t* flags) {
    cholesky_inverse(gram, batch, n, shift, inverse, flags);
}

void small_eigh(const double* gram, int64_t batch, int n, double* values, double* vectors, int32_t* flags) {
    for (int64_t b = 0; b < batch; ++b) {
        const auto shared = memory(mingle::JacobiMemory::doubles(n));
        flags[b] = mingle::small_eigh(block, shared.get(), gram + b * n * n, n, values + b * n, vectors + b * n * n);
    }
}

int widest_eigh(int64_t bytes) { return mingle::JacobiMemory::widest(bytes); }

int rescale_chunks(int64_t size) { return mingle::chunks_of(size); }

void rescale_f32(const float* M, int64_t batch, int64_t m, int64_t n, int64_t batch_stride, int64_t row_stride, int chunks, float* scaled,
                 int32_t* exponent, int64_t* nonfinite, int64_t* first) {
    rescale(M, batch, m, n, batch_stride, row_stride, chunks, scaled, exponent, nonfinite, first);
}

void rescale_f64(const double* M, int64_t batch, int64_t m, int64_t n, int64_t batch_stride, int64_t row_stride, int chunks, float* scaled,
                 int32_t* exponent, int64_t* nonfinite, int64_t* first) {
    rescale(M, batch, m, n, batch_stride, row_stride, chunks, scaled, exponent, nonfinite, first);
}

void fix_signs_f32(float* U, const int64_t* u_strides, float* Vh, const int64_t* v_strides, int64_t batch, int64_t m, int64_t r,
                   int64_t n) {
    fix_signs(U, u_strides, Vh, v_strides, batch, m, r, n);
}

void fix_signs_f64(double* U, const int64_t* u_strides, double* Vh, const int64_t* v_strides, int64_t batch, int64_t m, int64_t r,
                   int64_t n) {
    fix_signs(U, u_strides, Vh, v_strides, batch, m, r, n);
}

void effective_rank(const double* sigma, int64_t batch, int k, int32_t* ranks) {
    for (int64_t b = 0; b < batch; ++b) ranks[b] = mingle::effective_rank(block, sigma + b * k, k);
}
}
