// DropKey's masks on a CPU in one pass, bit for bit those of models/counter_hash.py, which states the definition.
//
// A row has two words. Word w of a row serves the keys 256 g + 64 j + l (w = 64 g + l, j from 0 to 3) with its byte j. A
// key is dropped if its byte, moved to the top and read as signed, is below the threshold of its block of 64 keys.
//
// Plain C++ without PyTorch's headers, which take minutes to compile.

#include <algorithm>
#include <cstdint>

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C"
#endif

namespace {

constexpr uint32_t MIX_1 = 0x7FEB352Du, MIX_2 = 0x846CA68Bu, GOLDEN = 0x9E3779B9u;
constexpr uint32_t STEP_1 = 0x85EBCA6Bu, STEP_2 = 0xC2B2AE35u;
constexpr int64_t LANES = 64, GROUP = 4 * LANES;
// decisions from which on another thread is worth its start
constexpr int64_t GRAIN = 32768;

// of a ratio (counter_hash.byte_thresholds)
struct Thresholds {
  int32_t lower, upper, fraction;
};

inline uint32_t fold(uint32_t x) { return x ^ (x >> 16); }

// without the first fold, which distributes over the xor of row and column
inline uint32_t mix_folded(uint32_t x, uint32_t key) {
  x *= MIX_1;
  x = (x ^ (x >> 15) ^ key) * MIX_2;
  return fold(x);
}

struct Pair {
  uint32_t k1, k2;
};

// the pair that follows from a pair and an index (counter_hash.step)
inline Pair step(Pair from, int64_t index) {
  const uint32_t offset = static_cast<uint32_t>(index) * GOLDEN;
  const uint32_t k1 = mix_folded(fold(from.k1 ^ (offset + STEP_1)), 0);
  return {k1, mix_folded(fold(from.k2 ^ (offset + STEP_2) ^ k1), 0)};
}

template <typename T>
inline void fill_block(T* out, int64_t count, const uint32_t* words, uint32_t shift, int32_t threshold, T infinity) {
  for (int64_t lane = 0; lane < count; ++lane)
    out[lane] = static_cast<int32_t>(words[lane] << shift) < threshold ? infinity : T(0);
}

// One row; `folded` is k1 with its upper half folded into the lower, which is its own inverse.
template <typename T>
void fill_row(T* out, int64_t keys, uint32_t folded, uint32_t k2, Thresholds of, T infinity) {
  const uint32_t k1 = fold(folded);
  uint32_t words[LANES];
  for (int64_t start = 0; start < keys; start += GROUP) {
    const uint32_t first = static_cast<uint32_t>(start / 4);
    for (int64_t lane = 0; lane < LANES; ++lane)
      words[lane] = mix_folded(folded ^ fold((first + static_cast<uint32_t>(lane)) * GOLDEN), k2);
    for (int64_t byte = 0; byte < 4 && start + LANES * byte < keys; ++byte) {
      const int64_t key = start + LANES * byte;
      const uint32_t block = static_cast<uint32_t>(key / LANES), shift = 24 - 8 * static_cast<uint32_t>(byte);
      const int32_t dither = static_cast<int32_t>(mix_folded(fold(3 * k1 ^ k2 ^ block * GOLDEN), 0));
      const int32_t threshold = dither < of.fraction ? of.upper : of.lower;
      // a length that the compiler knows becomes whole vectors
      if (keys - key >= LANES)
        fill_block(out + key, LANES, words, shift, threshold, infinity);
      else
        fill_block(out + key, keys - key, words, shift, threshold, infinity);
    }
  }
}

template <typename T>
void fill(T* out, int64_t rows, int64_t keys, const int32_t* folded, const int32_t* k2, Thresholds of, T infinity,
          int64_t threads) {
  const int used = static_cast<int>(std::max<int64_t>(1, std::min(threads, rows * keys / GRAIN)));
  (void)used;
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
  for (int64_t row = 0; row < rows; ++row)
    fill_row(out + row * keys, keys, static_cast<uint32_t>(folded[row]), static_cast<uint32_t>(k2[row]), of, infinity);
}

}  // namespace

// `out` are the bits of floats [rows, keys], of 4 or 2 bytes, and `infinity` those of -inf; folded and k2 are [rows].
EXPORTED void hf_dropkey_fill_masks(void* out, int64_t bytes, uint32_t infinity, int64_t rows, int64_t keys,
                                    const int32_t* folded, const int32_t* k2, int32_t lower, int32_t upper,
                                    int32_t fraction, int64_t threads) {
  const Thresholds of{lower, upper, fraction};
  if (bytes == 4)
    fill(static_cast<uint32_t*>(out), rows, keys, folded, k2, of, infinity, threads);
  else
    fill(static_cast<uint16_t*>(out), rows, keys, folded, k2, of, static_cast<uint16_t>(infinity), threads);
}

// The pairs k1 and k2, each [images, heads, queries], of one seed of two words, or of a seed for each image.
EXPORTED void hf_dropkey_row_keys(int32_t* k1, int32_t* k2, const int32_t* seeds, int32_t seed_by_image, int64_t images,
                                  int64_t heads, int64_t queries) {
  for (int64_t image = 0; image < images; ++image) {
    const int32_t* seed = seeds + (seed_by_image ? 2 * image : 0);
    const Pair of_seed{static_cast<uint32_t>(seed[0]), static_cast<uint32_t>(seed[1])};
    const Pair of_image = step(of_seed, seed_by_image ? 0 : image);
    for (int64_t head = 0; head < heads; ++head) {
      const Pair of_head = step(of_image, head);
      for (int64_t query = 0; query < queries; ++query) {
        const Pair row = step(of_head, query);
        *k1++ = static_cast<int32_t>(row.k1);
        *k2++ = static_cast<int32_t>(row.k2);
      }
    }
  }
}
