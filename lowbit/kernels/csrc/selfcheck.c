/* A program of its own, for sanitizers and for other processors under an emulator: runs random problems through every
 * instruction set on one to four threads, and compares each output with sums made here, code by code, in 64 bits.
 *
 * A part of the problems allows Winograd's form; those are run in both forms.
 *
 *   selfcheck [problems] [seed]      exits with 1 at the first difference */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static uint64_t state;
static int winograd_runs;

static uint32_t draw(uint32_t below) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)((state >> 33) % below);
}

static int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/* Writes code c of output n and input k (of 8 bits: the level itself); see packing.py. */
static void put_code(uint8_t *packed, int bits, int64_t k_padded, int64_t n, int64_t k, int c) {
  uint8_t *block = packed + n / 16 * (k_padded * 2 * bits);
  const int64_t row = k / 4, i = n % 16 * 4 + k % 4;
  if (bits == 8) {
    block[row * 64 + i] = (uint8_t)c;
  } else if (bits == 4) {
    block[row / 2 * 64 + i] |= (uint8_t)(c << 4 * (row % 2));
  } else if (bits == 2) {
    block[row / 4 * 64 + i] |= (uint8_t)(c << 2 * (row % 4));
  } else {
    block[row / 8 * 192 + row % 8 / 4 * 64 + i] |= (uint8_t)((c & 3) << 2 * (row % 4));
    block[row / 8 * 192 + 128 + i] |= (uint8_t)((c >> 2) << lb_top_bit[row % 8]);
  }
}

static int64_t quantized(float x, float scale, int64_t low, int64_t high) {
  float v = x / scale;
  if (v != v) v = 0;
  v = v < (float)low ? (float)low : v > (float)high ? (float)high : v;
  return (int64_t)rintf(v);
}

static void *get(size_t bytes) { /* not rounded up: the sanitizer sees the first byte too far */
  void *p = malloc(bytes ? bytes : 1);
  if (!p) exit(2);
  return p;
}

/* The same layer with activations that stay floats; see floats.h. */
static int floats_differ(lb_args a, int number, const int16_t *levels, void *room) {
  const int64_t outs = a.batch * a.outputs;
  float *out = get((size_t)outs * 4), *expected = a.out_type == LB_FLOAT32 ? room : get((size_t)outs * 4);
  a.out = out;
  for (int64_t m = 0; m < a.batch; m++)
    for (int64_t n = 0; n < a.outputs; n++) {
      float sums[4] = {0}, *value = expected + m * a.outputs + n;
      for (int64_t k = 0; k < a.channels; k++)
        sums[k % 4] += ((const float *)a.x)[m * a.channels + k] * (float)levels[n * a.channels + k];
      *value = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * a.scale[n];
      if (a.bias) *value += a.bias[n];
    }
  char names[128];
  int wrong = 0;
  snprintf(names, sizeof names, "%s", lb_isas(0));
  for (char *name = strtok(names, ","); name && !wrong; name = strtok(NULL, ",")) {
    lb_select(name);
    for (a.threads = 1; a.threads <= 4 && !wrong; a.threads += 3) {
      memset(out, 0x5a, (size_t)outs * 4);
      wrong = lb_run_floats(&a) || memcmp(out, expected, (size_t)outs * 4);
      if (wrong) printf("problem %d differs: %s, %d bits, float activations\n", number, name, (int)a.bits);
    }
  }
  free(out);
  if (a.out_type != LB_FLOAT32) free(expected);
  return wrong;
}

