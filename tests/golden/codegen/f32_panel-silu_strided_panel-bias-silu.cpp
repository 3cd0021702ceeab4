// base.h
// f32.h
// tile.h
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
    static constexpr Step steps[] = {
        {panel<Silu>, panels},
        {strided<Plain, false>, strips},
        {panel<BiasSilu>, panels},
    };
    static constexpr Whole wholes[] = {
        nullptr,
        nullptr,
        nullptr,
    };
    return run(steps, wholes, Chain<3>(sizes, weights), inputs, static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
