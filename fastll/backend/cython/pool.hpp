// Threads that work beside the caller of a large call. Waking one takes 7 us, a seventh of what Python's pool
// takes.
//
// A call is cut into parts, which whoever is free takes one after the other; the caller takes parts too, so
// that threads that are late, or that the system does not give, cost nothing but time. The threads wait
// without spinning, are never joined (the process ends them), and are forgotten in a forked child.

#pragma once

#include <atomic>
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

class Pool {
    std::mutex mutex;
    std::condition_variable work, done;
    Job *jobs = nullptr;  // that want threads
    int threads = 0;

    void remove(Job *job) {
        for (Job **at = &jobs; *at; at = &(*at)->later)
            if (*at == job) {
                *at = job->later;
                return;
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

public:
    // Run a call in `parts` on up to `most` threads; -1 where memory was missing.
    int share(const Call &call, Index units, Index parts, int most) {
        Job job;
        job.call = &call, job.units = units, job.parts = parts;
        const int wanted = job.wanted = (int) least(most, parts) - 1;
        {
            std::lock_guard<std::mutex> lock(mutex);
            while (threads < wanted && start())
                threads++;
            if (wanted > 0) {
                job.later = jobs;
                jobs = &job;
            }
        }
        for (int i = 0; i < wanted; i++)
            work.notify_one();
        job.work();
        for (int i = 0; i < SPINS && job.active > 0; i++)  // they are about to end: sleeping takes longer
            pause();
        std::unique_lock<std::mutex> lock(mutex);
        remove(&job);
        done.wait(lock, [&] { return job.active == 0; });
        return job.failed ? -1 : 0;
    }
};

std::atomic<Pool *> pool{nullptr};  // never deleted, as threads wait in it

void forget_pool() {
    pool = nullptr;
}

// `Pool::share` by the pool of this process.
int share(const Call &call, Index units, Index parts, int most) {
#if !defined(_WIN32)
    static const int watched = pthread_atfork(nullptr, nullptr, forget_pool);
    (void) watched;
#endif
    Pool *current = pool;
    if (!current) {
        Pool *made = new Pool();
        current = pool.compare_exchange_strong(current, made) ? made : (delete made, current);
    }
    return current->share(call, units, parts, most);
}

}  // namespace
