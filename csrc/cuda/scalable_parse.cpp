// What the streams of codec 3 say beside their numbers: bytes in, jobs for the device out. Host code. The
// verdicts are those of kvstore_s3/codec/scalable.py and scalable_stream.py, which read the same in the same
// order.

#include <cmath>
#include <cstring>

#include "scalable_places.h"

namespace {

using namespace kvs;

constexpr std::uint32_t kHeaderBytes = 12, kRaw = 0xFFFF;
constexpr std::uint32_t kMostComponents = 1u << 16, kMostNarrow = 1u << 14, kMostDim = 256;
constexpr std::uint8_t kSpanAll = 3, kSpanHead = 1;
constexpr int kGood = 0, kTruncated = static_cast<int>(Fault::kTruncated),
              kBad = static_cast<int>(Fault::kBadPayload);

template <typename Number>
Number load(const std::uint8_t* from) {
  Number number;
  std::memcpy(&number, from, sizeof number);
  return number;
}

// Takes parts off the front of a stream, and never more than it has.
struct Reader {
  const std::uint8_t* host;
  std::uint64_t device;
  std::uint64_t length;
  std::uint64_t at = 0;
  bool failed = false;

  // Where the part begins; 0 and `failed` where it is not all there. Once failed, always failed.
  std::uint64_t take(std::uint64_t size) {
    if (failed || size > length - at) {
      failed = true;
      return 0;
    }
    at += size;
    return at - size;
  }

  std::uint64_t take_device(std::uint64_t size) { return device + take(size); }

  void skip_padding() {
    const std::uint64_t size = (4 - at % 4) % 4, begin = take(size);
    for (std::uint64_t i = 0; i < size && !failed; ++i) failed |= host[begin + i] != 0;
  }

  bool finish() {
    skip_padding();
    return !failed && at == length;
  }
};

struct Section {
  const KvsScalableSection& given;
  KvsScalableHeader header;
  std::uint32_t streams;  // of the section
  std::uint32_t stream_heads;
  std::uint64_t numbers;  // n of a stream
};

int read_rotation(const KvsScalableSection& of, KvsScalableHeader& header) {
  const std::uint64_t flags_at = kHeaderBytes + 4ull * header.pairs;
  const std::uint64_t padded = (of.layers + 3ull) / 4 * 4;
  const std::uint64_t end = header.pairs ? flags_at + padded : kHeaderBytes;
  if (of.lengths[0] < end) return kTruncated;
  for (std::uint32_t i = 0; i < header.pairs; ++i) {
    if (!std::isfinite(load<float>(of.payload[0] + kHeaderBytes + 4 * i))) return kBad;
  }
  for (std::uint64_t i = flags_at; i < end; ++i) {
    if (of.payload[0][i] > (i - flags_at < of.layers ? 1 : 0)) return kBad;
  }
  header.streams_at = static_cast<std::uint32_t>(end);
  return kGood;
}

int read_header(const KvsScalableSection& of, KvsScalableHeader& header) {
  header = {};
  if (of.lengths[0] < kHeaderBytes) return kTruncated;
  const std::uint8_t* bytes = of.payload[0];
  const std::uint8_t mode = bytes[0];
  header.span = bytes[1];
  header.levels = bytes[2];
  header.style = bytes[3];
  header.first_position = load<std::uint32_t>(bytes + 4);
  header.pairs = load<std::uint16_t>(bytes + 8);
  header.calibrated = mode == 0;
  header.frequencies_at = header.streams_at = kHeaderBytes;
  if (mode > 1 || header.span > kSpanAll || header.style > 2 || load<std::uint16_t>(bytes + 10) != 0)
    return kBad;
  if (header.levels < 1 || header.levels > kLevels) return kBad;
  if (of.object_levels != 0 && header.levels != of.object_levels) return kBad;
  if (of.first_position >= 0 && header.first_position != of.first_position) return kBad;
  if (header.calibrated != (of.units != nullptr)) return kBad;
  if (header.calibrated) return header.style || header.pairs || header.span != of.span ? kBad : kGood;
  if (header.span || (header.style == 0) != (header.pairs == 0) || 2u * header.pairs > of.dim) return kBad;
  return read_rotation(of, header);
}

// Whether the table of lengths at `at` and its streams are all of a payload.
int check_lengths(const KvsScalableSection& of, unsigned level, std::uint64_t at, std::uint32_t streams) {
  std::uint64_t end = at + 4ull * streams;
  if (of.lengths[level] < end) return kTruncated;
  for (std::uint32_t i = 0; i < streams; ++i) end += load<std::uint32_t>(of.payload[level] + at + 4ull * i);
  if (end == of.lengths[level]) return kGood;
  return end > of.lengths[level] ? kTruncated : kBad;
}

bool steps_are_sound(const std::uint8_t* steps, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i) {
    const float step = load<float>(steps + 4ull * i);
    if (!std::isfinite(step) || !(step > 0)) return false;
  }
  return true;
}

