"""The other side of benches/embed.rs: loads a bge-m3 folder and, for each line of lengths on stdin, embeds random texts
of so many tokens. Prints wall and CPU seconds. Equal lengths run in batches of 4096 tokens, as Taper's do; mixed ones
are sorted and padded to the longest of their batch."""

import sys
import time

import torch
from transformers import AutoModel

BATCH_TOKENS = 4096

torch.set_grad_enabled(False)
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="sdpa").eval()
print("ready", torch.__version__, torch.get_num_threads(), flush=True)
for line in sys.stdin:
    lengths = sorted(map(int, line.split()), reverse=True)
    wall, cpu = time.perf_counter(), time.process_time()
    while lengths:
        longest = lengths[0]
        batch = lengths[: max(1, BATCH_TOKENS // longest)]
        lengths = lengths[len(batch) :]
        ids = torch.randint(5, 250000, (len(batch), longest))
        mask = torch.arange(longest)[None] < torch.tensor(batch)[:, None]
        ids[~mask] = 1
        # A mask costs time; where nothing is padded, none is needed.
        hidden = model(input_ids=ids, attention_mask=None if bool(mask.all()) else mask.long()).last_hidden_state
        torch.nn.functional.normalize(hidden[:, 0], dim=-1)
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)
