/* Encoders from C, for tests: native, under sanitizers, and compiled for another processor.
 *
 *     answers FOLDER THREADS         passes from standard input, their results to standard output
 *     mixed FOLDER COUNT SEED        passes of any shape, wish and content, through two threads; memory, not answers
 *     hostile FOLDER WORK COUNT SEED      FOLDER's encoder.bin with words changed at random, in WORK, which has the rest
 *
 * A pass: what, batch, length, number of places; then ids, mask, types [batch, length] and the places, all as text.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ffnas_encoder.h"

static uint64_t state = 1;
static uint64_t chance(uint64_t below) { /* xorshift64* */
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (state * 2685821657736338717u >> 20) % below;
}

static void* need(size_t bytes) {
  void* p = malloc(bytes == 0 ? 1 : bytes);
  if (p == NULL) exit(9);
  return p;
}

static int64_t answers_of(void* encoder, int64_t what, int64_t batch, int64_t length, int64_t places) {
  const int64_t labels = ffnas_encoder_size(encoder, FFNAS_LABELS), hidden = ffnas_encoder_size(encoder, FFNAS_HIDDEN_SIZE);
  const int64_t rows = batch * length;
  if (places > 0) return places * labels;
  if (what == FFNAS_SCORES) return (ffnas_encoder_size(encoder, FFNAS_PER_TOKEN) ? rows : batch) * labels;
  return (what == FFNAS_HIDDEN ? rows : batch) * hidden;
}

static int run(void* encoder, const int64_t* ids, const uint8_t* mask, const int64_t* types, int64_t batch, int64_t length,
               int64_t what, const int64_t* places, int64_t count, float* out) {
  return count > 0 ? ffnas_encoder_run_at(encoder, ids, mask, types, batch, length, places, count, out)
                   : ffnas_encoder_run(encoder, ids, mask, types, batch, length, what, -1e4, out);
}

static int answers(const char* folder, int threads) {
  int status;
  void* encoder = ffnas_encoder_open(folder, FFNAS_FP32, threads, &status);
  if (encoder == NULL) return fprintf(stderr, "status %d\n", status), 1;
  int64_t what, batch, length, count;
  while (scanf("%" SCNd64 " %" SCNd64 " %" SCNd64 " %" SCNd64, &what, &batch, &length, &count) == 4) {
    const int64_t n = batch * length, size = answers_of(encoder, what, batch, length, count);
    int64_t* numbers = need(sizeof(int64_t) * (size_t)(3 * n + count));
    uint8_t* mask = need((size_t)n);
    float* out = need(sizeof(float) * (size_t)size);
    for (int64_t i = 0; i < 3 * n + count; ++i)
      if (scanf("%" SCNd64, numbers + i) != 1) return 2;
    for (int64_t i = 0; i < n; ++i) mask[i] = numbers[n + i] != 0;
    status = run(encoder, numbers, mask, numbers + 2 * n, batch, length, what, numbers + 3 * n, count, out);
    if (status != 0) return fprintf(stderr, "status %d\n", status), 1;
    for (int64_t i = 0; i < size; ++i) printf("%.9g ", (double)out[i]);
    printf("\n");
    free(numbers);
    free(mask);
    free(out);
  }
  ffnas_encoder_free(encoder);
  return 0;
}

/* One pass with ids, masks and wishes that may be wrong, into memory of the right size. */
static int any_pass(void* encoder, int64_t vocabulary, int64_t longest) {
  static const int64_t kWishes[] = {0, 1, 2, 3, 4, 5, 18, 19, 20, 21, 6, 16, 17, -1};
  const int64_t what = kWishes[chance(sizeof kWishes / sizeof *kWishes)];
  const int64_t batch = 1 + (int64_t)chance(6), length = 1 + (int64_t)chance((uint64_t)longest), n = batch * length;
  const int64_t count = chance(4) == 0 ? 1 + (int64_t)chance(5) : 0;
  const int64_t size = answers_of(encoder, what, batch, length, count);
  int64_t *ids = need(sizeof(int64_t) * (size_t)n), *types = need(sizeof(int64_t) * (size_t)n);
  int64_t* places = need(sizeof(int64_t) * (size_t)count);
  uint8_t* mask = need((size_t)n);
  float* out = need(sizeof(float) * (size_t)size);
  for (int64_t i = 0; i < n; ++i) {
    ids[i] = (int64_t)chance((uint64_t)vocabulary);
    types[i] = (int64_t)chance(2);
    mask[i] = i % length == 0 || chance(8) != 0;
  }
  for (int64_t i = 0; i < count; ++i) places[i] = (int64_t)chance((uint64_t)n);
  if (chance(50) == 0) ids[chance((uint64_t)n)] = (int64_t)chance(2) - 1 + vocabulary * (int64_t)chance(1000000);
  if (chance(50) == 0) types[chance((uint64_t)n)] = -1;
  if (count > 0 && chance(50) == 0) places[chance((uint64_t)count)] = n + 3;
  const int status = run(encoder, ids, chance(3) == 0 ? NULL : mask, chance(3) == 0 ? NULL : types, batch, length, what, places, count, out);
  free(ids);
  free(types);
  free(places);
  free(mask);
  free(out);
  return status;
}

