// Cases that compare the kernels' view of the hardware, and the emulator's, with NVIDIA's CuTe headers.
// A case passes where it compared something and nothing differed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace witness {

struct Case {
  const char* name;
  void (*run)();
  Case* next;
  Case(const char* name_, void (*run_)());
};

void same_number(uint64_t ours, uint64_t theirs, const char* what, int line);
void same_text(const std::string& ours, const std::string& theirs, const char* what, int line);

// A fixed sequence of numbers: results repeat.
inline uint32_t random_bits(uint64_t& state) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 33);
}
inline int8_t random_int8(uint64_t& state) { return static_cast<int8_t>(random_bits(state)); }

}  // namespace witness

#define CASE(name)                                        \
  static void case_##name();                              \
  static witness::Case entry_##name(#name, case_##name);  \
  static void case_##name()
#define SAME(ours, theirs, what) \
  witness::same_number(static_cast<uint64_t>(ours), static_cast<uint64_t>(theirs), what, __LINE__)
#define SAME_TEXT(ours, theirs, what) witness::same_text(ours, theirs, what, __LINE__)
