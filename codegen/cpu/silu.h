// x / (1 + exp(-x)) with exp(v) = 2^n p(r), two roundings at most. x is bounded below where exp would
// leave the normal numbers (the result is 0 there) and v likewise; NaN stays NaN.
static inline float silu(float x) {
  const float above = -87.0f > x ? -87.0f : x;
  const float v = -87.0f > -above ? -87.0f : -above;
  const float n = std::rint(v * 1.44269504f);
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float whole = n > -200.0f ? n : 0.0f;  // where n is NaN, p is too: any exponent will do
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return above / (1.0f + p * power);
}
