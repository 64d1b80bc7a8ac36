// ⌊exp(−Σ p ln p)⌋ with p = σ / Σσ and 0 · ln 0 = 0, of singular values σ [k]; 0 where all are zero.
#pragma once

#include "block.cuh"

namespace mingle {

// exp(ln k) may fall short of k by roundings, which must not cost a rank.
constexpr double kRounding = 1.0 + 0x1p-40;

template <class Block>
MINGLE_DEVICE int effective_rank(const Block& block, const double* sigma, int k) {
    const auto add = [](double a, double b) { return a + b; };
    const double total = block.reduce(k, 0.0, [&](int i) { return sigma[i]; }, add);
    if (!(total > 0.0)) return 0;
    const auto information = [&](int i) {
        const double p = sigma[i] / total;
        return p > 0.0 ? -p * log(p) : 0.0;
    };
    return static_cast<int>(exp(block.reduce(k, 0.0, information, add)) * kRounding);
}

}  // namespace mingle
