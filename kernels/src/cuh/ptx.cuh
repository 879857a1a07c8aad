// The only place with inline PTX: one named function per instruction, and what it means on the CPU.
//
// Fragment layouts are those of the PTX manual; the emulated forms compute from the same layouts, so a
// kernel that loads a fragment wrongly is wrong there too. Everything here assembles for sm_90 and sm_121.
#pragma once
#include "base.cuh"

#ifdef DSV4_EMULATED

DEVICE uint4 load_stream(const void* at) {
    uint4 v;
    memcpy(&v, at, 16);
    return v;
}
DEVICE u32 load_near1(const void* at) { return *static_cast<const u8*>(at); }
DEVICE u32 load_byte(const void* at) { return *static_cast<const u8*>(at); }
DEVICE u32 load_fresh(const u32* at) { return *at; }
DEVICE void copy_async4(void* to, const void* from) { emu::copy_later(to, from, 4); }
DEVICE void copy_async16(void* to, const void* from) { emu::copy_later(to, from, 16); }
DEVICE void copy_async16_or_zero(void* to, const void* from, bool real) {
    emu::copy_later(to, real ? from : nullptr, 16);
}
DEVICE void copy_async16_wide(void* to, const void* from) { emu::copy_later(to, from, 16); }
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        u8 byte = (u8)(both >> 8 * (selector >> 4 * i & 7));
        if (selector >> 4 * i & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= (u32)byte << 8 * i;
    }
    return out;
}
DEVICE void copy_commit() { emu::copy_close_group(); }
template <int PENDING>
DEVICE void copy_wait() {
    emu::copy_finish(PENDING);
}
DEVICE void prefetch_l2(const void*, u32) {}
DEVICE void prefetch_l2(const void*) {}
DEVICE void wait_for_previous() { emu::block().waited = true; }
DEVICE float reciprocal_near(float x) { return 1.0f / x; }

