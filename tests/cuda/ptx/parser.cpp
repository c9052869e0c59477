// Reads a module as nvcc writes it.
#include "program.h"

#include <cctype>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <unordered_map>

namespace ptx {
namespace {

// Names of a scope: the registers declared in it, as single names or as ranges "%r<12>".
struct Scope {
  std::unordered_map<std::string, Operand> names;
  struct Range {
    std::string prefix;
    int count, first;
    char width;
  };
  std::vector<Range> ranges;
};

class Reader {
 public:
  Reader(const std::string& text, Module& module) : text_(text), module_(module) {}

  void module() {
    while (skip()) {
      const std::string word = peek_word();
      if (word == ".version" || word == ".target" || word == ".address_size") {
        rest_of_line();
      } else if (word == ".extern") {
        shared_symbol(until(';'));
      } else if (word == ".visible") {
        kernel();
      } else {
        fail("a directive '" + word + "' is unknown");
      }
    }
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw Fault("line " + std::to_string(line_) + ": " + what); }

  // Skips spaces and comments; false at the end.
  bool skip() {
    while (at_ < text_.size()) {
      if (text_[at_] == '\n') ++line_;
      if (isspace(static_cast<unsigned char>(text_[at_]))) {
        ++at_;
      } else if (text_.compare(at_, 2, "//") == 0) {
        at_ = text_.find('\n', at_);
        if (at_ == std::string::npos) at_ = text_.size();
      } else {
        return true;
      }
    }
    return false;
  }
  std::string peek_word() const {
    size_t end = at_;
    while (end < text_.size() && !isspace(static_cast<unsigned char>(text_[end]))) ++end;
    return text_.substr(at_, end - at_);
  }
  std::string until(char stop) {
    const size_t end = text_.find(stop, at_);
    if (end == std::string::npos) fail(std::string("no '") + stop + "'");
    std::string found = text_.substr(at_, end - at_);
    for (const char c : found) line_ += c == '\n';
    at_ = end + 1;
    return found;
  }
  void rest_of_line() {
    at_ = text_.find('\n', at_);
    if (at_ == std::string::npos) at_ = text_.size();
  }

  // ".extern .shared .align 1024 .b8 name[]": the dynamic shared memory, the only variable we have.
  void shared_symbol(const std::string& text) {
    std::istringstream in(text);
    std::string external, space, align, type, name;
    int bytes = 0;
    in >> external >> space >> align >> bytes >> type >> name;
    if (space != ".shared" || align != ".align" || type != ".b8" || name.size() < 3 ||
        name.substr(name.size() - 2) != "[]")
      fail("a variable of an unknown form: " + text);
    if (bytes > static_cast<int>(kSharedBase)) fail("shared memory aligned to more than its base");
    shared_ = name.substr(0, name.size() - 2);
  }

  void kernel() {
    kernel_ = std::make_unique<Kernel>();
    std::istringstream head(until('('));
    std::string visible, entry;
    head >> visible >> entry >> kernel_->name;
    if (entry != ".entry") fail("not a kernel: " + entry);
    parameters(until(')'));
    while (skip() && text_[at_] != '{') {
      const std::string word = peek_word();
      at_ += word.size();
      skip();
      const size_t end = text_.find('\n', at_);
      const std::string value = text_.substr(at_, end - at_);
      if (word == ".maxntid")
        kernel_->threads = atoi(value.c_str());
      else if (word == ".minnctapersm")
        kernel_->blocks_per_sm = atoi(value.c_str());
      else
        fail("a directive '" + word + "' of a kernel is unknown");
      rest_of_line();
    }
    if (kernel_->threads == 0) fail("a kernel without .maxntid");
    ++at_;
    body();
    for (Instruction& instruction : kernel_->code) {
      if (instruction.target < 0) continue;
      const auto found = labels_.find(label_names_[static_cast<size_t>(instruction.target)]);
      if (found == labels_.end()) fail("no label " + label_names_[static_cast<size_t>(instruction.target)]);
      instruction.target = found->second;
    }
    labels_.clear();
    label_names_.clear();
    const std::string name = kernel_->name;
    if (!module_.kernels.emplace(name, std::move(kernel_)).second) fail("two kernels " + name);
  }

