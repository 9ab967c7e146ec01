#include "packed_codebook.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace tokenflow::cpu {
namespace {

constexpr size_t kMostEntries = 64;
constexpr size_t kMostNumbers = size_t{1} << 21;  // 8 MiB in all, and as much packed

// Of a few numbers and the place: enough to tell what is worth comparing.
uint64_t fingerprint_of(const float* codebook, size_t count) {
  uint64_t hash = reinterpret_cast<uintptr_t>(codebook);
  constexpr size_t kNumbers = 64;
  for (size_t i = 0; i < kNumbers; ++i) {
    uint32_t bits;
    std::memcpy(&bits, codebook + i * count / kNumbers, sizeof(bits));
    hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

bool same_layout(const CodebookLayout& a, const CodebookLayout& b) {
  return a.codes == b.codes && a.dim == b.dim && a.groups == b.groups && a.l2_norm == b.l2_norm &&
         a.metric == b.metric && std::equal(a.begin, a.begin + a.groups, b.begin) &&
         std::equal(a.weight, a.weight + a.groups, b.weight);
}

}  // namespace

AlignedBytes allocate(size_t bytes) {
  return {static_cast<std::byte*>(::operator new[](bytes, std::align_val_t(kAlignment))),
          [](std::byte* p) { ::operator delete[](p, std::align_val_t(kAlignment)); }};
}

PackedCodebooks& PackedCodebooks::instance() {
  static PackedCodebooks all;
  return all;
}

PackedCodebooks::Packed PackedCodebooks::get(const CodebookLayout& layout, const float* codebook,
                                             const CoarseScoreKernels& coarse,
                                             const std::function<Packed()>& pack) {
  const size_t count = static_cast<size_t>(layout.codes) * layout.dim;
  if (count > kMostNumbers) return pack();
  const uint64_t fingerprint = fingerprint_of(codebook, count);
  const auto matches = [&](const Entry& entry) {
    return entry.fingerprint == fingerprint && entry.coarse == &coarse &&
           same_layout(entry.layout, layout);
  };
  std::shared_ptr<const Codes> codes;
  Packed packed;
  bool seen = false;
  {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto entry = std::find_if(entries_.begin(), entries_.end(), matches);
    if (entry != entries_.end()) {
      seen = true;
      codes = entry->codes;
      packed = entry->packed;
      entries_.splice(entries_.begin(), entries_, entry);  // the last used
    }
  }
  if (packed && std::memcmp(codes->data(), codebook, count * sizeof(float)) == 0) return packed;
  packed = pack();
  codes = seen ? std::make_shared<const Codes>(codebook, codebook + count) : nullptr;
  const std::lock_guard<std::mutex> guard(lock_);
  entries_.remove_if(matches);
  entries_.push_front({layout, &coarse, fingerprint, codes, codes ? packed : nullptr});
  size_t numbers = 0;
  for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
    numbers += entry->codes ? entry->codes->size() : kMostNumbers / kMostEntries;
    if (numbers > kMostNumbers) {  // the longest unused
      entries_.erase(entry, entries_.end());
      break;
    }
  }
  return packed;
}

}  // namespace tokenflow::cpu
