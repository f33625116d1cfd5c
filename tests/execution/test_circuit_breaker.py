"""The circuit breaker, on a clock of the test's own."""

from __future__ import annotations

from esper.execution.circuit_breaker import CircuitBreaker


def test_life_of_a_breaker():
    now = [100.0]
    breaker = CircuitBreaker(2, 10.0, lambda: now[0])
    assert breaker.allow() and not breaker.open and breaker.wait_s == 0
    breaker.failure()
    assert breaker.allow() and not breaker.open
    breaker.failure()
    assert breaker.open and not breaker.allow() and breaker.wait_s == 10
    now[0] += 9
    assert not breaker.allow() and breaker.wait_s == 1
    now[0] += 1
    assert breaker.allow(), "the first trial"
    assert not breaker.allow(), "one at a time"
    breaker.failure()
    assert breaker.wait_s == 10
    now[0] += 10
    assert breaker.allow()
    breaker.success()
    assert not breaker.open and breaker.allow() and breaker.wait_s == 0


def test_a_success_between_failures_keeps_it_closed():
    breaker = CircuitBreaker(2, 10.0)
    for _ in range(5):
        breaker.failure()
        breaker.success()
    assert not breaker.open