  void parameters(const std::string& text) {
    std::istringstream in(text);
    std::string word;
    int64_t offset = 0;
    while (in >> word) {  // .param .align 8 .b8 name[88],
      Parameter p;
      std::string align, type, name;
      in >> align >> p.align >> type >> name;
      if (word != ".param" || align != ".align" || type != ".b8") fail("a parameter of an unknown form: " + text);
      const size_t open = name.find('[');
      if (open == std::string::npos) fail("a parameter of an unknown form: " + text);
      p.name = name.substr(0, open);
      p.bytes = atoll(name.c_str() + open + 1);
      offset = (offset + p.align - 1) / p.align * p.align;
      p.offset = offset;
      offset += p.bytes;
      kernel_->parameters.push_back(p);
    }
    kernel_->parameter_bytes = offset;
  }

  void body() {
    scopes_.assign(1, {});
    while (true) {
      if (!skip()) fail("a kernel without an end");
      if (text_[at_] == '{') {
        scopes_.emplace_back();
        ++at_;
      } else if (text_[at_] == '}') {
        ++at_;
        scopes_.pop_back();
        if (scopes_.empty()) return;
      } else if (text_[at_] == '$') {
        const std::string label = until(':');
        if (!labels_.emplace(label, static_cast<int>(kernel_->code.size())).second) fail("two labels " + label);
      } else {
        const int line = line_;
        const std::string text = until(';');
        if (text.compare(0, 4, ".reg") == 0)
          registers(text);
        else if (text.compare(0, 7, ".pragma") == 0)
          continue;  // hints: "nounroll", "used_bytes_mask"
        else if (text[0] == '.')
          fail("a directive is unknown: " + text);
        else
          instruction(text, line);
      }
    }
  }

  void registers(const std::string& text) {
    std::istringstream in(text);
    std::string directive, type, name;
    in >> directive >> type;
    static const std::map<std::string, char> widths = {
        {".pred", 'p'}, {".b16", 'h'}, {".b32", 'w'}, {".f32", 'f'}, {".b64", 'd'}};
    const auto width = widths.find(type);
    if (width == widths.end()) fail("registers of an unknown type: " + text);
    while (in >> name) {
      if (name.back() == ',') name.pop_back();
      const size_t open = name.find('<');
      if (open == std::string::npos) {
        Operand operand;
        operand.kind = Operand::reg;
        operand.width = width->second;
        operand.slot = kernel_->slots++;
        scopes_.back().names[name] = operand;
      } else {
        const int count = atoi(name.c_str() + open + 1);
        scopes_.back().ranges.push_back({name.substr(0, open), count, kernel_->slots, width->second});
        kernel_->slots += count;
      }
    }
  }

  bool find_register(const std::string& name, Operand& operand) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->names.find(name);
      if (found != scope->names.end()) {
        operand = found->second;
        return true;
      }
      for (const Scope::Range& range : scope->ranges) {
        const size_t length = range.prefix.size();
        if (name.compare(0, length, range.prefix) != 0 || name.size() == length) continue;
        if (name.find_first_not_of("0123456789", length) != std::string::npos) continue;
        const int number = atoi(name.c_str() + length);
        if (number >= range.count) continue;
        operand.kind = Operand::reg;
        operand.width = range.width;
        operand.slot = range.first + number;
        return true;
      }
    }
    return false;
  }

  static std::string trimmed(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\n");
    if (first == std::string::npos) return "";
    return text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
  }

