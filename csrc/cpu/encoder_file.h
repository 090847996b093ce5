// The model in a folder, for programs without Python. Part of api.cpp. Keep in step with kernels/runtime/writing.py.
//
//     encoder.bin   "FFNASENC", then little-endian: int64 version, number of words, number of program words, bytes of the
//                   weights file; uint64 checksum of the weights file, of what follows; double LayerNorm epsilon; the
//                   words of a model (`Encoder::read`), matrices as offsets into the weights file; int32 programs
//     weights.safetensors
//
// Both are checked whole before a number of them is used. The weights are mapped, not copied: processes share them, and
// starting costs one look at them. So a folder in use is replaced, never written into.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <string>

namespace ffnas {
namespace {

// A file's bytes, for reading alone.
class Mapped {
 public:
  Mapped() = default;
  Mapped(Mapped&& other) noexcept { *this = std::move(other); }
  Mapped& operator=(Mapped&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Mapped() {
    if (data_ != nullptr) munmap(data_, static_cast<size_t>(size_));
  }

  bool map(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (file < 0) return false;
    if (fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0) {
#ifdef MAP_POPULATE
      constexpr int kFlags = MAP_PRIVATE | MAP_POPULATE;
#else
      constexpr int kFlags = MAP_PRIVATE;
#endif
      void* found = mmap(nullptr, static_cast<size_t>(about.st_size), PROT_READ, kFlags, file, 0);
      if (found != MAP_FAILED) {
        data_ = found;
        size_ = about.st_size;
      }
    }
    ::close(file);
    return data_ != nullptr;
  }
  char* data() const { return static_cast<char*>(data_); }
  int64_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

class EncoderFile {
 public:
  // kOk; kBadFile: missing, cut, changed or of another version; kOutOfMemory.
  Status read(const char* folder) {
    int64_t size = 0;
    Status status = load(std::string(folder) + "/encoder.bin", header_, size);
    if (status != kOk) return status;
    const char* bytes = static_cast<const char*>(header_.get());
    if (size < kHeader || __builtin_memcmp(bytes, "FFNASENC", 8) != 0) return kBadFile;
    uint64_t sums[2];
    __builtin_memcpy(numbers_, bytes + 8, sizeof(numbers_));
    __builtin_memcpy(sums, bytes + 40, sizeof(sums));
    __builtin_memcpy(&eps_, bytes + 56, sizeof(eps_));
    const int64_t words = numbers_[1], programs = numbers_[2];
    if (numbers_[0] != kVersionOfFile || words < 0 || programs < 0 || words > size / 8 || programs > size / 4 ||
        kHeader + 8 * words + 4 * programs != size || checksum(bytes + 56, size - 56) != sums[1])
      return kBadFile;
    if (!weights_.map(std::string(folder) + "/weights.safetensors")) return kBadFile;
    return weights_.size() == numbers_[3] && checksum(weights_.data(), weights_.size()) == sums[0] ? kOk : kBadFile;
  }

  double eps() const { return eps_; }

  ModelReader reader() const {
    const char* bytes = static_cast<const char*>(header_.get()) + kHeader;
    const auto* words = reinterpret_cast<const int64_t*>(bytes);
    ModelReader in{words, words + numbers_[1]};
    in.weights = weights_.data();
    in.weights_size = weights_.size();
    in.programs = reinterpret_cast<const int32_t*>(bytes + 8 * numbers_[1]);
    in.program_words = numbers_[2];
    return in;
  }

  Mapped release_weights() { return std::move(weights_); }

 private:
  static constexpr int64_t kHeader = 64, kVersionOfFile = 2;

  static Status load(const std::string& path, Buffer& to, int64_t& size) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (file == nullptr || std::fseek(file.get(), 0, SEEK_END) != 0 || (size = std::ftell(file.get())) < 1) return kBadFile;
    std::rewind(file.get());
    to.reset(std::aligned_alloc(64, static_cast<size_t>((size + 127) / 64 * 64)));
    if (to == nullptr) return kOutOfMemory;
    return std::fread(to.get(), 1, static_cast<size_t>(size), file.get()) == static_cast<size_t>(size) ? kOk : kBadFile;
  }

  // Of words of eight bytes, the last one filled up with zeros: their sum, and the sum of what each of them is multiplied
  // out to with its place. Tells damage, not intent.
  static uint64_t checksum(const char* bytes, int64_t size) {
    constexpr uint64_t kKey = 0x9E3779B97F4A7C15u, kStep = 0xA0761D6478BD642Fu;
    uint64_t plain = 0, mixed = 0;
    const auto take = [&](uint64_t word, int64_t i) {
      const uint64_t t = word ^ (kKey + static_cast<uint64_t>(i) * kStep);
      plain += word;
      mixed += (t & 0xFFFFFFFFu) * (t >> 32);
    };
    const int64_t whole = size / 8;
    for (int64_t i = 0; i < whole; ++i) {
      uint64_t word;
      __builtin_memcpy(&word, bytes + 8 * i, 8);
      take(word, i);
    }
    if (size % 8 != 0) {
      uint64_t word = 0;
      __builtin_memcpy(&word, bytes + 8 * whole, static_cast<size_t>(size % 8));
      take(word, whole);
    }
    return mixed ^ (plain << 32 | plain >> 32);
  }

  Buffer header_;
  Mapped weights_;
  int64_t numbers_[4] = {};
  double eps_ = 0.0;
};

}  // namespace
}  // namespace ffnas
