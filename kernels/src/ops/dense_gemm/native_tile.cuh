// One tile of y = x W^T on the block-scaled tensor cores of sm_121a: TOKENS rows of x, OUTS rows of W, in float32.
//
// x is E4M3 codes with a UE8M0 byte per 128 columns of a row; W is E4M3 (a byte per 128x128) or E2M1 (a byte per row
// and 32 columns). The mma multiplies codes and applies both scales: nothing is widened, and the result is that of
// tile.cuh but for the order of sums. Both operands come to shared memory as they are stored (cp.async, STAGES deep, 64
// columns a stage).
//
// The 16-row side of an mma is W, the 8-column side x. E4M3 fragments come by ldmatrix. E2M1 comes packed, by ldmatrix
// too, a word of eight consecutive columns for every row of an mma, and becomes two words of bytes in registers: six
// operations for eight codes. (ldmatrix can unpack as well, but only rows that lie in shared memory padded to twice
// their size.) Lane q of four then has columns 8q..8q+7 of 32, and takes the same ones of x. Which output a row of the
// mma is, is free: rows of W are put into shared memory in such an order that a lane ends up with consecutive outputs,
// and so that the scales it has to bring are those of consecutive rows.
#include "base.cuh"
#include "ptx_sm121.cuh"

#define WEIGHT_FP8 2
#define WEIGHT_FP4 3

// Columns of a stage, and those under one scale of x and of an FP8 weight.
#define STAGE_COLS 64
#define SCALE_COLS 128
// A warp's part of a tile.
#define WARP_OUTS 64
#define WARP_TOKENS 32

// The shape of a block's work. PAIRED: every 64 rows of W are 32 of one matrix and 32 of another, and a lane has 4
// consecutive outputs of each instead of 8.
template <int TOKENS_, int OUTS_, int STAGES_, int FORMAT_, bool PAIRED_>
struct TileShape {
    static constexpr int TOKENS = TOKENS_, OUTS = OUTS_, STAGES = STAGES_, FORMAT = FORMAT_;
    static constexpr bool PAIRED = PAIRED_;
    static constexpr int OPERAND = FORMAT == WEIGHT_FP8 ? OPERAND_E4M3 : OPERAND_E2M1;
    static constexpr int WARPS_N = OUTS / WARP_OUTS, BLOCK = LANES * (TOKENS / WARP_TOKENS) * WARPS_N;
    // Bytes of a row of W in a stage, and 16-byte chunks of it and of a row of x.
    static constexpr int ROW_BYTES = FORMAT == WEIGHT_FP8 ? STAGE_COLS : STAGE_COLS / 2;
    static constexpr int CHUNKS = ROW_BYTES / 16, X_CHUNKS = STAGE_COLS / 16;
    static constexpr int X_BYTES = TOKENS * STAGE_COLS, STAGE_BYTES = X_BYTES + OUTS * ROW_BYTES;
    // Copies of a thread in a stage, and the rows between them.
    static constexpr int X_STEP = BLOCK / X_CHUNKS, X_COPIES = TOKENS / X_STEP;
    static constexpr int W_STEP = BLOCK / CHUNKS, W_COPIES = OUTS / W_STEP;
    static_assert(TOKENS % WARP_TOKENS == 0 && OUTS % WARP_OUTS == 0, "not whole warps");
    static_assert(X_COPIES * X_STEP == TOKENS && X_STEP % 8 == 0, "tokens are not whole copies");
    static_assert(W_COPIES * W_STEP == OUTS && W_STEP % 64 == 0, "outputs are not whole copies");
};

// What a thread copies and scales: filled by the kernel, for its rows.
template <class T>
struct TileSource {
    const u8 *x, *w;
    // Where its copies start, in 16-byte units from x and w: row and chunk.
    u32 x_at[T::X_COPIES], w_at[T::W_COPIES];
    // Scales of lane_scale_token(), a byte per 128 columns.
    const u8* x_scales;
    // Scales of lane_scale_out(0) and (1): FP8 a byte per 128 columns, FP4 four.
    const u8* w_scales[2];
    // Columns / 128.
    u32 steps;
};

// Row of W at a place in shared memory: 16 m + 8 h + l is row 16 m + 8 h + l of a warp's mma.
template <class T>
DEVICE u32 weight_row(u32 place) {
    u32 l = place % 8, h = place / 8 % 2, m = place / 16 % 4;
    return T::PAIRED ? place / 32 * 32 + 4 * l + 2 * (m % 2) + h : place / 64 * 64 + 8 * l + 2 * m + h;
}
// Which bits of a row's place are put over those of its chunks, so that the eight rows of an ldmatrix, or the four of a
// half-warp's 8-byte reads, are in different banks.
template <class T>
DEVICE u32 swizzle_x(u32 row) {
    return T::FORMAT == WEIGHT_FP8 ? row / 2 % 4 : row / 2 % 2 * 2;
}
template <class T>
DEVICE u32 swizzle_w(u32 place) {
    return T::FORMAT == WEIGHT_FP8 ? place / 2 % 4 : place / 4 % 2;
}

