"""``esper.huggingface``: the Trainer of ``transformers`` with seeds, its checkpoints, and going on from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[dev]')")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import esper  # noqa: E402
from esper.execution.lifecycle import SeedLifecycleState as _State  # noqa: E402
from esper.huggingface import CHECKPOINT_NAME, SeededTrainer  # noqa: E402
from tests.integration.test_huggingface import CASES, tokens, wake  # noqa: E402

GPT2 = CASES[1]
LAYER = GPT2.layer
#: What the lattice has of the process it is in, and the checksum over it.
CLOCKS = {"last_update_epoch", "exec_latency_us", "layout", "crc"}
ROWS = [{"input_ids": row, "labels": row} for row in tokens(6).repeat(8, 1)]


class Grow(transformers.TrainerCallback):  # type: ignore[misc]
    """Wakes a second seed after step 2 and culls the first after step 4."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            wake(model, LAYER, seed_idx=3, alpha=0.5)
        if state.global_step == 4:
            model.cull(LAYER, 1)


def grown() -> Any:
    model = esper.wrap(GPT2.make())
    wake(model, LAYER, alpha=0.5)
    return model


def trainer(model: Any, folder: Path, *callbacks: Any, kind: Any = SeededTrainer, **options: Any) -> Any:
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "logging_strategy": "no", "disable_tqdm": True, "weight_decay": 0.01,
        "save_strategy": "no",
    }  # fmt: skip
    extra = {name: options.pop(name) for name in ("seed_options",) if name in options}
    rows = options.pop("rows", ROWS)
    arguments = transformers.TrainingArguments(**{**settings, **options})
    return kind(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=list(callbacks), **extra
    )


def same(ours: Any, theirs: Any) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert not [name for name in mine if not torch.equal(mine[name], other[name])]


def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = trainer(grown(), tmp_path / "run", Grow(), save_strategy="steps", save_steps=1)
    whole.train()
    end = whole.model.state_dict()
    assert whole.model.layer(LAYER).state_layout.state_of(1) is _State.CULLED
    # Before the second seed woke, while both were awake, and after the first was culled.
    for step in (1, 3, 5):
        model = esper.wrap(GPT2.make())  # never grew
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        again = trainer(model, tmp_path / f"again{step}", Grow())
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert again.state.global_step == 6
        now = again.model.state_dict()
        odd = [name for name in now if not torch.equal(now[name], end[name])]
        # The process began to count anew, and took its own times.
        assert now.keys() == end.keys() and {name.removeprefix("esper.lattice.") for name in odd} <= CLOCKS, step


def test_both_sides_read_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(grown(), tmp_path, Grow(), save_strategy="steps", save_steps=3, max_steps=3)
    run.train()
    folder = tmp_path / "checkpoint-3"
    host = type(run.model.wrapped_model).from_pretrained(folder)
    for name, tensor in run.model.wrapped_model.state_dict().items():
        assert torch.equal(host.state_dict()[name], tensor), name
    same(esper.load(folder / CHECKPOINT_NAME, GPT2.make()), run.model)
    run.save_model(str(tmp_path / "last"))
    same(esper.load(tmp_path / "last" / CHECKPOINT_NAME, GPT2.make()), run.model)


