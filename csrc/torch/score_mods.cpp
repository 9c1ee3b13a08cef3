#include "torch/score_mods.h"

#include <c10/util/Exception.h>

#include <map>
#include <mutex>

namespace attention_ext {

namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, CompiledScoreMod, std::less<>> compiled;
};

Registry& registry() {
  static Registry all;
  return all;
}

}  // namespace

void register_score_mod(const std::string& key, const CompiledScoreMod& compiled) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().compiled.insert_or_assign(key, compiled);
}

CompiledScoreMod compiled_score_mod(const char* op, std::string_view key) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().compiled.find(key);
  TORCH_CHECK(found != registry().compiled.end(), op,
              ": expected `score_mod` to be one that this process compiled, got ", key,
              ": call attention_ext.flex_attention with the function, here too");
  return found->second;
}

}  // namespace attention_ext
