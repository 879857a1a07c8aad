// attend: o[r,h,:] = turned back(sum_t p_t key_t / (sum_t p_t + exp(sink_h - m))), p_t = exp(q[r,h,:] . key_t / sqrt(HD) - m)
//
// q, o     [R, heads, HD] act        kv  [R, HD] act, window rows of this step
// window   [slots, CAPW, HD] act, position p at p % CAPW, for positions before the step
// entries  paged rows of HD act; RATIO 4: those of selected [R, TOPK], counts [R]; other: all visible; 0: none
// sinks    [heads] f32     turns  [R, ROPE/2] of the rows' positions
// partial  [R, splits, heads, HD] f32 unscaled sums and stats [R, splits, heads, 2] f32 (m, sum of p), for
//          attend_merge; with one split o is written at once
// grid     published: (splits, R, ceil(heads / HEADS)); float: (splits, R, heads)     smem  see mod.rs
// cost     4 * HD flops per head and key. One split of long steps reads 2 * HD bytes per key and HEADS heads out of
//          the L2 cache; with many splits (decode) a launch is a few latencies.
// twin     reference.rs::attend; numerators are rounded to bfloat16 relative to the largest score so far, not of all
#include "base.cuh"
#include "ptx.cuh"

// One value of the result: divided, rounded, turned back with its neighbour, rounded.
DEVICE void finish_pair(float& x, float& y, float sum, int channel, const float2* turns) {
    x = round_act(x / sum);
    y = round_act(y / sum);
    if (channel < HD - ROPE) return;
    float2 turn = turns[(channel - (HD - ROPE)) / 2];
    float u = x, v = y;
    x = round_act(u * turn.x + v * turn.y);
    y = round_act(v * turn.x - u * turn.y);
}

#if PUBLISHED
// A warp owns SLICE channels: it copies, multiplies and sums these of every key, so that keys need no barrier. The
// dot products of the slices are summed over shared memory, in the order of the slices.
constexpr int SLICE = HD / WARPS;
constexpr int CHUNKS = SLICE / 8;
constexpr int STEPS = SLICE / 16;
constexpr int BLOCKS = HEADS / 16;
// Threads that share a head in the softmax, and keys of each.
constexpr int SHARING = THREADS / HEADS;
constexpr int EACH = KEYS / SHARING;
static_assert(EACH == 2 || EACH % 4 == 0, "keys are read in pairs or fours");

struct Shared {
    u16 keys[2][WARPS][KEYS * SLICE];
    float dots[WARPS][HEADS * KEYS];
    u16 numerators[HEADS * KEYS];
    float factor[HEADS], max[HEADS], sum[HEADS];
};

// Places of 16 bytes in a key's slice, dot products and numerators are permuted so that the rows of a matrix lie in
// different banks.
DEVICE int key_place(int key, int chunk) { return key * SLICE + 8 * (CHUNKS == 8 ? chunk ^ (key & 7) : chunk); }
DEVICE int dot_place(int head, int key) { return head * KEYS + (key ^ (head & 3) << 3); }
DEVICE int numerator_place(int head, int chunk) { return head * KEYS + 8 * (chunk ^ (head >> 1 & 3)); }

// Begins to copy this warp's slice of a tile; lane l knows key l. Returns which of the keys there are.
DEVICE u32 copy_keys(u16* to, const u16* own, bool real) {
    u32 mask = ballot(real);
    u64 address = (u64)own;
    u32 low = (u32)address, high = (u32)(address >> 32);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        int item = i * LANES + (int)lane_id(), key = item / CHUNKS, chunk = item % CHUNKS;
        u64 from = (u64)shuffle(low, key) | (u64)shuffle(high, key) << 32;
        copy_async16_or_zero(to + key_place(key, chunk), (const u16*)from + warp_id() * SLICE + 8 * chunk,
                             mask >> key & 1);
    }
    return mask;
}

