"""Watching a job from outside: the picture of what it tells, and where that picture is shown.

One state model (:mod:`esper.watch.state`) is told facts by a bus or a recorded file, and is drawn on a terminal, served
to Prometheus, or written for TensorBoard. Nothing here imports PyTorch before a TensorBoard file is wanted.
"""
