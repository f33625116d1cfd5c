"""Random blueprints that are right by construction, and ways to rewrite one without changing what it means."""

from __future__ import annotations

from hypothesis import strategies as st

from esper.blueprints import ACTIVATIONS, NORMS, Blueprint, Node
from esper.blueprints.nodes import OPS

#: Inner widths, as expressions that are positive for every d_in, d_out and rank.
WIDTHS = ("d_in", "d_out", "rank", "2*rank", "d_out + rank", "max(1, d_in // 2)", "3")

#: Depthwise kernels that keep every image's size, so that their results can be added to anything.
SAME_SIZE = (
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": [3, 1], "padding": [2, 0], "dilation": 2},
)


@st.composite
def blueprints(draw: st.DrawFn, *, images: bool = False, max_nodes: int = 8) -> Blueprint:
    """A blueprint that validates for every d_in and d_out; ``images`` lets depthwise nodes in."""
    nodes = [Node("x", "input")]
    width = {"x": "d_in"}
    kinds = ["linear", "activation", "norm", "scale", "shift", "add", "mul"] + ["depthwise"] * images

    def grow(op: str, inputs: tuple[str, ...], out: str, **attrs: object) -> None:
        if "out" in OPS[op].attrs:
            attrs["out"] = out
        nodes.append(Node(f"n{len(nodes)}", op, inputs, attrs))
        width[nodes[-1].name] = out

    for _ in range(draw(st.integers(0, max_nodes))):
        op = draw(st.sampled_from(kinds))
        source = draw(st.sampled_from(sorted(width)))
        if op == "linear":
            grow(op, (source,), draw(st.sampled_from(WIDTHS)), bias=draw(st.booleans()))
        elif op in ("add", "mul"):
            other = draw(st.sampled_from([name for name in sorted(width) if width[name] == width[source]]))
            grow(op, (source, other), width[source])
        elif op == "activation":
            grow(op, (source,), width[source], kind=draw(st.sampled_from(ACTIVATIONS)))
        elif op == "norm":
            grow(
                op, (source,), width[source], kind=draw(st.sampled_from(NORMS)), eps=draw(st.sampled_from([1e-5, 1e-3]))
            )
        elif op == "depthwise":
            grow(op, (source,), width[source], **draw(st.sampled_from(SAME_SIZE)), bias=draw(st.booleans()))
        else:
            grow(op, (source,), width[source])

    # Lead every loose end to d_out features, and add them up.
    read = {source for node in nodes for source in node.inputs}
    ends = [node.name for node in nodes if node.name not in read]
    results = []
    for end in ends:
        grow("linear", (end,), "d_out", bias=draw(st.booleans()))
        results.append(nodes[-1].name)
    while len(results) > 1:
        grow("add", (results.pop(), results.pop()), "d_out")
        results.append(nodes[-1].name)
    nodes.append(Node("y", "output", (results[0],)))
    uses_rank = any("rank" in str(node.attrs.get("out", "")) for node in nodes)
    return Blueprint(
        draw(st.sampled_from(["random", "a.b-c_1"])),
        tuple(nodes),
        tap=draw(st.sampled_from(["input", "output"])),
        mode=draw(st.sampled_from(["residual", "replace"])),
        scope=draw(st.sampled_from(["layer", "chunk"])),
        parameters={"rank": draw(st.integers(1, 4))} if uses_rank else {},
    )


@st.composite
def rewritten(draw: st.DrawFn, blueprint: Blueprint) -> Blueprint:
    """The same blueprint with other names, another order of nodes, and the inputs of add and mul swapped at will."""
    fresh = draw(st.permutations([f"m{i}" for i in range(len(blueprint.nodes))]))
    name = {node.name: fresh[i] for i, node in enumerate(blueprint.nodes)}
    nodes = []
    for node in draw(st.permutations(blueprint.nodes)):
        inputs = tuple(name[source] for source in node.inputs)
        if OPS[node.op].commutative and draw(st.booleans()):
            inputs = inputs[::-1]
        nodes.append(Node(name[node.name], node.op, inputs, node.attrs))
    return Blueprint("other", tuple(nodes), blueprint.tap, blueprint.mode, blueprint.scope, blueprint.parameters)