DEVICE u32 pack_half2(float lo, float hi) {
    _Float16 a = (_Float16)lo, b = (_Float16)hi;
    u16 x, y;
    memcpy(&x, &a, 2);
    memcpy(&y, &b, 2);
    return x | (u32)y << 16;
}
DEVICE float half_bits(u16 x) {
    _Float16 h;
    memcpy(&h, &x, 2);
    return (float)h;
}
DEVICE float2 unpack_half2(u32 v) { return float2{half_bits((u16)v), half_bits((u16)(v >> 16))}; }
DEVICE float e4m3_bits(u8 code) {
    u32 magnitude = code & 0x7f;
    float v = magnitude >> 3 ? ldexpf(1.0f + (magnitude & 7) / 8.0f, (int)(magnitude >> 3) - 7)
                             : ldexpf((float)(magnitude & 7), -9);
    return code & 0x80 ? -v : v;
}
DEVICE u32 half2_of_e4m3x2(u16 codes) { return pack_half2(e4m3_bits((u8)codes), e4m3_bits((u8)(codes >> 8))); }
// As the instruction rounds: to the nearest, ties to even, saturating.
DEVICE u8 e4m3_of(float x) {
    float m = fabsf(x) > 448.0f ? 448.0f : fabsf(x);
    u32 sign = bits_of(x) >> 24 & 0x80u;
    if (m < 0.015625f) return (u8)(sign | (u32)rintf(m * 512.0f));
    u32 bits = bits_of(m);
    return (u8)(sign | (((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3)));
}
DEVICE u16 e4m3x2_of(float lo, float hi) { return (u16)(e4m3_of(lo) | (u32)e4m3_of(hi) << 8); }
DEVICE u32 mul_bf16x2(u32 a, u32 b) {
    float lo = float_of(a << 16) * float_of(b << 16), hi = float_of(a & 0xffff0000u) * float_of(b & 0xffff0000u);
    return to_bf16(lo) | (u32)to_bf16(hi) << 16;
}

namespace emu {
// D[16][8] += A[16][16] B[16][8]; `value` gives the float of a 16-bit element.
template <class Value>
inline void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Value value) {
    unsigned lane = block().current % WARP;
    // What this lane needs: two rows of A, two columns of B.
    float A[2][16], B[2][16];
    {
        const uint32_t(*all)[4] = exchange(a, 4);
        for (unsigned half = 0; half < 2; half++)
            for (unsigned col = 0; col < 16; col++) {
                uint32_t pair = all[lane / 4 * 4 + col % 8 / 2][half + 2 * (col / 8)];
                A[half][col] = value((u16)(pair >> (16 * (col % 2))));
            }
    }
    {
        const uint32_t(*all)[4] = exchange(b, 2);
        for (unsigned odd = 0; odd < 2; odd++)
            for (unsigned row = 0; row < 16; row++) {
                uint32_t pair = all[(lane % 4 * 2 + odd) * 4 + row % 8 / 2][row / 8];
                B[odd][row] = value((u16)(pair >> (16 * (row % 2))));
            }
    }
    for (unsigned i = 0; i < 4; i++) {
        float sum = 0;
        for (unsigned k = 0; k < 16; k++) sum += A[i / 2][k] * B[i % 2][k];
        d[i] += sum;
    }
}
inline void load_matrix(u32 (&r)[4], const void* row, bool transposed) {
    unsigned lane = block().current % WARP;
    u64 address = (u64)row;
    uint32_t words[2] = {(uint32_t)address, (uint32_t)(address >> 32)};
    const uint32_t(*all)[4] = exchange(words, 2);
    for (unsigned m = 0; m < 4; m++) {
        auto element = [&](unsigned i, unsigned j) {
            u64 at = (u64)all[8 * m + i][0] | (u64)all[8 * m + i][1] << 32;
            return reinterpret_cast<const u16*>(at)[j];
        };
        unsigned i = lane / 4, j = lane % 4 * 2;
        r[m] = transposed ? element(j, i) | (u32)element(j + 1, i) << 16 : element(i, j) | (u32)element(i, j + 1) << 16;
    }
    // The rows may be overwritten as soon as every lane has read.
    barrier_warp();
}
}  // namespace emu

DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emu::mma_16816(d, a, b, [](u16 x) { return from_bf16(x); });
}
DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emu::mma_16816(d, a, b, [](u16 x) { return half_bits(x); });
}
DEVICE void load_matrix_x4(u32 (&r)[4], const void* row) { emu::load_matrix(r, row, false); }
DEVICE void load_matrix_x4_trans(u32 (&r)[4], const void* row) { emu::load_matrix(r, row, true); }

#else

// 16 bytes that are read once: kept out of the L1 cache.
DEVICE uint4 load_stream(const void* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}
// A byte whose neighbours are read soon by other warps: they may stay in the L1 cache. Volatile, so that it is asked
// for where it stands, ahead of its use.
DEVICE u32 load_near1(const void* at) {
    u32 v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}
