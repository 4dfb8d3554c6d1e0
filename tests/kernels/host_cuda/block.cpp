#include "block.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tensor_cores.h"

// Static __shared__ variables: the build renames .bss of kernel files. (GCC ignores a section that
// is named on variables of templates.)
extern "C" __attribute__((weak, visibility("hidden"))) char __start_mk_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_mk_shared[];

namespace host_cuda {

dim3 grid_dim, block_dim;
uint3 block_index, thread_index;
void* dynamic_shared;

namespace {

constexpr int kWarp = 32;
constexpr int kPoison = 0xa5;
constexpr std::uint64_t kUndefined = 0xa5a5a5a5a5a5a5a5u;
constexpr std::size_t kStack = 128 << 10;
constexpr std::size_t kGuard = 4096;
constexpr std::size_t kShared = 227 << 10;  // bytes of shared memory that a block can have
constexpr std::size_t kPast = 1024;         // bytes behind it that a kernel must leave alone

struct alignas(16) Word {
  char bytes[16];
};

// A stack that runs one thread after another; one that waits keeps its stack until it goes on.
struct Fiber {
  Fiber() {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack = static_cast<char*>(p);
    mprotect(stack, kGuard, PROT_NONE);
  }
  ~Fiber() { munmap(stack, kStack); }
  Fiber(const Fiber&) = delete;

