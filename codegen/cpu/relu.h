// max(x, 0), written so that NaN stays NaN.
static inline float relu(float x) { return 0.0f > x ? 0.0f : x; }
