"""What each of two processes runs: a SeededTrainer under DDP, a seed that wakes on the way, going on from a checkpoint.

python -m torch.distributed.run --nproc-per-node 2 trainer_on_ranks.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import esper
from esper.huggingface import SeededTrainer


class Net(nn.Module):
    """Two Linears and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.out(torch.relu(self.fc(x)))
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


class Ask(transformers.TrainerCallback):
    """Asks for a kernel after the second step."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.outcome: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.outcome = model.request_kernel("fc", 1, self.kernel, alpha=0.5)


def digest(model: nn.Module) -> str:
    bits = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        bits.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    os.environ["ESPER_CACHE_DIR"] = str(folder / f"cache-{rank}")
    registry = str(folder / "registry")
    kernel = esper.compile("lowrank", d_in=4, d_out=6, rank=2, registry=registry)
    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(64)]

    if rank == 0:  # the other one must not come to a folder that is not there yet
        plainly = transformers.Trainer._save

        def late(*args: Any, **kwargs: Any) -> None:
            time.sleep(0.5)
            plainly(*args, **kwargs)

        transformers.Trainer._save = late

    def trainer(name: str, *callbacks: Any, reserve_rank: int = 2, steps: int, **options: Any) -> Any:
        torch.manual_seed(rank)  # DDP has all ranks begin with the first one's weights
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / name), max_steps=steps, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", ddp_backend="gloo", save_strategy="steps", save_steps=steps, logging_strategy="no",
            disable_tqdm=True, ddp_find_unused_parameters=False, **options,
        )  # fmt: skip
        model = esper.wrap(Net(), registry=registry, reserve_rank=reserve_rank)
        return SeededTrainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))

    ask = Ask(kernel)
    run = trainer("run", ask, steps=200)
    run.train()
    found = {"woken": ask.outcome.done() and ask.outcome.result(), "end": digest(run.model)}
    again = trainer("again", steps=202, torch_compile=True, torch_compile_backend="eager")
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-200"))
    found["joined"] = again.model.consensus is not None
    found |= {
        "steps": again.state.global_step,
        "again": digest(again.model),
        "awake": list(again.model.layer("fc").grafts.bound),
    }
    try:
        trainer("elastic", reserve_rank=0, steps=1)
    except ValueError as error:
        found["refused"] = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