KERNEL(attend, AttendArgs, THREADS) {
    DYNAMIC_SHARED(Shared, s);
    u32 r = blockIdx.y, lane = lane_id(), warp = warp_id(), head0 = blockIdx.z * HEADS;
    Row row = a.rows[r];
    u32 entries = entries_of(a, row, r), tiles = tiles_of(entries);
    u32 each = tiles_of_split(tiles, a.splits), begin = blockIdx.x * each;
    u32 end = begin + each < tiles ? begin + each : tiles;
    if (begin >= end) return;
    // Tiles before position 0 add nothing.
    u32 empty = row.position + 1 < WINDOW ? (WINDOW - 1 - row.position) / KEYS : 0;
    if (begin < empty) begin = empty;

    // Addresses take two loads; each is asked for a tile before the next needs it.
    u32 masks[2] = {0, 0}, ahead[2], pages[2];
#pragma unroll
    for (int i = 0; i < 2; i++) ahead[i] = entry_of(a, r, entries, (begin + i) * KEYS + lane);
#pragma unroll
    for (int i = 0; i < 2; i++) pages[i] = page_of(a, row, entries, (begin + i) * KEYS + lane, ahead[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (begin + i < end) {
            const u16* at;
            bool real = key_at(a, row, entries, (begin + i) * KEYS + lane, ahead[i], pages[i], at);
            masks[i] = copy_keys(s->keys[i][warp], at, real);
        }
        copy_commit();
    }
    u32 entry = entry_of(a, r, entries, (begin + 2) * KEYS + lane);

    // The warp's slice of the queries. Heads that are not there are zeros.
    u32 q[BLOCKS][STEPS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 head = head0 + m * 16 + half * 8 + lane / 4;
            bool real = head < a.heads;
            const u16* from = a.q + ((u64)r * a.heads + (real ? head : 0)) * HD + warp * SLICE + 2 * (lane % 4);
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                q[m][k][half] = real ? *reinterpret_cast<const u32*>(from + 16 * k) : 0;
                q[m][k][half + 2] = real ? *reinterpret_cast<const u32*>(from + 16 * k + 8) : 0;
            }
        }
    }
    float o[BLOCKS][CHUNKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int n = 0; n < CHUNKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[m][n][i] = 0.0f;
    int head_of_thread = threadIdx.x / SHARING, first_key = threadIdx.x % SHARING * EACH;
    float max = NO_SCORE, sum = 0.0f;

#pragma unroll 1
    for (u32 t = begin; t < end; t++) {
        u16* keys = s->keys[(t - begin) & 1][warp];
        u32 i_next = (t + 2) * KEYS + lane;
        u32 page = page_of(a, row, entries, i_next, entry);
        u32 entry_after = entry_of(a, r, entries, i_next + KEYS);
        copy_wait<1>();
        sync_warp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float dots[BLOCKS][2][4];
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int i = 0; i < 8; i++) dots[m][i / 4][i % 4] = 0.0f;
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                u32 b[4];
                int key = half * 16 + (int)(lane / 16) * 8 + (int)(lane % 8), chunk = 2 * k + (int)(lane / 8 % 2);
                load_matrix_x4(b, keys + key_place(key, chunk));
                u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    mma_bf16(dots[m][0], q[m][k], b0);
                    mma_bf16(dots[m][1], q[m][k], b1);
                }
            }
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    int head = m * 16 + (int)(lane / 4), key = half * 16 + n * 8 + 2 * (int)(lane % 4);
                    float* to = s->dots[warp];
                    *reinterpret_cast<float2*>(to + dot_place(head, key)) = float2{dots[m][n][0], dots[m][n][1]};
                    *reinterpret_cast<float2*>(to + dot_place(head + 8, key)) = float2{dots[m][n][2], dots[m][n][3]};
                }
        }
        sync_block();
        {
            float x[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) x[i] = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float* from = s->dots[w] + dot_place(head_of_thread, first_key);
                if constexpr (EACH % 4 == 0) {
#pragma unroll
                    for (int i = 0; i < EACH; i += 4) {
                        float4 v = *reinterpret_cast<const float4*>(from + i);
                        x[i] += v.x;
                        x[i + 1] += v.y;
                        x[i + 2] += v.z;
                        x[i + 3] += v.w;
                    }
                } else {
                    float2 v = *reinterpret_cast<const float2*>(from);
                    x[0] += v.x;
                    x[1] += v.y;
                }
            }
            u32 mask = masks[0] >> first_key;
            float largest = max;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                x[i] = mask >> i & 1 ? x[i] * SCALE : NO_SCORE;
                largest = fmaxf(largest, x[i]);
            }
#pragma unroll
            for (int m = 1; m < SHARING; m *= 2) largest = fmaxf(largest, shuffle_xor(largest, m));
            float factor = expf(max - largest);
            max = largest;
            sum *= factor;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                x[i] = mask >> i & 1 ? expf(x[i] - max) : 0.0f;
                sum += x[i];
            }
            u16* to = s->numerators + numerator_place(head_of_thread, first_key / 8) + first_key % 8;
