// G = W diag(λ) Wᵀ of a symmetric positive semidefinite matrix [n, n], n ≤ 128.
//
//     G = L Lᵀ, L [n, k] by Cholesky with pivoting;   L V = A with orthogonal columns, by one-sided Jacobi rotations (Hestenes)
//     λ_j = ‖a_j‖²,  w_j = a_j / ‖a_j‖ for j < k;     λ_j = 0 and w_j from Gram–Schmidt on unit vectors for k ≤ j
//
// Rotating the pivoted factor instead of G converges in half as many sweeps (at n = 128 in 8 to 13, and in 17 at most for tight clusters
// of eigenvalues, where G takes 10 to 37), finds small eigenvalues to the accuracy that G determines them to, and needs no product of
// rotations: A alone fits into shared memory.  A warp rotates a pair of columns; a round-robin tournament pairs all columns once per sweep,
// k/2 pairs at a time.
// Veselić, Hari, Numer. Math. 56 (1989), 627; Drmač, Veselić, SIAM J. Matrix Anal. Appl. 29 (2008), 1322.
#pragma once

#include <cfloat>

#include "block.cuh"
#include "cholesky_qr.cuh"

namespace mingle {

constexpr int kMaxSweeps = 24;
// Squares of columns of L must not underflow.  Relative to the largest entry of G.
constexpr double kSmallestPivot = 1e-280;

// Memory that the threads of a block share: 134 KB at n = 128.  Columns are an odd number of doubles apart, so that a row is free of bank
// conflicts.
struct JacobiMemory {
    int n, stride;
    double* columns;  // [n, n] first L, then A, then W
    double* rest;     // [n] of the diagonal: what the columns of L, or of W, do not account for
    double* lengths;  // [n] squared, of the columns; the coefficients of Gram–Schmidt
    int* order;       // [n] the columns from the longest to the shortest

    MINGLE_DEVICE JacobiMemory(double* memory, int n)
        : n(n), stride(n | 1), columns(memory), rest(memory + n * stride), lengths(rest + n), order(reinterpret_cast<int*>(lengths + n)) {}

    static constexpr int doubles(int n) { return n * (n | 1) + 2 * n + (n + 1) / 2; }

    MINGLE_DEVICE double* column(int j) const { return columns + j * stride; }

    // The widest matrix for which that many bytes suffice.
    static constexpr int widest(int64_t bytes) {
        int n = kMaxSize;
        while (n > 0 && static_cast<int64_t>(doubles(n) * sizeof(double)) > bytes) --n;
        return n;
    }
};

// The largest of rest[0 … n).
template <class Block>
MINGLE_DEVICE Peak largest_rest(const Block& block, const JacobiMemory& shared) {
    return block.reduce(shared.n, Peak{-1.0, 0}, [&](int i) { return Peak{shared.rest[i], i}; }, Peak::larger);
}

// L of 2^-exponent G = L Lᵀ in `columns`, rows in G's order; k, the number of its columns.  It ends where no pivot exceeds n ulp of its
// diagonal entry, that is the rounding errors in it.
template <class Block>
MINGLE_DEVICE int pivoted_cholesky(const Block& block, const JacobiMemory& shared, const double* gram, int exponent) {
    const int n = shared.n;
    block.each(n, [&](int i) { shared.rest[i] = ldexp(gram[i * n + i], -exponent); });
    block.sync();
    for (int k = 0; k < n; ++k) {
        const Peak pivot = largest_rest(block, shared);
        if (!(pivot.value > kSmallestPivot)) return k;
        const int p = static_cast<int>(pivot.index);
        const double length = sqrt(pivot.value);
        block.each(n, [&](int i) {
            double value = i == p ? length : 0.0;
            if (i != p && shared.rest[i] >= 0.0) {
                value = ldexp(i < p ? gram[p * n + i] : gram[i * n + p], -exponent);
                for (int t = 0; t < k; ++t) value -= shared.column(t)[i] * shared.column(t)[p];
                value /= length;
                const double left = shared.rest[i] - value * value;
                shared.rest[i] = left > n * DBL_EPSILON * ldexp(gram[i * n + i], -exponent) ? left : 0.0;
            }
            shared.column(k)[i] = value;
            if (i == p) shared.rest[p] = -1.0;  // done
        });
        block.sync();
    }
    return n;
}

// Squared lengths of columns 0 … k − 1, and the order in which they fall.
template <class Block>
MINGLE_DEVICE void order_by_length(const Block& block, const JacobiMemory& shared, int k) {
    block.each_warp(k, [&](int j, const auto& warp) {
        const double* a = shared.column(j);
        const double square = warp.sum(shared.n, 0.0, [&](int i) { return a[i] * a[i]; });
        warp.each(1, [&](int) { shared.lengths[j] = square; });
    });
    block.sync();
    block.each(k, [&](int j) {
        int place = 0;
        for (int other = 0; other < k; ++other)
            place += shared.lengths[other] > shared.lengths[j] || (shared.lengths[other] == shared.lengths[j] && other < j);
        shared.order[place] = j;
    });
    block.sync();
}

// Inner products of columns p and q.
struct Products {
    double pp, qq, pq;

