// Signs of singular vectors: the largest magnitude of every column of U [m, r] becomes a positive entry, by flipping columns of U and the
// same rows of Vh [r, n] in place.
#pragma once

#include "block.cuh"

namespace mingle {

constexpr int kColumns = 32;  // that one block looks after
constexpr int kLanes = 8;     // threads per column

// A matrix with any strides.
template <class T>
struct Strided {
    T* data;
    int64_t rows, columns, row_stride, column_stride;

    MINGLE_DEVICE T& at(int64_t i, int64_t j) const { return data[i * row_stride + j * column_stride]; }
};

// Memory that the threads of a block share.
struct SignMemory {
    Peak peaks[kColumns * kLanes];  // of a column's rows lane, lane + kLanes, …: magnitude and row
    bool flips[kColumns];
};

// Columns first … first + kColumns − 1 of one pair of matrices.  Of equal magnitudes the first row counts.
template <class T, class Block>
MINGLE_DEVICE void fix_signs(const Block& block, SignMemory& shared, const Strided<T>& U, const Strided<T>& Vh, int64_t first) {
    const int width = static_cast<int>(U.columns - first < kColumns ? U.columns - first : kColumns);
    block.each(kLanes * kColumns, [&](int k) {
        Peak peak{-1.0, 0};
        if (k % kColumns < width)
            for (int64_t i = k / kColumns; i < U.rows; i += kLanes)
                peak = Peak::larger(peak, Peak{fabs(static_cast<double>(U.at(i, first + k % kColumns))), i});
        shared.peaks[k] = peak;
    });
    block.sync();
    block.each(width, [&](int c) {
        Peak peak = shared.peaks[c];
        for (int lane = 1; lane < kLanes; ++lane) peak = Peak::larger(peak, shared.peaks[lane * kColumns + c]);
        shared.flips[c] = U.at(peak.index, first + c) < T(0);
    });
    block.sync();
    block.each(kLanes * kColumns, [&](int k) {
        const int c = k % kColumns;
        if (c < width && shared.flips[c])
            for (int64_t i = k / kColumns; i < U.rows; i += kLanes) U.at(i, first + c) = -U.at(i, first + c);
    });
    for (int c = 0; c < width; ++c)
        if (shared.flips[c]) block.each(static_cast<int>(Vh.columns), [&](int j) { Vh.at(first + c, j) = -Vh.at(first + c, j); });
}

}  // namespace mingle
