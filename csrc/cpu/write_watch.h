// Whether memory was written to since a moment, as the system's page tables know it. Part of api.cpp.
//
// Linux since 6.7 protects pages so that the first write to each is let through and leaves a mark (userfaultfd,
// asynchronous), and lists marks (PAGEMAP_SCAN): 0.01 ms for 42 MB, whose bytes take 7 ms to read. Writes of the system
// for this process count (read, process_vm_writev). Not seen are writes of devices into pinned memory, and other
// processes' into shared memory, so memory that is not private and anonymous is refused. Where the system or its rules do
// not allow all that there is no watch, and callers read the bytes.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/userfaultfd.h>)
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#define FFNAS_WRITE_WATCH
#endif
#endif

namespace ffnas {
namespace {

class WriteWatch {
 public:
  struct Range {
    uint64_t begin, end;  // whole pages
  };

  // nullptr where the system does not do it, or not for this memory.
  static WriteWatch* make(const int64_t* words, int64_t count) {
    auto watch = std::make_unique<WriteWatch>();
    for (int64_t i = 0; i < count; ++i)
      watch->ranges_.push_back({static_cast<uint64_t>(words[2 * i]), static_cast<uint64_t>(words[2 * i] + words[2 * i + 1])});
    return watch->is_private() && watch->begin() ? watch.release() : nullptr;
  }

#ifdef FFNAS_WRITE_WATCH
  ~WriteWatch() {
    for (const Range& r : ranges_) {
      uffdio_range range = {r.begin, r.end - r.begin};
      if (owner_ == getpid() && fault_ >= 0) ioctl(fault_, UFFDIO_UNREGISTER, &range);
    }
    if (map_ >= 0) close(map_);
    if (fault_ >= 0) close(fault_);
  }

  // From now on. False where that cannot be.
  bool arm() const {
    if (owner_ != getpid()) return false;
    for (const Range& r : ranges_)
      if (scan(r, kProtect | kOnlyProtected, kWritten, 0) < 0) return false;
    return true;
  }
  // Whether no byte was written, and no page taken away; a forked child does not know.
  bool clean() const {
    if (owner_ != getpid()) return false;
    for (const Range& r : ranges_)
      if (scan(r, kOnlyProtected, kWritten, 0) != 0 || scan(r, kOnlyProtected, kThere, kThere) != 0) return false;
    return true;
  }

 private:
  static constexpr uint64_t kProtect = 1, kOnlyProtected = 2;             // flags of a scan
  static constexpr uint64_t kWritten = 2, kThere = 8 | 16;                // categories: written; present, swapped
  static constexpr uint64_t kAsynchronous = 1 << 15, kUnpopulated = 1 << 13;  // features of userfaultfd
  static constexpr int kUserModeOnly = 1;

  struct Scan {  // the kernel's pm_scan_arg
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask, category_anyof_mask, return_mask;
  };

  // How many places have all of `mask` (of `inverted`: lack), the first one at most; -1: not all of it is protected memory.
  int scan(const Range& r, uint64_t flags, uint64_t mask, uint64_t inverted) const {
    uint64_t found[3];
    Scan s = {};
    s.size = sizeof s;
    s.flags = flags;
    s.start = r.begin;
    s.end = r.end;
    s.category_mask = mask;
    s.category_inverted = inverted;
    if ((flags & kProtect) == 0) {
      s.vec = reinterpret_cast<uint64_t>(found);
      s.vec_len = s.max_pages = 1;
      s.return_mask = mask;
    }
    return ioctl(map_, _IOWR('f', 16, Scan), &s);
  }

  bool begin() {
    owner_ = getpid();
    fault_ = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUserModeOnly));
    map_ = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uffdio_api api = {UFFD_API, kAsynchronous | kUnpopulated, 0};
    if (fault_ < 0 || map_ < 0 || ioctl(fault_, UFFDIO_API, &api) != 0) return false;
    for (const Range& r : ranges_) {
      uffdio_register wanted = {{r.begin, r.end - r.begin}, UFFDIO_REGISTER_MODE_WP, 0};
      if (ioctl(fault_, UFFDIO_REGISTER, &wanted) != 0) return false;
    }
    return arm();
  }

  // Whether all of it is this process's own memory: no file's, not shared.
  bool is_private() const {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> maps(std::fopen("/proc/self/maps", "r"), std::fclose);
    if (maps == nullptr) return false;
    uint64_t wanted = 0, covered = 0;
    for (const Range& r : ranges_) wanted += r.end - r.begin;
    char line[512];
    bool begins = true;
    while (std::fgets(line, sizeof line, maps.get()) != nullptr) {
      unsigned long long from, to, inode;
      char permissions[8];
      const bool own = begins && std::sscanf(line, "%llx-%llx %7s %*s %*s %llu", &from, &to, permissions, &inode) == 4 &&
                       permissions[3] == 'p' && inode == 0;
      for (const Range& r : ranges_) {
        const uint64_t low = r.begin < from ? from : r.begin, high = r.end < to ? r.end : to;
        if (own && low < high) covered += high - low;
      }
      begins = __builtin_strchr(line, '\n') != nullptr;  // a long name goes on
    }
    return wanted != 0 && covered == wanted;
  }

  int fault_ = -1, map_ = -1;
  pid_t owner_ = 0;
#else
  bool arm() const { return false; }
  bool clean() const { return false; }

 private:
  bool begin() { return false; }
  bool is_private() const { return false; }
#endif
  std::vector<Range> ranges_;
};

}  // namespace
}  // namespace ffnas

// A watch over `count` pieces of whole pages, two words each: address and bytes. nullptr: there is none, read the bytes.
FFNAS_EXPORT void* ffnas_watch_new(const int64_t* words, int64_t count) {
  try {
    return ffnas::WriteWatch::make(words, count);
  } catch (const std::exception&) {
    return nullptr;
  }
}
FFNAS_EXPORT int ffnas_watch_arm(void* watch) { return static_cast<ffnas::WriteWatch*>(watch)->arm(); }
FFNAS_EXPORT int ffnas_watch_clean(void* watch) { return static_cast<ffnas::WriteWatch*>(watch)->clean(); }
FFNAS_EXPORT void ffnas_watch_free(void* watch) { delete static_cast<ffnas::WriteWatch*>(watch); }