def test_the_best_model_comes_back_with_its_seeds(tmp_path: Path) -> None:
    class Spoil(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.normal_()

    run = trainer(
        grown(), tmp_path, Grow(), Spoil(), max_steps=5, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name in ("checkpoint-1", "checkpoint-2")
    same(run.model, esper.load(best / CHECKPOINT_NAME, GPT2.make()))
    assert run.model.layer(LAYER).state_layout.state_of(1) is _State.ACTIVE  # culled at the end of the run
    run.train(resume_from_checkpoint=False)  # and the same Trainer goes on


def test_what_decays_is_what_decays_of_the_host(tmp_path: Path) -> None:
    model = grown()
    bare = trainer(model.wrapped_model, tmp_path, kind=transformers.Trainer).create_optimizer()
    ours = trainer(model, tmp_path).create_optimizer()
    seeds = {id(p) for p in model.graft_parameters().values()}
    for decays, theirs in zip(ours.param_groups[:2], bare.param_groups, strict=True):
        assert decays["weight_decay"] == theirs["weight_decay"]
        assert [id(p) for p in decays["params"] if id(p) not in seeds] == [id(p) for p in theirs["params"]]
    assert {id(p) for p in ours.param_groups[2]["params"]} == seeds and ours.param_groups[2]["weight_decay"] == 0.01


def test_seeds_have_options_of_their_own_and_follow_the_schedule(tmp_path: Path) -> None:
    model = grown()
    before = {name: p.detach().clone() for name, p in model.graft_parameters().items()}
    run = trainer(model, tmp_path, Grow(), max_steps=3, seed_options={"lr": 0.5, "weight_decay": 0.0})
    run.train()
    groups = {group["esper_seed"]: group for group in run.optimizer.param_groups if "esper_seed" in group}
    assert list(groups) == [f"{LAYER}#1", f"{LAYER}#3"]
    host = run.optimizer.param_groups[0]
    for group in groups.values():
        assert group["weight_decay"] == 0.0 and group["initial_lr"] == 0.5
        assert group["lr"] / group["initial_lr"] == pytest.approx(host["lr"] / host["initial_lr"])
    moved = model.graft_parameters()
    assert all(not torch.equal(moved[name], before[name]) for name in before)
    late = model.layer(LAYER).grafts.seed_parameters(3).values()
    assert {id(p) for p in late} <= {id(p) for p in run.optimizer.state}, "the late seed was trained too"


def test_columns_and_labels_are_those_of_the_host(tmp_path: Path) -> None:
    rows = [{**row, "note": torch.zeros(3)} for row in ROWS]  # nothing that the model takes
    run = trainer(grown(), tmp_path, rows=rows, max_steps=1)
    run.train()
    assert "eval_loss" in run.evaluate()


class Strict(nn.Module):
    """Takes two arguments by name and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.fc(x)
        return {"logits": y} if labels is None else {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


def test_a_host_that_takes_no_further_arguments(tmp_path: Path) -> None:
    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(8)]
    model = esper.wrap(Strict())
    run = trainer(model, tmp_path, rows=rows, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    assert "eval_loss" in run.evaluate()
    same(esper.load(tmp_path / "checkpoint-2" / CHECKPOINT_NAME, Strict()), model)


def test_it_goes_before_the_trainer_of_another_library(tmp_path: Path) -> None:
    class Theirs(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen = True
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Mine(SeededTrainer, Theirs):
        pass

    run = trainer(grown(), tmp_path, kind=Mine, max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    assert run.seen and (tmp_path / "checkpoint-1" / CHECKPOINT_NAME).is_file()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"SeededTrainer needs a model that esper.wrap gave, got GPT2LMHeadModel"):
        trainer(GPT2.make(), tmp_path)
    plain = trainer(GPT2.make(), tmp_path, kind=transformers.Trainer, max_steps=1, save_strategy="steps", save_steps=1)
    plain.train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1/esper.safetensors: no such file.*before wrapping"):
        trainer(grown(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    script = Path(__file__).with_name("trainer_on_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(script), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert (
        one["joined"]
        and one["woken"] is True
        and one["awake"] == [1]
        and one["steps"] == 202
        and one["end"] != one["again"]
    )
    assert one["refused"].startswith("2 processes need reserved memory, esper.wrap(model, reserve_rank=8)")
    assert (tmp_path / "run" / "checkpoint-200" / CHECKPOINT_NAME).is_file()


def test_labels_of_a_causal_model_are_shifted_where_they_are_smoothed(tmp_path: Path) -> None:
    def losses(kind: Any, model: Any) -> list[float]:
        run = trainer(model, tmp_path, kind=kind, max_steps=2, label_smoothing_factor=0.1, logging_strategy="steps",
                      logging_steps=1)  # fmt: skip
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry] + [run.evaluate()["eval_loss"]]

    plain = losses(transformers.Trainer, GPT2.make())
    assert losses(SeededTrainer, esper.wrap(GPT2.make())) == plain


def test_a_best_model_that_is_gone_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Lose(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for path in tmp_path.glob(f"checkpoint-*/{CHECKPOINT_NAME}"):
                path.unlink()

    run = trainer(
        grown(), tmp_path, Lose(), max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    with caplog.at_level("WARNING"):
        assert run.train().global_step == 2
    assert f"has no {CHECKPOINT_NAME}: the model stays as training left it" in caplog.text


def test_a_run_that_trains_seeds_alone_is_resumed(tmp_path: Path) -> None:
    def frozen() -> Any:
        model = grown()
        model.wrapped_model.requires_grad_(False)
        return model

    whole = trainer(frozen(), tmp_path / "run", Grow(), save_strategy="steps", save_steps=3, max_steps=4)
    whole.train()
    again = trainer(frozen(), tmp_path / "again", Grow(), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    ours, theirs = again.model.graft_parameters(), whole.model.graft_parameters()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