static int problem(int number) {
  static const int16_t tables[6][16] = {{-2, -1, 1, 2},
                                        {-3, -1, 1, 3},
                                        {-8, -4, -2, -1, 1, 2, 4, 8},
                                        {-4, -2, -1, 0, 1, 2, 4},
                                        {-128, -64, -32, -16, -8, -4, -2, -1, 1, 2, 4, 8, 16, 32, 64, 128},
                                        {-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15}};
  static const int counts[6] = {4, 4, 8, 7, 16, 16};
  const int winograd = draw(3) == 0; /* what that form can be used for, mostly */
  const int table = (int)draw(winograd ? 4 : 7), bytes = table == 6;
  lb_args a = {.bits = bytes ? 8 : 2 + table / 2};
  if (!bytes) memcpy(a.levels, tables[table], sizeof a.levels);
  const int linear = !winograd && draw(2);
  a.batch = 1 + draw(linear ? 50 : 3);
  a.height = linear ? 1 : 1 + draw(9);
  a.width = linear ? 1 : 1 + draw(20);
  a.channels = 1 + draw(draw(3) ? 140 : 700);
  a.outputs = 1 + draw(80);
  a.kernel_y = linear ? 1 : 1 + draw(3), a.kernel_x = linear ? 1 : 1 + draw(3);
  a.stride_y = 1 + draw(2), a.stride_x = 1 + draw(2);
  a.padding_y = linear ? 0 : draw(3), a.padding_x = linear ? 0 : draw(3);
  a.dilation_y = 1 + draw(2), a.dilation_x = 1 + draw(2);
  if (winograd) a.kernel_y = a.kernel_x = 3, a.stride_y = a.stride_x = a.dilation_y = a.dilation_x = 1;
  const int64_t room_y = a.height + 2 * a.padding_y - (a.kernel_y - 1) * a.dilation_y - 1;
  const int64_t room_x = a.width + 2 * a.padding_x - (a.kernel_x - 1) * a.dilation_x - 1;
  if (room_y < 0 || room_x < 0) return 0;
  const int64_t out_h = room_y / a.stride_y + 1, out_w = room_x / a.stride_x + 1;
  const int64_t taps = a.kernel_y * a.kernel_x, c = a.channels;
  a.padded_channels = taps == 1 ? c : round_up(c, c >= 32 ? 64 : 4);
  const int64_t k_padded = round_up(taps * a.padded_channels, 64), blocks = (a.outputs + 15) / 16;
  a.x_type = draw(3), a.out_type = draw(3);
  a.x_scales = draw(3) == 0 && a.x_type == LB_FLOAT32 ? 0 : draw(2) ? 1 : a.batch;
  a.low = draw(winograd ? 5 : 2) ? 0 : -128, a.high = a.low ? 127 : winograd ? 31 : draw(2) ? 255 : 7;
  const uint32_t below = winograd && draw(5) ? 32 : 256; /* of activations that are integers */
  a.relu = draw(2);
  a.out_low = a.out_type == LB_UINT8 ? 0 : -128, a.out_high = a.out_type == LB_UINT8 ? 255 : 127;
  a.out_scale = a.out_type == LB_FLOAT32 ? 1.0 : 0.37;

  const size_t values = (size_t)(a.batch * a.height * a.width * c);
  const size_t outs = (size_t)(a.batch * out_h * out_w * a.outputs);
  const size_t packed_bytes = (size_t)(blocks * k_padded * 2 * a.bits);
  const size_t x_size = a.x_type == LB_FLOAT32 ? 4 : 1, out_size = a.out_type == LB_FLOAT32 ? 4 : 1;
  void *x = get(values * x_size);
  uint8_t *packed = get(packed_bytes);
  float *scale = get((size_t)a.outputs * 4), *bias = get((size_t)a.outputs * 4), *x_scale = get((size_t)a.x_scales * 4);
  int32_t *sums = get((size_t)a.outputs * 4);
  int16_t *levels = get((size_t)(a.outputs * taps * c) * 2);
  char *out = get(outs * out_size), *expected = get(outs * out_size);
  for (size_t i = 0; i < values; i++) {
    if (a.x_type == LB_FLOAT32) ((float *)x)[i] = (float)((int)draw(2001) - 1000) * 0.01f;
    else ((uint8_t *)x)[i] = (uint8_t)draw(below);
  }
  for (int64_t i = 0; i < a.x_scales; i++) x_scale[i] = 0.01f * (float)(1 + draw(20));
  for (size_t i = 0; i < packed_bytes; i++) packed[i] = 0;
  for (int64_t n = 0; n < a.outputs; n++) {
    scale[n] = 0.001f * (float)((int)draw(100) - 50), bias[n] = (float)draw(100) - 50.0f, sums[n] = 0;
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t i = 0; i < c; i++) {
        const int code = bytes ? (int)draw(256) - 128 : (int)draw((uint32_t)counts[table]);
        const int level = bytes ? code : a.levels[code];
        levels[(n * taps + tap) * c + i] = (int16_t)level;
        put_code(packed, (int)a.bits, k_padded, n, tap * a.padded_channels + i, code);
        sums[n] += level;
      }
  }
  for (int64_t n = a.outputs; n < blocks * 16; n++) /* pads may hold anything */
    for (int64_t k = 0; k < k_padded; k++) put_code(packed, (int)a.bits, k_padded, n, k, (int)draw(1u << a.bits));
  if (taps * a.padded_channels < k_padded)
    for (int64_t n = 0; n < a.outputs; n++) put_code(packed, (int)a.bits, k_padded, n, k_padded - 1, (1 << a.bits) - 1);
  a.x = x, a.packed = packed, a.scale = scale, a.sums = sums, a.bias = draw(2) ? bias : NULL;
  a.x_scale = x_scale, a.out = out;
  a.add_type = draw(3), a.add_scale = 0.21;
  const size_t add_bytes = outs * (a.add_type == LB_FLOAT32 ? 4 : 1);
  void *add = get(add_bytes);
  for (size_t i = 0; i < outs; i++) {
    if (a.add_type == LB_FLOAT32) ((float *)add)[i] = (float)draw(100) * 0.1f - 5.0f;
    else ((uint8_t *)add)[i] = (uint8_t)draw(256);
  }
  if (draw(2)) a.add = add;

  size_t o = 0;
  for (int64_t image = 0; image < a.batch; image++) {
    float s = a.x_scales ? x_scale[a.x_scales == 1 ? 0 : image] : 0;
    const size_t image_values = (size_t)(a.height * a.width * c);
    if (!a.x_scales) {
      for (size_t i = 0; i < image_values; i++) s = fmaxf(s, fabsf(((float *)x)[(size_t)image * image_values + i]));
      s = fmaxf(s / (float)a.high, 1.17549435e-38f);
    }
    for (int64_t y = 0; y < out_h; y++)
      for (int64_t z = 0; z < out_w; z++)
        for (int64_t n = 0; n < a.outputs; n++, o++) {
          int64_t sum = 0;
          for (int64_t tap = 0; tap < taps; tap++) {
            const int64_t in_y = y * a.stride_y - a.padding_y + tap / a.kernel_x * a.dilation_y;
            const int64_t in_x = z * a.stride_x - a.padding_x + tap % a.kernel_x * a.dilation_x;
            if (in_y < 0 || in_y >= a.height || in_x < 0 || in_x >= a.width) continue;
            const size_t at = (size_t)(((image * a.height + in_y) * a.width + in_x) * c);
            for (int64_t i = 0; i < c; i++) {
              const int64_t q = a.x_type == LB_FLOAT32  ? quantized(((float *)x)[at + (size_t)i], s, a.low, a.high)
                                : a.x_type == LB_INT8 ? ((int8_t *)x)[at + (size_t)i]
                                                      : ((uint8_t *)x)[at + (size_t)i];
              sum += q * levels[(n * taps + tap) * c + i];
            }
          }
          float value = (float)sum * s * scale[n];
          if (a.bias) value += bias[n];
          if (a.add)
            value += a.add_type == LB_FLOAT32 ? ((float *)add)[o]
                     : (float)(a.add_type == LB_INT8 ? ((int8_t *)add)[o] : ((uint8_t *)add)[o]) * (float)a.add_scale;
          if (a.relu && value < 0) value = 0;
          if (a.out_type == LB_FLOAT32) memcpy(expected + o * 4, &value, 4);
          else expected[o] = (char)quantized(value, (float)a.out_scale, a.out_low, a.out_high);
        }
  }

  char names[128];
  int wrong = 0;
  snprintf(names, sizeof names, "%s", lb_isas(0));
  for (char *name = strtok(names, ","); name && !wrong; name = strtok(NULL, ",")) {
    lb_select(name);
    for (int run = 0; run < (winograd ? 4 : 2) && !wrong; run++) {
      const char *form = run < 2 ? "direct" : "winograd";
      a.threads = run % 2 ? 4 : 1;
      memset(out, 0x5a, outs * out_size);
      lb_select_form(form);
      const int status = lb_run(&a);
      winograd_runs += !strcmp(lb_form_taken(), "winograd");
      for (size_t i = 0; i < outs && !wrong; i++) {
        if (a.out_type == LB_FLOAT32) wrong = ((float *)out)[i] != ((float *)expected)[i];
        else wrong = out[i] != expected[i];
      }
      wrong |= status;
      if (wrong)
        printf("problem %d differs: %s, %s, %d threads, %d bits, status %d\n", number, name, form, (int)a.threads,
               (int)a.bits, status);
    }
  }
  if (linear && a.x_type == LB_FLOAT32 && !wrong) wrong = floats_differ(a, number, levels, expected);
  free(x), free(packed), free(levels), free(scale), free(bias), free(x_scale), free(sums), free(out), free(expected), free(add);
  return wrong;
}

int main(int argc, char **argv) {
  const int problems = argc > 1 ? atoi(argv[1]) : 100;
  state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
  for (int i = 0; i < problems; i++)
    if (problem(i)) return 1;
  printf("%d problems agree, %d runs of them in Winograd's form: %s\n", problems, winograd_runs, lb_isas(0));
  return 0;
}
