// Opcodes to handlers, with the widths that operands must have.
//
// A signature is "results:sources". p predicate, h %rs, w %r, f %f, d %rd; x a register of 32 bits of
// either kind; a an address; s a special register or a symbol; n a number; _ nothing; {..} a vector.
// Where a source is a register, a number may stand too. "|" separates forms.
#include "machine.h"

namespace ptx {
namespace {

const Table& table() {
  static const Table all = [] {
    Table t;
    add_arithmetic(t);
    add_float(t);
    add_memory(t);
    add_matrix(t);
    add_control(t);
    add_asynchronous(t);
    return t;
  }();
  return all;
}

bool fits(char want, const Operand& o, bool result) {
  switch (want) {
    case 'a':
      return o.kind == Operand::address;
    case 'n':
      return o.kind == Operand::immediate && o.decimal && !result;
    case '_':
      return o.kind == Operand::sink;
    case 's':
      return o.kind == Operand::special || o.kind == Operand::symbol;
    default:
      break;
  }
  if (o.kind == Operand::immediate) {
    if (result) return false;
    if (want == 'f') return !o.decimal;
    if (want == 'x') return true;
    if (want == 'p') return o.decimal && (o.value == 0 || o.value == 1);
    return o.decimal;
  }
  if (o.kind != Operand::reg) return false;
  switch (want) {
    case 'x':
      return o.width == 'w' || o.width == 'f';
    default:
      return o.width == want;
  }
}

bool match(const char*& s, const Operand& o, bool result) {
  if (*s == '{') {
    ++s;
    if (o.kind != Operand::vector) return false;
    for (const Operand& part : o.parts) {
      if (*s == '}' || !match(s, part, result)) return false;
    }
    if (*s != '}') return false;
    ++s;
    return true;
  }
  if (!fits(*s, o, result)) return false;
  ++s;
  return true;
}

bool matches(const char* signature, const Instruction& i) {
  bool result = true;
  const char* s = signature;
  size_t at = 0;
  while (*s) {
    if (*s == ':') {
      result = false;
      ++s;
      continue;
    }
    if (at == i.operands.size() || !match(s, i.operands[at], result)) return false;
    ++at;
  }
  return at == i.operands.size();
}

void collect(const Operand& o, bool result, Instruction& i) {
  if (o.kind == Operand::reg) (result ? i.writes : i.reads).push_back(o.slot);
  if (o.kind == Operand::address && o.slot >= 0) i.reads.push_back(o.slot);
  for (const Operand& part : o.parts) collect(part, result && o.kind == Operand::vector, i);
}

}  // namespace

void decode(Instruction& i) {
  const auto found = table().find(i.opcode);
  if (found == table().end()) throw Fault("the opcode is unknown");
  if (i.guard >= 0 && i.opcode != "bra") throw Fault("a guard on something else than a branch");
  // Alternatives of a signature are separated by "|".
  const std::string all = found->second.signature;
  size_t begin = 0;
  bool known = false;
  size_t results = 0;
  while (begin <= all.size() && !known) {
    size_t end = all.find('|', begin);
    if (end == std::string::npos) end = all.size();
    const std::string one = all.substr(begin, end - begin);
    if (matches(one.c_str(), i)) {
      known = true;
      int depth = 0;
      for (const char c : one) {
        if (c == ':') break;
        if (c == '{') ++depth;
        if (c == '}') --depth;
        if (depth == 0 || (c == '{' && depth == 1)) results += c != '}';
      }
    }
    begin = end + 1;
  }
  if (!known) throw Fault("operands do not fit " + all);
  i.run = found->second.run;
  for (size_t o = 0; o < i.operands.size(); ++o) collect(i.operands[o], o < results, i);
  if (i.guard >= 0) i.reads.push_back(i.guard);
}

}  // namespace ptx
