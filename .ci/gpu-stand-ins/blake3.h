// BLAKE3: O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3, one function, fast everywhere".
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "octets.h"

namespace digests {

constexpr std::size_t kBlock = 64, kChunk = 1024, kLanes = 8;
constexpr Word kStart = 1, kEnd = 2, kParent = 4, kRoot = 8, kKeyed = 16, kContext = 32, kMaterial = 64;
constexpr Word kInitial[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                              0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
constexpr Octet kPermutation[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};

// The same word of kLanes chunks.
typedef Word Lanes __attribute__((vector_size(4 * kLanes)));

template <typename W>
W rotate(W word, int by) {
  return (word >> by) | (word << (32 - by));
}

template <typename W>
void mix(W* v, int a, int b, int c, int d, W x, W y) {
  v[a] = v[a] + v[b] + x;
  v[d] = rotate(v[d] ^ v[a], 16);
  v[c] = v[c] + v[d];
  v[b] = rotate(v[b] ^ v[c], 12);
  v[a] = v[a] + v[b] + y;
  v[d] = rotate(v[d] ^ v[a], 8);
  v[c] = v[c] + v[d];
  v[b] = rotate(v[b] ^ v[c], 7);
}

// Seven rounds on the state v; m is used up.
template <typename W>
void rounds(W* v, W* m) {
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < 4; ++i) mix(v, i, 4 + i, 8 + i, 12 + i, m[2 * i], m[2 * i + 1]);
    for (int i = 0; i < 4; ++i) {
      mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[8 + 2 * i], m[9 + 2 * i]);
    }
    W permuted[16];
    for (int i = 0; i < 16; ++i) permuted[i] = m[kPermutation[i]];
    std::copy_n(permuted, 16, m);
  }
}

using Chain = std::array<Word, 8>;

// What a compression takes. Its first half is a chaining value, all of it a part of the root's output.
struct Node {
  Chain chain;
  Octet block[kBlock];
  Word length, flags;
  Long counter;

  std::array<Word, 16> compress(Long at, Word more) const {
    Word m[16], v[16];
    std::memcpy(m, block, kBlock);
    std::copy_n(chain.data(), 8, v);
    std::copy_n(kInitial, 4, v + 8);
    v[12] = static_cast<Word>(at);
    v[13] = static_cast<Word>(at >> 32);
    v[14] = length;
    v[15] = flags | more;
    rounds(v, m);
    std::array<Word, 16> out;
    for (int i = 0; i < 8; ++i) {
      out[i] = v[i] ^ v[8 + i];
      out[8 + i] = v[8 + i] ^ chain[i];
    }
    return out;
  }

  Chain chaining_value() const {
    const auto out = compress(counter, 0);
    Chain found;
    std::copy_n(out.begin(), 8, found.begin());
    return found;
  }
};

Node parent_of(const Chain& left, const Chain& right, const Chain& key, Word flags) {
  Node node{key, {}, kBlock, flags | kParent, 0};
  std::memcpy(node.block, left.data(), 32);
  std::memcpy(node.block + 32, right.data(), 32);
  return node;
}

struct Blake3 {
  Chain key;
  Word flags;
  Word depth;
  Node chunk;   // the last block of the chunk under way
  Word blocks;  // before it
  Chain stack[54];

  void begin(const Chain& with, Word kind) {
    key = with;
    flags = kind;
    depth = 0;
    start_chunk(0);
  }

  void start_chunk(Long counter) {
    chunk = Node{key, {}, 0, flags | kStart, counter};
    blocks = 0;
  }

  Node finished_chunk() const {
    Node node = chunk;
    node.flags |= kEnd;
    return node;
  }

  // Subtrees of equal size become one: as many as the number of chunks so far has zeros at its end.
  void add_chunk(Chain chain, Long chunks) {
    for (; (chunks & 1) == 0; chunks >>= 1) {
      chain = parent_of(stack[--depth], chain, key, flags).chaining_value();
    }
    stack[depth++] = chain;
  }

  void update(const Octet* data, std::size_t size) {
    while (size > 0) {
      if (blocks == 0 && chunk.length == 0 && size > kLanes * kChunk) {
        add_chunks(data);
        data += kLanes * kChunk;
        size -= kLanes * kChunk;
        continue;
      }
      if (chunk.length == kBlock) end_block();
      const std::size_t taken = std::min<std::size_t>(size, kBlock - chunk.length);
      std::memcpy(chunk.block + chunk.length, data, taken);
      chunk.length += static_cast<Word>(taken);
      data += taken;
      size -= taken;
    }
  }

  // A full block that is not the last of all.
  void end_block() {
    if (blocks == kChunk / kBlock - 1) {
      add_chunk(finished_chunk().chaining_value(), chunk.counter + 1);
      start_chunk(chunk.counter + 1);
      return;
    }
    chunk.chain = chunk.chaining_value();
    chunk.flags = flags;
    chunk.length = 0;
    std::memset(chunk.block, 0, kBlock);
    ++blocks;
  }

  // kLanes chunks side by side, none of them the last.
  void add_chunks(const Octet* data) {
    Lanes chain[8];
    for (int i = 0; i < 8; ++i) chain[i] = Lanes{} + key[i];
    Lanes low, high;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      low[lane] = static_cast<Word>(chunk.counter + lane);
      high[lane] = static_cast<Word>((chunk.counter + lane) >> 32);
    }
    for (std::size_t block = 0; block < kChunk / kBlock; ++block) {
      Lanes m[16], v[16];
      for (int i = 0; i < 16; ++i) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
          m[i][lane] = read<Word>(data + lane * kChunk + block * kBlock + 4 * i);
        }
      }
      std::copy_n(chain, 8, v);
      for (int i = 0; i < 4; ++i) v[8 + i] = Lanes{} + kInitial[i];
      v[12] = low;
      v[13] = high;
      v[14] = Lanes{} + static_cast<Word>(kBlock);
      v[15] = Lanes{} + (flags | (block == 0 ? kStart : 0) | (block == kChunk / kBlock - 1 ? kEnd : 0));
      rounds(v, m);
      for (int i = 0; i < 8; ++i) chain[i] = v[i] ^ v[8 + i];
    }
    const Long first = chunk.counter;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      Chain one;
      for (int i = 0; i < 8; ++i) one[i] = chain[i][lane];
      add_chunk(one, first + lane + 1);
    }
    start_chunk(first + kLanes);
  }

  void digest(Octet* out, std::size_t size) const {
    Node node = finished_chunk();
    for (Word left = depth; left-- > 0;) node = parent_of(stack[left], node.chaining_value(), key, flags);
    for (Long at = 0; at * kBlock < size; ++at) {
      const auto words = node.compress(at, kRoot);
      std::memcpy(out + at * kBlock, words.data(), std::min<std::size_t>(kBlock, size - at * kBlock));
    }
  }
};

}  // namespace digests
