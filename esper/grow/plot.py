"""One picture of a run: loss, accuracy, alpha and health over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esper.grow.experiment import NETWORKS, NetworkName, NetworkResult
from esper.grow.grower import SeedTrace

__all__ = ["draw"]

COLORS: dict[NetworkName, str] = {"host": "#7f7f7f", "grown": "#2a7f3f", "static": "#3465a4"}


def draw(results: Sequence[NetworkResult], layer_rows: Sequence[str], path: Path) -> None:
    """Write a PNG: validation loss and accuracy of every network, alpha and health of the first grown network's seeds.

    Only seeds that were awake at some time are drawn.
    """
    # The object interface, not pyplot: nothing global is set, and no window system is looked for.
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    _curves(grid[0, 0], results, "validation_loss", "validation loss (nats)")
    _curves(grid[0, 1], results, "validation_accuracy", "validation accuracy")
    grown = next((result for result in results if result.network == "grown" and result.traces), None)
    awake = _ever_awake(grown.traces) if grown is not None else []
    title = f"seeds of run {grown.seed}" if grown is not None else "no grown network"
    for axes, key in ((grid[1, 0], "alpha"), (grid[1, 1], "health")):
        for row in awake:
            assert grown is not None
            epochs = [trace.epoch for trace in grown.traces]
            axes.plot(
                epochs, [getattr(trace, key)[row] for trace in grown.traces], label=layer_rows[row], linewidth=1.3
            )
        axes.set(xlabel="epoch", ylabel=key, title=title, ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
        if awake:
            axes.legend(fontsize=8, title="layer#seed", title_fontsize=8)
    figure.savefig(path, dpi=110)


def _curves(axes: Axes, results: Sequence[NetworkResult], key: str, label: str) -> None:
    """One thin line per network, and per kind the mean over the networks that got that far."""
    for name in NETWORKS:
        histories = [result.history for result in results if result.network == name and result.history]
        for history in histories:
            axes.plot(
                [record.epoch for record in history],
                [getattr(record, key) for record in history],
                color=COLORS[name],
                linewidth=0.6,
                alpha=0.35,
            )
        if histories:
            common = min(map(len, histories))
            means = [sum(getattr(history[i], key) for history in histories) / len(histories) for i in range(common)]
            epochs = [record.epoch for record in histories[0][:common]]
            axes.plot(epochs, means, color=COLORS[name], linewidth=2.0, label=f"{name} (mean of {len(histories)})")
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def _ever_awake(traces: Sequence[SeedTrace]) -> list[int]:
    rows = range(len(traces[0].alpha))
    return [row for row in rows if any(trace.alpha[row] > 0.0 for trace in traces)]