// This thread's row of x, place of W and chunk in its first copy; the next are X_STEP and W_STEP further, also as rows
// of W.
template <class T>
DEVICE u32 copy_x_row() {
    return threadIdx.x / T::X_CHUNKS;
}
template <class T>
DEVICE u32 copy_x_chunk() {
    return threadIdx.x % T::X_CHUNKS;
}
template <class T>
DEVICE u32 copy_w_place() {
    return threadIdx.x / T::CHUNKS;
}
template <class T>
DEVICE u32 copy_w_chunk() {
    return threadIdx.x % T::CHUNKS;
}
// The first token and output of this thread's warp.
template <class T>
DEVICE u32 warp_token() {
    return warp_id() / T::WARPS_N * WARP_TOKENS;
}
template <class T>
DEVICE u32 warp_out() {
    return warp_id() % T::WARPS_N * WARP_OUTS;
}
// The first of this lane's consecutive outputs, from its warp's first (of both matrices where two are mixed).
template <class T>
DEVICE u32 lane_out() {
    return lane_id() / 4 * (T::PAIRED ? 4 : 8);
}
// The token and the outputs whose scales this lane brings. Lane q of a quad has the token of its row of mma column tile
// q; its two outputs, of the two halves of the warp's four row tiles, are the rows that the pairs of lanes stand for.
DEVICE u32 lane_scale_token() { return lane_id() % 4 * 8 + lane_id() / 4; }
template <class T>
DEVICE u32 lane_scale_out(int half) {
    return T::PAIRED ? lane_id() : lane_id() / 4 * 8 + half * 4 + lane_id() % 4;
}

template <class T>
DEVICE void copy_stage(u8* stage, const TileSource<T>& s, u32 step) {
    u32 row = copy_x_row<T>();
    u8* to = stage + row * STAGE_COLS + (copy_x_chunk<T>() ^ swizzle_x<T>(row)) * 16;
    const u8* x = s.x + (u64)step * STAGE_COLS;
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++) copy_async16(to + i * T::X_STEP * STAGE_COLS, x + (u64)s.x_at[i] * 16);
    u32 place = copy_w_place<T>();
    to = stage + T::X_BYTES + place * T::ROW_BYTES + (copy_w_chunk<T>() ^ swizzle_w<T>(place)) * 16;
    const u8* w = s.w + (u64)step * T::ROW_BYTES;
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++)
        copy_async16_wide(to + i * T::W_STEP * T::ROW_BYTES, w + (u64)s.w_at[i] * 16);
}

// Eight E2M1 codes of a word as two words of operand bytes: in bits 2 to 5, in their order.
DEVICE void unpack_e2m1(u32& low, u32& high, u32 codes) {
    u32 even = codes << 2 & 0x3c3c3c3cu, odd = codes >> 2 & 0x3c3c3c3cu;
    low = permute_bytes(even, odd, 0x5140);
    high = permute_bytes(even, odd, 0x7362);
}

// Sums of a warp: [row tile m][8 tokens][h * 2 + odd]: output 2m + h of the lane, token 8 j + 2q + odd.
template <class T>
struct TileSums {
    float v[4][4][4];
};

// The scales of 128 columns as this lane brings them.
struct StepScales {
    u32 w[2], x;
};
template <class T>
DEVICE StepScales read_scales(const TileSource<T>& s, u32 step) {
    StepScales out;
#pragma unroll
    for (int i = 0; i < 2; i++)
        out.w[i] = T::FORMAT == WEIGHT_FP8 ? load_near1(s.w_scales[i] + step)
                                           : *reinterpret_cast<const u32*>(s.w_scales[i] + 4 * (u64)step);
    out.x = load_byte(s.x_scales + step);
    return out;
}

template <class T, int PART, int M>
DEVICE void multiply_row(TileSums<T>& sums, const u32 (&a)[4], const u32 (&b)[4][2], const StepScales& scales) {
    constexpr int BYTE = T::FORMAT == WEIGHT_FP8 ? 0 : PART;
    mma_scaled<T::OPERAND, BYTE, M % 2, 0, 0>(sums.v[M][0], a, b[0], scales.w[M / 2], scales.x);
    mma_scaled<T::OPERAND, BYTE, M % 2, 0, 1>(sums.v[M][1], a, b[1], scales.w[M / 2], scales.x);
    mma_scaled<T::OPERAND, BYTE, M % 2, 0, 2>(sums.v[M][2], a, b[2], scales.w[M / 2], scales.x);
    mma_scaled<T::OPERAND, BYTE, M % 2, 0, 3>(sums.v[M][3], a, b[3], scales.w[M / 2], scales.x);
}

