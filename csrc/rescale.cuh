// 2^-e M of a matrix M [m, n] with the largest finite magnitude in [0.5, 1), and a census of what is not finite.
//
// Large matrices are cut into chunks, a block each.  A first launch surveys the chunks, a second one puts the surveys together, in the same
// order in every block, and scales: no atomics, equal bits on every run.
#pragma once

#include "block.cuh"

namespace mingle {

constexpr int64_t kChunk = 1 << 16;  // entries that are worth a block of their own
constexpr int kMaxChunks = 256;      // of a matrix: every block of the second launch reads all surveys

// A matrix whose rows are `row_stride` entries apart.
template <class In>
struct Rows {
    const In* data;
    int64_t m, n, row_stride;
};

// Entries begin … end − 1, counted row by row.
struct Chunk {
    int64_t begin, end;

    MINGLE_DEVICE static Chunk of(int64_t size, int chunks, int index) {
        const int64_t length = (size + chunks - 1) / chunks, begin = index * length, end = begin + length;
        return {begin < size ? begin : size, end < size ? end : size};
    }
};

inline int chunks_of(int64_t size) {
    const int64_t chunks = (size + kChunk - 1) / kChunk;
    return static_cast<int>(chunks < 1 ? 1 : chunks < kMaxChunks ? chunks : kMaxChunks);
}

struct Survey {
    double largest;     // finite magnitude
    int64_t nonfinite;  // how many entries
    int64_t first;      // index of the first of them, kNone without

    static constexpr int64_t kNone = INT64_MAX;

    MINGLE_DEVICE static Survey none() { return {0.0, 0, kNone}; }

    MINGLE_DEVICE static Survey both(Survey a, Survey b) {
        return {a.largest < b.largest ? b.largest : a.largest, a.nonfinite + b.nonfinite, a.first < b.first ? a.first : b.first};
    }
};

// f(index, entry) for every entry of a chunk.  Chunks are shorter than 2³¹, so that only 32-bit numbers are divided per entry.
template <class In, class F>
struct EachEntry {
    Rows<In> M;
    int64_t begin, first_row;
    uint32_t first_column, width;
    F f;

    MINGLE_DEVICE EachEntry(const Rows<In>& M, int64_t begin, F f)
        : M(M), begin(begin), first_row(begin / M.n), first_column(begin % M.n), width(M.n), f(f) {}

    MINGLE_DEVICE auto operator()(int k) const {
        if (M.row_stride == M.n) return f(begin + k, M.data[begin + k]);
        const uint32_t position = first_column + k, row = position / width;
        return f(begin + k, M.data[(first_row + row) * M.row_stride + (position - row * width)]);
    }
};

template <class In, class Block>
MINGLE_DEVICE Survey survey(const Block& block, const Rows<In>& M, Chunk chunk) {
    const auto look = [](int64_t index, In entry) {
        const double magnitude = fabs(static_cast<double>(entry));
        return finite(magnitude) ? Survey{magnitude, 0, Survey::kNone} : Survey{0.0, 1, index};
    };
    return block.reduce(static_cast<int>(chunk.end - chunk.begin), Survey::none(), EachEntry<In, decltype(look)>(M, chunk.begin, look),
                        Survey::both);
}

// Writes a chunk of 2^-e M to `scaled` [m, n], contiguous; returns the surveys of all chunks put together, and e.
template <class In, class Block>
MINGLE_DEVICE Survey rescale(const Block& block, const Rows<In>& M, Chunk chunk, const Survey* surveys, int chunks, float* scaled, int* e) {
    const Survey all = block.reduce(chunks, Survey::none(), [&](int c) { return surveys[c]; }, Survey::both);
    frexp(all.largest, e);  // e = 0 where all is zero
    // 2^-e may exceed the range of doubles where they are subnormal; then it is two factors, both exact
    const int near = *e < -1000 ? 1000 : *e > 1000 ? -1000 : -*e;
    const double factor = ldexp(1.0, near), rest = ldexp(1.0, -*e - near);
    const auto write = [&](int64_t index, In entry) { scaled[index] = static_cast<float>(static_cast<double>(entry) * factor * rest); };
    block.each(static_cast<int>(chunk.end - chunk.begin), EachEntry<In, decltype(write)>(M, chunk.begin, write));
    return all;
}

}  // namespace mingle
