// Threads that work beside the caller of a large call.
//
// A call is cut into parts, which whoever is free takes one after the other; the caller takes parts too, so
// that threads that are late, or that the system does not give, cost nothing but time. The threads are never
// joined (the process ends them), and are forgotten in a forked child.
//
// To wake a thread that sleeps takes 7 to 50 us, most of it in a virtual machine whose CPU was halted. So a
// thread that has worked stays awake for a while, giving way to any other that wants its CPU: where calls
// follow each other, a thread takes its first part within a microsecond, and much smaller calls are worth
// sharing.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
  #include <pthread.h>
  #include <signal.h>
#endif

#include "fold.hpp"

namespace {

constexpr int SPINS = 2000;  // about 20 us
constexpr int PARTS = 4;  // per thread: enough for the others to take over from one that is held up
constexpr int AWAKE = 8;  // a call is shared from a fraction of the elements on, if threads are awake

using Clock = std::chrono::steady_clock;
constexpr Clock::duration WATCH = std::chrono::microseconds(100);  // how long threads stay awake

INLINE void pause() {
#if defined(__SSE2__)
    _mm_pause();
#endif
}

struct Job {
    const Call *call;
    Index units, parts;
    std::atomic<Index> next{0};  // part
    std::atomic<bool> failed{false};
    int wanted;  // threads that may still come
    std::atomic<int> active{0};  // threads that are at work
    Job *later = nullptr;

    void work() {
        for (Index part; (part = next++) < parts;)
            if (run(*call, units * part / parts, units * (part + 1) / parts) < 0)
                failed = true;
    }
};

INLINE Index share_from_awake(Index share_from) {
    return (share_from + AWAKE - 1) / AWAKE;
}

class Pool {
    std::mutex mutex;
    std::condition_variable work, done;
    std::atomic<Job *> jobs{nullptr};  // that want threads; written under the mutex
    std::atomic<int> watching{0};  // threads that are awake and look for jobs; likewise
    std::atomic<Clock::rep> last{0};  // when a call that could be shared has ended
    int threads = 0;

    void remove(Job *job) {
        Job *before = nullptr;
        for (Job *at = jobs; at; before = at, at = at->later)
            if (at == job) {
                if (before)
                    before->later = job->later;
                else
                    jobs = job->later;
                return;
            }
    }

    void watch() const {
        for (const Clock::time_point end = Clock::now() + WATCH; !jobs && Clock::now() < end;) {
            for (int i = 0; i < 16 && !jobs; i++)
                pause();
            std::this_thread::yield();
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            work.wait(lock, [this] { return jobs != nullptr; });
            Job *job = jobs;
            job->active++;
            if (--job->wanted == 0)
                remove(job);
            lock.unlock();
            job->work();
            lock.lock();
            if (--job->active == 0)
                done.notify_all();
            watching++;
            lock.unlock();
            watch();
            lock.lock();
            watching--;
        }
    }

    // Start a thread, to which no signal is delivered: those are for the threads of Python.
    bool start() {
#if !defined(_WIN32)
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
        bool started = true;
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::system_error &) {
            started = false;
        }
#if !defined(_WIN32)
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
        return started;
    }

    // Do the parts of a call on up to `most` threads.
    int divide(const Call &call, Index units, Index parts, int most) {
        Job job;
        job.call = &call, job.units = units, job.parts = parts;
        const int wanted = job.wanted = (int) least(most, parts) - 1;
        int asleep;
        {
            std::lock_guard<std::mutex> lock(mutex);
            while (threads < wanted && start())
                threads++;
            asleep = wanted - watching;
            job.later = jobs;
            jobs = &job;
        }
        for (int i = 0; i < asleep; i++)
            work.notify_one();
        job.work();
        for (int i = 0; i < SPINS && job.active > 0; i++)  // they are about to end: sleeping takes longer
            pause();
        std::unique_lock<std::mutex> lock(mutex);
        remove(&job);
        done.wait(lock, [&] { return job.active == 0; });
        return job.failed ? -1 : 0;
    }

    // Whether threads are awake, or were a moment ago or would have been, had they been asked.
    bool is_busy() const {
        return watching > 0 || Clock::now().time_since_epoch().count() - last < WATCH.count();
    }

public:
    // Run all units of a call, on up to `most` threads if they have enough elements: see `run_shared`.
    int share(const Call &call, Index units, Index elements, int most, Index share_from) {
        if (elements < share_from)
            share_from = is_busy() ? share_from_awake(share_from) : elements + 1;
        Index parts = 1;
        if (elements >= share_from)
            parts = least(least(units, PARTS * most), std::max((Index) 2, 2 * elements / share_from));
        const int status = parts < 2 ? run(call, 0, units) : divide(call, units, parts, most);
        last = Clock::now().time_since_epoch().count();
        return status;
    }
};

std::atomic<Pool *> pool{nullptr};  // never deleted, as threads wait in it

void forget_pool() {
    pool = nullptr;
}

// Run all units of a call; -1 where memory was missing. Up to `most` threads share them from so many elements
// on, or from a fraction of these on while threads are awake.
int run_shared(const Call &call, Index units, Index elements, int most, Index share_from) {
    if (units < 2 || most < 2 || elements < share_from_awake(share_from))
        return run(call, 0, units);
#if !defined(_WIN32)
    static const int watched = pthread_atfork(nullptr, nullptr, forget_pool);
    (void) watched;
#endif
    Pool *current = pool;
    if (!current) {
        Pool *made = new Pool();
        current = pool.compare_exchange_strong(current, made) ? made : (delete made, current);
    }
    return current->share(call, units, elements, most, share_from);
}

}  // namespace
