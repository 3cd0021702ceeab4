// base.h
// f32.h
// tile.h
// silu.h

struct Plain {
  static constexpr bool any = false, bias = false;
  static inline float apply(float v) { return v; }
};

struct Silu {
  static constexpr bool any = true, bias = false;
  static inline float apply(float v) { return silu(v); }
};

extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {
  try {
    static constexpr Step steps[] = {
        {move<Plain, false>, eighths},
        {panel<Silu>, panels},
        {panel<Plain>, panels},
        {panel<Plain>, panels},
    };
    static constexpr Whole wholes[] = {
        whole<false, false, Rms>,
        nullptr,
        whole<true, false, None>,
        whole<false, true, None>,
    };
    return run(steps, wholes, Chain<4>(sizes, weights), inputs, static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
