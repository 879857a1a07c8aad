// Runs a kernel's threads as fibers on the CPU, so that its logic is tested where there is no GPU.
//
// Every thread of a block is a fiber with a stack of its own; barriers and warp functions switch between
// them. Blocks run one after another on each worker thread. What is emulated is the meaning, not the speed
// and not the memory model: races between barriers are not found here. x86-64 only.
#pragma once
#ifndef __x86_64__
#error "the emulator switches stacks in x86-64 assembly"
#endif

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <thread>
#include <vector>

struct uint4 {
    unsigned x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
struct float4 {
    float x, y, z, w;
};
struct float2 {
    float x, y;
};
struct uint3 {
    unsigned x, y, z;
};

extern "C" __attribute__((visibility("hidden"))) void dsv4_emu_switch(void** from, void* to);
asm(R"(
.text
.hidden dsv4_emu_switch
.globl dsv4_emu_switch
.type dsv4_emu_switch,@function
dsv4_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emu {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10;
constexpr unsigned THREADS_MAX = 1024;
constexpr size_t SHARED_MAX = 101376;  // what a GB10 block may have

enum State { READY, AT_WARP, AT_BLOCK, LEFT };

struct Fiber {
    void* sp;
    State state;
};

// A copy to shared memory in the background, of a thread's group `group`; zeros where nothing is read.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes, group;
};
// A thread's copies that have not come.
struct Copies {
    std::vector<Copy> pending;
    unsigned group;
};

// One warp's exchange: what its lanes have put down for the others.
struct Warp {
    unsigned waiting, alive;
    uint32_t values[2][WARP][4];
    unsigned turn;
};

struct Block {
    Fiber fibers[THREADS_MAX];
    Warp warps[THREADS_MAX / WARP];
    Copies copies[THREADS_MAX];
    unsigned threads, current, waiting, alive;
    // One of its threads has waited for the kernel ahead.
    bool waited;
    uint3 index, grid;
    void* scheduler;
    char* stacks;
    const void* args;
    void (*body)(const void*);
    alignas(128) unsigned char shared[SHARED_MAX];
};

inline Block*& block_slot() {
    static thread_local Block* block = nullptr;
    return block;
}
// Not inlined: a fiber never moves to another worker, but the compiler must not keep the address of a
// thread's variable over a switch.
__attribute__((noinline)) inline Block& block() { return *block_slot(); }

inline void to_scheduler() {
    Block& b = block();
    dsv4_emu_switch(&b.fibers[b.current].sp, b.scheduler);
}

inline void wake(Block& b, unsigned first, unsigned count, State from) {
    for (unsigned i = first; i < first + count; i++)
        if (b.fibers[i].state == from) b.fibers[i].state = READY;
}

inline unsigned lanes_of(const Block& b, unsigned warp) {
    unsigned rest = b.threads - warp * WARP;
    return rest < WARP ? rest : WARP;
}

inline void barrier_warp() {
    Block& b = block();
    unsigned warp = b.current / WARP;
    Warp& w = b.warps[warp];
    if (++w.waiting == w.alive) {
        w.waiting = 0;
        wake(b, warp * WARP, lanes_of(b, warp), AT_WARP);
        return;
    }
    b.fibers[b.current].state = AT_WARP;
    to_scheduler();
}

inline void barrier_block() {
    Block& b = block();
    if (++b.waiting == b.alive) {
        b.waiting = 0;
        wake(b, 0, b.threads, AT_BLOCK);
        return;
    }
    b.fibers[b.current].state = AT_BLOCK;
    to_scheduler();
}

// Copies come as late as they may: what is read before it was waited for is not there.
inline void copy_later(void* to, const void* from, unsigned bytes) {
    Copies& c = block().copies[block().current];
    c.pending.push_back(Copy{to, from, bytes, c.group});
}
inline void copy_close_group() { block().copies[block().current].group++; }
inline void copy_finish(unsigned pending_groups) {
    Copies& c = block().copies[block().current];
    size_t kept = 0;
    for (const Copy& copy : c.pending) {
        if (copy.group + pending_groups >= c.group) c.pending[kept++] = copy;
        else if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
        else memset(copy.to, 0, copy.bytes);
    }
    c.pending.resize(kept);
}

inline void leave() {
    Block& b = block();
    unsigned warp = b.current / WARP;
    Warp& w = b.warps[warp];
    b.fibers[b.current].state = LEFT;
    b.alive--;
    w.alive--;
    if (w.alive && w.waiting == w.alive) {
        w.waiting = 0;
        wake(b, warp * WARP, lanes_of(b, warp), AT_WARP);
    }
    if (b.alive && b.waiting == b.alive) {
        b.waiting = 0;
        wake(b, 0, b.threads, AT_BLOCK);
    }
    to_scheduler();
    abort();
}

inline void enter() {
    Block& b = block();
    b.body(b.args);
    leave();
}

// Puts down up to four words per lane, waits for the warp, and gives the lanes' words.
inline const uint32_t (*exchange(const uint32_t* words, unsigned count))[4] {
    Block& b = block();
    Warp& w = b.warps[b.current / WARP];
    // Two sets in turn: a fast lane may already put down its next words while slow ones still read.
    unsigned turn = w.turn;
    memcpy(w.values[turn][b.current % WARP], words, count * 4);
    if (w.waiting + 1 == w.alive) w.turn ^= 1;
    barrier_warp();
    return w.values[turn];
}

template <class F>
inline float butterfly(float v, F combine) {
    uint32_t word;
    memcpy(&word, &v, 4);
    unsigned lane = block().current % WARP;
    const uint32_t(*all)[4] = exchange(&word, 1);
    float sums[WARP];
    for (unsigned l = 0; l < WARP; l++) memcpy(&sums[l], all[l], 4);
    for (unsigned m = WARP / 2; m > 0; m /= 2) {
        float next[WARP];
        for (unsigned l = 0; l < WARP; l++) next[l] = combine(sums[l], sums[l ^ m]);
        memcpy(sums, next, sizeof sums);
    }
    return sums[lane];
}

inline int fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    return 1;
}

inline int run_block(Block& b, size_t shared) {
    b.waiting = 0;
    b.alive = b.threads;
    b.waited = false;
    for (unsigned w = 0; w * WARP < b.threads; w++) b.warps[w] = Warp{0, lanes_of(b, w), {}, 0};
    // NaN: what is not written must not be used.
    memset(b.shared, 0xff, shared);
    for (unsigned i = 0; i < b.threads; i++) {
        // A stack that returns into enter(), with six registers to pop and the alignment of a call.
        void** top = reinterpret_cast<void**>(b.stacks + (i + 1) * STACK) - 2;
        top[0] = reinterpret_cast<void*>(&enter);
        top -= 6;
        memset(top, 0, 6 * sizeof(void*));
        b.fibers[i] = Fiber{top, READY};
        b.copies[i].pending.clear();
        b.copies[i].group = 0;
    }
    while (b.alive) {
        bool ran = false;
        for (unsigned i = 0; i < b.threads; i++) {
            if (b.fibers[i].state != READY) continue;
            ran = true;
            b.current = i;
            dsv4_emu_switch(&b.scheduler, b.fibers[i].sp);
        }
        if (!ran) return fail("threads wait at a barrier that others never reach");
    }
    // It would end the chain of those that wait for one another.
    if (!b.waited) return fail("a block ends that has not waited for the kernel ahead");
    return 0;
}

inline int run(const unsigned* grid, unsigned threads, size_t shared, unsigned workers, const void* args,
               void (*body)(const void*)) {
    if (threads == 0 || threads > THREADS_MAX) return fail("bad block size");
    if (shared > SHARED_MAX) return fail("more shared memory than a GB10 block may have");
    uint64_t count = (uint64_t)grid[0] * grid[1] * grid[2];
    std::atomic<uint64_t> next{0};
    std::atomic<int> failed{0};
    auto work = [&] {
        static thread_local struct Holder {
            Block* block = nullptr;
            ~Holder() {
                if (block) {
                    munmap(block->stacks, THREADS_MAX * STACK);
                    delete block;
                }
            }
        } holder;
        if (!holder.block) {
            holder.block = new Block;
            holder.block->stacks = static_cast<char*>(mmap(nullptr, THREADS_MAX * STACK, PROT_READ | PROT_WRITE,
                                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        }
        Block& b = *holder.block;
        block_slot() = &b;
        b.threads = threads;
        b.args = args;
        b.body = body;
        b.grid = uint3{grid[0], grid[1], grid[2]};
        for (uint64_t i; !failed && (i = next++) < count;) {
            b.index = uint3{(unsigned)(i % grid[0]), (unsigned)(i / grid[0] % grid[1]), (unsigned)(i / grid[0] / grid[1])};
            if (run_block(b, shared)) failed = 1;
        }
    };
    if (workers <= 1 || count <= 1) {
        work();
    } else {
        std::vector<std::thread> threads_;
        for (unsigned i = 0; i < workers; i++) threads_.emplace_back(work);
        for (auto& t : threads_) t.join();
    }
    return failed;
}

}  // namespace emu

#define threadIdx (uint3{emu::block().current, 0, 0})
#define blockIdx (emu::block().index)
#define gridDim (emu::block().grid)
#define blockDim (uint3{emu::block().threads, 1, 1})

#define DEVICE static inline
#define SHARED static thread_local
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::block().shared)
#define KERNEL(name, Args, THREADS)                                                                                  \
    static void name##_body(const Args& a);                                                                          \
    extern "C" int name(const void* args, const unsigned* grid, unsigned threads, unsigned long shared,              \
                        unsigned workers) {                                                                          \
        if (threads > (THREADS)) return emu::fail(#name ": more threads than its bound");                            \
        return emu::run(grid, threads, shared, workers, args,                                                        \
                        [](const void* p) { name##_body(*static_cast<const Args*>(p)); });                           \
    }                                                                                                                \
    static void name##_body(const Args& a)

#define KERNEL_RESIDENT(name, Args, THREADS, BLOCKS) KERNEL(name, Args, THREADS)

DEVICE u32 bits_of(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return bits;
}
DEVICE float float_of(u32 bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
DEVICE u32 shuffle_xor(u32 v, int lane_mask) {
    unsigned lane = emu::block().current % emu::WARP;
    return emu::exchange(&v, 1)[lane ^ (unsigned)lane_mask][0];
}
DEVICE float shuffle_xor(float v, int lane_mask) { return float_of(shuffle_xor(bits_of(v), lane_mask)); }
DEVICE u32 shuffle(u32 v, int lane) { return emu::exchange(&v, 1)[(unsigned)lane % emu::WARP][0]; }
DEVICE float shuffle(float v, int lane) { return float_of(shuffle(bits_of(v), lane)); }
DEVICE u32 ballot(bool v) {
    u32 word = v;
    const uint32_t(*all)[4] = emu::exchange(&word, 1);
    u32 out = 0;
    for (unsigned lane = 0; lane < emu::WARP; lane++) out |= all[lane][0] << lane;
    return out;
}
DEVICE u32 warp_max(u32 v) {
    for (int m = emu::WARP / 2; m > 0; m /= 2) {
        u32 other = shuffle_xor(v, m);
        v = other > v ? other : v;
    }
    return v;
}
// The sum over a warp's lanes and the largest, by the tree of base.cuh, with one exchange.
DEVICE float warp_sum(float v) {
    return emu::butterfly(v, [](float a, float b) { return a + b; });
}
DEVICE float warp_max(float v) {
    return emu::butterfly(v, [](float a, float b) { return b > a ? b : a; });
}
DEVICE void sync_block() { emu::barrier_block(); }
DEVICE void sync_warp() { emu::barrier_warp(); }
DEVICE u32 count_bits(u32 v) { return (u32)__builtin_popcount(v); }
DEVICE u32 atomic_add(u32* at, u32 v) { return __atomic_fetch_add(at, v, __ATOMIC_SEQ_CST); }
DEVICE void fence_device() { std::atomic_thread_fence(std::memory_order_seq_cst); }
using std::exp;
using std::fabs;
DEVICE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
