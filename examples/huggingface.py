"""A tiny GPT-2 of transformers, built from its configuration: trained, grown by a seed, and asked to generate.

Needs the package transformers.
"""

import asyncio
import sys
import tempfile

import torch

import esper

try:
    import transformers
except ImportError as error:
    sys.exit(f"this example needs the package transformers ({error}): pip install transformers")

torch.manual_seed(0)
config = transformers.GPT2Config(
    vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=0, pad_token_id=0
)
registry = tempfile.mkdtemp(prefix="esper-registry-")
model = esper.wrap(transformers.GPT2LMHeadModel(config), registry=registry)  # Conv1D layers get seeds too

# The task: count upwards from any number.
start = torch.randint(1, 16, (64, 1))
tokens = start + torch.arange(12)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
esper.optim.attach(optimizer, model)
kernel = esper.compile("bottleneck", d_in=32, d_out=128, rank=8, registry=registry)
for step in range(120):
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.step()
    if step == 40:
        awake = asyncio.run(model.load_kernel("transformer.h.0.mlp.c_fc", 0, kernel, alpha=1.0, ramp_steps=20))
        print(f"seed awake: {awake}; loss {loss.item():.3f}")
print(f"loss {loss.item():.3f}")
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0].tolist())