  char* stack;
  bool begun = false;
  jmp_buf context;
};

enum class State { fresh, ready, at_block, at_warp, ended };

struct Thread {
  uint3 index;
  State state;
  Fiber* fiber;
  jmp_buf context;
  // Where it waits, for whom, and what it brought and learned.
  const char* file;
  int line;
  unsigned mask;
  std::uint64_t value;
  int argument;
  std::uint64_t learned;
};

// A permutation of n numbers: a start and a stride that has no divisor in common with n.
struct Order {
  Order(long seed, long n) : n(n), start((seed % n + n) % n), stride(std::max(1L, start)) {
    while (std::gcd(stride, n) != 1) ++stride;
  }
  long at(long i) const { return (start + i * (stride % n)) % n; }
  long n, start, stride;
};

std::mutex one_launch;
std::deque<Fiber> fibers;
std::vector<Fiber*> idle;
std::vector<Thread> threads;
std::deque<int> queue;  // threads that can run
std::vector<int> order;
const std::function<void()>* body;
int current, waiting, ended, votes;
Thread barrier;  // where the first of the waiting threads waits
Fiber* fiber;
jmp_buf scheduler;
std::string failure;

[[gnu::noinline]] void leap(jmp_buf& from, jmp_buf& to) {
  if (!_setjmp(from)) _longjmp(to, 1);
}

void select(int thread) {
  current = thread;
  thread_index = threads[thread].index;
}

// What a fiber does: threads that have not begun, one after another.
void work() {
  for (;;) {
    while (failure.empty() && !queue.empty() && threads[queue.front()].state == State::fresh) {
      select(queue.front());
      queue.pop_front();
      (*body)();
      threads[current].state = State::ended;
      ++ended;
    }
    idle.push_back(fiber);
    leap(fiber->context, scheduler);
  }
}

[[gnu::noinline]] void begin(Fiber* fresh) {
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fresh->stack + kGuard;
  context.uc_stack.ss_size = kStack - kGuard;
  context.uc_link = nullptr;
  makecontext(&context, work, 0);
  fresh->begun = true;
  if (!_setjmp(scheduler)) setcontext(&context);
}

std::string place(const Thread& t) { return std::string(t.file) + ":" + std::to_string(t.line); }

// Leaves the running thread until somebody puts it into the queue.
void wait() {
  threads[current].fiber = fiber;
  leap(threads[current].context, scheduler);
}

// Whoever goes on, in `order`: a block behind the threads that wait, a warp before them, so that it
// runs ahead of other warps as far as barriers let it.
template <class Who>
void release(bool ahead, Who who) {
  const auto behind = ahead ? queue.begin() : queue.end();
  std::vector<int> gone;
  for (int i : order)
    if (who(i)) threads[i].state = State::ready, gone.push_back(i);
  queue.insert(behind, gone.begin(), gone.end());
}

void run_block() {
  const int n = int(threads.size());
  queue.assign(order.begin(), order.end());
  waiting = ended = 0;
  while (!queue.empty() && failure.empty()) {
    Thread& next = threads[queue.front()];
    if (next.state == State::ready) {
      select(queue.front());
      queue.pop_front();
      fiber = next.fiber;
      leap(scheduler, next.context);
      continue;
    }
    if (idle.empty()) idle.push_back(&fibers.emplace_back());
    fiber = idle.back();
    idle.pop_back();
    if (fiber->begun)
      leap(scheduler, fiber->context);
    else
      begin(fiber);
  }
  if (failure.empty() && ended < n) {
    const Thread& stuck = *std::find_if(threads.begin(), threads.end(),
                                        [](const Thread& t) { return t.state != State::ended; });
    failure = std::to_string(n - ended) + " of " + std::to_string(n) +
              " threads wait for others that do not come; got one at " + place(stuck) + ", and " +
              std::to_string(ended) + " that ended";
  }
}

}  // namespace

std::uint64_t ballot(const Brought* all, int) {
  std::uint64_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= std::uint64_t(all[i].present && all[i].value) << i;
  return bits;
}
std::uint64_t take(const Brought* all, int of) {
  const Brought& from = all[all[of].argument];
  return from.present ? from.value : kUndefined;
}
std::uint64_t match(const Brought* all, int of) {
  std::uint64_t bits = 0;
  for (int i = 0; i < kWarp; ++i)
    bits |= std::uint64_t(all[i].present && all[i].value == all[of].value) << i;
  return bits;
}
std::uint64_t sum(const Brought* all, int) {
  std::uint64_t total = 0;
  for (int i = 0; i < kWarp; ++i) total += all[i].present ? all[i].value : 0;
  return total;
}
std::uint64_t greatest(const Brought* all, int) {
  std::uint64_t result = 0;
  for (int i = 0; i < kWarp; ++i) result = std::max(result, all[i].present ? all[i].value : 0);
  return result;
}

int meet_block(int vote, const char* file, int line) {
  Thread& me = threads[current];
  if (waiting > 0 && line != barrier.line)
    failure = "the threads of a block wait in two places; got " + place(barrier) + " and " +
              std::string(file) + ":" + std::to_string(line);
  me.state = State::at_block;
  me.file = file;
  me.line = line;
  if (waiting == 0) barrier = me, votes = 0;
  votes += vote;
  if (++waiting == int(threads.size())) {
    waiting = 0;
    for (Thread& each : threads) each.learned = std::uint64_t(votes);
    release(false, [](int) { return true; });
  }
  wait();
  return int(threads[current].learned);
}

std::uint64_t meet_warp(unsigned mask, std::uint64_t value, int argument, Learn learn,
                        const char* file, int line) {
  const int first = current / kWarp * kWarp;
  Thread& me = threads[current];
  me.state = State::at_warp;
  me.file = file;
  me.line = line;
  me.mask = mask;
  me.value = value;
  me.argument = argument;
  Brought all[kWarp] = {};
  const auto named = [&](int i) { return mask >> i & 1u; };
  for (int i = 0; i < kWarp; ++i) {
    if (!named(i)) continue;
    const bool there = first + i < int(threads.size());
    const Thread* other = there ? &threads[first + i] : nullptr;
    if (!there || other->state != State::at_warp || other->line != line || other->mask != mask) {
      wait();
      return threads[current].learned;
    }
    all[i] = {true, other->value, other->argument};
  }
  for (int i = 0; i < kWarp; ++i)
    if (named(i)) threads[first + i].learned = learn(all, i);
  release(true, [&](int i) { return i / kWarp * kWarp == first && named(i - first); });
  wait();
  return threads[current].learned;
}

void run(dim3 blocks, dim3 size, std::size_t shared, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const char* seed = std::getenv("MERGEKERN_HOST_CUDA_ORDER");
  const long order_seed = seed ? std::atol(seed) : 0;
  const long n = long(size.x) * size.y * size.z, grid = long(blocks.x) * blocks.y * blocks.z;
  if (n < 1 || n > 1024 || grid < 1) throw std::runtime_error("no launch of that size");
  if (shared > kShared) throw std::runtime_error("no multiprocessor has so much shared memory");
  std::vector<Word> words((shared + kPast) / sizeof(Word) + 1);
  char* const bytes = words.front().bytes;
  dynamic_shared = bytes;
  grid_dim = blocks;
  block_dim = size;
  body = &thread;
  const Order of_blocks(order_seed, grid), of_threads(order_seed, n);
  order.resize(n);
  for (long i = 0; i < n; ++i) order[i] = int(of_threads.at(i));
  for (long b = 0; b < grid; ++b) {
    const unsigned at = unsigned(of_blocks.at(b));
    block_index = {at % blocks.x, at / blocks.x % blocks.y, at / blocks.x / blocks.y};
    if (__start_mk_shared)
      std::memset(__start_mk_shared, kPoison, __stop_mk_shared - __start_mk_shared);
    std::memset(bytes, kPoison, shared + kPast);
    threads.assign(n, Thread{});
    for (unsigned i = 0; i < n; ++i)
      threads[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    run_block();
    const auto written = [](char c) { return c != char(kPoison); };
    const int copies = forget_copies();
    if (failure.empty() && copies > 0)
      failure = "a kernel ended before its copies; got " + std::to_string(copies) + " on their way";
    if (failure.empty() && std::any_of(bytes + shared, bytes + shared + kPast, written))
      failure = "a kernel wrote past its dynamic shared memory; got a launch with " +
                std::to_string(shared) + " bytes of it";
    if (failure.empty()) continue;
    idle.clear();
    fibers.clear();
    throw std::runtime_error(std::exchange(failure, std::string()));
  }
}

}  // namespace host_cuda
