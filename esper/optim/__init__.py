"""Optimizers that follow a growing network.

:func:`attach` binds a ``torch.optim`` optimizer to a wrapped model. From then on every seed that wakes joins the
optimizer as one parameter group of its own, and every seed that is culled leaves it together with its state. What the
optimizer had learnt about all other parameters (momenta, second moments, step counts) is not touched, and learning-rate
schedulers that were built for fewer groups are brought along.
"""

from esper.optim.attachment import Attachment, GrowingModel, attach
from esper.optim.groups import SEED_KEY

__all__ = ["SEED_KEY", "Attachment", "GrowingModel", "attach"]
