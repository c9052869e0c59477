// A parsed PTX module: kernels as lists of decoded instructions.
//
// What this interpreter does not know (an opcode with its qualifiers, a form of an operand, a directive)
// is an error when the module is read, never a guess.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// Every fault of a kernel and every unknown form; `what` is a sentence for the test's report.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kLanes = 32;
using Lanes = std::array<uint64_t, kLanes>;  // one register of a warp

// Address spaces of symbols.
enum class Space : uint8_t { none, shared, parameter };

struct Operand {
  enum Kind : uint8_t { reg, immediate, special, symbol, address, vector, sink } kind = sink;
  char width = 0;                   // of a register: p predicate, h 16 bits, w 32 bits, f float32, d 64 bits
  Space space = Space::none;        // of a symbol, or of the symbol in an address
  int slot = -1;                    // of a register, or of the base of an address (-1: none)
  bool decimal = false;             // an immediate written as an integer
  int64_t value = 0;                // immediate, symbol's offset, or offset of an address
  std::string name;                 // of a special register
  std::vector<Operand> parts;       // of a vector, or the coordinates of an address
  std::shared_ptr<Lanes> constant;  // an immediate or symbol, once a lane
};

struct Warp;
struct Block;
struct Instruction;
using Handler = void (*)(Block&, Warp&, const Instruction&, uint32_t active);

struct Instruction {
  std::string text, opcode;
  int line = 0;
  int guard = -1;  // slot of the predicate, or -1
  bool guard_negated = false;
  std::vector<Operand> operands;
  Handler run = nullptr;
  int target = -1;   // of a branch
  std::vector<int> reads, writes;  // slots
  uint64_t executed = 0;
};

struct Parameter {
  std::string name;
  int64_t offset = 0, bytes = 0, align = 1;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  int64_t parameter_bytes = 0;
  int threads = 0, blocks_per_sm = 1;
  int slots = 0;
  bool warpgroups = false;  // uses wgmma: registers are watched
  std::vector<Instruction> code;
};

struct Module {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

// Where each space begins. Device code sees shared addresses as 32 bits from here on.
constexpr uint32_t kSharedBase = 1024;  // the first KiB of a block belongs to the system on sm_90
constexpr uint64_t kParameterBase = 0x10000;

void parse(const std::string& path, Module& module);
// Finds the handler of an opcode and checks the operands' widths.
void decode(Instruction& instruction);

}  // namespace ptx
