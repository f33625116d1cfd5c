"""What a worker remembers of jobs that it cannot run."""

from __future__ import annotations

from esper.services.tezzeret.elsewhere import Elsewhere
from esper.services.tezzeret.queue import Aside
from tests.services.tezzeret.processes import job

GPU = "needs a GPU"


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_pauses_grow_are_random_and_have_an_end():
    clock, wanted = Time(), job()
    elsewhere = Elsewhere(frozenset({"standard"}), clock)
    pauses = []
    for _ in range(14):
        pauses.append(elsewhere.leave(wanted, 1).pause_s)
        clock.now += pauses[-1]
    for number, pause in enumerate(pauses):
        longest = min(600.0, 2.0 * 2**number)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == len(pauses)


def test_what_is_counted_is_the_time_since_it_was_first_seen():
    clock, wanted, other = Time(), job(), job()
    elsewhere = Elsewhere(None, clock)
    first = elsewhere.leave(wanted, 1)
    assert (first.is_first, first.since_s) == (True, 0.0)
    clock.now += 500
    assert elsewhere.leave(other, 1).is_first
    again = elsewhere.leave(wanted, 1)
    assert (again.is_first, again.since_s) == (False, 500.0)
    # Somebody tried it, which is on the queue's count.
    clock.now += 500
    again = elsewhere.leave(wanted, 2)
    assert (again.is_first, again.since_s) == (False, 0.0)
    # It did not come back: somebody took it, and if it ever comes again the time begins anew.
    clock.now += 20_000
    assert elsewhere.leave(wanted, 1).is_first
    elsewhere.done(wanted, compiled=False)
    assert elsewhere.leave(wanted, 1).is_first


def test_what_this_machine_lacks_is_tried_again_after_a_while():
    clock, here = Time(), Elsewhere(None)
    elsewhere = Elsewhere(None, clock)
    tuned, other = job(pipeline="aggressive"), job(pipeline="aggressive", seed=1)
    assert here.reason(tuned) is elsewhere.reason(tuned) is None
    elsewhere.learn(tuned, GPU)
    assert elsewhere.reason(tuned) == elsewhere.reason(other) == GPU
    # Others need something else: no GPU, or another one.
    assert elsewhere.reason(job(pipeline="standard")) is None
    assert elsewhere.reason(job(pipeline="aggressive", architectures=["sm_90"])) is None
    clock.now += 3
    assert elsewhere.reason(tuned) is None
    elsewhere.learn(tuned, GPU)
    elsewhere.done(tuned, compiled=False)
    assert elsewhere.reason(other) == GPU
    elsewhere.done(tuned, compiled=True)
    assert elsewhere.reason(other) is None


def test_pipelines_that_it_does_not_run():
    elsewhere = Elsewhere(frozenset({"fast", "standard"}))
    assert elsewhere.reason(job()) is None
    assert elsewhere.reason(job(pipeline="aggressive")) == "this worker does not run pipeline 'aggressive'"
    # That one is wrong everywhere, which its log should say.
    assert elsewhere.reason(job(pipeline="quick")) is None


def test_what_is_aside_comes_back():
    aside = Aside()
    aside.put("now", 0.0)
    aside.put("soon", 1e-9)
    aside.put("later", 100.0)
    assert aside.names() == ["later"]
