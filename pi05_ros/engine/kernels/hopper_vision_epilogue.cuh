// What hopper_vision_product.cu does with the sums of a tile: the norm before the product, bias, GELU,
// and with RESIDUAL the sum with `out` and its moments.
#ifndef HOPPER_VISION_EPILOGUE_CUH
#define HOPPER_VISION_EPILOGUE_CUH
#include "hopper_tile.cuh"

constexpr int kMultiplying = TILE_ROWS * 2;  // threads
constexpr int kGroups = TILE_FEATURES / 16;
static_assert(TILE_ROWS % 64 == 0 && TILE_FEATURES % 16 == 0, "whole warpgroups and groups");

// A warpgroup's sums of 64 rows. A lane has, of each of two rows and each group of 16 features, four
// neighbours: the order of the weight's rows sees to it.
struct Sums {
  float acc[TILE_FEATURES / 2];

  __device__ __forceinline__ static int row(int half) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
  }
  __device__ __forceinline__ static int feature(int group) {
    return group * 16 + threadIdx.x % 4 * 4;
  }
  __device__ __forceinline__ float4 get(int group, int half) const {
    const float* v = acc + group * 8 + half * 2;
    return make_float4(v[0], v[1], v[4], v[5]);
  }
};

// What the epilogue adds or multiplies per feature, in shared memory.
struct Columns {
  float *bias, *sums;

  // By the threads that multiply; features beyond the matrix get zeros.
  __device__ __forceinline__ void fetch(const float* all_bias, const float* all_sums, int feature0,
                                        int features) const {
    for (int i = threadIdx.x; i < TILE_FEATURES; i += kMultiplying) {
      bool there = feature0 + i < features;
      bias[i] = there ? all_bias[feature0 + i] : 0.f;
#ifndef RESIDUAL
      sums[i] = there ? all_sums[feature0 + i] : 0.f;
#endif
    }
    named_barrier(1, kMultiplying);
  }
  __device__ __forceinline__ float4 bias4(int group) const {
    return *(const float4*)(bias + Sums::feature(group));
  }
  __device__ __forceinline__ float4 sums4(int group) const {
    return *(const float4*)(sums + Sums::feature(group));
  }
};

