"""Ten lines from a network to a grown one: wake a seed in the background while training goes on."""

import tempfile

import torch
from torch import nn

import esper

torch.manual_seed(0)
x = torch.randn(256, 8)
y = x.prod(dim=1, keepdim=True).tanh()
network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
registry = tempfile.mkdtemp(prefix="esper-registry-")

model = esper.wrap(network, registry=registry)  # dormant seeds: same function, no cost
kernel = esper.compile("bottleneck", d_in=8, d_out=4, rank=16, registry=registry)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
esper.optim.attach(optimizer, model)  # seeds that wake join the optimizer
for step in range(400):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.step()  # commits what the background has fetched; never waits
    if step == 100:
        before = loss.item()
        awake = model.request_kernel("0", 0, kernel, alpha=1.0, ramp_steps=50)
print(f"seed awake: {awake.result(timeout=0)}; loss {before:.4f} when it was asked for, {loss.item():.4f} now")
plain = esper.export(model)  # ordinary torch modules, nothing of Esper left
print(f"exported: off by {(plain(x) - model(x)).abs().max().item():.1e}")
