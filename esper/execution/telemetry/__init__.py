"""What a training process publishes of itself, and the commands that come back (docs/telemetry.md).

On the training thread: :mod:`publisher` decides when a window is due, :mod:`capture` takes it. On the one other thread,
:mod:`sender`: :mod:`packing` makes messages of it, and what the bus does not take goes to the :mod:`spool`.
"""
