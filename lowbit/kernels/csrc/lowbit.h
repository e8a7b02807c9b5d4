/* The native kernels' whole interface: one entry for linear layers and convolutions, and the choice of instruction set.
 * What is computed is defined in lowbit/kernels/reference.py, the layout of packed weights in packing.py. */
#ifndef LOWBIT_H
#define LOWBIT_H
#include <stdint.h>

#define LB_ABI 4 /* raise with every change of lb_args, its meaning or the functions; native.py asks for the same */

#if defined(__GNUC__)
#define LB_PUBLIC __attribute__((visibility("default")))
#else
#define LB_PUBLIC
#endif

enum { LB_FLOAT32 = 0, LB_INT8 = 1, LB_UINT8 = 2 };
enum {
  LB_OK = 0, LB_NO_MEMORY = 1, LB_WRONG_ARGS = 2, LB_UNKNOWN_ISA = 3, LB_UNAVAILABLE_ISA = 4, LB_UNKNOWN_FORM = 5
};

/* A convolution of x [batch][height][width][channels] (channels fastest) with the packed weights, to
 * out [batch][height'][width'][outputs]. A linear layer is one with 1x1 images and a 1x1 kernel. All fields have 8
 * bytes. */
typedef struct {
  const void *x;
  const uint8_t *packed;
  const float *scale;   /* [outputs] */
  const int32_t *sums;  /* [outputs] */
  const float *bias;    /* [outputs] or NULL */
  const float *x_scale; /* [x_scales] */
  void *out;
  const void *add; /* like out, added to the outputs before ReLU; or NULL */
  int64_t x_type, out_type; /* LB_FLOAT32, LB_INT8, LB_UINT8 */
  int64_t x_scales;         /* 0: follows from x, for each image; 1: one; batch: one for each image */
  int64_t bits;             /* 2, 3, 4; or 8: packed bytes are the weights themselves, levels are not used */
  int64_t batch, height, width, channels;
  int64_t padded_channels; /* channels as packed */
  int64_t outputs;
  int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t low, high; /* range of the quantized x, if it is float */
  int64_t relu;
  int64_t out_low, out_high; /* range of the output, if it is not float */
  int64_t threads;
  int64_t add_type;
  double out_scale;
  double add_scale; /* of an add that is not float */
  int16_t levels[16]; /* what a code stands for; unused ones 0 */
} lb_args;

LB_PUBLIC int lb_abi(void);
/* Comma-separated names of the instruction sets that this processor (all != 0: this build) offers, best first. */
LB_PUBLIC const char *lb_isas(int all);
LB_PUBLIC const char *lb_isa(void);         /* the one in use */
LB_PUBLIC int lb_select(const char *name);  /* NULL: the best */
/* How convolutions are computed: "direct", "winograd" where that can be used, or "auto" (also NULL): whichever is
 * expected to be faster. All give the same bits. */
LB_PUBLIC int lb_select_form(const char *name);
LB_PUBLIC const char *lb_form(void);
LB_PUBLIC const char *lb_form_taken(void); /* by this thread's last lb_run: "direct" or "winograd" */
LB_PUBLIC int lb_run(const lb_args *args);  /* safe from several threads at once */
/* A linear layer whose activations stay float32 (kernels/floats.py): of the arguments only x, packed, scale, bias, out,
 * bits, batch (rows), channels (K), outputs, levels and threads count. */
LB_PUBLIC int lb_run_floats(const lb_args *args);

#endif
