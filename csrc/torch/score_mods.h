// The compiled score_mods of this process, by the hash of what they were made from.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "attention_ext/score_block.h"

namespace attention_ext {

struct CompiledScoreMod {
  ScoreModFunction function;
  ScoreModGradient gradient;  // null where the derivative is 1
  bool is_double;
  int64_t captured;  // their number
};

void register_score_mod(const std::string& key, const CompiledScoreMod& compiled);

// Raises for a key that was not registered.
CompiledScoreMod compiled_score_mod(const char* op, std::string_view key);

}  // namespace attention_ext