// Adds 32 columns of a stage, part PART of four of 128.
template <class T, int PART>
DEVICE void add_part(TileSums<T>& sums, const u8* stage, const StepScales& scales) {
    constexpr u32 K = PART % 2;
    u32 lane = lane_id();
    const u8* x = stage + warp_token<T>() * STAGE_COLS;
    const u8* w = stage + T::X_BYTES + warp_out<T>() * T::ROW_BYTES;
    u32 a[4][4], b[4][2];
    if constexpr (T::FORMAT == WEIGHT_FP8) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
            u32 place = m * 16 + lane % 16;
            load_matrix_x4(a[m], w + place * T::ROW_BYTES + ((2 * K + lane / 16) ^ swizzle_w<T>(place)) * 16);
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            u32 row = j * 8 + lane / 16 * 8 + lane % 8, pair[4];
            load_matrix_x4(pair, x + row * STAGE_COLS + ((2 * K + lane / 8 % 2) ^ swizzle_x<T>(row)) * 16);
            b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
        }
    } else {
#pragma unroll
        for (int m = 0; m < 4; m += 2) {
            u32 place = m * 16 + lane, packed[4];
            load_matrix_x4(packed, w + place * T::ROW_BYTES + (K ^ swizzle_w<T>(place)) * 16);
#pragma unroll
            for (int i = 0; i < 4; i++) unpack_e2m1(a[m + i / 2][i % 2], a[m + i / 2][i % 2 + 2], packed[i]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 row = j * 8 + lane / 4, chunk = (2 * K + lane % 4 / 2) ^ swizzle_x<T>(row);
            uint2 codes = *reinterpret_cast<const uint2*>(x + row * STAGE_COLS + chunk * 16 + lane % 2 * 8);
            b[j][0] = codes.x, b[j][1] = codes.y;
        }
    }
    multiply_row<T, PART, 0>(sums, a[0], b, scales);
    multiply_row<T, PART, 1>(sums, a[1], b, scales);
    multiply_row<T, PART, 2>(sums, a[2], b, scales);
    multiply_row<T, PART, 3>(sums, a[3], b, scales);
}

// The whole product. `shared` has STAGE_BYTES * STAGES; called by all threads; ends with a barrier.
template <class T>
DEVICE void multiply_tile(TileSums<T>& sums, u8* shared, const TileSource<T>& s) {
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums.v[m][j][i] = 0.0f;
    u32 stages = s.steps * (SCALE_COLS / STAGE_COLS);
#pragma unroll
    for (int i = 0; i < T::STAGES - 1; i++) {
        if ((u32)i < stages) copy_stage<T>(shared + i * T::STAGE_BYTES, s, i);
        copy_commit();
    }
    StepScales next = read_scales<T>(s, 0);
    u32 reading = 0, writing = T::STAGES - 1;
    // Waits for the next stage, asks for the one that takes the place of the last, and says where the next is.
    auto advance = [&](u32 stage) {
        copy_wait<T::STAGES - 2>();
        // Every thread's copies of this stage are there, and all have left the stage that is written next.
        sync_block();
        if (stage + T::STAGES - 1 < stages) copy_stage<T>(shared + writing * T::STAGE_BYTES, s, stage + T::STAGES - 1);
        copy_commit();
        const u8* here = shared + reading * T::STAGE_BYTES;
        reading = reading + 1 == T::STAGES ? 0 : reading + 1;
        writing = writing + 1 == T::STAGES ? 0 : writing + 1;
        return here;
    };
#pragma unroll 1
    for (u32 step = 0; step < s.steps; step++) {
        StepScales scales = next;
        const u8* stage = advance(2 * step);
        // A step ahead: their latency hides behind the mma.
        next = read_scales<T>(s, step + 1 < s.steps ? step + 1 : step);
        add_part<T, 0>(sums, stage, scales);
        add_part<T, 1>(sums, stage, scales);
        stage = advance(2 * step + 1);
        add_part<T, 2>(sums, stage, scales);
        add_part<T, 3>(sums, stage, scales);
    }
    copy_wait<0>();
    sync_block();
}

// Output i of this lane's eight, for token 8 * tile + 2q + odd of the warp.
template <class T>
DEVICE float finish(const TileSums<T>& sums, int tile, int odd, int i) {
    return sums.v[i / 2][tile][i % 2 * 2 + odd];
}
// Which token of the block that is.
template <class T>
DEVICE u32 lane_token(int tile, int odd) {
    return warp_token<T>() + tile * 8 + lane_id() % 4 * 2 + odd;
}
