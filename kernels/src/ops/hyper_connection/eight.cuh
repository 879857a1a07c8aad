// Eight activations on their way: asked for, not waited for. They stay as they came until they are widened, so that the
// wait for them is there and not where they are asked for.
#include "base.cuh"

struct Eight {
#if PUBLISHED
    uint4 v;
#else
    float4 low, high;
#endif
};
DEVICE Eight ask_eight(const act_t* at) {
#if PUBLISHED
    return Eight{*reinterpret_cast<const uint4*>(at)};
#else
    return Eight{reinterpret_cast<const float4*>(at)[0], reinterpret_cast<const float4*>(at)[1]};
#endif
}
DEVICE void widen_eight(const uint4& from, float (&v)[8]) {
    widen_bf16x2(from.x, v[0], v[1]);
    widen_bf16x2(from.y, v[2], v[3]);
    widen_bf16x2(from.z, v[4], v[5]);
    widen_bf16x2(from.w, v[6], v[7]);
}
DEVICE void widen_eight(const Eight& from, float (&v)[8]) {
#if PUBLISHED
    widen_eight(from.v, v);
#else
    v[0] = from.low.x, v[1] = from.low.y, v[2] = from.low.z, v[3] = from.low.w;
    v[4] = from.high.x, v[5] = from.high.y, v[6] = from.high.z, v[7] = from.high.w;
#endif
}
