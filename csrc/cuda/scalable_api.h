// The C interface of decoding codec 3 (docs/format-scalable.md) on a GPU; part of api.h. In three steps:
// 1. host: kvs_scalable_pack_tables, once for each table set; its bytes are copied to the device.
// 2. host: kvs_scalable_read_header for each section, where K's angles are not known otherwise, then
//    kvs_scalable_parse for all of them: what streams say beside their numbers, checked as the Python parser
//    does, becomes one job for each stream.
// 3. device: kvs_scalable_decode of all jobs.
#pragma once

#include <cstddef>
#include <cstdint>

struct KvsPages;

extern "C" {

// What kvs_scalable_parse answers beside the faults of kvs::Fault: these bytes may be good, but are not for
// the device. Streams that do not begin at a multiple of 4, more than 2^16 components (2^14 for spans channel
// and head), heads of more than 256 dims: decode them on the host.
enum { KVS_SCALABLE_FOR_HOST = 255 };

// Calibrated: what one stream is decoded with; prepared once for each calibration and unit. "host" says that
// the CPU reads it, all else are device addresses, 4 bytes aligned at least.
struct KvsScalableUnit {
  const std::uint8_t* host_classes;  // host, [components]: 0 to 47
  std::uint64_t classes;             // the same on the device
  std::uint64_t mean;                // float [n]
  std::uint64_t scale;               // float [components]: synthesis_scale
  std::uint64_t matrix;  // span head [2 layers][dim][dim], group and all [components][n]; channel: 0
  std::uint32_t components;
  std::uint32_t matrix_bytes;  // of an element: 2 (float16), 4 (float), 0 where there is none
  float largest_scale;         // magnitude, of `scale`
  std::uint32_t reserved;      // 0
};

// One section, as far as it was read, and where it goes. `payload` are host addresses, `device` the same
// bytes there.
struct KvsScalableSection {
  const std::uint8_t* payload[3];
  std::uint64_t device[3];
  std::uint64_t lengths[3];
  const KvsScalableUnit* units;  // host, one for each stream of the section; null: uncalibrated
  std::uint64_t tables;  // device, 16 bytes aligned: packed, of the calibration or the uncalibrated ones
  // K's angles: float [tokens][pairs], and [layers] of the section, 1 where K is rotated; 0, 0 and 0 where
  // there are none. Uncalibrated, `rotated` is not read: the payload has it.
  std::uint64_t cosines, sines, rotated;
  std::int64_t first_position;  // -1: the payload's own is believed
  std::uint32_t levels;         // that were read, 1 to 3
  std::uint32_t object_levels;  // of the object's index; 0: the payload's own is believed
  std::uint32_t tokens, heads, dim;
  std::uint32_t head_begin, head_end;  // wanted, of the section's heads
  std::uint32_t token_begin, layer_begin,
      head;  // of the section's first token and layer and the first wanted head, in the pages
  std::uint16_t layers;
  std::uint16_t pairs;      // calibrated: of the angles
  std::uint8_t span;        // calibrated: 0 channel, 1 head, 2 group, 3 all
  std::uint8_t style;       // calibrated: 0 none, 1 halves, 2 pairs
  std::uint8_t item_bytes;  // of a value: 2 or 4
  std::uint8_t first[3];    // of the table set
};

// What the header of level 0 says.
struct KvsScalableHeader {
  std::uint32_t first_position;
  std::uint32_t streams_at;      // where the table of lengths begins
  std::uint32_t frequencies_at;  // float [pairs], in the payload; with it K's angles are computed
  std::uint16_t pairs;
  std::uint8_t calibrated, span, levels, style;
};

// One stream. Addresses are the device's; kvs_scalable_parse writes all of it.
struct KvsScalableJob {
  std::uint64_t words[3], states, escapes, classes, steps, means, exact_tokens, exact_values;
  std::uint64_t mean, scale, matrix, tables, cosines, sines, rotated;
  std::uint64_t numbers, order;  // places in the scratch, in elements
  std::uint32_t word_counts[3], escape_count;
  std::uint32_t exact_count;  // 65535: all tokens are exact (a raw stream)
  std::uint32_t components;
  std::uint32_t coded[3];  // M of each level of the object
  std::uint32_t tokens, token_begin, layer_begin, head, dim;
  std::uint32_t heads, want_begin, want_end;  // heads in x: 1, or all of the section's with span all
  std::uint16_t layers, pairs;
  std::uint8_t levels, object_levels, span, style, calibrated, matrix_bytes;
  std::uint8_t first[3];  // of the table set
  std::uint8_t reserved[3];
  float shrink, grow;  // powers of two, their product 1: y times its scale times `shrink` fits a float16
  std::uint32_t reserved_too;
};

// What the jobs of one call need together. Starts as zeros; kvs_scalable_parse adds to it.
struct KvsScalableTotals {
  std::uint64_t numbers;  // int16 of scratch
  std::uint64_t order;    // uint32 of scratch
  std::uint32_t jobs;
  std::uint32_t tokens;        // of the longest job
  std::uint32_t planes;        // of the job with the most: heads x layers x 2
  std::uint32_t components;    // the most, of jobs of spans channel and head
  std::uint32_t dim;           // the largest
  std::uint32_t narrow, wide;  // jobs of spans channel and head; of group and all, on tensor cores
  std::uint32_t wide_float;    // and without: matrices of floats, or of rows that are no multiple of 16 bytes
  std::uint32_t first_class;   // first[0] of the table set
  std::uint32_t classes_end;   // one more than the largest class of all jobs
  std::uint64_t tables;        // of all jobs: sections of other tables need a call of their own
};

// Bytes that a table set takes on the device.
KVS_EXPORT std::size_t kvs_scalable_tables_bytes(void);

// Packs a table set: first [3], base [48][256], refine [2][48][4][2], shift [3][48]. Answers 0, or 13 for
// what the format forbids in classes that are coded.
KVS_EXPORT int kvs_scalable_pack_tables(const std::uint8_t* first, const std::uint16_t* base,
                                        const std::uint16_t* refine, const float* shift,
                                        std::uint8_t* packed /* host */);

// Host. Answers a kvs::Fault, 0 where the header is good.
KVS_EXPORT int kvs_scalable_read_header(const KvsScalableSection* section, KvsScalableHeader* header);

// Host. Writes the jobs of the wanted streams, section by section, behind `totals->jobs`, of which there is
// room for `room`; `faults` [count] gets each section's verdict: a kvs::Fault, or KVS_SCALABLE_FOR_HOST.
// Sections that are not good have no jobs. `first_jobs` [count + 1] gets where each section's jobs begin.
// Answers 0, or 1 where there is no room or the sections do not share one table set.
KVS_EXPORT int kvs_scalable_parse(const KvsScalableSection* sections, std::uint32_t count,
                                  KvsScalableJob* jobs, std::uint32_t room, KvsScalableTotals* totals,
                                  std::uint32_t* first_jobs, std::uint32_t* faults);

// Bytes of the structs above, for callers that do not look inside: 0 job, 1 section, 2 unit, 3 header, 4
// totals.
KVS_EXPORT std::size_t kvs_scalable_struct_bytes(int which);

// Decodes `totals->jobs` jobs into pages of bfloat16 (1), float16 (2) or float (3). `faults` [jobs] gets a
// kvs::Fault for each job, as kvs_lossless_decode says. `numbers` and `order` are scratch of the size in
// `totals`, 16 bytes aligned.
KVS_EXPORT int kvs_scalable_decode(const KvsScalableJob* jobs /* device */,
                                   const KvsScalableTotals* totals /* host */,
                                   const KvsPages* pages /* host */, int dtype,
                                   std::int16_t* numbers /* device */, std::uint32_t* order /* device */,
                                   std::uint32_t* faults /* device */, void* stream);

// --- Encoding ---

// One stream of a section to encode. The jobs of a section are neighbours, stream by stream: one for each
// head, or with span all one for all heads. All addresses are the device's.
struct KvsScalableEncodeJob {
  std::uint64_t payload;  // 16 bytes aligned: the section's levels one behind the other, with room for
                          // kvs_scalable_encode_room of each of its streams, and header_bytes; the same in
                          // all of its jobs
  std::uint64_t scratch;  // 16 bytes aligned: kvs_scalable_encode_scratch bytes for this job alone
  std::uint64_t header;   // what level 0 says before its table of lengths
  std::uint64_t cosines, sines, rotated;  // as in KvsScalableSection, also uncalibrated
  // Calibrated, else 0: float [n]; static classes [components]; analysis as the format shapes it (channel:
  // 0); float [components].
  std::uint64_t mean, classes, matrix, scale;
  std::uint32_t header_bytes;  // a multiple of 4
  std::uint32_t tokens, token_begin, layer_begin;
  std::uint32_t head, heads;     // in the pages: the first, and how many x has: 1, or all with span all
  std::uint32_t streams, index;  // of the section: how many, and which of them this is
  std::uint32_t components;
  std::uint16_t layers, pairs;
  std::uint8_t calibrated, span, style, matrix_bytes;  // as in KvsScalableSection and KvsScalableUnit
  std::uint8_t levels;                                 // of the object
  std::uint8_t first_is_exact;                         // 1: the section's first token is the prompt's
  std::uint8_t reserved[6];                            // 0
};

// What the jobs of one call need together.
struct KvsScalableEncodeTotals {
  std::uint64_t tables;  // device, 16 bytes aligned: packed, of all jobs
  std::uint32_t jobs;
  std::uint32_t tokens;          // the most
  std::uint32_t components;      // that a matrix gives, the most: dim with span head
  std::uint32_t products;        // of a job, the most: layers x 2 with span head, else 1
  std::uint32_t uncalibrated;    // jobs
  std::uint32_t halves, floats;  // jobs with matrices of float16, and of floats
  std::uint32_t reserved;        // 0
};

// Bytes that a table set takes on the device for encoding.
KVS_EXPORT std::size_t kvs_scalable_encode_tables_bytes(void);

// Packs a table set: as kvs_scalable_pack_tables; `borders` [48], the least mean square of a component that
// gets each class, [0] being 0; `gains` [48][48], bits for each token that a component of the class found
// saves beside its static one. The host's encoder computes both in its own floating point, so they come from
// there.
KVS_EXPORT int kvs_scalable_pack_encode_tables(const std::uint8_t* first, const std::uint16_t* base,
                                               const std::uint16_t* refine, const double* borders,
                                               const double* gains, std::uint8_t* packed /* host */);

// Bytes of scratch for a job, whose addresses need not be set yet: 8 for each number and small change, 12
// with a matrix. 0: nothing for the device. That is what the format forbids, more than 2^16 tokens or numbers
// of a token, heads of more than 256 dims, and streams of 2^30 bytes or more. Host.
KVS_EXPORT std::uint64_t kvs_scalable_encode_scratch(const KvsScalableEncodeJob* job, std::uint32_t dim,
                                                     std::uint32_t item_bytes);

// Bytes of payload that a job's stream may take, its places in tables of lengths included. Host.
KVS_EXPORT std::uint64_t kvs_scalable_encode_room(const KvsScalableEncodeJob* job, std::uint32_t dim,
                                                  std::uint32_t item_bytes);

// 0 KvsScalableEncodeJob, 1 KvsScalableEncodeTotals.
KVS_EXPORT std::size_t kvs_scalable_encode_struct_bytes(int which);

// Encodes pages of bfloat16 (1), float16 (2) or float (3): without a matrix the bytes of the host's encoder.
// With one, y is a sum of as many products as the transform has dimensions, in float, in another order than
// the host's (which is another on other hosts, too): numbers differ where y lies so near to the middle
// between two. `lengths` [jobs][3] gets the bytes of each job's stream at each level, 0 at levels that there
// are not; a section's payload at a level is its header (level 0 alone), 4 bytes and the stream for each job.
// Whether the section is to be coded exactly instead, for its size, is the caller's to find from them.
KVS_EXPORT int kvs_scalable_encode(const KvsScalableEncodeJob* jobs /* device */,
                                   const KvsScalableEncodeTotals* totals /* host */,
                                   const KvsPages* pages /* host */, int dtype,
                                   std::uint32_t* lengths /* device */, void* stream);

}  // extern "C"
