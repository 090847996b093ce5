/* ffnas encoders from C: a folder written by `ffnas export RUN --native FOLDER`, token ids in, scores out.
 *
 * Link with the ffnas CPU library (`python -m kernels.build` prints where it is). Status codes: 0 done, 1 out of memory,
 * 2 a layer's program is not valid, 3 input the model cannot take (ids outside the vocabulary, too many tokens, a sequence
 * without any), 5 the folder is missing, damaged or of another version.
 */
#ifndef FFNAS_ENCODER_H
#define FFNAS_ENCODER_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FFNAS_FP32 = 0, FFNAS_BF16 = 1, FFNAS_INT8 = 2 };                  /* precision of matrix products */
enum { FFNAS_SCORES = 0, FFNAS_HIDDEN = 1, FFNAS_POOLED = 2 };            /* what to compute */
enum { FFNAS_LABELS = 0, FFNAS_PER_TOKEN = 1, FFNAS_HIDDEN_SIZE = 2, FFNAS_POSITIONS = 3, FFNAS_POOLS = 4 };  /* sizes */

/* FFNAS_INT8 changes answers more than FFNAS_BF16 does; docs/runtime.md says by how much.
 * The model, with `threads` threads including the caller's; NULL and a status where it cannot be had. */
void* ffnas_encoder_open(const char* folder, int precision, int threads, int* status);

/* Scores a sequence (or token); 1 where they are per token; hidden width; most tokens; 1 where there are pooled vectors. */
int64_t ffnas_encoder_size(void* encoder, int which);

/* One pass. ids and types: [batch, length]; mask: [batch, length], not 0 at real tokens; types and mask may be NULL.
 * out: [batch, labels], or [batch, length, labels] where scores are per token; hidden: [batch, length, hidden size];
 * pooled: [batch, hidden size]. `padding` is what scores of padded tokens are. Any number of threads may call at once. */
int ffnas_encoder_run(void* encoder, const int64_t* ids, const uint8_t* mask, const int64_t* types, int64_t batch,
                      int64_t length, int64_t what, double padding, float* out);

void ffnas_encoder_free(void* encoder);

#ifdef __cplusplus
}
#endif
#endif
