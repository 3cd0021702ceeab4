// base.h
// f32.h
// token.h
// silu.h

struct Silu {
  static constexpr bool any = true, bias = false;
  static inline float apply(float v) { return silu(v); }
};

struct Plain {
  static constexpr bool any = false, bias = false;
  static inline float apply(float v) { return v; }
};

struct BiasSilu {
  static constexpr bool any = true, bias = true;
  static inline float apply(float v) { return silu(v); }
};

extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {
  try {
    static constexpr Step steps[] = {panel<Silu>, strided<Plain>, panel<BiasSilu>};
    static constexpr Rows tails[] = {nullptr, nullptr, nullptr};
    return run(steps, tails, Chain<3>(sizes, weights), inputs,
               static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