bool exact_tokens_are_sound(const std::uint8_t* numbers, std::uint32_t count, std::uint32_t tokens) {
  std::int64_t before = -1;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::int64_t token = load<std::uint16_t>(numbers + 2ull * i);
    if (token <= before) return false;
    before = token;
  }
  return before < static_cast<std::int64_t>(tokens);
}

// M of each level, and how many classes there are up to the largest; false where one is none.
bool count_classes(const std::uint8_t* classes, KvsScalableJob& job, std::uint32_t& classes_end) {
  std::uint32_t counts[256] = {};
  for (std::uint32_t i = 0; i < job.components; ++i) ++counts[classes[i]];
  for (std::uint32_t k = kClasses; k < 256; ++k) {
    if (counts[k] != 0) return false;
  }
  for (std::uint32_t k = 0; k < kClasses; ++k) {
    if (counts[k] != 0 && k + 1 > classes_end) classes_end = k + 1;
    for (unsigned level = 0; level < job.object_levels; ++level) {
      if (k >= job.first[level]) job.coded[level] += counts[k];
    }
  }
  return true;
}

int parse_raw(const Section& section, Reader& reader, KvsScalableJob& job, std::uint8_t flags,
              std::uint8_t reserved) {
  if (job.word_counts[0] || job.escape_count || flags || reserved) return kBad;
  job.exact_values = reader.take_device(job.tokens * section.numbers * section.given.item_bytes);
  return reader.finish() ? kGood : kBad;
}

int parse_base(const Section& section, std::uint32_t stream, Reader reader, KvsScalableJob& job,
               std::uint32_t& classes_end) {
  const std::uint64_t head_at = reader.take(kHeaderBytes);
  if (reader.failed) return kBad;
  const std::uint8_t* head = reader.host + head_at;
  job.word_counts[0] = load<std::uint32_t>(head);
  job.escape_count = load<std::uint32_t>(head + 4);
  job.exact_count = load<std::uint16_t>(head + 8);
  const std::uint8_t flags = head[10], reserved = head[11];
  if (job.exact_count == kRaw) return parse_raw(section, reader, job, flags, reserved);
  if (job.exact_count >= job.tokens || flags > 1 || reserved || (!job.calibrated && !flags)) return kBad;
  if (!job.calibrated) {
    const std::uint32_t steps = 2u * job.layers;
    const std::uint64_t at = reader.take(4ull * steps);
    if (reader.failed || !steps_are_sound(reader.host + at, steps)) return kBad;
    job.steps = reader.device + at;
    job.means = reader.take_device(section.numbers);
  }
  const std::uint64_t classes_at = reader.take(flags ? job.components : 0);
  if (reader.failed) return kBad;
  if (flags) job.classes = reader.device + classes_at;
  const auto* static_classes = job.calibrated ? section.given.units[stream].host_classes : nullptr;
  if (!count_classes(flags ? reader.host + classes_at : static_classes, job, classes_end)) return kBad;
  reader.skip_padding();
  const std::uint32_t lanes = job.coded[job.object_levels - 1];
  job.states = reader.take_device(4ull * (lanes < kLanes ? lanes : kLanes));
  job.words[0] = reader.take_device(2ull * job.word_counts[0]);
  job.escapes = reader.take_device(2ull * job.escape_count);
  const std::uint64_t exact_at = reader.take(2ull * job.exact_count);
  if (reader.failed || !exact_tokens_are_sound(reader.host + exact_at, job.exact_count, job.tokens))
    return kBad;
  job.exact_tokens = reader.device + exact_at;
  job.exact_values = reader.take_device(job.exact_count * section.numbers * section.given.item_bytes);
  return reader.finish() ? kGood : kBad;
}