// Four neighbouring lanes have the same rows.
__device__ __forceinline__ float sum_of_four(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

__device__ __forceinline__ uint2 packed(float4 v) {
  return make_uint2(pack(v.x, v.y), pack(v.z, v.w));
}
__device__ __forceinline__ float4 unpacked(uint2 v) {
  return make_float4(low(v.x), high(v.x), low(v.y), high(v.y));
}

// gelu_tanh of two values, with one reciprocal: 1 / x = y / (x y). Where the exponential is cut off,
// the result is 0 in bfloat16 as well.
// gelu_tanh(v) = v * sigmoid(2 z), z = sqrt(2 / pi) * (v + 0.044715 v^3), in powers of two.
__device__ __forceinline__ void gelu2(float& v, float& w) {
  float x = 1.f + exp2_fast(fminf(v * (-2.3022082f - 0.10294324f * v * v), 60.f));
  float y = 1.f + exp2_fast(fminf(w * (-2.3022082f - 0.10294324f * w * w), 60.f));
  float r = reciprocal(x * y);
  v *= y * r, w *= x * r;
}

// Where a lane's part of the result goes.
struct Result {
  bf16* out;
  int row0, feature0, rows, features;

  __device__ __forceinline__ int row(int half) const { return row0 + Sums::row(half); }
  __device__ __forceinline__ bool has(int group, int half) const {
    return row(half) < rows && feature0 + Sums::feature(group) < features;
  }
  __device__ __forceinline__ uint2* at(int group, int half) const {
    return (uint2*)(out + (size_t)row(half) * features + feature0 + Sums::feature(group));
  }
};

#ifdef RESIDUAL
// What the sums are added to, asked for before the product, so that it is there behind it. Features
// beyond the matrix are zeros.
struct Finish {
  uint2 words[kGroups][2];

  __device__ __forceinline__ void fetch(const Result& result, const float2*, int, float) {
#pragma unroll
    for (int group = 0; group < kGroups; group++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        words[group][half] =
            result.has(group, half) ? __ldcg(result.at(group, half)) : make_uint2(0, 0);
  }
  __device__ __forceinline__ void write(Sums& sums, const Columns& columns, const Result& result,
                                        float2* moments) {
    add(sums, columns);
    float share = reciprocal(min(TILE_FEATURES, result.features - result.feature0));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float mean = sum_of_four(round(sums, result, half)) * share;
      float squares = sum_of_four(distances(result, half, mean));
      int tile = result.feature0 / TILE_FEATURES;
      if (threadIdx.x % 4 == 0 && result.row(half) < result.rows)
        moments[(size_t)tile * result.rows + result.row(half)] = {mean, squares};
    }
  }

 private:
  // For both halves at once, which have the same bias.
  __device__ __forceinline__ void add(Sums& sums, const Columns& columns) const {
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      float4 bias = columns.bias4(group);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float4 old = unpacked(words[group][half]);
        float* v = sums.acc + group * 8 + half * 2;
        v[0] += bias.x + old.x, v[1] += bias.y + old.y;
        v[4] += bias.z + old.z, v[5] += bias.w + old.w;
      }
    }
  }
  // Writes a row's result and returns what this lane's part of it, rounded, adds up to.
  __device__ __forceinline__ float round(const Sums& sums, const Result& result, int half) {
    float total = 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      words[group][half] = packed(sums.get(group, half));
      if (result.has(group, half)) *result.at(group, half) = words[group][half];
      float4 v = unpacked(words[group][half]);
      total += v.x + v.y + (v.z + v.w);
    }
    return total;
  }
  __device__ __forceinline__ float distances(const Result& result, int half, float mean) const {
    float total = 0.f;
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      float4 v = unpacked(words[group][half]);
      v = make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean);
      float squares = v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
      total += result.has(group, half) ? squares : 0.f;
    }
    return total;
  }
};
#else
// Mean and 1 / deviation of a lane's two rows, from their PARTS moments of PART_FEATURES each, which
// four lanes read and add up.
struct Finish {
  float mean[2], scale[2];

  __device__ __forceinline__ void fetch(const Result& result, const float2* moments, int width,
                                        float eps) {
    constexpr int kPerLane = (PARTS + 3) / 4;
    float2 part[2][kPerLane];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        int index = i * 4 + threadIdx.x % 4, row = result.row(half);
        part[half][i] = {0.f, 0.f};
        if (index < PARTS && row < result.rows)
          part[half][i] = __ldcg(moments + (size_t)index * result.rows + row);
      }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) sum += part[half][i].x * count(i, width);
      mean[half] = sum_of_four(sum) / width;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        float distance = part[half][i].x - mean[half];
        squares += part[half][i].y + distance * distance * count(i, width);
      }
      scale[half] = rsqrtf(sum_of_four(squares) / width + eps);
    }
  }
  __device__ __forceinline__ void write(const Sums& sums, const Columns& columns,
                                        const Result& result, const float2*) const {
#pragma unroll
    for (int group = 0; group < kGroups; group++) {
      float4 bias = columns.bias4(group), total = columns.sums4(group);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float4 v = sums.get(group, half);
        float r = scale[half], centre = mean[half];
        v = make_float4(r * (v.x - centre * total.x) + bias.x, r * (v.y - centre * total.y) + bias.y,
                        r * (v.z - centre * total.z) + bias.z,
                        r * (v.w - centre * total.w) + bias.w);
#ifdef GELU
        gelu2(v.x, v.y), gelu2(v.z, v.w);
#endif
        if (result.has(group, half)) *result.at(group, half) = packed(v);
      }
    }
  }

 private:
  // The features in a lane's i-th part.
  __device__ __forceinline__ static float count(int i, int width) {
    int left = width - (i * 4 + (int)(threadIdx.x % 4)) * PART_FEATURES;
    return max(min(left, PART_FEATURES), 0);
  }
};
#endif

#endif
