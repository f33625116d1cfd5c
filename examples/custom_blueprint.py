"""A sub-network of your own: describe it as data, compile it, wake it, keep it, save it and load it again."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import esper
from esper.blueprints import Blueprint, Node, preserves_function

# k(v) = up(tanh(down(norm(v))) * gate(v)): nodes in any order, sizes by name.
blueprint = Blueprint(
    name="tanh-gate",
    nodes=(
        Node("x", "input"),
        Node("norm", "norm", ("x",), {"kind": "rmsnorm"}),
        Node("down", "linear", ("norm",), {"out": "rank", "bias": True}),
        Node("act", "activation", ("down",), {"kind": "tanh"}),
        Node("gate", "linear", ("x",), {"out": "rank"}),
        Node("product", "mul", ("act", "gate")),
        Node("up", "linear", ("product",), {"out": "d_out"}),
        Node("y", "output", ("up",)),
    ),
    parameters={"rank": 8},
)
# Its last weights start at zero, so waking it changes nothing until it has learnt something.
print("waking it keeps the network's function:", preserves_function(blueprint, 16, 16))

folder = Path(tempfile.mkdtemp(prefix="esper-"))
kernel = esper.compile(blueprint, d_in=16, d_out=16, rank=12, registry=str(folder / "registry"))


def host() -> nn.Sequential:
    """The network to grow."""
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))


torch.manual_seed(0)
model = esper.wrap(host(), registry=str(folder / "registry"), preserve_original=False)
x = torch.randn(32, 16)
before = model(x)
outcome = model.request_kernel("0", 2, kernel, alpha=1.0)
while not outcome.done():
    model.step()
print("awake:", outcome.result(timeout=0), "- same output:", torch.equal(model(x), before))

optimizer = torch.optim.Adam(model.wrapped_model.parameters(), lr=1e-2)
esper.optim.attach(optimizer, model, lr=3e-2)  # the seed's parameters at a rate of their own
target = torch.randn(32, 4)
for _ in range(50):
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.step()
model.fossilize("0", 2)

esper.save(model, folder / "grown.safetensors")
again = esper.load(folder / "grown.safetensors", host())  # needs no registry
print("loaded:", torch.equal(again(x), model(x)), again.layer("0").state_layout.state_of(2).name)
