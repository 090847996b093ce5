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
/* What to compute: scores; the last layer's vectors; the model's own vector per sequence; or the mean, the first, the
 * largest of each column of its last layer's vectors. Add FFNAS_UNIT to the last four for vectors of length 1. */
enum { FFNAS_SCORES = 0, FFNAS_HIDDEN = 1, FFNAS_POOLED = 2, FFNAS_MEAN = 3, FFNAS_FIRST = 4, FFNAS_MAX = 5, FFNAS_UNIT = 16 };
enum { FFNAS_LABELS = 0, FFNAS_PER_TOKEN = 1, FFNAS_HIDDEN_SIZE = 2, FFNAS_POSITIONS = 3, FFNAS_POOLS = 4, FFNAS_HEAD = 5 };  /* sizes */
enum { FFNAS_NO_HEAD = 0, FFNAS_OF_SEQUENCES = 1, FFNAS_OF_TOKENS = 2, FFNAS_OF_MASKS = 3 };  /* what scores are of */

/* FFNAS_INT8 changes answers more than FFNAS_BF16 does; docs/runtime.md says by how much.
 * The model, with `threads` threads including the caller's; NULL and a status where it cannot be had. */
void* ffnas_encoder_open(const char* folder, int precision, int threads, int* status);

/* Scores a sequence (or token); 1 where they are per token; hidden width; most tokens; 1 where there are pooled vectors;
 * what its scores are of. Filling masks scores every word of the vocabulary; multiple choice is one score a sequence. */
int64_t ffnas_encoder_size(void* encoder, int which);

/* One pass. ids and types: [batch, length]; mask: [batch, length], not 0 at real tokens; types and mask may be NULL.
 * out: [batch, labels], or [batch, length, labels] where scores are per token; hidden: [batch, length, hidden size];
 * vectors per sequence: [batch, hidden size]. `padding` is what scores of padded tokens are. Any number of threads may call at once. */
int ffnas_encoder_run(void* encoder, const int64_t* ids, const uint8_t* mask, const int64_t* types, int64_t batch,
                      int64_t length, int64_t what, double padding, float* out);

/* Scores per token of some tokens alone, which are counted through [batch, length] and real: out [count, labels]. */
int ffnas_encoder_run_at(void* encoder, const int64_t* ids, const uint8_t* mask, const int64_t* types, int64_t batch,
                         int64_t length, const int64_t* places, int64_t count, float* out);

void ffnas_encoder_free(void* encoder);

#ifdef __cplusplus
}
#endif
#endif
