// base.h
// f32.h
// tile.h
// gelu.h

struct BiasGelu {
  static constexpr bool any = true, bias = true;
  static inline float apply(float v) { return gelu(v); }
};

struct Bias {
  static constexpr bool any = true, bias = true;
  static inline float apply(float v) { return v; }
};

extern "C" int32_t structc_run(const void* const* inputs, const void* const* weights, void* y,
                               int64_t rows, const int64_t* sizes) {
  try {
    static constexpr Step steps[] = {
        {panel<BiasGelu>, panels},
        {panel<Bias>, panels},
    };
    static constexpr Whole wholes[] = {
        nullptr,
        whole<false, true, Layer>,
    };
    return run(steps, wholes, Chain<2>(sizes, weights), inputs, static_cast<T*>(y), rows);
  } catch (...) {
    return 2;  // out of memory; an exception may not cross into C
  }
}
