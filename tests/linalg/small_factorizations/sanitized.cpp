// All host functions on matrices of many sizes and kinds, each in memory of exactly its size: for the address and undefined-behaviour
// sanitizers.
#include <cstdio>

#include "fuzz.h"
#include "host.cpp"

int main() {
    for (int n : kSizes)
        for (int kind = 0; kind < kKinds; ++kind) {
            const std::vector<double> G = gram(n, static_cast<Kind>(kind));
            std::vector<double> inverse(n * n), values(n), vectors(n * n);
            std::vector<float> single(n * n);
            int32_t flag = 0;
            cholesky_inverse_f64(G.data(), 1, n, 1e-12, inverse.data(), &flag);
            if ((flag < 0) != (kind == kNotFinite)) return std::printf("cholesky: n = %d, kind %d: %d\n", n, kind, flag);
            cholesky_inverse_f32(G.data(), 1, n, 1e-12, single.data(), &flag);
            small_eigh(G.data(), 1, n, values.data(), vectors.data(), &flag);
            if ((flag < 0) != (kind == kNotFinite)) return std::printf("eigh: n = %d, kind %d: %d\n", n, kind, flag);
            int32_t rank = 0;
            effective_rank(values.data(), 1, n, &rank);
        }
    for (int m : {1, 2, 9, 40})
        for (int n : {1, 3, 33, 70}) {
            std::vector<float> M(m * (n + 2)), scaled(m * n);
            for (float& entry : M) entry = static_cast<float>(uniform());
            M[n / 2] = INFINITY;
            int32_t exponent = 0;
            int64_t nonfinite = 0, first = 0;
            for (int chunks : {1, 2, 5, 256}) {
                rescale_f32(M.data(), 1, m, n, 0, n + 2, chunks, scaled.data(), &exponent, &nonfinite, &first);
                if (nonfinite != 1 || first != n / 2)
                    return std::printf("rescale: %d, %d: %ld at %ld\n", m, n, long(nonfinite), long(first));
            }
            std::vector<double> U(m * n), Vh(n * m);
            for (double& entry : U) entry = uniform();
            const int64_t left[] = {0, n, 1}, right[] = {0, 1, n};
            fix_signs_f64(U.data(), left, Vh.data(), right, 1, m, n, m);
        }
    std::puts("done");
}
