// Vectors of 4 floats: NEON of 64-bit Arm, which every such processor has. The same names as vec_avx512.h, which
// documents them.

using F = float32x4_t;
using M = uint32x4_t;
constexpr int kLanes = 4;

inline M lanes_below(int n) {
  const uint32_t lanes[kLanes] = {0, 1, 2, 3};
  return vcltq_u32(vld1q_u32(lanes), vdupq_n_u32(static_cast<uint32_t>(n)));
}

inline F set1(float a) { return vdupq_n_f32(a); }
inline F zero() { return vdupq_n_f32(0.0f); }
inline F load(const float* p) { return vld1q_f32(p); }
inline F loadn(const float* p, int n) {
  if (n >= kLanes) return load(p);
  float part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
inline F keep_lanes(F a, int n) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), lanes_below(n))); }
inline void store(float* p, F a) { vst1q_f32(p, a); }
inline void stream(float* p, F a) { store(p, a); }
inline void finish_streams() {}
inline void storen(float* p, F a, int n) {
  float part[kLanes];
  store(part, a);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }

inline M lt(F a, F b) { return vcltq_f32(a, b); }
inline M le(F a, F b) { return vcleq_f32(a, b); }
inline M gt(F a, F b) { return vcgtq_f32(a, b); }
inline M eq(F a, F b) { return vceqq_f32(a, b); }
inline M is_nan(F a) { return vmvnq_u32(vceqq_f32(a, a)); }
inline F select(M m, F a, F b) { return vbslq_f32(m, a, b); }
inline F min_second(F a, F b) { return select(lt(a, b), a, b); }  // vminq gives NaN where either is one
inline F max_second(F a, F b) { return select(gt(a, b), a, b); }

inline M sign_bits() { return vdupq_n_u32(0x80000000u); }
inline F absolute(F a) { return vabsq_f32(a); }
inline F minus_absolute(F a) { return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), sign_bits())); }
inline F copysign(F magnitude, F sign) { return vbslq_f32(sign_bits(), sign, magnitude); }
inline F round_even(F a) { return vrndnq_f32(a); }

inline F pow2(F n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline F scale(F p, F n) {
  const F half = round_even(n * set1(0.5f));
  return p * pow2(half) * pow2(n - half);
}

inline F reciprocal(F a) { return vdivq_f32(set1(1.0f), a); }
inline F square_root(F a) { return vsqrtq_f32(a); }

inline float sum(F a) { return vaddvq_f32(a); }

inline F widen(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
inline uint16x4_t narrow(F a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  return vshrn_n_u32(vbslq_u32(is_nan(a), vdupq_n_u32(0x7FC00000u), rounded), 16);
}
inline F load(const bf16* p) { return widen(vld1_u16(p)); }
inline F loadn(const bf16* p, int n) {
  bf16 part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
inline void store(bf16* p, F a) { vst1_u16(p, narrow(a)); }
inline void stream(bf16* p, F a) { store(p, a); }
inline void storen(bf16* p, F a, int n) {
  bf16 part[kLanes];
  store(part, a);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

inline void transpose(F (&r)[4]) {
  const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
