"""Two prompts that share a document: the second one loads what the first one computed.

python examples/quickstart.py MODEL [STORE]      such as: Qwen/Qwen3-0.6B file:///tmp/kv
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer

from kvstore_s3.connectors.transformers import PrefixCache

model, store = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "file:///tmp/kvstore-s3"
document = (Path(__file__).parent / "documents" / "ferry-operations-handbook.md").read_text()
tokenizer = AutoTokenizer.from_pretrained(model)

with PrefixCache.open(model, store) as cache:
    for question in ("When does the Ask stop sailing?", "The general alarm is"):
        inputs = tokenizer(f"{document}\n\n{question}", return_tensors="pt").to(cache.model.device)
        answer = cache.generate(**inputs, max_new_tokens=32, do_sample=False)
        print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]))
        print(cache.last)
