// An S3-shaped server that only moves bytes, so that the server's own cost does not hide the client's.
//
//   byte_server [--latency-ms N] [--certificate FILE --key FILE]     serves 127.0.0.1; prints its port first
//
// One thread, epoll, objects in memory: a PUT lands where it stays, a GET leaves from there by send, as from
// any server that has the bytes (sendfile costs the reader more over loopback: it gets them in pages of 4
// KiB). A PUT whose path contains "/sink/" is read and dropped. HEAD and GET give back the x-amz-meta-* of
// the PUT. Ranges, If-None-Match: *, If-Match, Expect, keep-alive and an empty listing are served; signatures
// and checksums are not looked at. Each answer begins N ms after its request was there. With a certificate it
// speaks TLS 1.3 (built with -DWITH_TLS, OpenSSL).
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>
#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using std::string;
using std::string_view;

constexpr size_t kMemory = size_t{32} << 30;  // address space; only what is written is committed
constexpr size_t kScratch = size_t{1} << 20;
constexpr size_t kHead = 64 * 1024;

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

struct Object {
  size_t begin = 0, size = 0;
  string etag, metadata;
};

struct Request {
  string method, path, query, range, if_match, metadata;
  size_t length = 0;
  bool if_none_match = false, expect = false, close = false;
};

struct Memory {
  char* base = nullptr;
  size_t used = 0;

  Memory() {
    void* at =
        mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) fail("mmap");
    madvise(at, kMemory, MADV_HUGEPAGE);
    base = static_cast<char*>(at);
  }

  // Objects that are replaced are not reclaimed: the server lives as long as a benchmark.
  std::optional<size_t> allocate(size_t size) {
    const size_t rounded = (size + 4095) / 4096 * 4096;
    if (rounded > kMemory - used) return std::nullopt;
    return std::exchange(used, used + rounded);
  }
};

// What is read from and written to a socket: plain, or through TLS. Returns as the system calls do, EAGAIN
// included.
class Channel {
 public:
  explicit Channel(int socket) : socket_(socket) {}
  virtual ~Channel() { close(socket_); }
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  int socket() const { return socket_; }
  virtual ssize_t read(char* into, size_t size) { return recv(socket_, into, size, 0); }
  virtual ssize_t drop(char*, size_t size) { return recv(socket_, nullptr, size, MSG_TRUNC); }
  virtual ssize_t write(const char* from, size_t size) { return send(socket_, from, size, MSG_NOSIGNAL); }

 private:
  int socket_;
};

#ifdef WITH_TLS
class TlsChannel final : public Channel {
 public:
  TlsChannel(int socket, SSL_CTX* context) : Channel(socket), ssl_(SSL_new(context)) {
    SSL_set_fd(ssl_, socket);
    SSL_set_accept_state(ssl_);
  }
  ~TlsChannel() override { SSL_free(ssl_); }

  ssize_t read(char* into, size_t size) override { return give(SSL_read(ssl_, into, clamp(size))); }
  ssize_t drop(char* scratch, size_t size) override { return read(scratch, std::min(size, kScratch)); }
  ssize_t write(const char* from, size_t size) override { return give(SSL_write(ssl_, from, clamp(size))); }

 private:
  static int clamp(size_t size) { return static_cast<int>(std::min(size, size_t{1} << 24)); }

  ssize_t give(int result) {
    if (result > 0) return result;
    const int why = SSL_get_error(ssl_, result);
    ERR_clear_error();
    if (why == SSL_ERROR_ZERO_RETURN) return 0;
    errno = why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? EAGAIN : EIO;
    return -1;
  }

  SSL* ssl_;
};

SSL_CTX* open_tls(const char* certificate, const char* key) {
  SSL_CTX* context = SSL_CTX_new(TLS_server_method());
  SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
  SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  if (SSL_CTX_use_certificate_chain_file(context, certificate) != 1 ||
      SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1) {
    ERR_print_errors_fp(stderr);
    std::exit(1);
  }
  return context;
}
#endif

