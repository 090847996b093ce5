// The model in a folder, for programs without Python. Part of api.cpp. Keep in step with kernels/runtime/encoder_file.py.
//
//     encoder.bin   "FFNASENC", then little-endian: int64 version, number of words, number of program words, bytes of the
//                   weights file; uint64 hash of the weights file, hash of what follows; double LayerNorm epsilon; the
//                   words of a model (`Encoder::read`), matrices as offsets into the weights file; int32 programs
//     weights.safetensors
//
// Both are read whole and checked before a number of them is used.
#pragma once

#include <cstdio>
#include <string>

namespace ffnas {
namespace {

class EncoderFile {
 public:
  // kOk; kBadFile: missing, cut, changed or of another version; kOutOfMemory.
  Status read(const char* folder) {
    int64_t size = 0;
    Status status = load(std::string(folder) + "/encoder.bin", header_, size);
    if (status != kOk) return status;
    const char* bytes = static_cast<const char*>(header_.get());
    if (size < kHeader || __builtin_memcmp(bytes, "FFNASENC", 8) != 0) return kBadFile;
    uint64_t hashes[2];
    __builtin_memcpy(numbers_, bytes + 8, sizeof(numbers_));
    __builtin_memcpy(hashes, bytes + 40, sizeof(hashes));
    __builtin_memcpy(&eps_, bytes + 56, sizeof(eps_));
    const int64_t words = numbers_[1], programs = numbers_[2];
    if (numbers_[0] != kVersionOfFile || words < 0 || programs < 0 || words > size / 8 || programs > size / 4 ||
        kHeader + 8 * words + 4 * programs != size || hash(bytes + 56, size - 56) != hashes[1])
      return kBadFile;
    status = load(std::string(folder) + "/weights.safetensors", weights_, weights_size_);
    if (status != kOk) return status;
    return weights_size_ == numbers_[3] && hash(static_cast<const char*>(weights_.get()), weights_size_) == hashes[0] ? kOk
                                                                                                                : kBadFile;
  }

  double eps() const { return eps_; }

  ModelReader reader() const {
    const char* bytes = static_cast<const char*>(header_.get()) + kHeader;
    const auto* words = reinterpret_cast<const int64_t*>(bytes);
    ModelReader in{words, words + numbers_[1]};
    in.weights = static_cast<char*>(weights_.get());
    in.weights_size = weights_size_;
    in.programs = reinterpret_cast<const int32_t*>(bytes + 8 * numbers_[1]);
    in.program_words = numbers_[2];
    return in;
  }

  Buffer release_weights() { return std::move(weights_); }

 private:
  static constexpr int64_t kHeader = 64, kVersionOfFile = 1;

  static Status load(const std::string& path, Buffer& to, int64_t& size) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (file == nullptr || std::fseek(file.get(), 0, SEEK_END) != 0 || (size = std::ftell(file.get())) < 1) return kBadFile;
    std::rewind(file.get());
    to.reset(std::aligned_alloc(64, static_cast<size_t>((size + 127) / 64 * 64)));
    if (to == nullptr) return kOutOfMemory;
    return std::fread(to.get(), 1, static_cast<size_t>(size), file.get()) == static_cast<size_t>(size) ? kOk : kBadFile;
  }

  // FNV-1a over words of eight bytes, the last one filled up with zeros.
  static uint64_t hash(const char* bytes, int64_t size) {
    uint64_t h = 14695981039346656037ull;
    for (int64_t i = 0; i < size; i += 8) {
      uint64_t word = 0;
      __builtin_memcpy(&word, bytes + i, static_cast<size_t>(size - i < 8 ? size - i : 8));
      h = (h ^ word) * 1099511628211ull;
    }
    return h;
  }

  Buffer header_, weights_;
  int64_t numbers_[4] = {}, weights_size_ = 0;
  double eps_ = 0.0;
};

}  // namespace
}  // namespace ffnas
