// rms_norm: y[i,c] = w[c] * (x[row(i),c] * rsqrt(mean_c(x[row(i),:]^2) + eps)), rounded to the activation format
//
// x      [.., stride] act, row(i) = i, or gather[i / per].source * per + i % per       w  [COLS] f32
// y      [rows, COLS] act, may be x when the strides are equal
// grid   one block of THREADS per row
// cost   moves 4*COLS bytes a row in bfloat16; memory-bound
// twin   reference.rs::rms_norm
#include "base.cuh"
#include "ptx.cuh"

KERNEL(rms_norm, RmsNormArgs, THREADS) {
    SHARED float scratch[THREADS / LANES];
    constexpr int EACH = (COLS + THREADS - 1) / THREADS;
    u32 i = blockIdx.x;
    // Weights come from far and do not depend on the kernel before.
    float w[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        w[j] = c < COLS ? a.w[c] : 0.0f;
    }
    wait_for_previous();
    u64 from = a.gather ? (u64)a.gather[i / a.per].source * a.per + i % a.per : i;
    const act_t* x = a.x + from * a.stride;
    float v[EACH];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        v[j] = c < COLS ? load(x + c) : 0.0f;
        sum += v[j] * v[j];
    }
    sum = block_sum<THREADS>(sum, scratch);
    float r = 1.0f / sqrtf(sum / COLS + a.eps);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        u32 c = threadIdx.x + j * THREADS;
        if (c < COLS) store(a.y + (u64)i * COLS + c, w[j] * (v[j] * r));
    }
}
