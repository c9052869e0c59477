// witness: names of all cases; witness NAME: runs one, ends with 1 where something differs.
#include "witness.h"

#include <cstring>

namespace witness {
namespace {

Case* first = nullptr;
long compared = 0, different = 0;

void count(bool same) {
  ++compared;
  different += !same;
}

}  // namespace

Case::Case(const char* name_, void (*run_)()) : name(name_), run(run_), next(first) { first = this; }

void same_number(uint64_t ours, uint64_t theirs, const char* what, int line) {
  count(ours == theirs);
  if (ours != theirs && different <= 10)
    printf("line %d: %s: ours 0x%llx, CuTe's 0x%llx\n", line, what, static_cast<unsigned long long>(ours),
           static_cast<unsigned long long>(theirs));
}

void same_text(const std::string& ours, const std::string& theirs, const char* what, int line) {
  count(ours == theirs);
  if (ours != theirs) printf("line %d: %s:\n  ours   %s\n  CuTe's %s\n", line, what, ours.c_str(), theirs.c_str());
}

}  // namespace witness

int main(int count, char** arguments) {
  using namespace witness;
  for (Case* each = first; each != nullptr; each = each->next) {
    if (count < 2) {
      printf("%s\n", each->name);
      continue;
    }
    if (std::strcmp(each->name, arguments[1]) != 0) continue;
    each->run();
    printf("%ld compared, %ld differ\n", compared, different);
    return compared > 0 && different == 0 ? 0 : 1;
  }
  return count < 2 ? 0 : 2;
}