static int mixed(const char* folder, int64_t count) {
  int status;
  int64_t done = 0;
  void* encoder = ffnas_encoder_open(folder, FFNAS_FP32, 2, &status);
  if (encoder == NULL) return fprintf(stderr, "status %d\n", status), 1;
  for (int64_t i = 0; i < count; ++i) done += any_pass(encoder, 97, ffnas_encoder_size(encoder, FFNAS_POSITIONS) + 1) == 0;
  ffnas_encoder_free(encoder);
  printf("%" PRId64 "\n", done);
  return 0;
}

/* As csrc/cpu/encoder_file.h: over words of eight bytes. */
static uint64_t checksum(const unsigned char* bytes, int64_t size) {
  uint64_t plain = 0, mixed_sum = 0;
  for (int64_t i = 0; 8 * i < size; ++i) {
    uint64_t word = 0;
    memcpy(&word, bytes + 8 * i, (size_t)(size - 8 * i < 8 ? size - 8 * i : 8));
    const uint64_t t = word ^ (0x9E3779B97F4A7C15u + (uint64_t)i * 0xA0761D6478BD642Fu);
    plain += word;
    mixed_sum += (t & 0xFFFFFFFFu) * (t >> 32);
  }
  return mixed_sum ^ (plain << 32 | plain >> 32);
}

static unsigned char* read_file(const char* folder, int64_t* size) {
  char path[4096];
  snprintf(path, sizeof path, "%s/encoder.bin", folder);
  FILE* file = fopen(path, "rb");
  unsigned char* bytes = need(1 << 20);
  if (file == NULL) exit(8);
  *size = (int64_t)fread(bytes, 1, 1 << 20, file);
  fclose(file);
  return bytes;
}

static int hostile(const char* folder, const char* work, int64_t count) {
  static const int64_t kWords[] = {-1, 0, 1, 2, 3, 4, 8, 16, 64, 4096, 1 << 20, INT64_C(1) << 28, INT64_C(1) << 31, INT64_C(1) << 62, INT64_MIN};
  int64_t size, words, refused = 0, answered = 0;
  unsigned char *good = read_file(folder, &size), *bad = need((size_t)size);
  char path[4096];
  snprintf(path, sizeof path, "%s/encoder.bin", work);
  memcpy(&words, good + 16, 8);
  for (int64_t turn = 0; turn < count; ++turn) {
    int64_t length = size;
    memcpy(bad, good, (size_t)size);
    for (uint64_t changes = 1 + chance(3); changes > 0; --changes) {
      const int64_t programs = (size - 64 - 8 * words) / 4;
      if (turn % 2 == 0 || programs < 1) {
        int64_t value = chance(2) ? kWords[chance(sizeof kWords / sizeof *kWords)] : (int64_t)chance(1 << 20);
        const int64_t at = 64 + 8 * (int64_t)chance((uint64_t)words);
        if (chance(3) == 0) { /* near what was there */
          memcpy(&value, bad + at, 8);
          value += (int64_t)chance(9) - 4;
        }
        memcpy(bad + at, &value, 8);
      } else {
        const int32_t value = chance(2) ? (int32_t)chance(300) - 3 : (int32_t)chance(UINT64_C(1) << 32);
        memcpy(bad + 64 + 8 * words + 4 * (int64_t)chance((uint64_t)programs), &value, 4);
      }
    }
    if (chance(20) == 0) length = (int64_t)chance((uint64_t)size);      /* cut */
    if (chance(20) == 0) bad[8 + chance(48)] ^= (unsigned char)(1 << chance(8)); /* of the header */
    const uint64_t sum = length > 56 ? checksum(bad + 56, length - 56) : 0;
    if (chance(50) != 0) memcpy(bad + 48, &sum, 8);
    FILE* file = fopen(path, "wb");
    if (file == NULL || fwrite(bad, 1, (size_t)length, file) != (size_t)length || fclose(file) != 0) return 7;
    int status = 0;
    void* encoder = ffnas_encoder_open(work, (int)(turn % 2), 1, &status);
    if (encoder == NULL) {
      if (status == 0) return 6;
      ++refused;
      continue;
    }
    const int64_t positions = ffnas_encoder_size(encoder, FFNAS_POSITIONS);
    const int64_t wide = ffnas_encoder_size(encoder, FFNAS_LABELS) + ffnas_encoder_size(encoder, FFNAS_HIDDEN_SIZE);
    if (wide < 1 << 20) any_pass(encoder, 97, positions < 40 ? positions : 40);
    ++answered;
    ffnas_encoder_free(encoder);
  }
  free(good);
  free(bad);
  printf("%" PRId64 " %" PRId64 "\n", refused, answered);
  return 0;
}

int main(int argc, char** argv) {
  if (argc > 4) state = strtoull(argv[argc - 1], NULL, 10) * 2654435769u + 1;
  if (argc == 4 && strcmp(argv[1], "answers") == 0) return answers(argv[2], atoi(argv[3]));
  if (argc == 5 && strcmp(argv[1], "mixed") == 0) return mixed(argv[2], strtoll(argv[3], NULL, 10));
  if (argc == 6 && strcmp(argv[1], "hostile") == 0) return hostile(argv[2], argv[3], strtoll(argv[4], NULL, 10));
  return 5;
}
