// R⁻¹ of the Cholesky factor of a Gram matrix G = YᵀY = RᵀR [n, n], n ≤ 128: Y R⁻¹ has orthonormal columns.
//
//     S = D^-½ G D^-½, D = diag(G);   S + τ I = M P Mᵀ, M unit lower triangular, P = diag(pivots);   R⁻¹ = D^-½ M^-ᵀ P^-½
//
// The scaling makes the result independent of the columns' lengths, which fall over ten orders where Y is a graded sketch.  A pivot of
// n + 16 ulp or less consists of rounding errors; then τ = shift · tr S = shift · n, and ten times as much at each of kRetries − 1 more
// attempts.
// Shifted Cholesky QR: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, SIAM J. Sci. Comput. 42 (2020), A477.  There the shift is
// 11 (mn + n(n+1)) u.
#pragma once

#include <cfloat>

#include "block.cuh"

namespace mingle {

constexpr int kMaxSize = 128;
constexpr int kRetries = 6;
constexpr int kSlack = 16;  // ulp of a pivot that are rounding errors of G itself, next to n of the factorisation
constexpr int kPanel = 8;   // columns between two updates of what lies behind them
constexpr int kTile = 4;    // rows and columns that one thread updates in registers

// The squared length at which a column of Y counts as zero: the reciprocal of a length has to be representable.
template <class Out>
struct Negligible;
template <>
struct Negligible<double> {
    static constexpr double value = 0.0;
};
template <>
struct Negligible<float> {
    static constexpr double value = 6.2230152778611417e-61;  // 2^-200
};

// Memory that the threads of a block share.  The triangle is packed by rows: 66 KB instead of 131 KB, so that two blocks fit on one
// multiprocessor, and a column is free of bank conflicts, because 16 consecutive triangular numbers differ modulo 16.
struct CholeskyMemory {
    double* triangle;     // [n (n + 1) / 2]: S, then M under the pivots, then M⁻¹
    double* reciprocals;  // [n] of the pivots
    double* scale;        // [n] D^-½, 0 for zero columns
    double* rows;         // [kPanel, n] of M X before they replace rows of M
    double* corner;       // [kPanel, kPanel] M⁻¹ on the diagonal

    MINGLE_DEVICE CholeskyMemory(double* memory, int n)
        : triangle(memory), reciprocals(memory + n * (n + 1) / 2), scale(reciprocals + n), rows(scale + n), corner(rows + kPanel * n) {}

    static constexpr int doubles(int n) { return n * (n + 1) / 2 + 2 * n + kPanel * n + kPanel * kPanel; }

