/* The tile instructions that amx.c uses as C functions on eight tiles of the thread, for tests on other processors. */
#ifndef LOWBIT_AMX_EMULATED_H
#define LOWBIT_AMX_EMULATED_H
#include <stdint.h>
#include <string.h>

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd

static _Thread_local uint8_t lb_tiles[8][16][64];

#define _tile_loadconfig(CONFIG) memset(lb_tiles, 0, sizeof lb_tiles), (void)(CONFIG)
#define _tile_release() ((void)0)
#define _tile_zero(T) memset(lb_tiles[T], 0, sizeof lb_tiles[T])
#define _tile_loadd(T, BASE, STRIDE) lb_tile_load(lb_tiles[T], (const uint8_t *)(BASE), STRIDE)
#define _tile_stored(T, BASE, STRIDE) lb_tile_store(lb_tiles[T], (uint8_t *)(BASE), STRIDE)
#define _tile_dpbusd(C, A, B) lb_tile_dpbusd(lb_tiles[C], lb_tiles[A], lb_tiles[B])

LB_INLINE void lb_tile_load(uint8_t tile[16][64], const uint8_t *base, int64_t stride) {
  for (int i = 0; i < 16; i++) memcpy(tile[i], base + i * stride, 64);
}

LB_INLINE void lb_tile_store(uint8_t tile[16][64], uint8_t *base, int64_t stride) {
  for (int i = 0; i < 16; i++) memcpy(base + i * stride, tile[i], 64);
}

/* c[m][n] += sum over k and i of unsigned a[m][k][i] times signed b[k][n][i], modulo 2^32 */
LB_INLINE void lb_tile_dpbusd(uint8_t c[16][64], uint8_t a[16][64], uint8_t b[16][64]) {
  for (int m = 0; m < 16; m++) {
    uint32_t sums[16];
    memcpy(sums, c[m], 64);
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++)
        for (int i = 0; i < 4; i++) sums[n] += (uint32_t)(a[m][4 * k + i] * (int8_t)b[k][4 * n + i]);
    memcpy(c[m], sums, 64);
  }
}

#endif
