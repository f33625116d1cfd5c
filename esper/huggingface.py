"""The ``Trainer`` of Hugging Face's ``transformers`` for models that grow.

It needs the packages ``transformers`` and ``accelerate``, and is imported by its name: ``import esper.huggingface``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

try:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils.generic import can_return_loss, find_labels
    from transformers.utils.logging import get_logger
except ImportError as error:
    raise ImportError(f"esper.huggingface needs two packages: pip install transformers accelerate ({error})") from error

from esper.core.checkpoint import restore, save
from esper.core.morphable import MorphableModel
from esper.core.naming import GRAFT_PREFIX
from esper.distributed import attach as join_ranks
from esper.optim import attach

__all__ = ["CHECKPOINT_NAME", "SeededTrainer", "StepSeeds"]

#: What a checkpoint's folder has beside the host's own files: the whole grown model, as ``esper.save`` writes it.
CHECKPOINT_NAME = "esper.safetensors"
_LOGGER = get_logger(__name__)


class StepSeeds(transformers.TrainerCallback):
    """Calls the wrapped model's ``step()`` after every training step, and lets ranks agree on what its seeds do.

    :class:`SeededTrainer` brings it.
    """

    def __init__(self, trainer: transformers.Trainer) -> None:
        self._trainer = weakref.ref(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer when model and optimizer are as they will be."""
        trainer = self._trainer()
        wrapped = trainer.model_wrapped if trainer is not None else None
        wrapped = getattr(wrapped, "_orig_mod", wrapped)  # what is compiled is compiled around the DDP
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            join_ranks(wrapped)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        model.step()


class SeededTrainer(transformers.Trainer):
    """A ``transformers.Trainer`` whose model is one that ``esper.wrap`` gave.

    It does what its base does, and besides:

    - steps the seeds, and has their parameters join and leave its optimizer as they come and go;
    - decays the weights that it would decay of the host;
    - takes names of columns and labels, and what the loss needs, from the signature of the host's ``forward``;
    - writes checkpoints that both sides read: the host as ``save_pretrained`` writes it, so that ``from_pretrained``
      takes the folder, and the grown model beside it as ``esper.safetensors``, which ``esper.load`` takes;
    - resumes from them (``resume_from_checkpoint``, ``load_best_model_at_end``) with the seeds that were awake then.

    With a Trainer of another library put it first: ``class Mine(SeededTrainer, SFTTrainer)``.

    Args:
        *args: As for ``transformers.Trainer``.
        seed_options: Options of the seeds' parameter groups, as for ``esper.optim.attach``: ``{"lr": 1e-3}``.
        **kwargs: As for ``transformers.Trainer``.

    Raises:
        TypeError: the model is not one that ``esper.wrap`` gave.
        ValueError: several processes train a model without reserved memory: DDP reduces no gradient of a parameter that
            comes later.
        NotImplementedError: FSDP or DeepSpeed is asked for; one process, and DDP, are what it trains with.
    """

    def __init__(self, *args: Any, seed_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.seed_options = dict(seed_options or {})
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, MorphableModel):
            raise TypeError(f"SeededTrainer needs a model that esper.wrap gave, got {type(self.model).__name__}")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            way = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise NotImplementedError(
                f"SeededTrainer does not train with {way}; use one process or DDP, or torch's own FSDP2 without a "
                "Trainer (docs/reserved.md)"
            )
        if self.args.world_size > 1 and not self.model.reserve_rank:
            raise ValueError(
                f"{self.args.world_size} processes need reserved memory, esper.wrap(model, reserve_rank=8): DDP does "
                "not reduce gradients of parameters that come later (docs/reserved.md)"
            )
        self._read_signature(self.model.wrapped_model)
        self.add_callback(StepSeeds(self))

    @property
    def _grown(self) -> MorphableModel:
        return cast(MorphableModel, self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """As the base; seeds join it, those that are awake too, each as a group of its own."""
        if not (args or kwargs or self._grown.reserve_rank):
            args = (self._grown.wrapped_model,)
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        attach(optimizer, self._grown, **self.seed_options)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the base, asked for host and seeds apart: down the tree of modules their names begin otherwise."""
        if not isinstance(model, MorphableModel):
            return list(super().get_decay_parameter_names(model))
        seeds = (f"{GRAFT_PREFIX}.{name}" for name in super().get_decay_parameter_names(model.esper))
        return [*super().get_decay_parameter_names(model.wrapped_model), *seeds]

    def _read_signature(self, host: nn.Module) -> None:
        """What the base has read off the wrapped model's ``forward``, which takes anything, read off the host's."""
        adapted: Any = host  # by PEFT
        base: nn.Module = adapted.get_base_model() if hasattr(host, "get_base_model") else host
        if self.args.label_names is None:
            self.label_names = find_labels(type(base))
        self.can_return_loss = can_return_loss(type(base))
        if not hasattr(base, "accepts_loss_kwargs"):
            parameters = inspect.signature(base.forward).parameters.values()
            self.model_accepts_loss_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if self.label_smoother is not None and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            # The base goes by the wrapped model's name, and would not shift a causal model's labels.
            shifting: Any = functools.partial(_shifted, self.label_smoother)
            self.label_smoother = shifting

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        with self._host_in_place():  # whose class decides how DDP is set up
            found: dict[str, Any] = super()._build_accelerator_args(**kwargs)
            return found

    @contextlib.contextmanager
    def _host_in_place(self) -> Iterator[None]:
        """While the base looks at its model's class, it sees the host."""
        grown: Any = self.model
        self.model = getattr(grown, "wrapped_model", grown)  # what is not wrapped is refused at the end of __init__
        try:
            yield
        finally:
            self.model = grown

    def _set_signature_columns_if_needed(self) -> None:
        with self._host_in_place():
            super()._set_signature_columns_if_needed()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self._host_in_place():
            super()._save(output_dir, state_dict)
        if self.args.should_save:  # every rank comes here
            folder = self.args.output_dir if output_dir is None else output_dir
            save(self._grown, Path(str(folder)) / CHECKPOINT_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        if (Path(folder) / CHECKPOINT_NAME).is_file():
            self._restore(folder)
        else:  # as the base: training is done, and an error would lose what it gave
            _LOGGER.warning("%s has no %s: the model stays as training left it", folder, CHECKPOINT_NAME)

    def _restore(self, folder: str) -> None:
        path = Path(folder) / CHECKPOINT_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file. A SeededTrainer resumes from what one has saved; load a plain network's "
                "weights before wrapping it (from_pretrained)"
            )
        restore(self._grown, path)


def _shifted(smoother: Callable[..., Any], outputs: Any, labels: Any, shift_labels: bool = False, **kwargs: Any) -> Any:
    return smoother(outputs, labels, shift_labels=True, **kwargs)
