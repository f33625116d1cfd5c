"""Prometheus and TensorBoard show the state that the screen shows; the Grafana dashboard asks for what is exported."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from esper.contracts.errors import EsperError
from esper.oona import OonaClient
from esper.watch.bus_source import BusSource
from esper.watch.export import Exporters, exporting
from esper.watch.facts import RunReport, RunStatus, SeedChange, Unreadable
from esper.watch.prometheus import METRICS, PrometheusExporter, serve
from esper.watch.recording import FileSource
from esper.watch.state import JobState
from esper.watch.watcher import Watcher
from tests.servers import wait_until
from tests.watch.scenes import T0, window, window_message
from tests.watch.test_recording import recorded

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "esper.json"


def job() -> JobState:
    state = JobState()
    facts = [
        window("a", [0, 2], T0, sequence=0, step=10, alpha=[0, 0.5], health_score=[0.25, 0.75], error_count=[0, 1]),
        window(
            "a", [0, 2], T0 + 1, sequence=2, step=20, epoch=1, alpha=[0, 1], health_score=[0.25, 0.75],
            error_count=[0, 3], nonfinite_count=[4, 0], dropped=2,
        ),
        window("b", [4], T0 + 1, alpha=[0.5], health_score=[np.nan]),
        RunReport(run="job", at=T0 + 1, metrics={"loss": 0.5, "broken": float("nan")}),
        SeedChange(run="job", at=T0 + 1, layer="a", seed_idx=0, kind="requested"),
        Unreadable("no"),
        window("a", run='odd "name"\\', rank=3, at=T0 + 2),
    ]  # fmt: skip
    for fact in facts:
        state.apply(fact, getattr(fact, "at", T0) + 0.25)
    return state


def scrape(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@contextlib.contextmanager
def looking(state: JobState) -> Iterator[JobState]:
    yield state


def test_metrics_over_http():
    state = job()
    served = serve(PrometheusExporter(lambda: looking(state), lambda: T0 + 11), "127.0.0.1", 0)
    try:
        found = scrape(served.url)
    finally:
        served.close()

    def value(metric: str, **labels: str) -> float:
        return found[metric, tuple(sorted({"run": "job", "rank": "0", **labels}.items()))]

    assert value("esper_seeds", state="active") == 1
    assert value("esper_seeds", state="fossilized") == 1
    assert value("esper_seeds", state="dormant") == 1
    assert value("esper_health_mean") == 0.5
    assert value("esper_health_min") == 0.25
    assert value("esper_alpha_mean") == 0.75
    assert (value("esper_step"), value("esper_epoch")) == (20, 1)
    assert value("esper_metric", name="loss") == 0.5
    assert not any(("name", "broken") in labels for _, labels in found)
    assert value("esper_windows_total") == 3
    assert value("esper_windows_missing_total") == 1
    assert value("esper_dropped_total") == 2
    assert value("esper_faults_total") == 2
    assert value("esper_seeds_failing") == 1
    assert value("esper_nonfinite") == 4
    assert value("esper_loads_total", outcome="asked") == 1
    assert value("esper_lag_seconds") == pytest.approx(0.25)
    assert value("esper_run_silent_seconds") == pytest.approx(9.75)
    assert value("esper_layer_health_mean", layer="a") == 0.5
    assert value("esper_layer_awake", layer="b") == 1
    # Nothing is known of the health of b, and nothing is said.
    assert not any(name == "esper_layer_health_mean" and ("layer", "b") in labels for name, labels in found)
    assert found["esper_messages_unreadable_total", ()] == 1
    assert found["esper_runs", ()] == 2
    assert any(("run", 'odd "name"\\') in labels for _, labels in found)
    assert {name.removesuffix("_total") for name, _ in found if name.startswith("esper")} <= METRICS.keys()


def test_layers_beyond_the_bound_are_left_out_and_counted():
    state = JobState()
    for number in range(7):
        state.apply(window(f"layer{number}"), T0)
    served = serve(PrometheusExporter(lambda: looking(state), max_layers=4), "127.0.0.1", 0)
    try:
        found = scrape(served.url)
    finally:
        served.close()
    assert found["esper_layers_left_out", (("rank", "0"), ("run", "job"))] == 3
    assert sum(name == "esper_layer_awake" for name, _ in found) == 4


def test_an_address_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EsperError, match=f"metrics cannot be served at 127.0.0.1:{port}: Address already in use"):
            serve(PrometheusExporter(lambda: looking(JobState())), "127.0.0.1", port)


def test_the_dashboard_loads_and_asks_only_for_what_is_exported():
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["title"] == "Esper"
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    exported = {f"{name}_total" if kind == "counter" else name: labels for name, (kind, _, labels) in METRICS.items()}
    named = set()
    for expression in asked:
        for name, matchers in re.findall(r"\b(esper_\w+)(?:\{([^}]*)\})?", expression):
            assert name in exported, f"{name} in {expression} is not exported"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
            assert labels <= set(exported[name]), f"{expression}: {name} has no labels {labels - set(exported[name])}"
            named.add(name)
        for name in re.findall(r"\bby \(([^)]*)\)", expression):
            assert all(label.strip() in {"run", "rank", "state"} for label in name.split(","))
    assert len(named) >= 12
    # Every panel has a place of its own, on a grid of 24 columns.
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


def test_tensorboard_files_say_the_same(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    from esper.watch.tensorboard import TensorBoardExporter

    state = JobState()
    with TensorBoardExporter(tmp_path / "tb", every_s=2.0) as exporter:
        for number in range(5):
            at = T0 + number
            state.apply(
                window("a", [0, 2], at, sequence=number, step=10 * number, alpha=[0, number / 4],
                       health_score=[0.25, 0.75]), at)  # fmt: skip
            state.apply(RunReport(run="job", at=at, metrics={"loss": 1 / (number + 1)}), at)
            exporter.update(state, at)
        # Nothing new, no point.
        exporter.update(state, T0 + 99)
        state.apply(RunReport(run="job", at=T0 + 4.5, step=41, status=RunStatus.FINISHED), T0 + 4.5)
        exporter.update(state, T0 + 4.5)
    (folder,) = (tmp_path / "tb").iterdir()
    assert folder.name == "job.rank0"
    files = reader.EventAccumulator(str(folder), size_guidance={reader.SCALARS: 0, reader.HISTOGRAMS: 0})
    files.Reload()
    loss = files.Scalars("run/loss")
    # Two seconds apart, and one more at the end.
    assert [point.step for point in loss] == [0, 20, 40, 41]
    assert [point.wall_time for point in loss] == [T0, T0 + 2, T0 + 4, T0 + 4.5]
    assert [point.value for point in loss] == pytest.approx([1, 1 / 3, 1 / 5, 1 / 5])
    assert [point.value for point in files.Scalars("alpha/mean")] == [0, 0.5, 1, 1]
    assert files.Scalars("seeds/active")[-1].value == 1
    assert files.Scalars("health/mean")[0].value == 0.5
    assert files.Histograms("health/seeds")[0].histogram_value.num == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from esper.watch.tensorboard import TensorBoardExporter

    (tmp_path / "file").touch()
    with pytest.raises(EsperError, match="cannot be made"):
        TensorBoardExporter(tmp_path / "file" / "tb")


def test_a_training_process_exports_what_itself_tells(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    with (
        OonaClient("memory://exporting") as bus,
        exporting(bus, prometheus="0", tensorboard=tmp_path / "tb") as exporters,
    ):
        bus.publish(window_message("fc", 0, time.time(), lifecycle_state=[0, 2]))

        def told() -> bool:
            return ("esper_windows_total", (("rank", "0"), ("run", "job"))) in scrape(exporters.url or "")

        wait_until(told, "the window is counted")
        url = exporters.url
    with pytest.raises(OSError, match="refused"):
        scrape(url or "")
    assert [folder.name for folder in (tmp_path / "tb").iterdir()] == ["job.rank0"]


def test_what_is_told_before_anybody_reads_is_exported_too():
    with OonaClient("memory://exporting-early") as bus:
        watcher = Watcher(BusSource(bus, since_s=None))
        bus.publish(window_message("fc", 0, time.time(), lifecycle_state=[0, 2]))
        watcher.start()
        try:
            wait_until(lambda: watcher.heard > 0, "the window is heard")
        finally:
            watcher.stop()
    with watcher.looking() as state:
        (run,) = state.runs.values()
        assert list(run.layers) == ["fc"]


def test_epochs_heard_together_are_a_point_each(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    watcher = Watcher(FileSource(recorded(tmp_path / "r.jsonl")))  # never started: it is told by hand
    with Exporters(watcher, tensorboard=tmp_path / "tb"):
        reports = [
            RunReport(run="job", at=T0 + 0.01 * n, step=10 * n, epoch=n, metrics={"loss": 1 / n}) for n in range(1, 13)
        ]
        watcher.hear([*reports, window("a", [0], T0 + 1, step=130, epoch=12)], T0 + 1)
    files = reader.EventAccumulator(str(tmp_path / "tb" / "job.rank0"), size_guidance={reader.SCALARS: 0})
    files.Reload()
    points = files.Scalars("run/loss")
    assert [point.step for point in points[:12]] == [10 * n for n in range(1, 13)]
    assert [point.value for point in points[:12]] == pytest.approx([1 / n for n in range(1, 13)])


def test_event_files_of_a_recording_keep_its_times(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    watcher = Watcher(FileSource(recorded(tmp_path / "r.jsonl")))
    with Exporters(watcher, tensorboard=tmp_path / "tb"):
        watcher.start()
        assert watcher.done.wait(60)
        watcher.stop()
    files = reader.EventAccumulator(str(tmp_path / "tb" / "job.rank0"), size_guidance={reader.SCALARS: 0})
    files.Reload()
    # Alpha goes from 0 to 0.95 in 20 windows a second apart; a point every two seconds, and the last.
    assert files.Scalars("alpha/mean")[-1].value == pytest.approx(0.95)
    points = files.Scalars("seeds/training")
    assert len(points) >= 10
    assert [point.wall_time for point in points] == sorted(point.wall_time for point in points)
    assert points[0].wall_time == T0
    assert points[-1].wall_time == pytest.approx(T0 + 21)


@pytest.mark.parametrize("address", ["high", "localhost", "1.2.3.4:99999", ""])
def test_an_address_that_is_none(address: str):
    with pytest.raises(EsperError, match="need a port from 0 to 65535"):
        Exporters(Watcher(FileSource(DASHBOARD)), prometheus=address)