#pragma unroll
            for (int i = 0; i < EACH; i += 2) *reinterpret_cast<u32*>(to + i) = pack_bf16x2(x[i], x[i + 1]);
            if (first_key == 0) s->factor[head_of_thread] = factor;
        }
        sync_block();
        float factor[BLOCKS][2];
        bool changed = false;
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                factor[m][half] = s->factor[m * 16 + half * 8 + lane / 4];
                changed |= factor[m][half] != 1.0f;
            }
        if (ballot(changed)) {
#pragma unroll
            for (int m = 0; m < BLOCKS; m++)
#pragma unroll
                for (int n = 0; n < CHUNKS; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) o[m][n][i] *= factor[m][i / 2];
        }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            u32 p[BLOCKS][4];
#pragma unroll
            for (int m = 0; m < BLOCKS; m++) {
                int head = m * 16 + (int)(lane % 16);
                load_matrix_x4(p[m], s->numerators + numerator_place(head, 2 * k + (int)(lane / 16)));
            }
#pragma unroll
            for (int n = 0; n < CHUNKS; n += 2) {
                u32 b[4];
                load_matrix_x4_trans(b, keys + key_place(k * 16 + (int)(lane % 16), n + (int)(lane / 16)));
                u32 b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    mma_bf16(o[m][n], p[m], b0);
                    mma_bf16(o[m][n + 1], p[m], b1);
                }
            }
        }
        sync_warp();
        masks[0] = masks[1];
        if (t + 2 < end) {
            const u16* at;
            bool real = key_at(a, row, entries, i_next, entry, page, at);
            masks[1] = copy_keys(keys, at, real);
        }
        copy_commit();
        entry = entry_after;
    }

#pragma unroll
    for (int m = 1; m < SHARING; m *= 2) sum += shuffle_xor(sum, m);
    if (first_key == 0) {
        u32 head = head0 + head_of_thread;
        if (a.splits > 1 && head < a.heads)
            *reinterpret_cast<float2*>(a.stats + 2 * partial_at(a, r, blockIdx.x, head)) = float2{max, sum};
        s->max[head_of_thread] = max;
        s->sum[head_of_thread] = sum;
    }
    sync_block();
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 local = m * 16 + half * 8 + lane / 4, head = head0 + local;
            if (head >= a.heads) continue;
            if (a.splits > 1) {
                float* to = a.partial + partial_at(a, r, blockIdx.x, head) * HD + warp * SLICE + 2 * (lane % 4);
#pragma unroll
                for (int n = 0; n < CHUNKS; n++)
                    *reinterpret_cast<float2*>(to + 8 * n) = float2{o[m][n][2 * half], o[m][n][2 * half + 1]};
                continue;
            }
            float all = s->sum[local] + expf(a.sinks[head] - s->max[local]);
            u16* to = a.o + ((u64)r * a.heads + head) * HD;
