// What the entry points of the library share: instruction sets, status codes, threads, scratch memory.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define HIF4_EXPORT extern "C" __attribute__((visibility("default")))

namespace hif4 {

enum Status { kDone = 0, kNoMemory = 1, kNoSuchSet = 2 };
enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// The number of the set to run, -1 asking for the best; -1 for one that this processor cannot run.
int usable_set(int set);

// GOMP_parallel of the OpenMP runtime that torch uses, so that there is one pool of threads; may be null.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Team {
  int threads;
  Parallel parallel;
};

// Tasks are handed out one by one: a thread that the system delays holds up no other.
template <typename Task>
struct Job {
  const Task& task;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};

  Job(const Task& task, int64_t count) : task(task), count(count) {}

  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    const int worker = job.workers++;
    for (int64_t i; (i = job.next++) < job.count;) job.task(i, worker);
  }
};

// task(i, worker) for i in [0, count); worker in [0, threads).
template <typename Task>
void run(const Team& team, int64_t count, const Task& task) {
  Job<Task> job(task, count);
  const int threads = static_cast<int>(std::min<int64_t>(team.threads, count));
  if (threads <= 1) return Job<Task>::work(&job);
  if (team.parallel) return team.parallel(Job<Task>::work, &job, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    for (int i = 1; i < threads; i++) others.emplace_back(Job<Task>::work, &job);
  } catch (...) {  // a thread that cannot be had is done without
  }
  Job<Task>::work(&job);
  for (std::thread& other : others) other.join();
}

template <typename T>
class Scratch {
 public:
  // `count` elements from a 64-byte boundary on; check with ok().
  explicit Scratch(int64_t count) : memory_(new (std::nothrow) uint8_t[count * sizeof(T) + 64]) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }
  bool ok() const { return memory_ != nullptr; }
  T* get() const { return data_; }

 private:
  std::unique_ptr<uint8_t[]> memory_;
  T* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace hif4
