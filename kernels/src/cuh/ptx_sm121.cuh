// The inline PTX that only sm_121a assembles: one named function per instruction, and what it means on the CPU.
//
// A part of ptx.cuh that not every unit has in front of it. The emulated form computes from the fragment layouts and
// the scale selectors of the PTX manual (9.7.14.3, 9.7.14.5): a kernel that loads a fragment wrongly is wrong there
// too.
#pragma once
#include "ptx.cuh"
#include "numerics.cuh"

// What a byte of an operand is: an E4M3 code, or an E2M1 code in bits 2 to 5 with zeros around it.
#define OPERAND_E4M3 0
#define OPERAND_E2M1 1

#ifdef DSV4_EMULATED

namespace emu {
template <int OPERAND>
inline float operand_value(u8 byte) {
    if (OPERAND == OPERAND_E2M1) {
        static const float values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        // The hardware would take bits 0 and 1 for more of the fraction.
        if (byte & 0xc3) return NAN;
        float v = values[byte >> 2 & 7];
        return byte & 0x20 ? -v : v;
    }
    return (byte & 0x7f) == 0x7f ? NAN : e4m3_bits(byte);
}
// All values, for speed.
template <int OPERAND>
inline const float* operand_values() {
    struct Table {
        float v[256];
        Table() {
            for (unsigned i = 0; i < 256; i++) v[i] = operand_value<OPERAND>((u8)i);
        }
    };
    static const Table table;
    return table.v;
}
inline double scale_of(u8 byte) { return byte == 255 ? NAN : ldexp(1.0, (int)byte - 127); }
}  // namespace emu

template <int OPERAND_A, int BYTE_A, int PAIR_A, int BYTE_B, int LANE_B>
DEVICE void mma_scaled(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], u32 scale_a, u32 scale_b) {
    static_assert(BYTE_A < 4 && PAIR_A < 2 && BYTE_B < 4 && LANE_B < 4, "selectors");
    unsigned lane = emu::block().current % emu::WARP;
    // What this lane needs: two rows of A and two columns of B, and their scales.
    float A[2][32], B[2][32];
    double scales_a[2], scales_b[2];
    {
        const float* values = emu::operand_values<OPERAND_A>();
        const uint32_t(*all)[4] = emu::exchange(a, 4);
        for (unsigned half = 0; half < 2; half++)
            for (unsigned k = 0; k < 32; k++) {
                // Four columns to a register; the upper eight rows have every second one.
                u32 word = all[lane / 4 * 4 + k % 16 / 4][half + k / 16 * 2];
                A[half][k] = values[word >> k % 4 * 8 & 0xff];
            }
    }
    {
        const float* values = emu::operand_values<OPERAND_E4M3>();
        uint32_t mine[4] = {b[0], b[1], scale_a, scale_b};
        const uint32_t(*all)[4] = emu::exchange(mine, 4);
        for (unsigned i = 0; i < 2; i++) {
            unsigned row = lane / 4 + i * 8, column = lane % 4 * 2 + i;
            for (unsigned k = 0; k < 32; k++)
                B[i][k] = values[all[column * 4 + k % 16 / 4][k / 16] >> k % 4 * 8 & 0xff];
            scales_a[i] = emu::scale_of(all[row % 8 * 4 + 2 * PAIR_A + row / 8][2] >> 8 * BYTE_A);
            scales_b[i] = emu::scale_of(all[column * 4 + LANE_B][3] >> 8 * BYTE_B);
        }
    }
    for (unsigned i = 0; i < 4; i++) {
        float sum = 0;
        for (unsigned k = 0; k < 32; k++) sum += A[i / 2][k] * B[i % 2][k];
        d[i] = (float)(d[i] + sum * (scales_a[i / 2] * scales_b[i % 2]));
    }
}

#else

// D[16][8] += A[16][32] B[32][8], E4M3 codes in B, with a power-of-two scale for every row of A and column of B.
// A row's is byte BYTE_A of `scale_a` of lane 4 (row % 8) + 2 PAIR_A + row / 8, a column's byte BYTE_B of `scale_b` of
// lane 4 column + LANE_B.
template <int OPERAND_A, int BYTE_A, int PAIR_A, int BYTE_B, int LANE_B>
DEVICE void mma_scaled(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], u32 scale_a, u32 scale_b) {
    static_assert(BYTE_A < 4 && PAIR_A < 2 && BYTE_B < 4 && LANE_B < 4, "selectors");
#define DSV4_MMA_SCALED(A)                                                                                          \
    asm("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32." A                         \
        ".e4m3.f32.ue8m0 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {%12, %13}, %11, "     \
        "{%14, %15};"                                                                                               \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b),             \
          "n"(BYTE_A), "n"(PAIR_A), "n"(BYTE_B), "n"(LANE_B))
    if constexpr (OPERAND_A == OPERAND_E2M1) DSV4_MMA_SCALED("e2m1");
    else DSV4_MMA_SCALED("e4m3");
#undef DSV4_MMA_SCALED
}

#endif
