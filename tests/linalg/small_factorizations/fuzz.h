// Matrices for the programs that run under sanitizers.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

constexpr int kSizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128};
enum Kind { kPlain, kDuplicates, kZeroColumn, kNotFinite, kZero, kGraded, kKinds };

// In [−1, 1), by a linear congruential generator.
inline double uniform() {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state >> 11) * 0x1p-52 - 1.0;
}

// G = YᵀY [n, n] with Y [n + 3, n] of a kind.
inline std::vector<double> gram(int n, Kind kind) {
    const int m = n + 3;
    std::vector<double> Y(m * n), G(n * n, 0.0);
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
            double value = uniform();
            if (kind == kDuplicates && j % 2) value = Y[i * n + j - 1];
            if (kind == kZero || (kind == kZeroColumn && j == n / 2)) value = 0.0;
            if (kind == kGraded) value *= std::pow(10.0, -15.0 * j / n);
            Y[i * n + j] = value;
        }
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j)
            for (int k = 0; k < m; ++k) G[i * n + j] += Y[k * n + i] * Y[k * n + j];
    if (kind == kNotFinite) G[(n - 1) * n] = NAN;
    return G;
}