struct Connection {
  enum class State { kHead, kBody, kWaiting, kAnswer };

  std::unique_ptr<Channel> channel;
  State state = State::kHead;
  string input;  // bytes of the next head, and what came along behind it
  Request request;
  size_t body_left = 0, body_at = 0;
  bool kept = false;  // the body goes to memory, not to the sink
  string output;
  size_t output_done = 0;
  size_t object_at = 0, object_left = 0;  // sent behind `output`
  bool writable_wanted = false;
  uint64_t serial = 0;  // of the answer that it waits for
};

string lower(string_view text) {
  string out(text);
  std::transform(out.begin(), out.end(), out.begin(), [](unsigned char c) { return std::tolower(c); });
  return out;
}

std::optional<size_t> number(string_view text) {
  size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Returns nothing where the head is not one that this server speaks.
std::optional<Request> parse_head(string_view head) {
  Request request;
  const size_t line_end = head.find("\r\n");
  const string_view line = head.substr(0, line_end);
  const size_t first = line.find(' '), last = line.rfind(' ');
  if (first == string_view::npos || last == first) return std::nullopt;
  request.method = line.substr(0, first);
  const string_view target = line.substr(first + 1, last - first - 1);
  const size_t question = target.find('?');
  request.path = target.substr(0, question);
  if (question != string_view::npos) request.query = target.substr(question + 1);
  for (size_t at = line_end + 2; at < head.size();) {
    const size_t end = head.find("\r\n", at);
    const string_view field = head.substr(at, end - at);
    at = end + 2;
    const size_t colon = field.find(':');
    if (colon == string_view::npos) continue;
    const string name = lower(field.substr(0, colon));
    string_view value = field.substr(colon + 1);
    while (!value.empty() && value.front() == ' ') value.remove_prefix(1);
    if (name == "content-length") {
      const auto length = number(value);
      if (!length) return std::nullopt;
      request.length = *length;
    } else if (name == "transfer-encoding") {
      return std::nullopt;
    } else if (name == "range") {
      request.range = value;
    } else if (name == "if-match") {
      request.if_match = value;
    } else if (name == "if-none-match") {
      request.if_none_match = value == "*";
    } else if (name == "expect") {
      request.expect = true;
    } else if (name == "connection") {
      request.close = lower(value) == "close";
    } else if (name.starts_with("x-amz-meta-")) {
      request.metadata += name + ": " + string(value) + "\r\n";
    }
  }
  return request;
}

// "bytes=A-B", "bytes=A-" or "bytes=-N" of `size` bytes: begin and end, or nothing where there are no such
// bytes.
std::optional<std::pair<size_t, size_t>> parse_range(string_view range, size_t size) {
  if (!range.starts_with("bytes=")) return std::nullopt;
  range.remove_prefix(6);
  const size_t dash = range.find('-');
  if (dash == string_view::npos) return std::nullopt;
  const auto from = number(range.substr(0, dash)), to = number(range.substr(dash + 1));
  if (!from)
    return to && *to && size ? std::optional(std::pair(size - std::min(*to, size), size)) : std::nullopt;
  if (*from >= size || (to && *to < *from)) return std::nullopt;
  return std::pair(*from, to ? std::min(*to + 1, size) : size);
}

class Server {
 public:
  Server(int listener, std::chrono::milliseconds latency, void* tls)
      : listener_(listener), latency_(latency), tls_(tls), scratch_(kScratch) {
    poll_ = epoll_create1(EPOLL_CLOEXEC);
    timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    watch(listener_, EPOLLIN, EPOLL_CTL_ADD);
    watch(timer_, EPOLLIN, EPOLL_CTL_ADD);
  }

  [[noreturn]] void run() {
    epoll_event events[256];
    for (;;) {
      const int count = epoll_wait(poll_, events, 256, -1);
      if (count < 0 && errno != EINTR) fail("epoll_wait");
      for (int i = 0; i < count; ++i) {
        const int file = events[i].data.fd;
        if (file == listener_) {
          accept_all();
        } else if (file == timer_) {
          answer_due();
        } else if (const auto found = connections_.find(file); found != connections_.end()) {
          if (!advance(*found->second)) connections_.erase(found);
        }
      }
    }
  }

 private:
  void watch(int file, uint32_t events, int how) {
    epoll_event event{};
    event.events = events;
    event.data.fd = file;
    if (epoll_ctl(poll_, how, file, &event) != 0) fail("epoll_ctl");
  }

  void accept_all() {
    for (;;) {
      const int socket = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (socket < 0) return;
      const int yes = 1;
      setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
      auto connection = std::make_unique<Connection>();
      connection->channel = open_channel(socket);
      connections_[socket] = std::move(connection);
      watch(socket, EPOLLIN, EPOLL_CTL_ADD);
    }
  }

  std::unique_ptr<Channel> open_channel(int socket) {
#ifdef WITH_TLS
    if (tls_) return std::make_unique<TlsChannel>(socket, static_cast<SSL_CTX*>(tls_));
#endif
    return std::make_unique<Channel>(socket);
  }

  // Goes as far as the socket allows. False: the connection has ended.
  bool advance(Connection& c) {
    for (;;) {
      bool more = false;
      switch (c.state) {
        case Connection::State::kHead:
          more = read_head(c);
          break;
        case Connection::State::kBody:
          more = read_body(c);
          break;
        case Connection::State::kWaiting:
          return wait(c);
        case Connection::State::kAnswer:
          more = write_answer(c);
          break;
      }
      if (!more) return !std::exchange(ended_, false);
    }
  }

  bool stop(bool ended) {
    ended_ = ended;
    return false;
  }

  // Of a read or write that moved nothing: stop for now, or for good.
  bool idle(ssize_t result) { return stop(result == 0 || (errno != EAGAIN && errno != EINTR)); }

  // A client that hangs up while its answer is held back is seen by epoll again and again: let it go.
  bool wait(Connection& c) {
    char byte;
    const ssize_t got = recv(c.channel->socket(), &byte, 1, MSG_PEEK);
    return !(got == 0 || (got < 0 && errno != EAGAIN));
  }

  bool read_head(Connection& c) {
    size_t end = c.input.find("\r\n\r\n");
    if (end == string::npos) {
      const ssize_t got = c.channel->read(scratch_.data(), scratch_.size());
      if (got <= 0) return idle(got);
      c.input.append(scratch_.data(), static_cast<size_t>(got));
      end = c.input.find("\r\n\r\n");
      if (end == string::npos) return c.input.size() > kHead ? stop(true) : true;
    }
    auto request = parse_head(string_view(c.input).substr(0, end + 2));
    if (!request) return stop(true);
    c.request = std::move(*request);
    c.input.erase(0, end + 4);
    return begin_body(c);
  }

  bool begin_body(Connection& c) {
    c.body_left = c.request.length;
    c.kept = c.request.method == "PUT" && c.request.path.find("/sink/") == string::npos;
    if (c.kept) {
      const auto at = memory_.allocate(c.request.length);
      if (!at) return stop(true);
      c.body_at = *at;
    }
    const size_t here = std::min(c.input.size(), c.body_left);
    if (c.kept) std::memcpy(memory_.base + c.body_at, c.input.data(), here);
    c.input.erase(0, here);
    c.body_left -= here;
    if (c.request.expect && c.body_left) {
      constexpr string_view go_on = "HTTP/1.1 100 Continue\r\n\r\n";
      if (c.channel->write(go_on.data(), go_on.size()) != static_cast<ssize_t>(go_on.size()))
        return stop(true);
    }
    c.state = Connection::State::kBody;
    return true;
  }

  bool read_body(Connection& c) {
    while (c.body_left) {
      char* into = memory_.base + c.body_at + (c.request.length - c.body_left);
      const ssize_t got =
          c.kept ? c.channel->read(into, c.body_left) : c.channel->drop(scratch_.data(), c.body_left);
      if (got <= 0) return idle(got);
      c.body_left -= static_cast<size_t>(got);
    }
    answer(c);
    if (latency_.count() == 0) {
      c.state = Connection::State::kAnswer;
      return true;
    }
    c.state = Connection::State::kWaiting;
    c.serial = ++serials_;
    due_.push_back({Clock::now() + latency_, c.channel->socket(), c.serial});
    if (due_.size() == 1) arm_timer();
    return stop(false);
  }

  bool write_answer(Connection& c) {
    while (c.output_done < c.output.size()) {
      const ssize_t sent = c.channel->write(c.output.data() + c.output_done, c.output.size() - c.output_done);
      if (sent <= 0) return want_writable(c, sent);
      c.output_done += static_cast<size_t>(sent);
    }
    while (c.object_left) {
      const ssize_t sent = c.channel->write(memory_.base + c.object_at, std::min(c.object_left, kScratch));
      if (sent <= 0) return want_writable(c, sent);
      c.object_at += static_cast<size_t>(sent);
      c.object_left -= static_cast<size_t>(sent);
    }
    if (c.writable_wanted) watch(c.channel->socket(), EPOLLIN, EPOLL_CTL_MOD);
    c.writable_wanted = false;
    if (c.request.close) return stop(true);
    c.state = Connection::State::kHead;
    return true;
  }

  bool want_writable(Connection& c, ssize_t result) {
    if (result == 0 || errno != EAGAIN) return stop(true);
    if (!c.writable_wanted) watch(c.channel->socket(), EPOLLOUT, EPOLL_CTL_MOD);
    c.writable_wanted = true;
    return stop(false);
  }

  void arm_timer() {
    itimerspec when{};
    const auto left = std::max<int64_t>((due_.front().at - Clock::now()).count(), 1);  // 0 would disarm it
    when.it_value.tv_sec = left / 1'000'000'000;
    when.it_value.tv_nsec = left % 1'000'000'000;
    timerfd_settime(timer_, 0, &when, nullptr);
  }

  void answer_due() {
    uint64_t expirations;
    if (::read(timer_, &expirations, sizeof expirations) < 0 && errno != EAGAIN) fail("timerfd");
    while (!due_.empty() && due_.front().at <= Clock::now()) {
      const Due due = due_.front();
      due_.pop_front();
      const auto found = connections_.find(due.socket);
      // The number of a socket is used again: the serial tells whether this is still the connection that
      // asked.
      if (found == connections_.end() || found->second->serial != due.serial) continue;
      found->second->state = Connection::State::kAnswer;
      if (!advance(*found->second)) connections_.erase(found);
    }
    if (!due_.empty()) arm_timer();
  }

  void respond(Connection& c, string_view status, string fields, string_view body = {},
               string_view type = {}) {
    if (!type.empty()) fields += "Content-Type: " + string(type) + "\r\n";
    fields += "Content-Length: " + std::to_string(body.size()) + "\r\n";
    begin_output(c, status, fields);
    if (c.request.method != "HEAD") c.output += body;
  }

  void begin_output(Connection& c, string_view status, string_view fields) {
    c.output = "HTTP/1.1 " + string(status) + "\r\nServer: byte_server\r\nx-amz-request-id: 1\r\n" +
               string(fields) + "\r\n";
    c.output_done = 0;
    c.object_left = 0;
  }

  void refuse(Connection& c, string_view status, string_view code) {
    const string body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>" + string(code) +
                        "</Code><Message>" + string(code) + "</Message></Error>";
    respond(c, status, "", body, "application/xml");
  }

  void answer(Connection& c) {
    const Request& request = c.request;
    const bool bucket = request.path.find('/', 1) == string::npos || request.path.ends_with('/');
    if (request.method == "PUT") return bucket ? respond(c, "200 OK", "") : keep(c);
    if (request.method == "DELETE") {
      objects_.erase(request.path);
      return respond(c, "204 No Content", "");
    }
    if (request.method != "GET" && request.method != "HEAD")
      return refuse(c, "501 Not Implemented", "NotImplemented");
    return bucket ? list(c) : give(c);
  }

  void list(Connection& c) {
    const string name = c.request.path.substr(1, c.request.path.find('/', 1) - 1);
    const string body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult><Name>" + name +
                        "</Name><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</"
                        "IsTruncated></ListBucketResult>";
    respond(c, "200 OK", "", body, "application/xml");
  }

  void keep(Connection& c) {
    const string etag = "\"" + std::to_string(++etags_) + "\"";
    if (c.kept) {
      const bool there = objects_.contains(c.request.path);
      if (there && c.request.if_none_match) return refuse(c, "412 Precondition Failed", "PreconditionFailed");
      objects_[c.request.path] = Object{c.body_at, c.request.length, etag, c.request.metadata};
    }
    respond(c, "200 OK", "ETag: " + etag + "\r\n");
  }

  void give(Connection& c) {
    const auto found = objects_.find(c.request.path);
    if (found == objects_.end()) return refuse(c, "404 Not Found", "NoSuchKey");
    const Object& object = found->second;
    if (!c.request.if_match.empty() && c.request.if_match != object.etag)
      return refuse(c, "412 Precondition Failed", "PreconditionFailed");
    size_t begin = 0, end = object.size;
    string fields = "ETag: " + object.etag +
                    "\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n"
                    "Content-Type: application/octet-stream\r\n" +
                    object.metadata;
    const bool partial = !c.request.range.empty();
    if (partial) {
      const auto range = parse_range(c.request.range, object.size);
      if (!range) return refuse(c, "416 Requested Range Not Satisfiable", "InvalidRange");
      std::tie(begin, end) = *range;
      fields += "Content-Range: bytes " + std::to_string(begin) + "-" + std::to_string(end - 1) + "/" +
                std::to_string(object.size) + "\r\n";
    }
    fields += "Content-Length: " + std::to_string(end - begin) + "\r\n";
    begin_output(c, partial ? "206 Partial Content" : "200 OK", fields);
    if (c.request.method == "GET") {
      c.object_at = object.begin + begin;
      c.object_left = end - begin;
    }
  }

  struct Due {
    Clock::time_point at;
    int socket;
    uint64_t serial;
  };

  int listener_, poll_ = -1, timer_ = -1;
  std::chrono::milliseconds latency_;
  void* tls_;
  Memory memory_;
  std::vector<char> scratch_;
  std::unordered_map<int, std::unique_ptr<Connection>> connections_;
  std::unordered_map<string, Object> objects_;
  std::deque<Due> due_;
  uint64_t serials_ = 0, etags_ = 0;
  bool ended_ = false;
};

int open_listener() {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(listener, 1024) != 0 || getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) != 0)
    fail("listen");
  std::printf("%d\n", ntohs(address.sin_port));
  std::fflush(stdout);
  return listener;
}

}  // namespace

int main(int argc, char** argv) {
  std::chrono::milliseconds latency{0};
  const char *certificate = nullptr, *key = nullptr;
  for (int i = 1; i + 1 < argc; i += 2) {
    const string_view name = argv[i];
    if (name == "--latency-ms") latency = std::chrono::milliseconds(std::atoi(argv[i + 1]));
    if (name == "--certificate") certificate = argv[i + 1];
    if (name == "--key") key = argv[i + 1];
  }
  prctl(PR_SET_PDEATHSIG, SIGTERM);  // it ends with whoever started it
  signal(SIGPIPE, SIG_IGN);
  void* tls = nullptr;
  if (certificate) {
#ifdef WITH_TLS
    tls = open_tls(certificate, key);
#else
    std::fputs("byte_server was built without TLS\n", stderr);
    return 2;
#endif
  }
  (void)key;
  Server(open_listener(), latency, tls).run();
}
