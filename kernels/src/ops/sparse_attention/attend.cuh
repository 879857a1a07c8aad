// The keys of a row: a list that begins with WINDOW places for the window (position - WINDOW + 1 .. position; before
// position 0 there is nothing), then the row's entries. It is worked on in tiles of KEYS, and the tiles are shared
// out to splits by the list alone: what else is in the step cannot change a row's sums.
#include "base.cuh"

constexpr int KEYS = 32;
constexpr int WINDOW_TILES = WINDOW / KEYS;
constexpr int WARPS = THREADS / LANES;
// Less than any score.
#define NO_SCORE -3e38f

// Entries in a row's list.
DEVICE u32 entries_of(const AttendArgs& a, const Row& row, u32 r) {
#if RATIO == 0
    return 0;
#elif RATIO == 4
    return a.counts[r];
#else
    return (row.position + 1) / RATIO;
#endif
}
DEVICE u32 tiles_of(u32 entries) { return WINDOW_TILES + (entries + KEYS - 1) / KEYS; }
// Tiles of each split.
DEVICE u32 tiles_of_split(u32 tiles, u32 splits) { return (tiles + splits - 1) / splits; }

// Which entry place `i` of the list is: the first of two loads on the way to its address. Outside the entries: 0.
DEVICE u32 entry_of(const AttendArgs& a, u32 r, u32 entries, u32 i) {
    if (i < WINDOW || i - WINDOW >= entries) return 0;
#if RATIO == 4
    return a.selected[(u64)r * TOPK + (i - WINDOW)];
#else
    return i - WINDOW;
#endif
}
// The second: the entry's page.
DEVICE u32 page_of(const AttendArgs& a, const Row& row, u32 entries, u32 i, u32 entry) {
#if RATIO == 0
    return 0;
#else
    return i < WINDOW || i - WINDOW >= entries ? 0 : a.pages[(u64)row.slot * a.pages_max + entry / EPP];
#endif
}
// Whether there is a key at place `i`, and where; a readable address in any case.
DEVICE bool key_at(const AttendArgs& a, const Row& row, u32 entries, u32 i, u32 entry, u32 page, const act_t*& at) {
    at = a.kv;
    if (i < WINDOW) {
        if (row.position + 1 + i < WINDOW) return false;
        u32 p = row.position + 1 + i - WINDOW;
        at = p >= row.start ? a.kv + (u64)(row.first + p - row.start) * HD
                            : a.window + ((u64)row.slot * CAPW + p % CAPW) * HD;
        return true;
    }
    if (i - WINDOW >= entries) return false;
#if RATIO != 0
    at = a.entries + ((u64)page * EPP + entry % EPP) * HD;
#endif
    return true;
}

DEVICE u64 partial_at(const AttendArgs& a, u32 r, u32 split, u32 head) {
    return ((u64)r * a.splits + split) * a.heads + head;
}