// The same of a byte that an earlier kernel has written: it may have run beside this one.
DEVICE u32 load_byte(const void* at) {
    u32 v;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
// A word as the L2 cache has it, whatever the L1 cache has kept of an earlier kernel's time.
DEVICE u32 load_fresh(const u32* at) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}
DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
// 4 bytes from global to shared memory, in the background; their neighbours may stay in the L1 cache.
DEVICE void copy_async4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// 16 bytes from global to shared memory, in the background.
DEVICE void copy_async16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// The same, or zeros where there is nothing real to read (`from` must still be a valid address).
DEVICE void copy_async16_or_zero(void* to, const void* from, bool real) {
    int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
// The same for rows read a few bytes at a time: the L2 cache fetches 128 bytes around.
DEVICE void copy_async16_wide(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes of a (0..3) and b (4..7); with 8 added, that
// byte's top bit eight times.
// (The intrinsic of that name ignores the 8.)
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
    return v;
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's groups are unfinished.
template <int PENDING>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Asks for `bytes` from `at` on into the L2 cache, both multiples of 16. Only memory that is really there.
DEVICE void prefetch_l2(const void* at, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
}
// The line of 128 bytes at an address.
DEVICE void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// Programmatic launch. Nothing that an earlier kernel writes is read before the wait; it ends when the kernel ahead has
// ended, which has waited as well, and so on: every block waits, also where it has nothing to do. Only then may the
// next one start: with more than one launch ahead they take each other's cache (H100: a step of 8 layers 1.12 ms so,
// 1.37 ms with the start released before the wait).
DEVICE void wait_for_previous() {
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
}
// 1 / x within one unit in the last place, for normal results.
DEVICE float reciprocal_near(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE u32 pack_half2(float lo, float hi) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}
DEVICE float2 unpack_half2(u32 v) {
    float2 f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(f.x), "=f"(f.y) : "r"(v));
    return f;
}
// Two E4M3 codes to two halves; exact.
DEVICE u32 half2_of_e4m3x2(u16 codes) {
    u32 v;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(v) : "h"(codes));
    return v;
}
// Two floats to E4M3 codes, the first in the low byte: to the nearest, ties to even, saturating at 448.
DEVICE u16 e4m3x2_of(float lo, float hi) {
    u16 v;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(hi), "f"(lo));
    return v;
}
DEVICE u32 mul_bf16x2(u32 a, u32 b) {
    u32 v, zero = 0x80008000u;  // minus zero: the product is not changed by adding it
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(zero));
    return v;
}
// D[16][8] += A[16][16] B[16][8], bfloat16 inputs.
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for half inputs.
DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8x8 matrices of 16-bit elements from shared memory; lane l gives the row l % 8 of matrix l / 8.
DEVICE void load_matrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#endif

// The E2M1 codes in bits 0..3 and 16..19 of a word as halves times 2^-14: exact, also the subnormal 0.5.
// Four words come from eight packed codes c0..c7 (c0 in the lowest nibble): shift right by 0, 4, 8 and 12 gives
// the pairs (c0, c4), (c1, c5), (c2, c6), (c3, c7).
DEVICE u32 half2_of_e2m1(u32 word) { return (word & 0x00070007u) << 9 | (word & 0x00080008u) << 12; }
// Undoes the 2^-14.
#define E2M1_HALF_SCALE 16384.0f

// Two E4M3 codes (bits 0..7 and 16..23 of a word) as bfloat16 times 2^-120; exact.
DEVICE u32 bf16x2_of_e4m3(u32 word) { return (word & 0x007f007fu) << 4 | (word & 0x00800080u) << 8; }

// Last arrivers and single launches of what used to be several.
#ifdef DSV4_EMULATED
DEVICE uint4 load_ahead(const void* at) { return load_stream(at); }
DEVICE u32 bf16x2_near(float lo, float hi) { return to_bf16(lo) | (u32)to_bf16(hi) << 16; }
DEVICE u32 arrive(u32* counter) { return __atomic_fetch_add(counter, 1u, __ATOMIC_SEQ_CST); }
template <int THREADS>
DEVICE void sync_first() {
    sync_block();
}
DEVICE void pass_first() { sync_block(); }
#else
// As load_stream, but it stays ahead of wait_for_previous(): the compiler moves loads of what it is told never changes
// (.nc) behind that (13.0.88, sm_90a and sm_121a), which is where they are late.
DEVICE uint4 load_ahead(const void* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}
// Two bfloat16 in a word, the lower one first, to the nearest, ties to even: one instruction.
DEVICE u32 bf16x2_near(float lo, float hi) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}
// Counts this block in; gives how many were before it. What a block's threads wrote before a barrier ahead of this is
// seen by all threads of a later one behind a barrier after it.
DEVICE u32 arrive(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
// A barrier of a block's first THREADS threads, whole warps. The others pass it by, and say so as often as it is met.
template <int THREADS>
DEVICE void sync_first() {
    asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
}
DEVICE void pass_first() {}
#endif
