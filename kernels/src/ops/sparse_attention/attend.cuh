// The keys of a row: a list that begins with WINDOW places for the window (position - WINDOW + 1 .. position; before
// position 0 there is nothing), then the row's entries. It is worked on in tiles of KEYS, and the tiles are shared
// out to splits by the list alone: what else is in the step cannot change a row's sums.
#include "base.cuh"
#include "ptx.cuh"

constexpr int KEYS = 32;
constexpr int WINDOW_TILES = WINDOW / KEYS;
constexpr int WARPS = THREADS / LANES;
// Less than any score.
#define NO_SCORE -3e38f
#define LOG2_E 1.44269504f

struct List {
    Row row;
    // Row of the step, its entries, tiles of keys, tiles of each split, splits that have any.
    u32 r, entries, tiles, each, splits;
    // Entries are those that the indexer chose; else all that the row sees.
    bool chosen;
};

DEVICE List list_of(const AttendArgs& a, u32 r) {
    List list;
    list.row = a.rows[r];
    list.r = r;
    list.entries = 0;
    list.chosen = false;
#if RATIO != 0
    list.entries = (list.row.position + 1) / RATIO;
#endif
#if RATIO == 4
    list.chosen = list.entries > TOPK;
    if (list.chosen) list.entries = TOPK;
#endif
    list.tiles = WINDOW_TILES + (list.entries + KEYS - 1) / KEYS;
    list.each = (list.tiles + a.splits - 1) / a.splits;
    list.splits = (list.tiles + list.each - 1) / list.each;
    return list;
}

// Where the entry at place `i` of the list is, in rows of the cache; 0 outside of the entries.
DEVICE u32 place_of(const AttendArgs& a, const List& list, u32 i) {
    if (i < WINDOW || i - WINDOW >= list.entries) return 0;
#if RATIO == 0
    return 0;
#else
    u32 w = i - WINDOW;
#if RATIO == 4
    if (list.chosen) return a.selected[(u64)list.r * TOPK + w];
#endif
    return a.pages[(u64)list.row.slot * a.pages_max + w / EPP] * EPP + w % EPP;
#endif
}

// Whether there is a key at place `i`, and where; a readable address in any case.
DEVICE bool key_at(const AttendArgs& a, const List& list, u32 i, u32 place, const act_t*& at) {
    at = a.kv;
    const Row& row = list.row;
    if (i < WINDOW) {
        if (row.position + 1 + i < WINDOW) return false;
        u32 p = row.position + 1 + i - WINDOW;
        at = p >= row.start ? a.kv + (u64)(row.first + p - row.start) * HD
                            : a.window + ((u64)row.slot * CAPW + p % CAPW) * HD;
        return true;
    }
    if (i - WINDOW >= list.entries) return false;
#if RATIO != 0
    at = a.entries + (u64)place * HD;
#endif
    return true;
}

// One pair of neighbours of a query as it is projected: scaled, rounded, turned, rounded.
DEVICE void finish_query(float& x, float& y, float scale, int channel, const float2* turns) {
    x = round_act(x * scale);
    y = round_act(y * scale);
    if (channel < HD - ROPE) return;
    float2 turn = turns[(channel - (HD - ROPE)) / 2];
    float u = x, v = y;
    x = round_act(u * turn.x - v * turn.y);
    y = round_act(u * turn.y + v * turn.x);
}
// One pair of the result: divided, rounded, turned back, rounded.
DEVICE void finish_pair(float& x, float& y, float sum, int channel, const float2* turns) {
    x = round_act(x / sum);
    y = round_act(y / sum);
    if (channel < HD - ROPE) return;
    float2 turn = turns[(channel - (HD - ROPE)) / 2];
    float u = x, v = y;
    x = round_act(u * turn.x + v * turn.y);
    y = round_act(v * turn.x - u * turn.y);
}

DEVICE u64 partial_at(const AttendArgs& a, u32 r, u32 split, u32 head) {
    return ((u64)r * a.splits + split) * a.heads + head;
}

// Whether this block is the last of the splits of its part of a row to have written its sums. All threads call it,
// after their writes; those of the last see what all have written.
DEVICE bool is_last(u32* arrived, u32 splits, u32& shared) {
    fence_device();
    sync_block();
    if (threadIdx.x == 0) {
        shared = atomic_add(arrived, 1) + 1 == splits;
        // For the next launch.
        if (shared) *arrived = 0;
    }
    sync_block();
    if (!shared) return false;
    fence_device();
    return true;
}

// The splits of heads `head0`.. summed in their order, channels `channel0`.. of `channels`; `stats` has two floats per
// split and head, `sums` one per head.
template <int HEADS>
DEVICE void merge(const AttendArgs& a, const List& list, u32 head0, u32 channel0, u32 channels, float* stats,
                  float* sums) {
    u32 heads = a.heads - head0 < HEADS ? a.heads - head0 : HEADS;
    for (u32 i = threadIdx.x; i < list.splits * heads; i += THREADS) {
        u32 split = i / heads, head = i % heads;
        const float* from = a.stats + 2 * partial_at(a, list.r, split, head0 + head);
        stats[2 * (split * HEADS + head)] = from[0];
        stats[2 * (split * HEADS + head) + 1] = from[1];
    }
    sync_block();
    for (u32 head = threadIdx.x; head < heads; head += THREADS) {
        float top = NO_SCORE, sum = 0.0f;
        for (u32 i = 0; i < list.splits; i++) top = fmaxf(top, stats[2 * (i * HEADS + head)]);
        for (u32 i = 0; i < list.splits; i++) {
            float* of = stats + 2 * (i * HEADS + head);
            of[0] = exp2f(of[0] - top);
            sum += of[0] * of[1];
        }
        sums[head] = sum + exp2f(a.sinks[head0 + head] * LOG2_E - top);
    }
    sync_block();
    const float2* turns = a.turns + (u64)list.r * (ROPE / 2);
    for (u32 i = threadIdx.x; i < heads * (channels / 8); i += THREADS) {
        u32 head = i / (channels / 8), c = channel0 + i % (channels / 8) * 8;
        float o[8];
#pragma unroll
        for (int k = 0; k < 8; k++) o[k] = 0.0f;
#pragma unroll 5
        for (u32 split = 0; split < list.splits; split++) {
            float v[8], factor = stats[2 * (split * HEADS + head)];
            load8(a.partial + partial_at(a, list.r, split, head0 + head) * HD + c, v);
#pragma unroll
            for (int k = 0; k < 8; k++) o[k] += factor * v[k];
        }
#pragma unroll
        for (int k = 0; k < 8; k += 2) finish_pair(o[k], o[k + 1], sums[head], c + k, turns);
        store8(a.o + ((u64)list.r * a.heads + head0 + head) * HD + c, o);
    }
}