    MINGLE_DEVICE double& at(int i, int j) const { return triangle[i * (i + 1) / 2 + j]; }
};

MINGLE_DEVICE inline int smaller(int a, int b) { return a < b ? a : b; }

// The row of entry k of a triangle packed by rows; exact for k < 2^21.
MINGLE_DEVICE inline int triangle_row(int k) { return static_cast<int>((sqrtf(8.0f * k + 1.0f) - 1.0f) / 2.0f); }

// The lower triangle of S + τ I.
template <class Block>
MINGLE_DEVICE void load_scaled(const Block& block, const CholeskyMemory& shared, const double* gram, int n, double tau) {
    block.each(n * n, [&](int k) {
        const int i = k / n, j = k % n;
        if (j < i) shared.at(i, j) = gram[k] * shared.scale[i] * shared.scale[j];
        if (j == i) shared.at(i, i) = 1.0 + tau;
    });
    block.sync();
}

// S −= M P Mᵀ of the columns from … to − 1, for all entries from row and column `to` on.
template <class Block>
MINGLE_DEVICE void update_trailing(const Block& block, const CholeskyMemory& shared, int n, int from, int to) {
    const int tiles = (n - to + kTile - 1) / kTile;
    block.each(tiles * (tiles + 1) / 2, [&](int k) {
        const int a = triangle_row(k), b = k - a * (a + 1) / 2;
        const int row = to + a * kTile, column = to + b * kTile;
        double sum[kTile][kTile] = {};
        for (int t = from; t < to; ++t) {
            double left[kTile], right[kTile];
            for (int c = 0; c < kTile; ++c) {
                // the last tile's missing rows repeat row n − 1 and are not stored
                left[c] = shared.at(smaller(row + c, n - 1), t) * shared.reciprocals[t];
                right[c] = shared.at(smaller(column + c, n - 1), t);
            }
            for (int r = 0; r < kTile; ++r)
                for (int c = 0; c < kTile; ++c) sum[r][c] += left[r] * right[c];
        }
        for (int r = 0; r < kTile; ++r)
            for (int c = 0; c < kTile; ++c)
                if (row + r < n && column + c <= row + r) shared.at(row + r, column + c) -= sum[r][c];
    });
    block.sync();
}

// S = M P Mᵀ in place, M below the diagonal; false, the same for all threads, where a pivot is of the size of its rounding errors.
//
// Columns of a panel are kept as M P, so that one barrier per column is enough: nobody has to wait for a pivot before storing.
template <class Block>
MINGLE_DEVICE bool factor(const Block& block, const CholeskyMemory& shared, int n) {
    for (int from = 0; from < n; from += kPanel) {
        const int to = smaller(from + kPanel, n);
        for (int j = from; j < to; ++j) {
            block.each(n - j, [&](int below) {
                const int i = j + below;
                double value = shared.at(i, j);
                for (int t = from; t < j; ++t) value -= shared.at(i, t) * shared.reciprocals[t] * shared.at(j, t);
                shared.at(i, j) = value;
                if (i == j) shared.reciprocals[j] = 1.0 / value;
            });
            block.sync();
            if (!(shared.at(j, j) > (n + kSlack) * DBL_EPSILON)) return false;
        }
        update_trailing(block, shared, n, from, to);
    }
    block.each(n * n, [&](int k) {
        const int i = k / n, j = k % n;
        if (j < i) shared.at(i, j) *= shared.reciprocals[j];
    });
    block.sync();
    return true;
}

// X = M⁻¹ in place, kPanel rows at a time.  With rows [M₁ M₂] next to the rows X₁ above them:  X₂ = M₂⁻¹,  row of X = −X₂ (M₁ X₁).
template <class Block>
MINGLE_DEVICE void invert(const Block& block, const CholeskyMemory& shared, int n) {
    for (int from = 0; from < n; from += kPanel) {
        const int height = smaller(kPanel, n - from), strips = (height + kTile - 1) / kTile;
        block.each(strips * from + height, [&](int task) {
            if (task < strips * from) {  // kTile entries of a column of M₁ X₁
                const int j = task % from, first = task / from * kTile;
                double sum[kTile];
                for (int r = 0; r < kTile; ++r) sum[r] = shared.at(smaller(from + first + r, n - 1), j);  // X₁ has ones on its diagonal
                for (int t = j + 1; t < from; ++t) {
                    const double x = shared.at(t, j);
                    for (int r = 0; r < kTile; ++r) sum[r] += shared.at(smaller(from + first + r, n - 1), t) * x;
                }
                for (int r = 0; r < kTile; ++r) shared.rows[(first + r) * n + j] = sum[r];
            } else {  // a column of M₂⁻¹
                const int c = task - strips * from;
                for (int r = 0; r < height; ++r) {
                    double value = r == c ? 1.0 : 0.0;
                    for (int s = c; s < r; ++s) value -= shared.at(from + r, from + s) * shared.corner[s * kPanel + c];
                    shared.corner[r * kPanel + c] = value;
                }
            }
        });
        block.sync();
        block.each(height * (from + height), [&](int k) {
            const int r = k / (from + height), j = k % (from + height);
            if (j < from) {
                double value = 0.0;
                for (int s = 0; s <= r; ++s) value -= shared.corner[r * kPanel + s] * shared.rows[s * n + j];
                shared.at(from + r, j) = value;
            } else if (j < from + r) {
                shared.at(from + r, j) = shared.corner[r * kPanel + j - from];
            }
        });
        block.sync();
    }
}

// One matrix.  gram: G [n, n], of which the lower triangle is read.  inverse: R⁻¹ [n, n], upper triangular, zero where it failed.
// Returns, to every thread, the number of shifts, or −1: no shift helped, an entry is not finite, or the diagonal is negative.
template <class Out, class Block>
MINGLE_DEVICE int cholesky_inverse(const Block& block, double* memory, const double* gram, int n, double shift, Out* inverse) {
    const CholeskyMemory shared(memory, n);
    bool wrong = false;
    block.each(n * n, [&](int k) { wrong = wrong || (k % n <= k / n && !finite(gram[k])); });
    block.each(n, [&](int i) {
        const double length = gram[i * n + i];
        wrong = wrong || length < 0.0;
        shared.scale[i] = length > Negligible<Out>::value ? 1.0 / sqrt(length) : 0.0;
    });
    bool done = false;
    int shifts = 0;
    if (!block.any(wrong)) {
        double tau = 0.0;
        for (;; ++shifts) {
            load_scaled(block, shared, gram, n, tau);
            done = factor(block, shared, n);
            if (done || shifts == kRetries) break;
            tau = shifts == 0 ? shift * n : 10.0 * tau;
            block.sync();  // the failed pivot has been read
        }
    }
    if (done) invert(block, shared, n);
    block.each(n * n, [&](int k) {
        const int i = k / n, j = k % n;
        double value = 0.0;
        if (done && i <= j) value = shared.scale[i] * sqrt(shared.reciprocals[j]) * (i == j ? 1.0 : shared.at(j, i));
        inverse[k] = static_cast<Out>(value);
    });
    return done ? shifts : -1;
}

}  // namespace mingle
