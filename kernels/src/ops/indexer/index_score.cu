// index_score: scores[r,w] = sum_h weight[r,h] * relu(q[r,h,:] . entry_w), weight = round(round(hw) * scale)
//
// q       [R, IH, ID] act       hw  [R, IH] act, raw head weights
// entries paged: entry w at ((u64)page * EPP + w % EPP) * ID, page = pages[slot * pages_max + w / EPP]
// scores  [R, stride] f32; written for w < visible of rows with visible = (position + 1) / RATIO > TOPK only
// grid    (tiles of KEYS entries, groups of `per` rows): a block keeps its entries in registers for all its rows
// cost    reads every visible entry once per row group; 2 * IH * ID flops per row and entry
//         A score depends on its row and its entry alone.
// twin    reference.rs::scores
#include "base.cuh"
#include "ptx.cuh"

constexpr int KEYS = THREADS;
constexpr int KEYS_OF_WARP = KEYS / (THREADS / LANES);
// Heads, filled up to whole tensor core tiles.
constexpr int HEADS = (IH + 7) / 8 * 8;

DEVICE const act_t* entry_at(const IndexScoreArgs& a, u32 slot, u32 w) {
    u64 page = a.pages[(u64)slot * a.pages_max + w / EPP];
    return a.entries + (page * EPP + w % EPP) * ID;
}

// The weights of a row's heads, to shared memory.
DEVICE void load_weights(const IndexScoreArgs& a, u32 r, float* weights) {
    for (u32 h = threadIdx.x; h < HEADS; h += THREADS)
        weights[h] = h < IH ? round_act(load(a.hw + (u64)r * IH + h) * a.scale) : 0.0f;
}

#if PUBLISHED
// The sum over the 16 channels of a k step may run in any order if both sides agree: lane c of four takes the
// channels 8c.. of every 32, so that entries and queries are read 16 bytes at a time.
constexpr int CHUNKS = ID / 32;
// Rows of q in shared memory begin in other banks than their neighbours.
constexpr int Q_STRIDE = ID + 32;

DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

KERNEL(index_score, IndexScoreArgs, THREADS) {
    SHARED uint4 q_shared[HEADS * Q_STRIDE / 8];
    SHARED float weights[HEADS];
    u16* q = reinterpret_cast<u16*>(q_shared);
    u32 lane = lane_id(), first = blockIdx.x * KEYS + warp_id() * KEYS_OF_WARP;
    u32 r0 = blockIdx.y * a.per, r1 = r0 + a.per < a.count ? r0 + a.per : a.count;
    uint4 key[2][2][CHUNKS];
    u32 loaded = 0xffffffffu;
    for (u32 r = r0; r < r1; r++) {
        u32 slot = a.rows[r].slot, visible = (a.rows[r].position + 1) / RATIO;
        if (visible <= TOPK || visible <= blockIdx.x * KEYS) continue;
        if (loaded != slot) {
            // All that any row of this sequence in this block sees.
            u32 end = visible;
            for (u32 next = r + 1; next < r1 && a.rows[next].slot == slot; next++)
                end = (a.rows[next].position + 1) / RATIO;
            loaded = slot;
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 w = first + m * 16 + half * 8 + lane / 4;
                    const act_t* at = entry_at(a, slot, w < end ? w : 0) + 8 * (lane % 4);
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        uint4 zero = {0, 0, 0, 0};
                        key[m][half][c] = w < end ? *reinterpret_cast<const uint4*>(at + 32 * c) : zero;
                    }
                }
            }
        }
        sync_block();
        for (u32 i = threadIdx.x; i < HEADS * (ID / 8); i += THREADS) {
            u32 h = i / (ID / 8), c = i % (ID / 8);
            bool real = h < IH;
            copy_async16_or_zero(q + h * Q_STRIDE + c * 8, a.q + ((u64)r * IH + (real ? h : 0)) * ID + c * 8, real);
        }
        copy_commit();
        load_weights(a, r, weights);
        copy_wait<0>();
        sync_block();
        float sum[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll 2
        for (int n = 0; n < HEADS / 8; n++) {
            float dots[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                uint4 heads = *reinterpret_cast<const uint4*>(q + (n * 8 + lane / 4) * Q_STRIDE + 32 * c + 8 * (lane % 4));
#pragma unroll
                for (int s = 0; s < 4; s += 2) {
                    u32 b[2] = {word_of(heads, s), word_of(heads, s + 1)};
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        u32 k[4] = {word_of(key[m][0][c], s), word_of(key[m][1][c], s), word_of(key[m][0][c], s + 1),
                                    word_of(key[m][1][c], s + 1)};
                        mma_bf16(dots[m], k, b);
                    }
                }
            }
            float w0 = weights[n * 8 + 2 * (lane % 4)], w1 = weights[n * 8 + 2 * (lane % 4) + 1];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                sum[m][0] += fmaxf(dots[m][0], 0.0f) * w0 + fmaxf(dots[m][1], 0.0f) * w1;
                sum[m][1] += fmaxf(dots[m][2], 0.0f) * w0 + fmaxf(dots[m][3], 0.0f) * w1;
            }
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float s = sum[m][half];
                s += shuffle_xor(s, 1);
                s += shuffle_xor(s, 2);
                u32 w = first + m * 16 + half * 8 + lane / 4;
                if (lane % 4 == 0 && w < visible) a.scores[(u64)r * a.stride + w] = s;
            }
        }
    }
}
#else
KERNEL(index_score, IndexScoreArgs, THREADS) {
    SHARED float q[IH * ID];
    SHARED float weights[HEADS];
    u32 lane = lane_id(), first = blockIdx.x * KEYS + warp_id() * KEYS_OF_WARP;
    u32 r0 = blockIdx.y * a.per, r1 = r0 + a.per < a.count ? r0 + a.per : a.count;
    for (u32 r = r0; r < r1; r++) {
        u32 visible = (a.rows[r].position + 1) / RATIO;
        if (visible <= TOPK || visible <= blockIdx.x * KEYS) continue;
        sync_block();
        for (u32 i = threadIdx.x; i < IH * ID; i += THREADS) q[i] = a.q[(u64)r * IH * ID + i];
        load_weights(a, r, weights);
        sync_block();
        for (u32 w = first; w < first + KEYS_OF_WARP && w < visible; w++) {
            const float* key = entry_at(a, a.rows[r].slot, w);
            float channels[ID / LANES];
#pragma unroll
            for (int i = 0; i < ID / LANES; i++) channels[i] = key[i * LANES + lane];
            float sum = 0.0f;
            for (int h = 0; h < IH; h++) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < ID / LANES; i++) dot += q[h * ID + i * LANES + lane] * channels[i];
                sum += fmaxf(warp_sum(dot), 0.0f) * weights[h];
            }
            if (lane == 0) a.scores[(u64)r * a.stride + w] = sum;
        }
    }
}
#endif
