"""How good a KV codec is for its bits: text, protocol, peers, report. `benchmarks/codec_quality.py` runs it."""