  // Parts between commas that stand outside brackets.
  static std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    int depth = 0;
    std::string now;
    for (const char c : text) {
      if (c == '{' || c == '[') ++depth;
      if (c == '}' || c == ']') --depth;
      if (c == ',' && depth == 0) {
        parts.push_back(trimmed(now));
        now.clear();
      } else {
        now += c;
      }
    }
    now = trimmed(now);
    if (!now.empty() || !parts.empty()) parts.push_back(now);
    return parts;
  }

  // A number; false if the text is none.
  static bool number(const std::string& text, Operand& operand) {
    char* end = nullptr;
    operand.kind = Operand::immediate;
    if (text.compare(0, 2, "0f") == 0 && text.size() == 10) {
      operand.value = static_cast<int64_t>(strtoull(text.c_str() + 2, &end, 16));
      return *end == 0;
    }
    if (text.empty() || !(isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-')) return false;
    operand.decimal = true;
    operand.value =
        text[0] == '-' ? strtoll(text.c_str(), &end, 0) : static_cast<int64_t>(strtoull(text.c_str(), &end, 0));
    return *end == 0;
  }

  // "symbol" of shared memory or a parameter; value: its address.
  bool symbol(const std::string& name, Operand& operand) const {
    if (!shared_.empty() && name == shared_) {
      operand.space = Space::shared;
      operand.value = kSharedBase;
      return true;
    }
    for (const Parameter& p : kernel_->parameters) {
      if (name != p.name) continue;
      operand.space = Space::parameter;
      operand.value = static_cast<int64_t>(kParameterBase) + p.offset;
      return true;
    }
    return false;
  }

  Operand address(const std::string& inside) {
    Operand operand;
    const std::vector<std::string> parts = split(inside);
    if (parts.empty()) fail("an empty address");
    std::string base = parts[0], offset;
    const size_t plus = base.find('+');
    if (plus != std::string::npos) {
      offset = base.substr(plus + 1);
      base = base.substr(0, plus);
    }
    if (!find_register(base, operand) && !symbol(base, operand)) fail("an address of an unknown form: " + inside);
    operand.kind = Operand::address;
    if (!offset.empty()) {
      Operand added;
      if (!number(offset, added)) fail("an offset of an unknown form: " + inside);
      operand.value += added.value;
    }
    if (parts.size() > 2) fail("an address of an unknown form: " + inside);
    if (parts.size() == 2) {
      if (parts[1].size() < 2 || parts[1][0] != '{') fail("coordinates of an unknown form: " + inside);
      for (const std::string& part : split(parts[1].substr(1, parts[1].size() - 2)))
        operand.parts.push_back(parsed(part));
    }
    return operand;
  }

  Operand parsed(const std::string& text) {
    Operand operand;
    if (text.empty()) fail("an empty operand");
    if (text == "_") return operand;
    if (text[0] == '[') return address(text.substr(1, text.size() - 2));
    if (text[0] == '{') {
      operand.kind = Operand::vector;
      for (const std::string& part : split(text.substr(1, text.size() - 2))) operand.parts.push_back(parsed(part));
      return operand;
    }
    const size_t bar = text.find('|');
    if (bar != std::string::npos) {  // a register and a predicate
      operand.kind = Operand::vector;
      operand.parts = {parsed(text.substr(0, bar)), parsed(text.substr(bar + 1))};
      return operand;
    }
    if (find_register(text, operand)) return operand;
    if (symbol(text, operand))
      operand.kind = Operand::symbol;
    else if (text[0] == '%')
      operand.kind = Operand::special, operand.name = text;
    else if (!number(text, operand))
      fail("an operand of an unknown form: " + text);
    operand.constant = std::make_shared<Lanes>();
    operand.constant->fill(static_cast<uint64_t>(operand.value));
    return operand;
  }

  void instruction(const std::string& whole, int line) {
    Instruction instruction;
    std::string text = trimmed(whole);
    instruction.text = text.substr(0, 160);
    instruction.line = line;
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t");
      instruction.guard_negated = text[1] == '!';
      Operand guard;
      if (!find_register(text.substr(instruction.guard_negated ? 2 : 1, end - (instruction.guard_negated ? 2 : 1)),
                         guard) ||
          guard.width != 'p')
        fail("a guard of an unknown form: " + text);
      instruction.guard = guard.slot;
      text = trimmed(text.substr(end));
    }
    const size_t end = text.find_first_of(" \t\n");
    instruction.opcode = text.substr(0, end);
    const std::string operands = end == std::string::npos ? "" : trimmed(text.substr(end));
    if (instruction.opcode == "bra" || instruction.opcode == "bra.uni") {
      instruction.target = static_cast<int>(label_names_.size());
      label_names_.push_back(operands);
    } else {
      for (const std::string& part : split(operands)) instruction.operands.push_back(parsed(part));
    }
    try {
      decode(instruction);
    } catch (const Fault& fault) {
      line_ = line;
      fail(std::string(fault.what()) + ": " + instruction.text);
    }
    if (instruction.opcode.compare(0, 6, "wgmma.") == 0) kernel_->warpgroups = true;
    kernel_->code.push_back(std::move(instruction));
  }

  const std::string& text_;
  Module& module_;
  size_t at_ = 0;
  int line_ = 1;
  std::string shared_;
  std::unique_ptr<Kernel> kernel_;
  std::vector<Scope> scopes_;
  std::unordered_map<std::string, int> labels_;
  std::vector<std::string> label_names_;
};

}  // namespace

void parse(const std::string& path, Module& module) {
  std::ifstream file(path);
  if (!file) throw Fault("no file " + path);
  std::stringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  try {
    Reader(text, module).module();
  } catch (const Fault& fault) {
    throw Fault(path + ", " + fault.what());
  }
}

}  // namespace ptx
