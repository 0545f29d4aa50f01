#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hasten {
namespace {

// Spins before a waiting thread lets others run (in a pass) or sleeps (between passes): about 30 and 200 microseconds.
constexpr int YIELD_AFTER = 2000, SLEEP_AFTER = 12000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::vector<std::thread> workers;
  std::mutex one_caller, sleep_lock;
  std::condition_variable wake;
  int threads = 1;
  alignas(64) std::atomic<uint32_t> job{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> round{0};
  std::atomic<int> asleep{0};
  Task task = nullptr;
  void *context = nullptr;
  bool leave = false;

  void meet() {
    if (threads == 1) return;
    const uint32_t now = round.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
      pause();
      if (spins > YIELD_AFTER) std::this_thread::yield();
    }
  }

  void work(int thread) {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; job.load(std::memory_order_acquire) == seen; spins++) {
        pause();
        if (spins < SLEEP_AFTER) continue;
        std::unique_lock<std::mutex> lock(sleep_lock);
        asleep.fetch_add(1);
        wake.wait(lock, [&] { return job.load() != seen; });
        asleep.fetch_sub(1);
      }
      seen = job.load(std::memory_order_acquire);
      if (leave) return;
      task(context, thread, threads);
      meet();
    }
  }

  void start() {
    job.fetch_add(1);
    if (asleep.load()) {
      std::lock_guard<std::mutex> lock(sleep_lock);
      wake.notify_all();
    }
  }

  void resize(int count) {
    std::lock_guard<std::mutex> guard(one_caller);
    if (count == threads) return;
    leave = true;
    start();
    for (auto &worker : workers) worker.join();
    workers.clear();
    leave = false;
    threads = count;
    job.store(0);
    for (int i = 1; i < count; i++) workers.emplace_back([this, i] { work(i); });
  }
};

// Never destroyed: threads may still wait on it while the process ends. A forked child has no threads, and starts anew.
Pool *only = nullptr;

Pool &pool() {
  static const bool made = [] {
    only = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { only = new Pool; });
#endif
    return true;
  }();
  (void)made;
  return *only;
}

}  // namespace

void set_threads(int count) { pool().resize(count); }
int thread_count() { return pool().threads; }
void barrier() { pool().meet(); }

void run_on_all(Task task, void *context) {
  Pool &p = pool();
  std::lock_guard<std::mutex> guard(p.one_caller);
  p.task = task;
  p.context = context;
  if (p.threads > 1) p.start();
  task(context, 0, p.threads);
  p.meet();
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace hasten
