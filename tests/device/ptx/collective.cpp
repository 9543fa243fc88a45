// What the lanes of a warp do together: votes, shuffles, meetings.
#include <bit>

#include "forms.h"

namespace ptx {

namespace {

enum class Vote { kBallot, kAny, kAll, kSame };

template <Vote kVote>
void vote(Warp& warp, const Instruction& i, Mask mask) {
  const Mask yes = (i.offset ? ~warp.predicate(i.operand[1]) : warp.predicate(i.operand[1])) & mask;
  if constexpr (kVote == Vote::kBallot) {
    fill<std::uint32_t>(warp, i.operand[0], mask, [=](std::uint32_t) { return yes; });
    return;
  }
  const bool found = kVote == Vote::kAny   ? yes != 0
                     : kVote == Vote::kAll ? yes == mask
                                           : yes == 0 || yes == mask;
  Mask& to = warp.predicate(i.operand[0]);
  to = found ? to | mask : to & ~mask;
}

enum class Shuffle { kUp, kDown, kXor, kIndex };

// detail: whether it also says which lanes had a source.
template <Shuffle kShuffle>
void shuffle(Warp& warp, const Instruction& i, Mask mask) {
  const std::uint32_t w = i.detail;
  std::uint32_t given[kWarp];
  std::memcpy(given, warp.lanes<std::uint32_t>(i.operand[w]), sizeof given);
  Mask in_range = 0;
  for (Mask left = mask; left; left &= left - 1) {
    const auto lane = static_cast<std::uint32_t>(std::countr_zero(left));
    const std::uint32_t by = static_cast<std::uint32_t>(warp.get(i.operand[w + 1], lane)) & 31;
    const auto bounds = static_cast<std::uint32_t>(warp.get(i.operand[w + 2], lane));
    const std::uint32_t segment = bounds >> 8 & 31, clamp = bounds & 31;
    const std::uint32_t first = lane & segment, last = first | (clamp & ~segment);
    std::uint32_t from = lane;
    bool there = false;
    if constexpr (kShuffle == Shuffle::kUp)
      from = lane - by, there = static_cast<std::int32_t>(from) >= static_cast<std::int32_t>(last);
    if constexpr (kShuffle == Shuffle::kDown) from = lane + by, there = from <= last;
    if constexpr (kShuffle == Shuffle::kXor) from = lane ^ by, there = from <= last;
    if constexpr (kShuffle == Shuffle::kIndex) from = first | (by & ~segment), there = from <= last;
    if (!there) from = lane;
    if (!(mask >> from & 1))
      warp.stop("it asks lane " + std::to_string(from) + ", which does not take part", lane);
    warp.set(i.operand[0], lane, given[from]);
    in_range |= static_cast<Mask>(there) << lane;
  }
  if (w == 2) {
    Mask& to = warp.predicate(i.operand[1]);
    to = (to & ~mask) | in_range;
  }
}

void only_meet(Warp&, const Instruction&, Mask) {}

}  // namespace

Found find_collective(const Statement& statement) {
  const std::string& text = statement.opcode.text;
  if (text == "ret" || text == "exit")
    return Form{.run = only_meet, .written = 0, .widths = {}, .way = Way::kReturn};
  if (text == "bar.sync") return Form{.run = only_meet, .written = 0, .widths = {4}, .way = Way::kMeetBlock};
  if (text == "bar.warp.sync")
    return Form{.run = only_meet, .written = 0, .widths = {4}, .way = Way::kMeetWarp, .member = 0};
  Form form{.run = nullptr, .widths = {0, 0, 4}, .way = Way::kMeetWarp, .member = 2};
  if (text == "vote.sync.any.pred") form.run = vote<Vote::kAny>;
  if (text == "vote.sync.all.pred") form.run = vote<Vote::kAll>;
  if (text == "vote.sync.uni.pred") form.run = vote<Vote::kSame>;
  if (text == "vote.sync.ballot.b32") form.run = vote<Vote::kBallot>, form.widths[0] = 4;
  if (form.run) return form;
  const bool two = !statement.terms.empty() && statement.terms[0].kind == Term::Kind::kVector;
  form = {.run = nullptr, .written = two ? 2 : 1, .widths = {4}, .way = Way::kMeetWarp};
  if (two) form.widths.push_back(0);
  form.widths.insert(form.widths.end(), {4, 4, 4, 4});
  form.detail = two ? 2 : 1;
  form.member = static_cast<int>(form.widths.size()) - 1;
  if (text == "shfl.sync.up.b32") form.run = shuffle<Shuffle::kUp>;
  if (text == "shfl.sync.down.b32") form.run = shuffle<Shuffle::kDown>;
  if (text == "shfl.sync.bfly.b32") form.run = shuffle<Shuffle::kXor>;
  if (text == "shfl.sync.idx.b32") form.run = shuffle<Shuffle::kIndex>;
  if (form.run) return form;
  return {};
}

}  // namespace ptx