#pragma unroll
            for (int n = 0; n < CHUNKS; n++) {
                int channel = warp * SLICE + 8 * n + 2 * (lane % 4);
                float x = o[m][n][2 * half], y = o[m][n][2 * half + 1];
                finish_pair(x, y, all, channel, a.turns + (u64)r * (ROPE / 2));
                *reinterpret_cast<u32*>(to + channel) = pack_bf16x2(x, y);
            }
        }
    }
}
#else
KERNEL(attend, AttendArgs, THREADS) {
    SHARED float q[HD];
    SHARED float scores[KEYS];
    SHARED float numerators[KEYS];
    SHARED const float* keys[KEYS];
    u32 r = blockIdx.y, head = blockIdx.z, lane = lane_id();
    Row row = a.rows[r];
    u32 entries = entries_of(a, row, r), tiles = tiles_of(entries);
    u32 each = tiles_of_split(tiles, a.splits), begin = blockIdx.x * each;
    u32 end = begin + each < tiles ? begin + each : tiles;
    if (begin >= end) return;
    for (u32 c = threadIdx.x; c < HD; c += THREADS) q[c] = a.q[((u64)r * a.heads + head) * HD + c];
    // A thread sums pairs of channels.
    constexpr int PAIRS = (HD / 2 + THREADS - 1) / THREADS;
    float o[PAIRS][2];
    for (int j = 0; j < PAIRS; j++) o[j][0] = o[j][1] = 0.0f;
    float max = NO_SCORE, sum = 0.0f;
    for (u32 t = begin; t < end; t++) {
        sync_block();
        if (threadIdx.x < KEYS) {
            u32 i = t * KEYS + threadIdx.x, entry = entry_of(a, r, entries, i);
            const float* at;
            bool real = key_at(a, row, entries, i, entry, page_of(a, row, entries, i, entry), at);
            keys[threadIdx.x] = real ? at : nullptr;
        }
        sync_block();
        for (int j = warp_id(); j < KEYS; j += WARPS) {
            const float* key = keys[j];
            float dot = 0.0f;
            if (key)
                for (u32 c = lane; c < HD; c += LANES) dot += q[c] * key[c];
            dot = warp_sum(dot);
            if (lane == 0) scores[j] = key ? dot * SCALE : NO_SCORE;
        }
        sync_block();
        float largest = max;
        for (int j = 0; j < KEYS; j++) largest = fmaxf(largest, scores[j]);
        float factor = expf(max - largest);
        max = largest;
        if (threadIdx.x < KEYS)
            numerators[threadIdx.x] = keys[threadIdx.x] ? expf(scores[threadIdx.x] - max) : 0.0f;
        sync_block();
        sum *= factor;
        for (int j = 0; j < KEYS; j++) sum += numerators[j];
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            u32 c = 2 * (threadIdx.x + p * THREADS);
            if (c >= HD) continue;
            o[p][0] *= factor;
            o[p][1] *= factor;
            for (int j = 0; j < KEYS; j++) {
                if (!keys[j]) continue;
                float2 v = *reinterpret_cast<const float2*>(keys[j] + c);
                o[p][0] += numerators[j] * v.x;
                o[p][1] += numerators[j] * v.y;
            }
        }
    }
    float all = sum + expf(a.sinks[head] - max);
    u64 partial = partial_at(a, r, blockIdx.x, head);
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        u32 c = 2 * (threadIdx.x + p * THREADS);
        if (c >= HD) continue;
        if (a.splits == 1) finish_pair(o[p][0], o[p][1], all, c, a.turns + (u64)r * (ROPE / 2));
        float* to = a.splits > 1 ? a.partial + partial * HD : a.o + ((u64)r * a.heads + head) * HD;
        *reinterpret_cast<float2*>(to + c) = float2{o[p][0], o[p][1]};
    }
    if (a.splits > 1 && threadIdx.x == 0)
        *reinterpret_cast<float2*>(a.stats + 2 * partial) = float2{max, sum};
}
#endif

// attend_merge: the splits of a row and head, summed in their order.     grid  (heads, R)
KERNEL(attend_merge, AttendArgs, MERGE_THREADS) {
    u32 head = blockIdx.x, r = blockIdx.y;
    Row row = a.rows[r];
    u32 tiles = tiles_of(entries_of(a, row, r)), each = tiles_of_split(tiles, a.splits);
    u32 splits = (tiles + each - 1) / each;
    float max = NO_SCORE;
    for (u32 i = 0; i < splits; i++) max = fmaxf(max, a.stats[2 * partial_at(a, r, i, head)]);
    float sum = 0.0f;
    for (u32 i = 0; i < splits; i++) {
        const float* of = a.stats + 2 * partial_at(a, r, i, head);
        sum += of[1] * expf(of[0] - max);
    }
    sum += expf(a.sinks[head] - max);
    for (u32 c = 4 * threadIdx.x; c < HD; c += 4 * MERGE_THREADS) {
        float o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (u32 i = 0; i < splits; i++) {
            u64 at = partial_at(a, r, i, head);
            float factor = expf(a.stats[2 * at] - max);
            float4 v = *reinterpret_cast<const float4*>(a.partial + at * HD + c);
            o[0] += factor * v.x;
            o[1] += factor * v.y;
            o[2] += factor * v.z;
            o[3] += factor * v.w;
        }
        const float2* turns = a.turns + (u64)r * (ROPE / 2);
        finish_pair(o[0], o[1], sum, c, turns);
        finish_pair(o[2], o[3], sum, c + 2, turns);
        act_t* to = a.o + ((u64)r * a.heads + head) * HD + c;
#pragma unroll
        for (int i = 0; i < 4; i++) store(to + i, o[i]);
    }
}
