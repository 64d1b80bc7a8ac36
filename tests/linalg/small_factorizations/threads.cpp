// The algorithms on several host threads with real barriers, for the thread sanitizer: a phase that reads what another thread writes in it,
// or a barrier that is missing, is a data race here as on a GPU.  Results must be those of one thread.
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

#include "cholesky_qr.cuh"
#include "effective_rank.cuh"
#include "fuzz.h"
#include "rescale.cuh"
#include "signs.cuh"
#include "small_eigh.cuh"

constexpr int kThreads = 3;

// What the threads of a block share besides an algorithm's memory.
struct Shared {
    // Used in turn.  With only one, a thread that wakes up late from it would seem to be ordered after what others did before its next use,
    // and the sanitizer would miss most races.
    pthread_barrier_t barriers[2];
    bool votes[kThreads];
    alignas(16) unsigned char partial[kThreads][64];

    Shared() {
        for (pthread_barrier_t& barrier : barriers) pthread_barrier_init(&barrier, nullptr, kThreads);
    }
    ~Shared() {
        for (pthread_barrier_t& barrier : barriers) pthread_barrier_destroy(&barrier);
    }
};

// One thread of a block; a warp is one thread.
struct ThreadBlock {
    Shared& shared;
    int thread;
    mutable int turn = 0;

    template <class F>
    void each(int n, F f) const {
        for (int i = thread; i < n; i += kThreads) f(i);
    }

    template <class F>
    void each_warp(int n, F f) const {
        for (int i = thread; i < n; i += kThreads) f(i, mingle::HostWarp{});
    }

    void sync() const { pthread_barrier_wait(&shared.barriers[turn++ % 2]); }

    bool any(bool mine) const {
        shared.votes[thread] = mine;
        sync();
        const bool result = std::any_of(shared.votes, shared.votes + kThreads, [](bool vote) { return vote; });
        sync();
        return result;
    }

    template <class T, class F, class Combine>
    T reduce(int n, T neutral, F f, Combine combine) const {
        T total = neutral;
        for (int i = thread; i < n; i += kThreads) total = combine(total, f(i));
        sync();
        std::memcpy(shared.partial[thread], &total, sizeof(T));
        sync();
        total = neutral;
        for (int t = 0; t < kThreads; ++t) {
            T part;
            std::memcpy(&part, shared.partial[t], sizeof(T));
            total = combine(total, part);
        }
        return total;
    }
};

// f(block) on every thread of a block.
template <class F>
void on_threads(F f) {
    Shared shared;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back([&, t] { f(ThreadBlock{shared, t}); });
    for (std::thread& thread : threads) thread.join();
}

bool differ(const std::vector<double>& a, const std::vector<double>& b, double limit) {
    for (size_t i = 0; i < a.size(); ++i)
        if (!(std::fabs(a[i] - b[i]) <= limit) && !(std::isnan(a[i]) && std::isnan(b[i]))) return true;
    return false;
}

int main() {
    for (int n : {1, 2, 5, 8, 9, 17, 26})
        for (int kind = 0; kind < kKinds; ++kind) {
            const std::vector<double> G = gram(n, static_cast<Kind>(kind));
            std::vector<double> inverse(n * n), values(n), vectors(n * n), one_inverse(n * n), one_values(n), one_vectors(n * n);
            std::vector<double> memory(std::max(mingle::CholeskyMemory::doubles(n), mingle::JacobiMemory::doubles(n)));
            on_threads(
                [&](const ThreadBlock& block) { mingle::cholesky_inverse(block, memory.data(), G.data(), n, 1e-12, inverse.data()); });
            mingle::cholesky_inverse(mingle::HostBlock{}, memory.data(), G.data(), n, 1e-12, one_inverse.data());
            if (differ(inverse, one_inverse, 0.0)) return std::printf("cholesky: n = %d, kind %d\n", n, kind);
            on_threads(
                [&](const ThreadBlock& block) { mingle::small_eigh(block, memory.data(), G.data(), n, values.data(), vectors.data()); });
            mingle::small_eigh(mingle::HostBlock{}, memory.data(), G.data(), n, one_values.data(), one_vectors.data());
            if (differ(values, one_values, 0.0) || differ(vectors, one_vectors, 1e-13))
                return std::printf("eigh: n = %d, kind %d\n", n, kind);
            int ranks[kThreads];
            on_threads([&](const ThreadBlock& block) { ranks[block.thread] = mingle::effective_rank(block, values.data(), n); });
            if (ranks[0] != mingle::effective_rank(mingle::HostBlock{}, values.data(), n))
                return std::printf("effective rank: n = %d\n", n);
        }
    const int m = 20, n = 37;
    std::vector<float> M(m * n), scaled(m * n);
    for (float& entry : M) entry = static_cast<float>(uniform());
    mingle::Survey survey;
    on_threads([&](const ThreadBlock& block) {
        const mingle::Rows<float> rows{M.data(), m, n, n};
        const mingle::Survey mine = mingle::survey(block, rows, {0, m * n});
        if (block.thread == 0) survey = mine;
        block.sync();
        int e = 0;
        mingle::rescale(block, rows, {0, m * n}, &survey, 1, scaled.data(), &e);
    });
    mingle::SignMemory signs{};
    std::vector<float> Vh(n * m, 1.0f);
    on_threads([&](const ThreadBlock& block) {
        mingle::fix_signs(block, signs, mingle::Strided<float>{M.data(), m, n, n, 1}, mingle::Strided<float>{Vh.data(), n, m, m, 1}, 0);
    });
    std::puts("done");
}