int parse_refinement(Reader reader, KvsScalableJob& job, unsigned level) {
  if (job.exact_count == kRaw) return reader.length ? kBad : kGood;
  const std::uint64_t at = reader.take(4);
  if (reader.failed) return kBad;
  job.word_counts[level] = load<std::uint32_t>(reader.host + at);
  job.words[level] = reader.take_device(2ull * job.word_counts[level]);
  return reader.finish() ? kGood : kBad;
}

// The power of two above a unit's largest scale: y is below 2^15, so that their quotient's products fit a
// float16.
bool set_shrink(const KvsScalableUnit& unit, KvsScalableJob& job) {
  int exponent = 0;
  std::frexp(unit.largest_scale, &exponent);
  const bool sound = std::isfinite(unit.largest_scale) && exponent >= -120 && exponent <= 120;
  job.shrink = std::ldexp(1.0f, sound ? -exponent : 0);
  job.grow = std::ldexp(1.0f, sound ? exponent : 0);
  return sound;
}

bool set_map(const Section& section, std::uint32_t stream, KvsScalableJob& job) {
  const KvsScalableSection& of = section.given;
  job.tables = of.tables;
  std::memcpy(job.first, of.first, sizeof job.first);
  job.cosines = of.cosines;
  job.sines = of.sines;
  job.shrink = job.grow = 1;
  bool sound = true;
  if (section.header.calibrated) {
    const KvsScalableUnit& unit = of.units[stream];
    job.components = unit.components;
    job.classes = unit.classes;
    job.mean = unit.mean;
    job.scale = unit.scale;
    job.matrix = unit.matrix;
    job.matrix_bytes = static_cast<std::uint8_t>(unit.matrix_bytes);
    job.style = of.style;
    job.pairs = of.pairs;
    job.rotated = of.rotated;
    if (job.matrix_bytes == 2) sound = set_shrink(unit, job);
  } else {
    job.components = static_cast<std::uint32_t>(section.numbers);
    job.style = section.header.style;
    job.pairs = section.header.pairs;
    job.rotated = of.device[0] + section.header.frequencies_at + 4ull * job.pairs;
  }
  if (job.style == 0 || job.cosines == 0) job.style = 0, job.pairs = 0;
  return sound;
}

// False where the device cannot decode with the stream's map.
bool start_job(const Section& section, std::uint32_t stream, KvsScalableJob& job) {
  const KvsScalableSection& of = section.given;
  job = {};
  job.calibrated = section.header.calibrated;
  job.span = section.header.span;
  job.levels = static_cast<std::uint8_t>(of.levels);
  job.object_levels = section.header.levels;
  job.tokens = of.tokens;
  job.token_begin = of.token_begin;
  job.layer_begin = of.layer_begin;
  job.layers = of.layers;
  job.dim = of.dim;
  job.heads = section.stream_heads;
  const bool all = job.span == kSpanAll;
  job.want_begin = all ? of.head_begin : 0;
  job.want_end = all ? of.head_end : 1;
  job.head = all ? of.head : of.head + stream - of.head_begin;
  return set_map(section, stream, job);
}

bool is_for_device(const Section& section, const KvsScalableJob& job) {
  const std::uint32_t most = job.span <= kSpanHead ? kMostNarrow : kMostComponents;
  return job.components <= most && section.numbers <= kMostComponents && section.given.dim <= kMostDim;
}

int parse_stream(const Section& section, std::uint32_t stream, Reader (&readers)[kLevels],
                 KvsScalableJob& job, KvsScalableTotals& totals) {
  bool for_device = start_job(section, stream, job);
  std::uint32_t classes_end = totals.classes_end;
  const KvsScalableSection& of = section.given;
  for (unsigned level = 0; level < of.levels; ++level) {
    for_device &= readers[level].device % 4 == 0;
    const int fault = level == 0 ? parse_base(section, stream, readers[0], job, classes_end)
                                 : parse_refinement(readers[level], job, level);
    if (fault != kGood) return fault;
  }
  if (!for_device || !is_for_device(section, job)) return KVS_SCALABLE_FOR_HOST;
  totals.classes_end = classes_end;
  return kGood;
}