    MINGLE_DEVICE Products operator+(const Products& other) const { return {pp + other.pp, qq + other.qq, pq + other.pq}; }
};

// Rotates columns p and q until they are orthogonal; false where they already are.
template <class Warp>
MINGLE_DEVICE bool orthogonalise(const Warp& warp, double* p, double* q, int n) {
    const Products sum = warp.sum(n, Products{0.0, 0.0, 0.0}, [&](int i) { return Products{p[i] * p[i], q[i] * q[i], p[i] * q[i]}; });
    if (fabs(sum.pq) <= DBL_EPSILON * sqrt(static_cast<double>(n)) * sqrt(sum.pp) * sqrt(sum.qq)) return false;
    const double zeta = (sum.qq - sum.pp) / (2.0 * sum.pq);
    // t is the smaller root of t² + 2ζt − 1; beyond 2²⁷ the one under the root is lost, and beyond 2⁵¹² the square is infinite
    const double t = fabs(zeta) > 134217728.0 ? 0.5 / zeta : copysign(1.0, zeta) / (fabs(zeta) + sqrt(1.0 + zeta * zeta));
    const double c = 1.0 / sqrt(1.0 + t * t), s = t * c;
    // c p − s q and s p + c q as corrections of p and q: where the angle is small and c rounds to one, lengths do not grow
    const double tau = s / (1.0 + c);
    warp.each(n, [&](int i) {
        const double old = p[i];
        p[i] -= s * (q[i] + tau * old);
        q[i] += s * (old - tau * q[i]);
    });
    return true;
}

// Makes columns 0 … k − 1 orthogonal.  The number of sweeps, or −1 where kMaxSweeps left something to do.
template <class Block>
MINGLE_DEVICE int jacobi(const Block& block, const JacobiMemory& shared, int k) {
    const int players = k + k % 2, rounds = players - 1;  // of an odd number one has a bye in every round
    for (int sweep = 1; sweep <= kMaxSweeps; ++sweep) {
        order_by_length(block, shared, k);
        bool rotated = false;
        for (int round = 0; round < rounds; ++round) {
            block.each_warp(players / 2, [&](int pair, const auto& warp) {
                // the last player stays, the others move on by one seat per round
                const int a = (round + pair) % rounds, b = pair == 0 ? rounds : (round - pair + rounds) % rounds;
                const int p = a < b ? a : b, q = a < b ? b : a;
                if (q < k && orthogonalise(warp, shared.column(shared.order[p]), shared.column(shared.order[q]), shared.n)) rotated = true;
            });
            block.sync();
        }
        if (!block.any(rotated)) return sweep;
    }
    return -1;
}

// Columns k … n − 1 from unit vectors, each the one farthest from the span so far: its distance is at least n^-½, so that orthogonalising
// twice is enough.
template <class Block>
MINGLE_DEVICE void complete(const Block& block, const JacobiMemory& shared, int k) {
    const int n = shared.n;
    block.each(n, [&](int i) {
        double covered = 0.0;
        for (int c = 0; c < k; ++c) covered += shared.column(c)[i] * shared.column(c)[i];
        shared.rest[i] = 1.0 - covered;
    });
    block.sync();
    for (int j = k; j < n; ++j) {
        const int unit = static_cast<int>(largest_rest(block, shared).index);
        double* w = shared.column(j);
        block.each(n, [&](int i) {
            double value = i == unit ? 1.0 : 0.0;
            for (int c = 0; c < j; ++c) value -= shared.column(c)[i] * shared.column(c)[unit];
            w[i] = value;
        });
        block.sync();
        block.each_warp(j, [&](int c, const auto& warp) {
            const double product = warp.sum(n, 0.0, [&](int i) { return shared.column(c)[i] * w[i]; });
            warp.each(1, [&](int) { shared.lengths[c] = product; });
        });
        block.sync();
        block.each(n, [&](int i) {
            for (int c = 0; c < j; ++c) w[i] -= shared.column(c)[i] * shared.lengths[c];
        });
        block.sync();
        const double square = block.reduce(n, 0.0, [&](int i) { return w[i] * w[i]; }, [](double a, double b) { return a + b; });
        block.each(n, [&](int i) {
            w[i] /= sqrt(square);
            shared.rest[i] -= w[i] * w[i];
        });
        block.sync();
    }
}

// One matrix.  gram: G [n, n], of which the lower triangle is read.  values: λ [n] in falling order.  vectors: W [n, n], row-major with the
// eigenvectors as columns.
// Returns, to every thread, the number of sweeps, or −1: kMaxSweeps did not suffice, or an entry is not finite (λ = NaN, W = I).
template <class Block>
MINGLE_DEVICE int small_eigh(const Block& block, double* memory, const double* gram, int n, double* values, double* vectors) {
    const JacobiMemory shared(memory, n);
    bool wrong = false;
    block.each(n * n, [&](int k) { wrong = wrong || (k % n <= k / n && !finite(gram[k])); });
    if (block.any(wrong)) {
        block.each(n * n, [&](int k) { vectors[k] = k / n == k % n ? 1.0 : 0.0; });
        block.each(n, [&](int i) { values[i] = NAN; });
        return -1;
    }
    const double largest = block.reduce(n, 0.0, [&](int i) { return gram[i * n + i]; }, [](double a, double b) { return a < b ? b : a; });
    int exponent = 0;
    frexp(largest, &exponent);

    const int rank = pivoted_cholesky(block, shared, gram, exponent);
    const int sweeps = jacobi(block, shared, rank);
    order_by_length(block, shared, rank);
    block.each(n, [&](int place) {
        if (place >= rank) shared.order[place] = place;
        values[place] = place < rank ? ldexp(shared.lengths[shared.order[place]], exponent) : 0.0;
    });
    block.each(rank * n, [&](int k) { shared.column(k / n)[k % n] /= sqrt(shared.lengths[k / n]); });
    block.sync();
    complete(block, shared, rank);
    block.each(n * n, [&](int k) { vectors[k] = shared.column(shared.order[k % n])[k / n]; });
    return sweeps;
}

}  // namespace mingle
