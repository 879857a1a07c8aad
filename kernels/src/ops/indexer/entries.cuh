// What the kernels of the indexer share: where entries are, the weights of heads, the order of scores.
#include "ptx.cuh"

constexpr int WARPS = THREADS / LANES;
// Heads, filled up to whole tensor core tiles.
constexpr int HEADS = (IH + 7) / 8 * 8;
// Values of a select's first pass through the scores' bits.
constexpr int BINS = 2048;

// Entries that a row sees.
DEVICE u32 visible_to(const Row& row) { return (row.position + 1) / RATIO; }

DEVICE const act_t* entry_at(const act_t* entries, const u32* pages, u32 w) {
    return entries + ((u64)pages[w / EPP] * EPP + w % EPP) * ID;
}

// The weights of a row's heads, to shared memory, by a block of BLOCK threads.
template <int BLOCK>
DEVICE void load_head_weights(const act_t* from, float scale, float* weights) {
    for (u32 h = threadIdx.x; h < HEADS; h += BLOCK) weights[h] = h < IH ? round_act(load(from + h) * scale) : 0.0f;
}

// Bits that are ordered as the scores are, minus zero before zero.
DEVICE u32 order_of(float score) {
    u32 bits = bits_of(score);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

#if PUBLISHED
// The sum over the 16 channels of a k step may run in any order if both sides agree: lane c of four takes the
// channels 8c.. of every 32, so that entries and queries are read 16 bytes at a time.
constexpr int CHUNKS = ID / 32;
// Rows of q in shared memory begin in other banks than their neighbours.
constexpr int Q_STRIDE = ID + 32;

DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Scores of TILES tiles of 16 entries: `sum[m][half]` of entry 16m + 8half + lane / 4, on every lane of four.
template <int TILES>
DEVICE void score_tiles(const uint4 (&key)[TILES][2][CHUNKS], const u16* q, const float* weights,
                        float (&sum)[TILES][2]) {
    u32 lane = lane_id();
#pragma unroll
    for (int m = 0; m < TILES; m++) sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll 2
    for (int n = 0; n < HEADS / 8; n++) {
        float dots[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) dots[m][i] = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            uint4 heads = *reinterpret_cast<const uint4*>(q + (n * 8 + lane / 4) * Q_STRIDE + 32 * c + 8 * (lane % 4));
#pragma unroll
            for (int s = 0; s < 4; s += 2) {
                u32 b[2] = {word_of(heads, s), word_of(heads, s + 1)};
#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    u32 k[4] = {word_of(key[m][0][c], s), word_of(key[m][1][c], s), word_of(key[m][0][c], s + 1),
                                word_of(key[m][1][c], s + 1)};
                    mma_bf16(dots[m], k, b);
                }
            }
        }
        float w0 = weights[n * 8 + 2 * (lane % 4)], w1 = weights[n * 8 + 2 * (lane % 4) + 1];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            sum[m][0] += fmaxf(dots[m][0], 0.0f) * w0 + fmaxf(dots[m][1], 0.0f) * w1;
            sum[m][1] += fmaxf(dots[m][2], 0.0f) * w0 + fmaxf(dots[m][3], 0.0f) * w1;
        }
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[m][half] += shuffle_xor(sum[m][half], 1);
            sum[m][half] += shuffle_xor(sum[m][half], 2);
        }
}
#else
constexpr int Q_STRIDE = ID;

// The score of one entry, by a warp.
DEVICE float score_entry(const float* key, const float* q, const float* weights) {
    float channels[ID / LANES], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ID / LANES; i++) channels[i] = key[i * LANES + lane_id()];
#pragma unroll 1
    for (int h = 0; h < IH; h++) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < ID / LANES; i++) dot += q[h * Q_STRIDE + i * LANES + lane_id()] * channels[i];
        sum += fmaxf(warp_sum(dot), 0.0f) * weights[h];
    }
    return sum;
}
#endif