void place_job(KvsScalableJob& job, KvsScalableTotals& totals) {
  const auto grow = [](std::uint32_t& most, std::uint32_t value) { most = value > most ? value : most; };
  job.numbers = totals.numbers;
  job.order = totals.order;
  const bool raw = job.exact_count == kRaw;
  const std::uint64_t blocks = raw ? 0 : (job.coded[job.levels - 1] + kLanes - 1) / kLanes;
  totals.numbers += blocks * padded_tokens(job.tokens) * kLanes;
  totals.order += raw ? 0 : (job.coded[job.object_levels - 1] + 3ull) / 4 * 4;
  ++totals.jobs;
  grow(totals.tokens, job.tokens);
  grow(totals.planes, 2u * job.layers * job.heads);
  grow(totals.dim, job.dim);
  if (job.span <= kSpanHead) grow(totals.components, job.components);
  ++(job.span <= kSpanHead ? totals.narrow : takes_tiles(job) ? totals.wide : totals.wide_float);
}

// All wanted streams of a section: jobs from `jobs` on.
int parse_section(const KvsScalableSection& given, KvsScalableJob* jobs, KvsScalableTotals& totals) {
  Section section{given, {}, given.heads, 1, 2ull * given.layers * given.dim};
  if (const int fault = read_header(given, section.header)) return fault;
  if (given.levels < 1 || given.levels > section.header.levels) return kBad;
  const bool all = section.header.span == kSpanAll;
  if (all) {
    section.streams = 1;
    section.stream_heads = given.heads;
    section.numbers *= given.heads;
  }
  Reader readers[kLevels]{};
  std::uint64_t at[kLevels];
  for (unsigned level = 0; level < given.levels; ++level) {
    const std::uint64_t table = level == 0 ? section.header.streams_at : 0;
    if (const int fault = check_lengths(given, level, table, section.streams)) return fault;
    at[level] = table + 4ull * section.streams;
  }
  const std::uint32_t begin = all ? 0 : given.head_begin, end = all ? 1 : given.head_end;
  for (std::uint32_t stream = 0; stream < end; ++stream) {
    for (unsigned level = 0; level < given.levels; ++level) {
      const std::uint64_t table = level == 0 ? section.header.streams_at : 0;
      const std::uint64_t length = load<std::uint32_t>(given.payload[level] + table + 4ull * stream);
      readers[level] = {given.payload[level] + at[level], given.device[level] + at[level], length};
      at[level] += length;
    }
    if (stream < begin) continue;
    KvsScalableJob& job = jobs[stream - begin];
    if (const int fault = parse_stream(section, stream, readers, job, totals)) return fault;
    place_job(job, totals);
  }
  return kGood;
}

}  // namespace

int kvs_scalable_read_header(const KvsScalableSection* section, KvsScalableHeader* header) {
  return read_header(*section, *header);
}

int kvs_scalable_parse(const KvsScalableSection* sections, std::uint32_t count, KvsScalableJob* jobs,
                       std::uint32_t room, KvsScalableTotals* totals, std::uint32_t* first_jobs,
                       std::uint32_t* faults) {
  for (std::uint32_t i = 0; i < count; ++i) {
    const KvsScalableSection& section = sections[i];
    first_jobs[i] = totals->jobs;
    if (room - totals->jobs < section.head_end - section.head_begin) return 1;
    if (totals->tables != 0 && totals->tables != section.tables) return 1;
    KvsScalableTotals after = *totals;
    after.tables = section.tables;
    after.first_class = section.first[0];
    const int fault = parse_section(section, jobs + totals->jobs, after);
    faults[i] = static_cast<std::uint32_t>(fault);
    if (fault == kGood) *totals = after;
  }
  first_jobs[count] = totals->jobs;
  return 0;
}

std::size_t kvs_scalable_struct_bytes(int which) {
  constexpr std::size_t kBytes[] = {sizeof(KvsScalableJob), sizeof(KvsScalableSection),
                                    sizeof(KvsScalableUnit), sizeof(KvsScalableHeader),
                                    sizeof(KvsScalableTotals)};
  return which >= 0 && which < 5 ? kBytes[which] : 0;
}
